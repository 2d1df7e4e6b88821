"""A client's volume over its paths."""
