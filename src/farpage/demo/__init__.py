"""The demonstration: a guest checks its memory while it is paged and the I/O servers under it fail."""
