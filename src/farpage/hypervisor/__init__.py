"""The daemon on the VMs' host: owns the memory pool, pages in and out, picks paths."""
