"""Requests between two processes of a hypervisor that are answered late, or never."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from farpage.pager.channel import Channel, PeerError, PeerGone, PeerSilent
from farpage.pager.messages import Nothing, Query, WorkerClients


async def test_a_request_that_is_not_answered_in_time_fails_and_its_late_answer_is_dropped() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    late = asyncio.Event()

    async def answer(method: str, parameters: Any, descriptors: list[int]) -> WorkerClients:
        if method == "query":
            await late.wait()
        return WorkerClients(clients=(method,))

    asking, answering = Channel(ours), Channel(theirs, on_request=answer)
    with pytest.raises(PeerSilent, match=r"not answered 'query' for 0\.01 s"):
        await asking.call("query", Query(client="vm"), WorkerClients, timeout_seconds=0.01)
    late.set()
    assert (await asking.call("clients", Nothing(), WorkerClients)).clients == ("clients",)
    asking.close()
    answering.close()


async def test_a_request_that_fails_in_an_unforeseen_way_is_answered() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    async def answer(method: str, parameters: Any, descriptors: list[int]) -> Nothing:
        raise KeyError(method)

    asking, answering = Channel(ours), Channel(theirs, on_request=answer)
    with pytest.raises(PeerError, match=r"'ping' failed in an unforeseen way: KeyError"):
        await asking.call("ping", Nothing(), Nothing)
    asking.close()
    answering.close()


async def test_a_request_without_a_time_out_ends_with_the_other_process() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(ours)
    theirs.close()
    with pytest.raises(PeerGone, match="before it answered 'ping'"):
        await channel.call("ping", Nothing(), Nothing)
    channel.close()
