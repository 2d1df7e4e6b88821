"""farpage pages the memory of virtual machines out to storage through redundant I/O servers."""

__version__ = "0.1.0"
