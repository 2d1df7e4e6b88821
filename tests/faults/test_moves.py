"""Each part of a move by an intermediate client is killed, at one of the instants of `tests.faults.moves`."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.faults.moves.kills import LIMIT_BYTES, PAGES, Role, kill_in_move, usual_seconds
from tests.support.moving_client import MovingClient, moving_client

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client() -> AsyncIterator[MovingClient]:
    async with moving_client(PAGES, LIMIT_BYTES) as moving:
        await moving.paged.write_all()
        yield moving


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def usual(client: MovingClient) -> float:
    return await usual_seconds(client)


@pytest.mark.parametrize(
    ("role", "seed"),
    [
        (Role.INTERMEDIARY, 9),
        (Role.SOURCE, 5),
        (Role.TARGET, 13),
        (Role.WORKER, 3),
        (Role.HYPERVISOR, 19),
        (Role.HOST, 11),
        (Role.COMMAND, 16),
    ],
)
async def test_whatever_is_killed_the_move_comes_to_its_end_and_no_page_is_wrong(
    client: MovingClient, usual: float, role: Role, seed: int
) -> None:
    killed = await kill_in_move(client, role, seed, usual)
    assert killed.wrong_pages == 0
