"""Each part of a move by an intermediate client is killed at random instants, while the client works.

FARPAGE_MOVE_KILLS says how often each is killed (1 by default), FARPAGE_MOVE_SEED with which random numbers.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from farpage.hypervisor.movement import MoveStage
from tests.support.moving_client import MovingClient, moving_client

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGES = 1024
LIMIT = 256 * 4096
BANDWIDTH = 4 << 20
LATEST_SECONDS = 1.0
"""By then a move has copied everything."""

KILLS = int(os.environ.get("FARPAGE_MOVE_KILLS", "1"))
SEED = int(os.environ.get("FARPAGE_MOVE_SEED", "1"))
ROLES = ("intermediary", "source", "target", "worker", "hypervisor", "hypervisor and worker")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client() -> AsyncIterator[MovingClient]:
    async with moving_client(PAGES, LIMIT) as moving:
        await moving.paged.write_all()
        yield moving


async def kill(client: MovingClient, role: str) -> None:
    """Kill one part, and start it again if nothing else does."""
    embedded = client.paged.embedded
    if role == "intermediary":
        if (pid := client.intermediary_pid()) is not None:
            os.kill(pid, signal.SIGKILL)
    elif role in ("source", "target"):
        vios = client.vios_of(client.places[0 if role == "source" else 1])
        client.paged.signal(vios, signal.SIGKILL)
        await client.paged.restart(vios)
    else:
        workers = [worker.pid for worker in (await embedded.hypervisor.info()).workers if worker.clients]
        if "worker" in role:
            os.kill(workers[0], signal.SIGKILL)
        if "hypervisor" in role:
            await client.restart_hypervisor()


@pytest.mark.parametrize("number", range(KILLS))
@pytest.mark.parametrize("role", ROLES)
async def test_whatever_is_killed_the_move_comes_to_its_end_and_no_page_is_wrong(
    client: MovingClient, role: str, number: int
) -> None:
    chance = random.Random(f"{SEED} {role} {number}")
    _, target = client.places
    await client.move(bandwidth_bytes=BANDWIDTH)

    async def fault() -> None:
        await asyncio.sleep(chance.random() * LATEST_SECONDS)
        await kill(client, role)

    killing = asyncio.create_task(fault())
    while not killing.done():
        first = chance.randrange(PAGES - 64)
        assert await client.paged.client.do(f"write {first} 64") == "done"
        assert await client.paged.client.do(f"verify {chance.randrange(PAGES - 64)} 64") == "wrong 0"
        await asyncio.sleep(0.01)
    await killing
    assert (await client.ended()).stage is MoveStage.DONE
    await client.whole_on(target)
