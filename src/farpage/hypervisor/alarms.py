"""Alarms: what an operator should look at, kept in order and counted by kind."""

from __future__ import annotations

from collections import Counter, deque
from datetime import UTC, datetime

from farpage.hypervisor.model import Alarm

KEPT_ALARMS = 1000


class AlarmLog:
    """The latest alarms, oldest first."""

    def __init__(self) -> None:
        self._alarms: deque[Alarm] = deque(maxlen=KEPT_ALARMS)
        self.counts: Counter[str] = Counter()

    def raise_alarm(self, client: str, kind: str, message: str) -> None:
        """Keep one alarm; it is logged where it was noticed."""
        self.counts[kind] += 1
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._alarms.append(Alarm(at=now, client=client, kind=kind, message=message))

    def all(self) -> tuple[Alarm, ...]:
        """Return the alarms kept."""
        return tuple(self._alarms)
