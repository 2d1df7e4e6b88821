from __future__ import annotations

import array
import asyncio
import fcntl
import mmap
import os
import random
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from farpage.api.sockets import AddressInUse
from farpage.attach import listener as listener_module
from farpage.attach.listener import AttachListener
from farpage.attach.memory import ClientMemory
from farpage.attach.messages import (
    HEADER,
    MAX_FRAME_BYTES,
    AttachReply,
    AttachRequest,
    CloseReply,
    decode,
    encode,
)
from farpage.kernel.memory import PAGE_SIZE, address_of, create_memfd
from farpage.kernel.process import read_descriptors
from farpage.kernel.userfaultfd import Userfaultfd

SIZE = 4 * PAGE_SIZE


class Peer:
    """A connection to the listener that says what it is told."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(path))
        self.socket.setblocking(False)

    async def send(self, data: bytes, descriptors: list[int] | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors or []))]
        sent = self.socket.sendmsg([data[:1]], rights if descriptors else [])
        await asyncio.get_running_loop().sock_sendall(self.socket, data[sent:])

    async def reply(self) -> AttachReply:
        return decode(AttachReply, await self._frame())

    async def close_reply(self) -> CloseReply:
        return decode(CloseReply, await self._frame())

    async def at_end(self) -> bool:
        """Wait for the listener to disconnect, by a reset if it left something unread."""
        try:
            return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.socket, 1), 60) == b""
        except ConnectionResetError:
            return True

    async def _frame(self) -> bytes:
        (length,) = HEADER.unpack(await self._exactly(HEADER.size))
        return await self._exactly(length)

    async def _exactly(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            part = await asyncio.wait_for(
                asyncio.get_running_loop().sock_recv(self.socket, length - len(data)), 60
            )
            if not part:
                raise EOFError
            data += part
        return data


@dataclass
class Attached:
    """What the handlers saw."""

    memories: list[ClientMemory] = field(default_factory=list)
    closed: asyncio.Queue[str] = field(default_factory=asyncio.Queue)

    async def attach(self, request: AttachRequest, memory: ClientMemory) -> str:
        self.memories.append(memory)
        return request.name or "nameless"

    async def close(self, name: str, memory: ClientMemory) -> None:
        memory.close_descriptors()
        self.closed.put_nowait(name)


@pytest.fixture
def attached() -> Attached:
    return Attached()


@pytest.fixture
async def path(short_folder: Path, attached: Attached) -> AsyncIterator[Path]:
    path = short_folder / "attach.sock"
    listener = AttachListener(str(path), attached.attach, attached.close)
    await listener.start()
    yield path
    await listener.close()
    assert not path.exists()


@pytest.fixture
def connect(path: Path) -> Iterator[Callable[[], Peer]]:
    peers: list[Peer] = []

    def connect() -> Peer:
        peers.append(Peer(path))
        return peers[-1]

    yield connect
    for peer in peers:
        peer.socket.close()


@dataclass
class Handoff:
    """What a region hands over, to be spoiled in one way at a time."""

    uffd: int
    memfd: int
    mapping: mmap.mmap

    def request(self, **changes: Any) -> bytes:
        fields = {"name": "test", "size_bytes": SIZE, "start_address": address_of(self.mapping)}
        return encode(AttachRequest.model_validate(fields | changes))


def make_memfd(size: int = SIZE, seals: int = fcntl.F_SEAL_SHRINK) -> int:
    memfd = create_memfd("region", size, sealable=True)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, seals)
    return memfd


@pytest.fixture
def handoff() -> Iterator[Handoff]:
    memfd = make_memfd()
    mapping = mmap.mmap(memfd, SIZE)
    with Userfaultfd.create() as uffd:
        uffd.handshake()
        yield Handoff(uffd.fileno(), memfd, mapping)
    mapping.close()
    os.close(memfd)


Connect = Callable[[], Peer]


async def assert_refused(peer: Peer, words: str) -> None:
    reply = await peer.reply()
    assert not reply.ok
    assert reply.error is not None
    assert words in reply.error.message
    assert reply.error.remedy
    assert await peer.at_end()


async def assert_serves(connect: Connect, handoff: Handoff, attached: Attached) -> None:
    """Check that a good request is taken in, and that its end is noticed."""
    peer = connect()
    await peer.send(handoff.request(name="good"), [handoff.uffd, handoff.memfd])
    assert await peer.reply() == AttachReply(ok=True, name="good")
    peer.socket.close()
    assert await asyncio.wait_for(attached.closed.get(), 60) == "good"


async def test_a_region_is_taken_in_with_what_the_map_says(
    connect: Connect, handoff: Handoff, attached: Attached
) -> None:
    peer = connect()
    start = address_of(handoff.mapping) + PAGE_SIZE
    await peer.send(
        handoff.request(start_address=start, size_bytes=2 * PAGE_SIZE), [handoff.uffd, handoff.memfd]
    )
    assert await peer.reply() == AttachReply(ok=True, name="test")
    memory = attached.memories[0]
    assert (memory.pid, memory.start_address, memory.length_bytes) == (os.getpid(), start, 2 * PAGE_SIZE)
    assert memory.memfd_offset_bytes == PAGE_SIZE
    assert memory.uffd.state.initialized


async def test_a_close_request_is_confirmed_after_the_region_was_let_go(
    connect: Connect, handoff: Handoff, attached: Attached
) -> None:
    peer = connect()
    await peer.send(handoff.request(), [handoff.uffd, handoff.memfd])
    await peer.reply()
    await peer.send(HEADER.pack(19) + b'{"request":"close"}')
    assert await peer.close_reply() == CloseReply(ok=True)
    assert attached.closed.get_nowait() == "test"
    assert await peer.at_end()


async def test_an_unknown_request_on_the_lifeline_is_answered_and_the_region_stays(
    connect: Connect, handoff: Handoff, attached: Attached
) -> None:
    peer = connect()
    await peer.send(handoff.request(), [handoff.uffd, handoff.memfd])
    await peer.reply()
    body = b'{"request":"what"}'
    await peer.send(HEADER.pack(len(body)) + body)
    assert not (await peer.close_reply()).ok
    assert attached.closed.empty()


async def test_a_frame_beyond_the_limit_on_the_lifeline_ends_the_region(
    connect: Connect, handoff: Handoff, attached: Attached
) -> None:
    peer = connect()
    await peer.send(handoff.request(), [handoff.uffd, handoff.memfd])
    await peer.reply()
    await peer.send(HEADER.pack(MAX_FRAME_BYTES + 1))
    assert await asyncio.wait_for(attached.closed.get(), 60) == "test"


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (HEADER.pack(0), "frame length"),
        (HEADER.pack(MAX_FRAME_BYTES + 1), "frame length"),
        (b"GET / HTTP/1.1\r\n\r\n", "frame length"),
        (HEADER.pack(4) + b"null", "message"),
        (HEADER.pack(3) + b"\xff\xfe\xfd", "message"),
        (HEADER.pack(20000) + b"[" * 20000, "message"),
    ],
)
async def test_what_is_no_request_is_answered_and_disconnected(
    connect: Connect, handoff: Handoff, attached: Attached, frame: bytes, words: str
) -> None:
    peer = connect()
    await peer.send(frame)
    await assert_refused(peer, words)
    await assert_serves(connect, handoff, attached)


async def test_descriptors_have_to_be_two(connect: Connect, handoff: Handoff, attached: Attached) -> None:
    for descriptors in ([], [handoff.uffd], [handoff.uffd, handoff.memfd, handoff.memfd]):
        peer = connect()
        await peer.send(handoff.request(), descriptors)
        await assert_refused(peer, "two")
    await assert_serves(connect, handoff, attached)


async def test_descriptors_of_another_kind_are_refused(connect: Connect, handoff: Handoff) -> None:
    reader, writer = os.pipe()
    cases = [
        ([handoff.memfd, handoff.uffd], "not a userfaultfd"),
        ([reader, handoff.memfd], "not a userfaultfd"),
        ([handoff.uffd, writer], "not a memfd"),
    ]
    for descriptors, words in cases:
        peer = connect()
        await peer.send(handoff.request(), descriptors)
        await assert_refused(peer, words)
    os.close(reader)
    os.close(writer)


async def test_a_userfaultfd_that_is_not_set_up_is_refused(connect: Connect, handoff: Handoff) -> None:
    with Userfaultfd.create() as bare, Userfaultfd.create(nonblocking=False) as blocking:
        blocking.handshake()
        for uffd, words in ((bare, "features"), (blocking, "non-blocking")):
            peer = connect()
            await peer.send(handoff.request(), [uffd.fileno(), handoff.memfd])
            await assert_refused(peer, words)


async def test_a_memfd_that_the_pager_cannot_rely_on_is_refused(connect: Connect, handoff: Handoff) -> None:
    cases = [
        (make_memfd(PAGE_SIZE), "smaller"),
        (make_memfd(seals=fcntl.F_SEAL_GROW), "shrinking"),
        (make_memfd(seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE), "sealed against writing"),
        (os.open(f"/proc/self/fd/{handoff.memfd}", os.O_RDONLY), "reading and writing"),
        (make_memfd(), "not mapped"),
    ]
    for memfd, words in cases:
        peer = connect()
        await peer.send(handoff.request(), [handoff.uffd, memfd])
        await assert_refused(peer, words)
        os.close(memfd)


async def test_addresses_that_are_not_those_of_the_memory_are_refused(
    connect: Connect, handoff: Handoff
) -> None:
    with mmap.mmap(handoff.memfd, SIZE, mmap.MAP_PRIVATE) as private:
        start = address_of(handoff.mapping)
        cases = [
            ({"start_address": PAGE_SIZE}, "not mapped"),
            ({"start_address": start + SIZE}, "not mapped"),
            ({"start_address": start + PAGE_SIZE}, "not mapped"),
            ({"start_address": address_of(private)}, "shared"),
        ]
        for changes, words in cases:
            peer = connect()
            await peer.send(handoff.request(**changes), [handoff.uffd, handoff.memfd])
            await assert_refused(peer, words)


async def test_a_peer_that_sends_half_a_request_is_disconnected_in_time(
    connect: Connect, handoff: Handoff, attached: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "REQUEST_TIMEOUT_SECONDS", 0.05)
    peer = connect()
    await peer.send(handoff.request()[:20], [handoff.uffd, handoff.memfd])
    assert await peer.at_end()
    await assert_serves(connect, handoff, attached)


async def test_silent_peers_do_not_keep_others_out(
    connect: Connect, handoff: Handoff, attached: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "REQUEST_TIMEOUT_SECONDS", 0.05)
    for _ in range(listener_module.MAX_PENDING + 10):
        connect()
    await assert_serves(connect, handoff, attached)


async def test_random_requests_leave_no_descriptor_behind_and_no_region(
    path: Path, connect: Connect, handoff: Handoff, attached: Attached
) -> None:
    await assert_serves(connect, handoff, attached)
    attached.memories.clear()
    before = set(read_descriptors(os.getpid()))
    chance = random.Random(20)
    good = handoff.request()
    for _ in range(500):
        frame = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            frame[chance.randrange(len(frame))] = chance.randrange(256)
        del frame[chance.randint(1, len(frame)) :]
        peer = Peer(path)
        descriptors = chance.choices([handoff.uffd, handoff.memfd], k=chance.randint(0, 4))
        with suppress(OSError):
            await peer.send(bytes(frame), descriptors)
        peer.socket.shutdown(socket.SHUT_WR)
        with suppress(OSError, EOFError):
            await peer._frame()
        peer.socket.close()
    attached_by_luck = len(attached.memories)
    for _ in range(attached_by_luck):
        await asyncio.wait_for(attached.closed.get(), 60)
    await assert_serves(connect, handoff, attached)
    after = {file for file in read_descriptors(os.getpid()) if not file.target.startswith("socket:")}
    assert after <= before


async def test_descriptors_sent_on_the_lifeline_are_dropped(
    connect: Connect, handoff: Handoff, attached: Attached
) -> None:
    peer = connect()
    await peer.send(handoff.request(), [handoff.uffd, handoff.memfd])
    await peer.reply()
    before = len(read_descriptors(os.getpid()))
    body = b'{"request":"again"}'
    await peer.send(HEADER.pack(len(body)) + body, [handoff.memfd] * 3)
    assert not (await peer.close_reply()).ok
    assert len(read_descriptors(os.getpid())) == before


async def test_the_socket_of_a_live_listener_is_not_taken_and_that_of_a_dead_one_is(
    path: Path, short_folder: Path, attached: Attached
) -> None:
    with pytest.raises(AddressInUse):
        await AttachListener(str(path), attached.attach, attached.close).start()
    stale = short_folder / "stale.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    listener = AttachListener(str(stale), attached.attach, attached.close)
    await listener.start()
    assert stale.stat().st_mode & 0o777 == 0o600
    await listener.close()
