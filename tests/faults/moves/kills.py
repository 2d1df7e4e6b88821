"""A move by an intermediate client, and one part of it that is killed at an instant that a seed decides.

Instants are spread over a whole move: seed n of `INSTANTS` falls into the n-th part of the time that one
takes which nobody disturbs. Meanwhile the client writes and verifies its pages, timing each command.
"""

from __future__ import annotations

import asyncio
import enum
import os
import random
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from farpage.hypervisor.movement import MoveStage
from tests.support.moving_client import MovingClient
from tests.support.paged_set import DEADLINE_SECONDS

PAGES = 1024
LIMIT_BYTES = 256 * 4096
BANDWIDTH_BYTES = 4 << 20
"""At which the client's volume takes a second to be copied."""
RUN_PAGES = 64
INSTANTS = 20
LOOK_SECONDS = 0.02
NOT_BEGUN = "not begun"


class Role(enum.StrEnum):
    """What is killed."""

    INTERMEDIARY = "intermediary"
    SOURCE = "source"
    """The VIOS that reaches the device which the volume comes from."""
    TARGET = "target"
    """The VIOS that reaches the device which it goes to."""
    WORKER = "worker"
    """The data worker of the client."""
    HYPERVISOR = "hypervisor"
    """The control process."""
    HOST = "host"
    """The control process and the data worker."""
    COMMAND = "command"
    """`farpage client move`, which waits for the end."""


@dataclass(frozen=True)
class Killed:
    """What one kill came to."""

    role: Role
    seed: int
    after_seconds: float
    stage: str
    """How far the move was."""
    wrong_pages: int
    longest_seconds: float
    """The longest time that a command of the client took, of `RUN_PAGES` pages each."""


async def usual_seconds(client: MovingClient) -> float:
    """Return how long a move takes that nobody disturbs."""
    now = asyncio.get_running_loop().time
    began, target = now(), client.places[1]
    await client.move(bandwidth_bytes=BANDWIDTH_BYTES)
    await _settled(client)
    seconds = now() - began
    await client.whole_on(target)
    return seconds


async def kill_in_move(client: MovingClient, role: Role, seed: int, usual: float) -> Killed:
    """Move the client, and kill one part at its instant of the `usual` seconds.

    :raise AssertionError: the move does not come to its end, or the volume is not whole at the target alone.
    """
    chance = random.Random(f"{role} {seed}")
    after_seconds = usual * ((seed - 1) % INSTANTS + chance.random()) / INSTANTS
    target = client.places[1]
    begin = _by_command if role is Role.COMMAND else _by_request
    kill = await begin(client, role)
    stages: list[str] = []

    async def fault() -> None:
        await asyncio.sleep(after_seconds)
        stages.append(await _stage(client, target))
        await kill()

    killing = asyncio.create_task(fault())
    wrong_pages, longest = 0, 0.0
    while not killing.done():
        for word in ("write", "verify"):
            began = asyncio.get_running_loop().time()
            answer = await client.paged.client.do(f"{word} {chance.randrange(PAGES - RUN_PAGES)} {RUN_PAGES}")
            longest = max(longest, asyncio.get_running_loop().time() - began)
            if answer != "done":
                wrong_pages += int(answer.removeprefix("wrong "))
        await asyncio.sleep(0.01)
    await killing
    place = await _settled(client)
    assert place == target
    await client.whole_on(place)
    return Killed(role, seed, after_seconds, stages[0], wrong_pages, longest)


async def _by_request(client: MovingClient, role: Role) -> Callable[[], Awaitable[None]]:
    """Begin a move; returns what kills the part."""
    await client.move(bandwidth_bytes=BANDWIDTH_BYTES)

    async def kill() -> None:
        await _kill(client, role)

    return kill


async def _by_command(client: MovingClient, _role: Role) -> Callable[[], Awaitable[None]]:
    """Begin a move by the command; returns what kills it."""
    state, target = client.paged.embedded.layout.root, client.places[1]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "farpage", "client", "move", "client", "--to", target, "--indirect"),
        *("--bandwidth", str(BANDWIDTH_BYTES), "--state", str(state)),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    async with asyncio.timeout(DEADLINE_SECONDS):
        while await _stage(client, target) == NOT_BEGUN:
            await asyncio.sleep(LOOK_SECONDS)

    async def kill() -> None:
        if process.returncode is None:
            process.kill()
        await process.wait()

    return kill


async def _kill(client: MovingClient, role: Role) -> None:
    """Kill one part, and start it again if nothing else does."""
    embedded = client.paged.embedded
    if role is Role.INTERMEDIARY:
        if (pid := client.intermediary_pid()) is not None:
            os.kill(pid, signal.SIGKILL)
    elif role in (Role.SOURCE, Role.TARGET):
        vios = client.vios_of(client.places[0 if role is Role.SOURCE else 1])
        client.paged.signal(vios, signal.SIGKILL)
        await client.paged.restart(vios)
    else:
        workers = [worker.pid for worker in (await embedded.hypervisor.info()).workers if worker.clients]
        if role is not Role.HYPERVISOR:
            os.kill(workers[0], signal.SIGKILL)
        if role is not Role.WORKER:
            await client.restart_hypervisor()


async def _stage(client: MovingClient, target: str) -> str:
    """Return how far a move is, as the definition has it."""
    definition = await client.definition()
    if move := definition.moves.get("client"):
        return str(move.state)
    (replica,) = definition.clients["client"].volumes[0].replicas
    there = definition.devices[replica.device].name == target
    return str(MoveStage.DONE) if there else NOT_BEGUN


async def _settled(client: MovingClient) -> str:
    """Wait until the client is not being moved; returns the name of its device."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            definition = await client.definition()
            replicas = definition.clients["client"].volumes[0].replicas
            if not definition.moves and len(replicas) == 1:
                return definition.devices[replicas[0].device].name
            await asyncio.sleep(LOOK_SECONDS)
