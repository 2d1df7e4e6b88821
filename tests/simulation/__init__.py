"""Deterministic simulation of the code that ships, on a simulated event loop, clock, network and disks."""
