from __future__ import annotations

from farpage.hypervisor.fullness import lifted_limits

MIB = 1 << 20


def test_a_client_whose_device_is_full_gets_what_the_pool_has_left() -> None:
    limits = {"full": 10 * MIB, "other": 20 * MIB}
    resident = {"full": 10 * MIB, "other": 5 * MIB}
    assert lifted_limits(40 * MIB, limits, resident, frozenset({"full"})) == {"full": 35 * MIB}


def test_two_share_it() -> None:
    limits = dict.fromkeys(("a", "b"), 10 * MIB)
    lifted = lifted_limits(40 * MIB, limits, limits, frozenset(limits))
    assert lifted == {"a": 20 * MIB, "b": 20 * MIB}


def test_a_full_pool_leaves_the_limit_as_it_is() -> None:
    limits = {"full": 10 * MIB}
    for resident in (9 * MIB, 12 * MIB):
        assert lifted_limits(8 * MIB, limits, {"full": resident}, frozenset({"full"})) == limits | {
            "full": max(10 * MIB, resident)
        }


def test_a_client_that_has_gone_meanwhile_gets_nothing() -> None:
    assert lifted_limits(8 * MIB, {}, {}, frozenset({"gone"})) == {}
