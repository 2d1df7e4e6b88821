"""Paging of clients' memory: page table, faults, eviction, read-ahead, and the data worker."""
