"""Ways to get at a client's memory: a running process, or a region that a process maps for itself."""
