from __future__ import annotations

import pytest

from farpage.errors import InvalidInput
from farpage.hypervisor.pool import MemoryPool, PoolTooSmall

MIB = 1 << 20


def test_a_limit_is_what_is_asked_for_else_the_default_else_the_memory() -> None:
    assert MemoryPool(1024 * MIB, 64 * MIB).limit_for(256 * MIB, 32 * MIB) == 32 * MIB
    assert MemoryPool(1024 * MIB, 64 * MIB).limit_for(256 * MIB, None) == 64 * MIB
    assert MemoryPool(1024 * MIB, None).limit_for(256 * MIB, None) == 256 * MIB


def test_a_limit_is_never_more_than_the_memory() -> None:
    assert MemoryPool(1024 * MIB, None).limit_for(16 * MIB, 64 * MIB) == 16 * MIB


def test_a_limit_too_small_to_run_in_is_refused() -> None:
    with pytest.raises(InvalidInput, match="too small"):
        MemoryPool(1024 * MIB, None).limit_for(256 * MIB, 4096)


def test_limits_beyond_the_pool_are_refused_and_a_clients_own_old_limit_does_not_count() -> None:
    pool = MemoryPool(100 * MIB, None)
    pool.limits = {"vm1": 60 * MIB}
    pool.give("vm1", 100 * MIB)
    with pytest.raises(PoolTooSmall):
        pool.give("vm2", 50 * MIB)


def test_a_pool_cannot_shrink_below_what_it_has_given() -> None:
    pool = MemoryPool(100 * MIB, None)
    pool.limits = {"vm1": 60 * MIB}
    with pytest.raises(PoolTooSmall):
        pool.resize(50 * MIB)
    assert pool.size_bytes == 100 * MIB
