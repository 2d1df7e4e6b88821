"""The virtual I/O server: exports, fencing, grants, API."""
