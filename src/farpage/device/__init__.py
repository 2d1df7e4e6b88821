"""Paging devices: storage that holds logical volumes."""
