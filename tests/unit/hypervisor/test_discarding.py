"""Clients made for an attachment: deleted after it, and never from under the next one of the name."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from farpage.hypervisor.clients import Clients
from farpage.hypervisor.detaching import Detaching
from farpage.hypervisor.pool import MemoryPool
from farpage.hypervisor.records import ClientRecords


@pytest.fixture
def ended_process() -> Iterator[int]:
    """The pidfd of a process that has ended."""
    process = subprocess.Popen(["true"])
    pidfd = os.pidfd_open(process.pid)
    process.wait()
    yield pidfd
    os.close(pidfd)


class Records:
    """A definition that takes until `answers` to change."""

    def __init__(self) -> None:
        self.names = {"vm"}
        self.leftovers: frozenset[str] = frozenset()
        self.answers = asyncio.Event()

    def __contains__(self, client: str) -> bool:
        return client in self.names

    async def discard(self, client: str) -> None:
        await self.answers.wait()
        self.names.remove(client)

    async def clear(self, client: str) -> None:
        await self.discard(client)


@pytest.fixture
def records() -> Records:
    return Records()


@pytest.fixture
def clients(records: Records) -> Clients:
    made = Clients(cast(ClientRecords, records), MemoryPool(1 << 30, None))
    made.run = cast(Any, SimpleNamespace(remove=lambda client: None))
    return made


def attach(clients: Clients, pidfd: int) -> None:
    memory = SimpleNamespace(pidfd=pidfd, close_descriptors=lambda: None)
    clients.attached["vm"] = cast(
        Any,
        SimpleNamespace(
            memory=memory,
            record=SimpleNamespace(releasing=False),
            worker=SimpleNamespace(clients={"vm"}),
            state=SimpleNamespace(close=lambda: None),
            paged=asyncio.Event(),
            attaching=False,
            ephemeral=True,
        ),
    )


async def begun(task: asyncio.Task[None]) -> None:
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()


async def test_who_attaches_after_a_process_has_ended_waits_until_its_client_is_deleted(
    clients: Clients, records: Records, ended_process: int
) -> None:
    attach(clients, ended_process)
    gone = asyncio.create_task(Detaching(clients).process_gone("vm"))
    await begun(gone)
    assert "vm" not in clients.attached

    async def attach_next() -> None:
        async with clients.only("vm", "attach"):
            assert "vm" not in clients.records

    following = asyncio.create_task(attach_next())
    await begun(following)
    records.answers.set()
    await gone
    await following


async def test_a_client_whose_process_lives_without_its_memory_is_let_go(
    clients: Clients, records: Records
) -> None:
    records.answers.set()
    pidfd = os.pidfd_open(os.getpid())
    attach(clients, pidfd)
    await Detaching(clients).process_gone("vm")
    assert "vm" in clients.attached
    await Detaching(clients).process_gone("vm", lives=True)
    assert "vm" not in clients.attached
    os.close(pidfd)


async def test_a_client_that_is_attached_again_is_not_deleted_for_the_one_before(
    clients: Clients, records: Records, ended_process: int
) -> None:
    records.answers.set()
    records.leftovers = frozenset({"vm"})
    attach(clients, ended_process)
    await clients.discard_unattached("vm")
    await clients.clear_leftovers()
    assert "vm" in records
    del clients.attached["vm"]
    await clients.clear_leftovers()
    assert "vm" not in records
