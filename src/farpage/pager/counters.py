"""What happened to a client's memory, counted. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

LATENCY_BUCKETS: Final = 26
"""Bucket i counts waits below 2**i microseconds that no smaller bucket counts; the last takes the rest."""
STALL_SECONDS: Final = 0.1
"""A wait that operators want to hear of."""


@dataclass
class Counters:
    """Counts since the attachment, in pages where they end in `_pages`."""

    faults: int = 0
    page_in_pages: int = 0
    page_out_pages: int = 0
    zero_fill_pages: int = 0
    zero_evict_pages: int = 0
    clean_evict_pages: int = 0
    cancelled_pages: int = 0
    read_ahead_pages: int = 0
    read_ahead_wasted_pages: int = 0
    tier_hit_pages: int = 0
    """Pages that came from the RAM tier, without a device."""
    checksum_errors: int = 0
    repaired_pages: int = 0
    scrubbed_pages: int = 0
    poisoned_pages: int = 0
    stalls_over_100ms: int = 0
    longest_stall_ms: float = 0.0
    wait_seconds: float = 0.0
    wait_buckets: list[int] = field(default_factory=lambda: [0] * LATENCY_BUCKETS)
    wrong_by_device: dict[str, int] = field(default_factory=dict)
    """Pages whose replica on a device was not what was paged out, by the device's name."""
    repaired_by_device: dict[str, int] = field(default_factory=dict)
    """Those of them that were put right."""

    def found_wrong(self, device: str, pages: int, repaired: int) -> None:
        """Count pages of one replica with other content than was paged out, and those put right."""
        self.wrong_by_device[device] = self.wrong_by_device.get(device, 0) + pages
        if repaired:
            self.repaired_by_device[device] = self.repaired_by_device.get(device, 0) + repaired
        self.repaired_pages += repaired

    def stalled(self, seconds: float) -> None:
        """Count a wait that was as long as this, if it was a long one."""
        if seconds >= STALL_SECONDS:
            self.stalls_over_100ms += 1

    def waits(self, buckets: list[int], seconds: float, longest_seconds: float) -> None:
        """Count accesses that waited, in the buckets of `wait_buckets`; `seconds` for all together."""
        self.wait_seconds += seconds
        for index, count in enumerate(buckets):
            if count:
                self.wait_buckets[index] += count
        self.longest_stall_ms = max(self.longest_stall_ms, longest_seconds * 1e3)

    def waited(self, seconds: float) -> None:
        """Count one access that waited for its page."""
        self.wait_seconds += seconds
        self.wait_buckets[min(int(seconds * 1e6).bit_length(), LATENCY_BUCKETS - 1)] += 1
        self.stalled(seconds)
        self.longest_stall_ms = max(self.longest_stall_ms, seconds * 1e3)
