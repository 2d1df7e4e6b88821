from __future__ import annotations

import errno

from farpage.vios.leases import Lease, LeaseExport, Leases, parse_lease_name

ID = "00000000000000ee"


class Clock:
    def __init__(self) -> None:
        self.now_seconds = 100.0

    def __call__(self) -> float:
        return self.now_seconds


def nonce_of(lease: Lease) -> bytes:
    return lease.offer()[:8]


def test_a_lease_begins_with_its_first_renewal_and_ends_by_itself() -> None:
    clock = Clock()
    lease = Lease(5.0, clock)
    assert lease.over()
    assert lease.renew(nonce_of(lease))
    clock.now_seconds += 4.9
    assert not lease.over()
    clock.now_seconds += 0.1
    assert lease.over()


def test_a_renewal_counts_from_when_its_nonce_was_given() -> None:
    clock = Clock()
    lease = Lease(5.0, clock)
    lease.renew(nonce_of(lease))
    nonce = nonce_of(lease)
    clock.now_seconds += 4.0
    assert lease.renew(nonce)
    clock.now_seconds += 1.0
    assert lease.over()


def test_a_lease_that_has_run_out_is_never_renewed() -> None:
    clock = Clock()
    lease = Lease(5.0, clock)
    lease.renew(nonce_of(lease))
    clock.now_seconds += 6.0
    assert not lease.renew(nonce_of(lease))
    assert lease.over()


def test_only_the_latest_nonce_counts_and_only_once() -> None:
    lease = Lease(5.0, Clock())
    assert not lease.renew(bytes(8))
    first, second = nonce_of(lease), nonce_of(lease)
    assert not lease.renew(first)
    assert lease.renew(second)
    assert not lease.renew(second)
    assert not lease.renew(b"")


def test_the_export_gives_offers_and_takes_nonces() -> None:
    leases = Leases(5.0, Clock())
    export = leases.begin(ID)
    assert isinstance(export, LeaseExport)
    assert (leases.find(ID), leases.alive) == (None, 0)
    offer = bytearray(export.size_bytes)
    assert export.read_now(0, memoryview(offer))
    assert int.from_bytes(offer[8:], "little") == 5_000_000_000
    answers: list[int] = []
    export.write(0, memoryview(offer)[:8], answers.append)
    export.write(0, memoryview(offer)[:8], answers.append)
    assert answers == [0, errno.ESHUTDOWN]
    assert (leases.find(ID) is not None, leases.alive) == (True, 1)


def test_a_lease_has_one_keeper_and_can_be_named_until_that_is_gone() -> None:
    leases = Leases(5.0, Clock())
    export = leases.begin(ID)
    assert export is not None
    assert leases.begin(ID) is None
    lease = leases._leases[ID]
    lease.renew(nonce_of(lease))
    leases.end(ID)
    assert leases.find(ID) is None
    assert not lease.over(), "what is open under it may go on until it runs out"


def test_names_of_leases_are_no_names_of_volumes() -> None:
    assert parse_lease_name(f"lease:{ID}") == ID
    assert [parse_lease_name(text) for text in ("lease:", "lease:xy", "vm1@1", f"lease:{ID}0")] == [None] * 4
