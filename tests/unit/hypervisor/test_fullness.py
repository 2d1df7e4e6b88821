from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from farpage.definition.model import PAGE_BYTES
from farpage.hypervisor.clients import Clients
from farpage.hypervisor.fullness import FullDevices, lifted_limits
from farpage.hypervisor.pool import MemoryPool
from farpage.pager.messages import SetLimit, TierReport
from farpage.pager.states import STATE_NAMES
from tests.support.simulated_loop import run_simulated

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


class OneClient:
    """A client with a limit of 10 MiB of 100, and what its worker is told."""

    def __init__(self) -> None:
        self.full = False
        self.limits: list[int] = []
        channel = SimpleNamespace(call=self._call)
        attached = SimpleNamespace(
            limit_bytes=10 * MIB,
            memory=SimpleNamespace(length_bytes=100 * MIB),
            worker=SimpleNamespace(channel=channel),
        )
        self.attached = {"vm": attached}

    async def _call(self, method: str, order: SetLimit, answer: object, **options: object) -> None:
        assert method == "set_limit"
        self.limits.append(order.limit_pages * PAGE_BYTES)

    async def report(self, client: str) -> Any:
        pages = {**dict.fromkeys(STATE_NAMES, 0), "dirty": 10 * MIB // PAGE_BYTES}
        return SimpleNamespace(page_outs_wait=self.full, pages_by_state=pages, tier=TierReport())


def test_a_limit_is_lifted_while_the_device_is_full_and_given_back_then() -> None:
    async def main() -> None:
        client = OneClient()
        devices = FullDevices(cast(Clients, client), MemoryPool(30 * MIB, None))
        devices.check()
        await asyncio.sleep(5)
        assert client.limits == []
        client.full = True
        devices.check()
        await asyncio.sleep(0.1)
        assert client.limits == [30 * MIB]
        client.full = False
        await asyncio.sleep(5)
        assert client.limits[-1] == 10 * MIB
        told = len(client.limits)
        await asyncio.sleep(60)
        assert len(client.limits) == told

    run_simulated(main)


def test_a_limit_that_an_earlier_control_process_lifted_is_given_back() -> None:
    async def main() -> None:
        client = OneClient()
        devices = FullDevices(cast(Clients, client), MemoryPool(30 * MIB, None))
        devices.resume()
        await asyncio.sleep(5)
        assert client.limits == [10 * MIB]

    run_simulated(main)
