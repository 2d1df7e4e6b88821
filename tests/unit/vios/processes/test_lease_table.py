"""The ends of leases as another process sees them in the memory that both have mapped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from farpage.vios.leases import Lease
from farpage.vios.processes.leasetable import PLACES, LeaseTable, SharedLeases

LEASE_SECONDS = 5.0


@dataclass
class Clock:
    now_seconds: float = 100.0

    def __call__(self) -> float:
        return self.now_seconds

    def nanoseconds(self) -> int:
        return int(self.now_seconds * 1e9)


@dataclass
class Both:
    """A front's leases, and how a data process sees them."""

    clock: Clock
    front: LeaseTable
    process: SharedLeases

    def begin(self, number: int, *, renew: bool = True) -> str:
        identifier = f"{number:016x}"
        assert self.front.begin(identifier) is not None
        if renew:
            self.renew(identifier)
        return identifier

    def renew(self, identifier: str) -> bool:
        lease = self.front._leases[identifier]
        assert isinstance(lease, Lease)
        return lease.renew(lease.offer()[:8])


@pytest.fixture
def both() -> Iterator[Both]:
    clock = Clock()
    front = LeaseTable(LEASE_SECONDS, clock)
    yield Both(clock, front, SharedLeases(front.descriptor, LEASE_SECONDS, clock.nanoseconds))
    front.close()


def test_a_lease_is_seen_from_its_first_renewal_to_its_end(both: Both) -> None:
    identifier = both.begin(1, renew=False)
    assert both.process.find(identifier) is None
    both.renew(identifier)
    lease = both.process.find(identifier)
    assert lease is not None
    both.clock.now_seconds += LEASE_SECONDS - 0.1
    assert not lease.over()
    assert both.renew(identifier)
    both.clock.now_seconds += LEASE_SECONDS - 0.1
    assert not lease.over()
    both.clock.now_seconds += 0.2
    assert lease.over()
    assert both.process.find(identifier) is None


def test_a_lease_whose_connection_has_ended_lasts_to_its_end_and_is_found_no_more(both: Both) -> None:
    identifier = both.begin(1)
    lease = both.process.find(identifier)
    assert lease is not None
    both.front.end(identifier)
    assert not lease.over()
    assert both.process.find(identifier) is None
    both.begin(2)  # gets another place: the first one's lease is not over
    assert not lease.over()


def test_a_lease_is_over_for_good_when_another_one_has_its_place(both: Both) -> None:
    identifier = both.begin(1)
    lease = both.process.find(identifier)
    assert lease is not None
    both.front.end(identifier)
    both.clock.now_seconds += LEASE_SECONDS
    assert both.begin(1) == identifier
    assert lease.over()
    again = both.process.find(identifier)
    assert again is not None
    assert not again.over()


def test_one_that_was_never_asked_for_is_not_there(both: Both) -> None:
    both.begin(1)
    assert both.process.find("0" * 16) is None
    assert both.process.find("f" * 16) is None


def test_there_are_no_more_than_there_are_places(both: Both) -> None:
    for number in range(1, PLACES + 1):
        both.begin(number, renew=False)
    assert both.front.begin("f" * 16) is None
    both.front.end(f"{1:016x}")
    assert both.front.begin("f" * 16) is not None


def test_a_data_process_cannot_write_to_the_table(both: Both) -> None:
    with pytest.raises(TypeError):
        both.process._words[0] = 1
