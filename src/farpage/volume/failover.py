"""What a loss of the active path did, kept for operators. No I/O."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

KEPT_FAILOVERS = 64


@dataclass
class Failover:
    """One loss of the active path; times are loop seconds (CLOCK_MONOTONIC)."""

    from_vios: str
    reason: str
    detected_at_seconds: float
    to_vios: str | None = None
    active_at_seconds: float | None = None
    replayed_commands: int = 0
    quarantined_bytes: int = 0
    longest_stall_seconds: float = 0.0
    device: str = ""
    """Name of the device whose replica the path leads to."""


class FailoverLog:
    """The latest failovers, oldest first."""

    def __init__(self) -> None:
        self.records: deque[Failover] = deque(maxlen=KEPT_FAILOVERS)

    def taken_over(self, device: str, vios: str, now_seconds: float) -> None:
        """Note that another path, or replica, carries the commands of those that a device's path had."""
        for record in self.records:
            if record.active_at_seconds is None and record.device == device:
                record.to_vios = vios
                record.active_at_seconds = now_seconds

    def note_stall(self, began_seconds: float, ended_seconds: float) -> None:
        """Charge a wait of the client to the failovers that it overlaps."""
        for record in self.records:
            over = record.active_at_seconds
            if ended_seconds >= record.detected_at_seconds and (over is None or began_seconds <= over):
                record.longest_stall_seconds = max(
                    record.longest_stall_seconds, ended_seconds - began_seconds
                )
