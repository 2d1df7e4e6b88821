"""The compiled loops on real memory, real events and real reads, one poll after the other."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import mmap
import os
import select
import struct
import termios
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from farpage.errors import Unsupported
from farpage.kernel.io_uring import FILES, Ring
from farpage.kernel.memory import (
    PAGE_SIZE,
    AlignedBuffer,
    address_of,
    create_memfd,
    resident_bytes,
    resident_ranges,
)
from farpage.kernel.userfaultfd import FLAG_WP, FLAG_WRITE, Mode, Userfaultfd
from farpage.nbd import eventloop
from farpage.pager.checksum import page_checksum
from farpage.pager.compiled import COMPILED, libraries
from farpage.pager.eviction import SLICE_RUNS
from farpage.pager.lane import (
    AHEAD,
    DEFERRED,
    HIGH,
    LOW,
    MOST,
    READING,
    READS_IN_FLIGHT,
    UNWRITABLE,
    WRITABLE,
    open_hub,
)
from farpage.pager.readahead import new_read_ahead
from farpage.pager.states import CLEAN, DIRTY, ON_DEVICE, POISONED, REWRITTEN, STATE_COUNT, WRITING, ZERO
from farpage.pager.states import READING as READING_STATE
from farpage.pager.table import PageTable
from tests.support.paging import content_of

if TYPE_CHECKING:
    from farpage.pager._hub import Hub
    from farpage.pager._lane import Lane

pytestmark = pytest.mark.skipif(COMPILED is None, reason="the compiled loops were not built")

PAGES = 2048
SINGLE_READS = 256
"""So many reads of a page may be in flight, beside those of neighbours."""
GIVEN_BACK = SINGLE_READS + 32 * 64
"""So many pages are remembered that a lane leaves to the interpreter after it has begun to read them."""
DEADLINE_SECONDS = 10.0
NOT_LATE_SECONDS = 60.0
OFTEN = 0.005
"""So long a poll waits while a test waits for something that no event tells of."""
STALL_SECONDS = 0.01

_memcpy = ctypes.CDLL(None).memcpy
_memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_memcpy.restype = ctypes.c_void_p


class Access(threading.Thread):
    """A copy from or to the client's memory, by a thread that holds no interpreter lock while it waits."""

    def __init__(self, address: int, write: bytes | None) -> None:
        super().__init__(daemon=True)
        self._address = address
        self._write = write
        self._buffer = ctypes.create_string_buffer(write or bytes(PAGE_SIZE), len(write or bytes(PAGE_SIZE)))
        self.start()

    def run(self) -> None:
        buffer = ctypes.addressof(self._buffer)
        target, source = (buffer, self._address) if self._write is None else (self._address, buffer)
        _memcpy(target, source, len(self._buffer))

    def ended(self) -> bool:
        return not self.is_alive()

    @property
    def content(self) -> bytes:
        """What a read has found."""
        assert self.ended()
        return self._buffer.raw


class Client:
    """Memory of this process, registered as a client's is, with everything that a lane works on.

    All of its pages are on the device at first, a file that has `content_of` each.
    """

    def __init__(self, polled: Polled, folder: Path, pages: int = PAGES) -> None:
        assert COMPILED is not None
        self.polled = polled
        self.pages = pages
        self.memfd = create_memfd("client", pages * PAGE_SIZE)
        self.mapping = mmap.mmap(self.memfd, pages * PAGE_SIZE)
        self.start = address_of(self.mapping)
        self.uffd = Userfaultfd.create()
        self.uffd.handshake()
        self.uffd.register(self.start, pages * PAGE_SIZE, Mode.MISSING | Mode.WP | Mode.MINOR)
        self.file = folder / f"volume{self.memfd}"
        self.file.write_bytes(b"".join(content_of(page) for page in range(pages)))
        self.table = PageTable(pages)
        self.table.restate(np.full(pages, ON_DEVICE, np.uint8))
        self.table.checksums[:] = [page_checksum(memoryview(content_of(page))) for page in range(pages)]
        self.order = COMPILED.order(pages)
        called = libraries()
        assert called is not None
        self.store = COMPILED.store(pages * PAGE_SIZE, *called)
        self.streams = COMPILED.streams(pages)
        self.marks = array("q", [0] * (AHEAD + 1))
        self.marks[MOST], self.marks[READING], self.marks[HIGH] = pages, pages, 1 << 60
        self.marks[AHEAD] = pages
        self.marks[WRITABLE], self.marks[UNWRITABLE] = pages, -1
        self.calls = 0
        self.left: list[tuple[int, int, float]] = []
        self.back: list[tuple[int, bool, bool, float]] = []
        self.on_attention: Callable[[], object] = self.take
        self.lane = self.new_lane()
        polled.watch(self.uffd.fileno())
        self.use_file()
        self.lane.turn(on=True)
        self._accesses: list[Access] = []
        self._buffer = AlignedBuffer(64 * PAGE_SIZE)

    def new_lane(self, **changed: Any) -> Lane:
        """Make a lane, with other arguments than those that belong to it."""
        assert COMPILED is not None
        arguments: dict[str, Any] = {
            "hub": self.polled.hub,
            "uffd": self.uffd.fileno(),
            "start": self.start,
            "memfd": self.memfd,
            "memfd_offset": 0,
            "state": self.table.state,
            "checksum": self.table.checksum,
            "counts": self.table.counts,
            "marks": self.marks,
            "store": self.store,
            "order": self.order,
            "streams": self.streams,
            "zero_ahead": new_read_ahead(),
            "write_ahead": new_read_ahead(32, gaps=False),
            "on_attention": self._attention,
        }
        return COMPILED.lane(**arguments | changed)

    # What it does with its memory

    def read(self, page: int) -> Access:
        """Begin to read a page."""
        return self._access(page, None)

    def write(self, page: int, data: bytes) -> Access:
        """Begin to write to the beginning of a page."""
        return self._access(page, data)

    def _access(self, page: int, data: bytes | None) -> Access:
        access = Access(self.start + page * PAGE_SIZE, data)
        self._accesses.append(access)
        return access

    def waits(self, accesses: int = 1) -> None:
        """Wait until so many accesses wait that nobody has read the events of."""
        end = time.monotonic() + DEADLINE_SECONDS
        while self.uffd.state.pending_faults < accesses:
            assert time.monotonic() < end, "no access waits"
            os.sched_yield()

    def has_read(self, page: int) -> bytes:
        """Read a page and return what was found."""
        access = self.read(page)
        self.polled.until(access.ended)
        return access.content

    # What the test does as the pager

    def use_file(self, late_seconds: float = NOT_LATE_SECONDS) -> None:
        """Read the file; past the page cache, where its file system can do that."""
        try:
            descriptor = os.open(self.file, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            descriptor = os.open(self.file, os.O_RDONLY)
        self.lane.use(descriptor, 0, late_seconds)
        os.close(descriptor)

    def resident(self, pages: list[int], state: int, content: Callable[[int], bytes] = content_of) -> None:
        """Have pages in memory, with their place in the order; clean ones are protected."""
        for page in pages:
            self._buffer.view[:PAGE_SIZE] = content(page)
            address = self.start + page * PAGE_SIZE
            protect = state == CLEAN
            assert (
                self.uffd.copy(address, self._buffer.address, PAGE_SIZE, write_protect=protect) == PAGE_SIZE
            )
            self.table.put(page, state)
            self.order.added(page)

    def take(self) -> None:
        """Take what is left to the interpreter."""
        self.left += self.lane.left()
        self.back += self.lane.back()

    def got_ready(
        self, buffer: AlignedBuffer, victims: int = 0
    ) -> tuple[list[tuple[int, int, int]], list[int]]:
        """Have victims chosen, and take those that are to be written."""
        self.lane.evict(victims, 0)
        self.lane.lend(buffer.view)
        self.polled.until(lambda: self.lane.is_ready)
        return self.lane.take()

    def _attention(self) -> None:
        self.calls += 1
        self.on_attention()

    # What there is then

    def states(self, *pages: int) -> list[int]:
        return [self.table.state[page] for page in pages]

    def held(self, page: int) -> bytes | None:
        """Return what the memfd holds of a page; None for a hole."""
        if not list(resident_ranges(self.memfd, page * PAGE_SIZE, PAGE_SIZE)):
            return None
        return os.pread(self.memfd, PAGE_SIZE, page * PAGE_SIZE)

    def protected(self, page: int) -> bool:
        """Tell whether a write to a page would be an event (pagemap, bit 57)."""
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek((self.start // PAGE_SIZE + page) * 8)
            return bool(int.from_bytes(pagemap.read(8), "little") >> 57 & 1)

    def accesses_left(self) -> list[tuple[int, int]]:
        """Return the accesses that were left to the interpreter."""
        return [(page, flags & (FLAG_WRITE | FLAG_WP)) for page, flags, _ in self.left]

    def close(self) -> None:
        """Let all go on that wait, and give the memory back."""
        self.lane.close()
        with suppress(OSError):  # a part of it may be so already
            self.uffd.unregister(self.start, self.pages * PAGE_SIZE)
        self.polled.unwatch(self.uffd.fileno())
        self.uffd.close()
        for access in self._accesses:
            access.join(DEADLINE_SECONDS)
            assert access.ended(), "an access still waits"
        self.mapping.close()
        os.close(self.memfd)
        self._buffer.close()
        assert list(self.table.counts) == np.bincount(self.table.states, minlength=STATE_COUNT).tolist()


class Polled:
    """A hub, its clients, and a test in the place of the event loop."""

    def __init__(self, folder: Path, ring: type[Ring] = Ring) -> None:
        assert COMPILED is not None
        self.epoll = select.epoll()
        self.hub: Hub = COMPILED.hub(self.epoll.fileno(), ring(READS_IN_FLIGHT))
        self.watch(self.hub.fileno())
        self.told: list[tuple[int, int]] = []
        """Events that the hub has left to the loop."""
        self.may_look = False
        self._folder = folder
        self.clients: list[Client] = []

    def client(self, pages: int = PAGES) -> Client:
        """Return a new one."""
        self.clients.append(Client(self, self._folder, pages))
        return self.clients[-1]

    def watch(self, descriptor: int) -> None:
        """Wait for what a descriptor tells."""
        self.epoll.register(descriptor, select.EPOLLIN)

    def unwatch(self, descriptor: int) -> None:
        """Take back `watch`."""
        self.epoll.unregister(descriptor)

    def poll(self, seconds: float = 0.0) -> None:
        """Do one turn of the loop."""
        for descriptor, events in self.hub.poll(seconds, self.may_look):
            if descriptor == self.hub.fileno():
                self.hub.attend()
            else:
                self.told.append((descriptor, events))

    def until(self, condition: Callable[[], object]) -> None:
        """Turn until something has come about."""
        end = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            assert time.monotonic() < end, "it never came about"
            self.poll(OFTEN)

    def close(self) -> None:
        """Let go of everything."""
        for client in self.clients:
            client.close()
        self.epoll.close()


class OnLoop(Polled):
    """The same over the data plane's event loop."""

    def __init__(self, folder: Path) -> None:
        self._loop = asyncio.get_running_loop()
        hub = eventloop.wait_with(self._loop, open_hub)
        assert hub is not None
        self.hub = hub
        self._folder = folder
        self.clients = []
        self.told = []

    def watch(self, descriptor: int) -> None:
        eventloop.add_reader(self._loop, descriptor, lambda: self.told.append((descriptor, 0)))

    def unwatch(self, descriptor: int) -> None:
        eventloop.remove_reader(self._loop, descriptor)

    async def comes(self, condition: Callable[[], object]) -> None:
        """Let the loop run until something has come about."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not condition():
                await asyncio.sleep(OFTEN)

    def close(self) -> None:
        for client in self.clients:
            client.close()


class PipeDevice:
    """A device that answers when the test says so."""

    def __init__(self, client: Client, late_seconds: float = NOT_LATE_SECONDS) -> None:
        self._polled = client.polled
        self._reader, self._writer = os.pipe()
        client.lane.use(self._reader, 0, late_seconds)

    def answer(self, content: bytes) -> None:
        """Answer the oldest reads, and wait until that is taken."""
        os.write(self._writer, content)
        self._polled.until(lambda: not self._unread())
        self._polled.poll()

    def _unread(self) -> int:
        (count,) = struct.unpack("i", fcntl.ioctl(self._reader, termios.FIONREAD, bytes(4)))
        return int(count)

    def close(self) -> None:
        """End what waits: there is nothing to be read any more."""
        os.close(self._writer)
        os.close(self._reader)


@pytest.fixture(autouse=True, scope="module")
def _io_uring() -> None:
    try:
        Ring(1).close()
    except Unsupported as error:
        pytest.skip(str(error))


@pytest.fixture(name="polled")
def _polled(tmp_path: Path) -> Iterator[Polled]:
    polled = Polled(tmp_path)
    yield polled
    polled.close()


@pytest.fixture(name="client")
def _client(polled: Polled) -> Client:
    return polled.client()


@pytest.fixture(name="device")
def _device(client: Client) -> Iterator[PipeDevice]:
    device = PipeDevice(client)
    yield device
    device.close()


# Page-ins


@pytest.mark.parametrize("may_look", [False, True])
def test_a_page_on_the_device_comes_in_clean_and_protected(
    client: Client, polled: Polled, may_look: bool
) -> None:
    polled.may_look = may_look
    assert client.has_read(300) == content_of(300)
    assert client.states(300) == [CLEAN]
    assert (client.table.counts[CLEAN], client.table.counts[ON_DEVICE]) == (1, PAGES - 1)
    assert client.protected(300)
    assert client.lane.in_flight == 0
    assert (client.left, client.back, polled.told) == ([], [], [])
    assert client.order.victims(2) == [300]


def test_what_has_come_in_is_counted_once(client: Client) -> None:
    for page in (100, 300, 500):
        client.has_read(page)
    faults, read, from_tier, zeroed, given_back, _, _, buckets, waited, longest, _ = client.lane.counted()
    assert (faults, read, from_tier, zeroed, given_back, sum(buckets)) == (3, 3, 0, 0, 0, 3)
    assert 0 < longest < waited
    assert client.lane.counted()[:5] == (0, 0, 0, 0, 0)


def test_a_write_brings_a_page_in_dirty_and_unprotected(client: Client, polled: Polled) -> None:
    access = client.write(300, b"new")
    polled.until(access.ended)
    assert client.states(300) == [DIRTY]
    assert not client.protected(300)
    assert client.held(300) == b"new" + content_of(300)[3:]


def test_a_volume_is_read_from_where_it_begins(client: Client) -> None:
    with open(client.file, "rb+") as file:
        content = file.read()
        file.seek(0)
        file.write(bytes(7 * PAGE_SIZE) + content)
    descriptor = os.open(client.file, os.O_RDONLY)
    client.lane.use(descriptor, 7 * PAGE_SIZE, NOT_LATE_SECONDS)
    os.close(descriptor)
    assert client.has_read(PAGES - 1) == content_of(PAGES - 1)
    assert client.has_read(0) == content_of(0)


def test_a_page_is_never_copied_whose_content_is_not_what_was_paged_out(
    client: Client, polled: Polled
) -> None:
    client.table.checksum[300] ^= 1
    access = client.read(300)
    polled.until(lambda: client.back)
    assert [read[:3] for read in client.back] == [(300, False, False)]
    assert client.states(300) == [READING_STATE]
    assert client.held(300) is None
    assert not access.ended()
    assert len(client.order) == client.lane.in_flight == client.lane.counted()[1] == 0


def test_a_read_that_fails_is_handed_back(client: Client, polled: Polled) -> None:
    os.truncate(client.file, 300 * PAGE_SIZE)
    client.write(300, b"new")
    polled.until(lambda: client.back)
    assert [read[:3] for read in client.back] == [(300, True, False)]
    assert client.states(300) == [READING_STATE]
    assert client.held(300) is None


def test_a_read_that_is_late_is_handed_back_and_its_answer_dropped(client: Client, polled: Polled) -> None:
    device = PipeDevice(client, late_seconds=0.01)
    began = time.monotonic()
    access = client.read(300)
    polled.until(lambda: client.back)
    ((page, write, late, read_began),) = client.back
    assert (page, write, late) == (300, False, True)
    assert began <= read_began <= time.monotonic() - 0.01
    assert client.lane.in_flight == 0
    assert not client.lane.join(300, False)
    device.answer(content_of(300))
    assert client.states(300) == [READING_STATE]
    assert client.held(300) is None
    assert not access.ended()
    assert len(client.back) == 1
    device.close()


def test_reads_that_are_withdrawn_are_returned_and_their_answers_dropped(
    client: Client, polled: Polled, device: PipeDevice
) -> None:
    client.read(300)
    client.write(500, b"new")
    polled.until(lambda: client.lane.in_flight == 2)
    withdrawn = client.lane.withdraw()
    assert sorted(read[:2] for read in withdrawn) == [(300, False), (500, True)]
    assert client.lane.in_flight == 0
    device.answer(content_of(300))
    assert client.states(300, 500) == [READING_STATE] * 2
    assert client.held(300) is None
    assert client.lane.withdraw() == []
    assert client.back == []


def test_the_answer_to_a_read_that_was_given_up_is_dropped(
    client: Client, polled: Polled, device: PipeDevice
) -> None:
    client.read(300)
    polled.until(lambda: client.lane.in_flight)
    client.table.put(300, ON_DEVICE)
    device.answer(content_of(300))
    assert client.states(300) == [ON_DEVICE]
    assert client.held(300) is None
    assert (client.lane.in_flight, client.back) == (0, [])


def test_two_accesses_to_a_page_that_is_being_read_go_on_together(
    client: Client, polled: Polled, device: PipeDevice
) -> None:
    reader = client.read(300)
    polled.until(lambda: client.lane.in_flight)
    writer = client.write(300, b"new")
    client.waits()
    polled.until(lambda: not client.uffd.state.pending_faults)
    assert client.lane.in_flight == 1
    device.answer(content_of(300))
    polled.until(lambda: reader.ended() and writer.ended())
    assert client.states(300) == [DIRTY]
    assert client.held(300) == b"new" + content_of(300)[3:]
    assert client.left == []


def test_an_access_joins_the_read_of_its_page(client: Client, polled: Polled, device: PipeDevice) -> None:
    access = client.read(300)
    polled.until(lambda: client.lane.in_flight)
    assert not client.lane.join(301, True)
    assert client.lane.join(300, True)
    device.answer(content_of(300))
    polled.until(access.ended)
    assert client.states(300) == [DIRTY]
    assert not client.lane.join(300, True)


def test_an_access_that_waits_long_is_a_stall(client: Client, polled: Polled, device: PipeDevice) -> None:
    access = client.read(300)
    polled.until(lambda: client.lane.in_flight)
    answered = time.monotonic() + STALL_SECONDS
    polled.until(lambda: time.monotonic() > answered)
    device.answer(content_of(300))
    polled.until(access.ended)
    *_, longest, stalls = client.lane.counted()
    ((began, ended),) = stalls
    assert ended - began == pytest.approx(longest)
    assert longest >= STALL_SECONDS
    assert client.lane.counted()[-1] == []


# A page in the RAM tier


def test_a_page_in_the_ram_tier_comes_in_without_a_read(client: Client, polled: Polled) -> None:
    client.lane.use(-1, 0, 0.0)
    client.store.keep(300, memoryview(content_of(300)))
    assert client.has_read(300) == content_of(300)
    assert client.states(300) == [CLEAN]
    assert client.protected(300)
    assert (300 in client.store, client.store.given) == (False, 1)
    assert client.lane.counted()[:3] == (1, 0, 1)
    assert client.order.victims(1) == [300]


def test_a_page_that_the_ram_tier_has_in_another_version_is_read(client: Client) -> None:
    client.store.keep(300, memoryview(content_of(300, 2)))
    assert client.has_read(300) == content_of(300)
    assert 300 not in client.store
    assert client.lane.counted()[:3] == (1, 1, 0)


# What is left to the interpreter


@pytest.mark.parametrize("mark", [MOST, READING], ids=["most", "reading"])
def test_an_access_is_left_when_there_is_no_room(client: Client, polled: Polled, mark: int) -> None:
    client.marks[mark] = 0
    client.write(300, b"new")
    polled.until(lambda: client.left)
    assert client.accesses_left() == [(300, FLAG_WRITE)]
    assert client.states(300) == [ON_DEVICE]
    assert client.lane.counted()[0] == 1


def test_what_the_ram_tier_takes_is_no_room_for_pages(client: Client, polled: Polled) -> None:
    client.marks[MOST] = 1
    client.store.keep(500, memoryview(content_of(500)))
    client.read(300)
    polled.until(lambda: client.left)
    assert client.accesses_left() == [(300, 0)]


def test_an_access_is_left_when_nothing_may_be_read(client: Client, polled: Polled) -> None:
    client.lane.use(-1, 0, 0.0)
    client.read(300)
    polled.until(lambda: client.left)
    assert client.accesses_left() == [(300, 0)]
    assert client.states(300) == [ON_DEVICE]


def test_a_page_that_is_read_ahead_comes_and_counts_as_no_wait(client: Client, polled: Polled) -> None:
    assert client.lane.fetch(range(300, 301), False) == (1, [])
    assert client.lane.fetch(range(307, 300, -7), True) == (1, [])
    assert (client.states(300, 307), client.lane.in_flight) == ([READING_STATE] * 2, 0)
    polled.until(lambda: client.states(300, 307) == [CLEAN, DIRTY])
    faults, read, *_, buckets, waited, longest, _ = client.lane.counted()
    assert (faults, read, sum(buckets), waited, longest) == (0, 2, 0, 0.0, 0.0)
    assert (len(client.order), client.has_read(300), client.has_read(307)) == (
        2,
        content_of(300),
        content_of(307),
    )
    assert [client.protected(page) for page in (300, 307)] == [True, False]


def test_an_access_waits_for_the_read_ahead_of_its_page(client: Client, polled: Polled) -> None:
    device = PipeDevice(client)
    assert client.lane.fetch(range(300, 301), False) == (1, [])
    access = client.write(300, b"written")
    polled.until(lambda: client.lane.in_flight == 1)
    device.answer(content_of(300))
    polled.until(access.ended)
    assert client.states(300) == [DIRTY]
    _, read, *_, buckets, waited, _, _ = client.lane.counted()
    assert (read, sum(buckets), waited > 0) == (1, 1, True)
    device.close()


def test_a_read_ahead_is_late_only_once_it_is_waited_for(client: Client, polled: Polled) -> None:
    device = PipeDevice(client, late_seconds=0.02)
    assert client.lane.fetch(range(300, 301), False) == (1, [])
    end = time.monotonic() + 0.1
    while time.monotonic() < end:
        polled.poll(OFTEN)
    assert client.back == []
    client.read(300)
    polled.until(lambda: client.back)
    ((page, write, late, began_seconds),) = client.back
    assert (page, write, late, began_seconds > 0) == (300, False, True, True)
    device.close()


def test_reads_ahead_that_nobody_waits_for_are_told_so_when_they_are_given_up(
    client: Client, polled: Polled
) -> None:
    device = PipeDevice(client)
    assert client.lane.fetch(range(300, 301), True) == (1, [])
    assert client.lane.withdraw() == [(300, True, -1.0)]
    assert client.lane.in_flight == 0
    device.answer(content_of(300))
    assert client.states(300) == [READING_STATE]
    client.table.put(300, ON_DEVICE)
    device.close()


def test_reads_ahead_leave_room_for_those_that_are_waited_for(client: Client, polled: Polled) -> None:
    device = PipeDevice(client)
    begun, left = client.lane.fetch(range(0, PAGES, 3), False)
    assert begun < SINGLE_READS
    assert left == list(range(3 * begun, PAGES, 3))
    client.read(901)
    polled.until(lambda: client.states(901) == [READING_STATE])
    device.close()
    polled.until(lambda: len(client.back) == begun + 1)
    assert sorted(began < 0 for *_, began in client.back) == [False] + [True] * begun


def test_no_page_that_the_client_does_not_have_is_read_ahead(client: Client) -> None:
    assert client.lane.fetch(range(-10, 0), False) == (0, [])
    assert client.lane.fetch(range(PAGES, PAGES + 10), False) == (0, [])
    assert client.lane.fetch(range(1 << 40, 1 << 41, 1 << 39), False) == (0, [])


def in_runs(client: Client, first: int, count: int, *, write: bool = False) -> Any:
    return client.lane.fetch_run(first, count, write)


def test_neighbours_are_read_together(client: Client, polled: Polled) -> None:
    assert in_runs(client, 300, 64) == (64, [])
    assert (client.states(300, 363), client.lane.in_flight) == ([READING_STATE] * 2, 0)
    polled.until(lambda: client.states(*range(300, 364)) == [CLEAN] * 64)
    faults, read, *_, buckets, waited, longest, _ = client.lane.counted()
    assert (faults, read, sum(buckets), waited, longest) == (0, 64, 0, 0.0, 0.0)
    assert all(client.held(page) == content_of(page) for page in range(300, 364))
    assert client.protected(300)
    assert client.protected(363)
    assert len(client.order) == 64


def test_neighbours_that_are_about_to_be_written_to_come_in_dirty(client: Client, polled: Polled) -> None:
    assert in_runs(client, 300, 3, write=True) == (3, [])
    polled.until(lambda: client.states(300, 301, 302) == [DIRTY] * 3)
    assert not client.protected(301)


def test_what_is_in_memory_amid_neighbours_stays_as_it_is(client: Client, polled: Polled) -> None:
    client.resident([301, 302, 310, 311], DIRTY, lambda _page: b"new" * 1365 + b"!")
    client.table.put(305, ZERO)
    assert in_runs(client, 300, 20) == (15, [])
    polled.until(lambda: client.table.counts[CLEAN] == 15)
    assert client.states(300, 301, 302, 303, 305, 310, 311) == [
        CLEAN,
        DIRTY,
        DIRTY,
        CLEAN,
        ZERO,
        DIRTY,
        DIRTY,
    ]
    assert client.held(301) == b"new" * 1365 + b"!"
    assert client.held(305) is None
    assert client.held(312) == content_of(312)


def test_neighbours_with_much_between_them_are_read_apart(client: Client, polled: Polled) -> None:
    for first in range(0, 64 * 17, 64):
        client.resident([*range(first + 1, first + 40)], CLEAN)
    device = PipeDevice(client)
    begun = [in_runs(client, first, 64) for first in range(0, 64 * 17, 64)]
    assert begun[:16] == [(25, [])] * 16
    assert begun[16][0] == 0
    device.close()
    polled.until(lambda: len(client.back) == 16 * 25)
    assert in_runs(client, 1024, 64) == (25, [])
    polled.until(lambda: len(client.back) == 17 * 25)
    for page, *_ in client.back:
        client.table.put(page, ON_DEVICE)


def test_an_access_waits_for_the_read_of_its_neighbours(client: Client, polled: Polled) -> None:
    device = PipeDevice(client)
    assert in_runs(client, 300, 8) == (8, [])
    accesses = [client.read(303), client.write(305, b"written"), client.read(305)]
    polled.until(lambda: client.lane.in_flight == 2 and client.uffd.state.pending_faults == 0)
    assert client.lane.join(303, False)
    assert not client.lane.join(308, False)
    device.answer(b"".join(content_of(page) for page in range(300, 308)))
    polled.until(lambda: all(access.ended() for access in accesses))
    assert client.states(*range(300, 308)) == [CLEAN] * 5 + [DIRTY] + [CLEAN] * 2
    assert accesses[0].content == content_of(303)
    assert client.held(305) == b"written" + content_of(305)[7:]
    _, read, *_, buckets, waited, _, _ = client.lane.counted()
    assert (read, sum(buckets), waited > 0) == (8, 2, True)
    assert client.lane.in_flight == 0
    device.close()


def test_those_of_neighbours_are_handed_back_that_are_not_what_was_paged_out(
    client: Client, polled: Polled
) -> None:
    client.table.checksum[303] ^= 1
    assert in_runs(client, 300, 8) == (8, [])
    polled.until(lambda: client.back)
    assert [(page, write, late, began < 0) for page, write, late, began in client.back] == [
        (303, False, False, True)
    ]
    assert client.states(302, 303, 304) == [CLEAN, READING_STATE, CLEAN]
    assert client.held(303) is None
    client.table.put(303, ON_DEVICE)


def test_those_of_neighbours_are_handed_back_that_the_device_does_not_give(
    client: Client, polled: Polled
) -> None:
    os.truncate(client.file, 303 * PAGE_SIZE + 100)
    assert in_runs(client, 300, 8) == (8, [])
    polled.until(lambda: len(client.back) == 5)
    assert [page for page, *_ in client.back] == [303, 304, 305, 306, 307]
    assert client.states(302, 303) == [CLEAN, READING_STATE]
    assert client.lane.in_flight == 0
    for page in range(303, 308):
        client.table.put(page, ON_DEVICE)


def test_those_of_neighbours_are_dropped_that_were_given_up(client: Client, polled: Polled) -> None:
    device = PipeDevice(client)
    assert in_runs(client, 300, 3) == (3, [])
    client.table.put(301, POISONED)
    device.answer(b"".join(content_of(page) for page in range(300, 303)))
    polled.until(lambda: client.states(300, 302) == [CLEAN] * 2)
    assert (client.states(301), client.held(301), client.back) == ([POISONED], None, [])
    device.close()


def test_a_page_that_somebody_else_has_filled_amid_neighbours_is_handed_back(
    client: Client, polled: Polled
) -> None:
    client.resident([302], ON_DEVICE)
    assert in_runs(client, 300, 5) == (5, [])
    polled.until(lambda: client.states(300, 301, 303, 304) == [CLEAN] * 4)
    assert [page for page, *_ in client.back] == [302]
    client.table.put(302, ON_DEVICE)


def test_a_read_of_neighbours_is_late_only_once_it_is_waited_for(client: Client, polled: Polled) -> None:
    device = PipeDevice(client, late_seconds=0.02)
    assert in_runs(client, 300, 3) == (3, [])
    end = time.monotonic() + 0.1
    while time.monotonic() < end:
        polled.poll(OFTEN)
    assert client.back == []
    client.write(301, b"new")
    polled.until(lambda: len(client.back) == 3)
    assert [(page, write, late, began > 0) for page, write, late, began in client.back] == [
        (300, False, True, False),
        (301, True, False, True),
        (302, False, False, False),
    ]
    device.answer(b"".join(content_of(page) for page in range(300, 303)))
    assert client.states(300, 301, 302) == [READING_STATE] * 3
    for page in range(300, 303):
        client.table.put(page, ON_DEVICE)
    device.close()


def test_reads_of_neighbours_that_are_withdrawn_are_returned_and_their_answers_dropped(
    client: Client, polled: Polled
) -> None:
    device = PipeDevice(client)
    client.resident([302], CLEAN)
    assert in_runs(client, 300, 4) == (3, [])
    client.write(301, b"new")
    polled.until(lambda: client.lane.in_flight)
    (first, second, third) = client.lane.withdraw()
    assert (first, second[:2], second[2] > 0, third) == (
        (300, False, -1.0),
        (301, True),
        True,
        (303, False, -1.0),
    )
    assert client.lane.in_flight == 0
    device.answer(b"".join(content_of(page) for page in range(300, 304)))
    assert client.states(300, 301, 303) == [READING_STATE] * 3
    for page in (300, 301, 303):
        client.table.put(page, ON_DEVICE)
    device.close()


def test_neighbours_for_which_no_read_can_be_begun_are_left(client: Client, polled: Polled) -> None:
    device = PipeDevice(client)
    begun = [in_runs(client, first, 2) for first in range(0, 33 * 32, 32)]
    assert begun == [(2, [])] * 32 + [(0, [(1024, 2)])]
    assert client.lane.fetch_near(600, 8, False, 1.0) == 0
    device.close()
    polled.until(lambda: len(client.back) == 64)
    assert in_runs(client, 1024, 2) == (2, [])
    polled.until(lambda: len(client.back) == 66)
    for page, *_ in client.back:
        client.table.put(page, ON_DEVICE)


def test_a_page_that_is_waited_for_comes_with_those_behind_it(client: Client, polled: Polled) -> None:
    access = client.read(300)
    client.lane.turn(on=False)
    client.waits()
    assert client.lane.fetch_near(300, 8, False, time.monotonic()) == 0
    client.lane.turn(on=True)
    client.resident([305], CLEAN)
    assert client.lane.fetch_near(300, 8, False, time.monotonic()) == 5
    assert client.lane.in_flight == 1
    polled.until(access.ended)
    assert client.states(*range(300, 307)) == [CLEAN] * 6 + [ON_DEVICE]
    assert access.content == content_of(300)
    assert (sum(client.lane.counted()[7]), client.lane.in_flight) == (1, 0)


def test_what_comes_with_a_page_that_is_written_to_comes_in_dirty(client: Client, polled: Polled) -> None:
    assert client.lane.fetch_near(300, 3, True, time.monotonic()) == 3
    polled.until(lambda: client.states(300, 301, 302, 303) == [DIRTY] * 3 + [ON_DEVICE])
    assert client.lane.fetch_near(302, 8, False, 1.0) == 0
    assert client.lane.fetch_near(PAGES - 2, 8, False, time.monotonic()) == 2
    assert client.lane.fetch_near(PAGES, 8, False, 1.0) == 0
    assert client.lane.fetch_near(-1, 8, False, 1.0) == 0
    polled.until(lambda: client.states(PAGES - 2, PAGES - 1) == [CLEAN] * 2)


def test_accesses_are_answered_between_two_reads_of_neighbours(client: Client, polled: Polled) -> None:
    client.file.read_bytes()
    descriptor = os.open(client.file, os.O_RDONLY)  # what the page cache has is read at once
    client.lane.use(descriptor, 0, NOT_LATE_SECONDS)
    os.close(descriptor)
    for first in (100, 200, 300):
        in_runs(client, first, 64)
    client.table.put(500, ZERO)
    client.read(500)
    client.waits()
    polled.until(lambda: client.states(100, 200, 300, 500) == [CLEAN] * 3 + [DIRTY])
    assert client.order.victims(200).index(500) <= 64


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (0, 65), (PAGES - 1, 2), (1 << 40, 1), (0, -1)])
def test_no_neighbours_are_read_that_the_client_does_not_have(client: Client, first: int, count: int) -> None:
    with pytest.raises(IndexError):
        in_runs(client, first, count)
    assert client.lane.in_flight == 0


def test_neighbours_are_left_while_nothing_may_be_read(client: Client) -> None:
    client.lane.turn(on=False)
    assert in_runs(client, 300, 3) == (0, [(300, 3)])
    client.lane.turn(on=True)
    client.lane.use(-1, 0, 0.0)
    assert in_runs(client, 300, 3) == (0, [(300, 3)])
    client.lane.close()
    assert in_runs(client, 300, 3) == (0, [])
    assert client.lane.fetch_near(300, 3, False, 1.0) == 0


def test_nothing_is_read_ahead_that_is_not_on_the_device_alone_or_that_may_not_be(client: Client) -> None:
    client.resident([300], CLEAN)
    assert client.lane.fetch(range(300, 301), False) == (0, [])
    client.lane.turn(on=False)
    assert client.lane.fetch(range(300, 302), False) == (0, [301])
    client.lane.turn(on=True)
    client.lane.use(-1, 0, 0.0)
    assert client.lane.fetch(range(300, 302), False) == (0, [301])


@pytest.mark.parametrize("recent", [[299], [303], [290, 296], [365], [500, 401]])
def test_an_access_that_is_merely_near_recent_ones_comes_alone(client: Client, recent: list[int]) -> None:
    for page in [*recent, 301]:
        assert client.has_read(page) == content_of(page)
    assert client.table.counts[ON_DEVICE] == PAGES - len(recent) - 1
    assert client.streams.markers == set()


@pytest.mark.parametrize(
    "pages", [range(PAGES), range(PAGES - 1, -1, -1), range(3, PAGES, 7), range(PAGES - 1, 0, -64)]
)
def test_a_reader_of_any_step_is_read_ahead_of_without_the_interpreter(client: Client, pages: range) -> None:
    faults = 0
    for page in pages:
        assert client.has_read(page) == content_of(page)
        faults += client.lane.counted()[0]
    assert (client.left, client.back, client.calls) == ([], [], 0)
    assert faults <= 24
    assert client.states(*pages) == [CLEAN] * len(pages)
    assert client.streams.wasted_pages == 0


def test_what_is_read_ahead_of_a_writer_comes_in_dirty(client: Client, polled: Polled) -> None:
    for page in range(300, 400):
        access = client.write(page, b"new")
        polled.until(access.ended)
    assert client.states(*range(302, 400)) == [DIRTY] * 98
    assert client.lane.counted()[0] < 20


def test_several_readers_in_turn_are_told_apart(client: Client) -> None:
    for page in range(200):
        for first in (0, 500, 1000, 1500):
            assert client.has_read(first + page) == content_of(first + page)
    assert client.lane.counted()[0] < 60


def test_a_page_that_the_ram_tier_has_begins_a_stream_as_well(client: Client, polled: Polled) -> None:
    client.store.keep(301, memoryview(content_of(301)))
    client.has_read(300)
    assert client.has_read(301) == content_of(301)
    polled.until(lambda: client.states(302) == [CLEAN])
    assert client.lane.counted()[2:3] == (1,)


def sweep_to_a_marker(client: Client) -> int:
    """Read pages in order until one that is read ahead is a marker, and return that."""
    page = 300
    while not client.streams.markers:
        client.has_read(page)
        page += 1
    (marker,) = client.streams.markers
    return marker


def test_a_marker_is_at_hand_but_not_in_memory(client: Client, polled: Polled) -> None:
    marker = sweep_to_a_marker(client)
    polled.until(lambda: client.states(marker - 1, marker + 1) == [CLEAN] * 2 and client.store.held)
    assert client.states(marker) == [ON_DEVICE]
    assert client.held(marker) is None
    for page in range(marker - 3, marker):
        client.has_read(page)
    client.lane.counted()
    device = PipeDevice(client)
    access = client.read(marker)
    polled.until(access.ended)
    assert access.content == content_of(marker)
    assert (client.states(marker), client.store.held) == ([CLEAN], 0)
    assert client.states(marker + 8) == [READING_STATE], "the next window"
    assert client.lane.counted()[:3] == (1, 0, 0)
    device.close()


def test_a_marker_that_is_asked_for_while_it_is_read_comes_with_its_window(
    client: Client, polled: Polled
) -> None:
    sweep_to_a_marker(client)
    device = PipeDevice(client)
    (marker,) = client.streams.markers
    access = client.read(marker)
    polled.until(access.ended)
    (marker,) = client.streams.markers
    access = client.read(marker)
    client.waits()
    polled.until(lambda: not client.uffd.state.pending_faults)
    (following,) = client.streams.markers
    assert following > marker
    assert client.states(marker, following) == [READING_STATE] * 2
    assert not access.ended()
    device.close()
    polled.until(lambda: len(client.back) == client.table.counts[READING_STATE])
    assert [page for page, _, _, began in client.back if began > 0] == [marker], "nobody waits for the others"
    for page, *_ in client.back:
        client.table.put(page, ON_DEVICE)


def test_a_marker_that_was_written_meanwhile_is_not_given_as_it_was(client: Client, polled: Polled) -> None:
    marker = sweep_to_a_marker(client)
    polled.until(lambda: client.store.held)
    client.table.checksum[marker] = page_checksum(memoryview(content_of(marker, 2)))
    with open(client.file, "rb+") as file:
        file.seek(marker * PAGE_SIZE)
        file.write(content_of(marker, 2))
    assert client.has_read(marker) == content_of(marker, 2)


@pytest.mark.parametrize("on", [True, False])
def test_a_marker_is_held_back_unless_all_is_to_come_in(
    client: Client, polled: Polled, device: PipeDevice, on: bool
) -> None:
    for page in (299, 300, 303, 307):
        client.streams.fault(page, PAGES)
    (marker,) = client.streams.markers
    assert in_runs(client, 308, 7) == (7, [])
    client.lane.turn(on=on)
    device.answer(b"".join(content_of(page) for page in range(308, 315)))
    others = [page for page in range(308, 315) if page != marker]
    assert client.states(*others) == [CLEAN] * 6
    assert (client.states(marker), client.store.held) == ([ON_DEVICE if on else CLEAN], on)


@pytest.mark.parametrize("on", [True, False])
def test_a_marker_of_pages_that_are_apart_is_held_back_unless_all_is_to_come_in(
    client: Client, polled: Polled, device: PipeDevice, on: bool
) -> None:
    for page in (300, 307, 314, 328, 356):
        client.streams.fault(page, PAGES)
    (marker,) = client.streams.markers
    assert client.lane.fetch(range(marker, marker + 1), False) == (1, [])
    client.lane.turn(on=on)
    device.answer(content_of(marker))
    assert (client.states(marker), client.store.held) == ([ON_DEVICE if on else CLEAN], on)
    assert (len(client.order), client.lane.counted()[1]) == (not on, 1)


def test_a_stream_is_left_where_nothing_may_be_read(client: Client, polled: Polled) -> None:
    client.lane.use(-1, 0, 0.0)
    for page in (300, 301):
        client.store.keep(page, memoryview(content_of(page)))
    client.has_read(300)
    client.read(301)
    polled.until(lambda: client.left)
    assert client.accesses_left() == [(301, 0)]
    assert client.streams.fault(301, 100) is not None, "it was not taken note of"


def test_a_stream_is_left_while_there_is_no_room(client: Client, polled: Polled) -> None:
    client.has_read(300)
    client.marks[MOST] = 1
    client.read(301)
    polled.until(lambda: client.left)
    assert client.accesses_left() == [(301, 0)]
    assert client.states(302) == [ON_DEVICE]


@pytest.mark.parametrize(("mark", "most", "ahead"), [(MOST, 300, 236), (READING, 100, 100), (AHEAD, 50, 100)])
def test_no_more_is_read_ahead_than_there_is_room_for(
    client: Client, mark: int, most: int, ahead: int
) -> None:
    client.marks[mark] = most
    for page in range(300, 364):
        assert client.has_read(page) == content_of(page)
    assert 50 <= PAGES - client.table.counts[ON_DEVICE] - 64 <= ahead


def test_an_access_to_a_missing_page_that_should_be_in_memory_is_left(client: Client, polled: Polled) -> None:
    client.table.put(300, DIRTY)
    client.read(300)
    polled.until(lambda: client.left)
    assert client.accesses_left() == [(300, 0)]
    assert client.states(300) == [DIRTY]


def test_a_first_touch_finds_zeros_and_makes_the_page_dirty(client: Client) -> None:
    client.table.put(300, ZERO)
    assert client.has_read(300) == bytes(PAGE_SIZE)
    assert client.states(300) == [DIRTY]
    assert not client.protected(300)
    assert client.lane.counted()[:5] == (1, 0, 0, 1, 0)
    assert client.order.victims(2) == [300]


def test_first_touches_in_order_are_filled_ahead_of(client: Client) -> None:
    for page in range(300, 500):
        client.table.put(page, ZERO)
    for page in (300, 301, 303, 307):
        assert client.has_read(page) == bytes(PAGE_SIZE)
    assert client.states(*range(300, 315)) == [DIRTY] * 15
    assert client.states(315) == [ZERO]
    assert client.lane.counted()[:5] == (4, 0, 0, 15, 0)
    assert len(client.order) == 15


def test_no_page_is_filled_that_has_been_touched(client: Client) -> None:
    for page in (300, 301, 302, 304):
        client.table.put(page, ZERO)
    client.has_read(300)
    client.has_read(301)
    assert client.states(300, 301, 302, 303, 304) == [DIRTY] * 3 + [ON_DEVICE, ZERO]


def test_no_more_is_filled_than_there_is_room_for(client: Client, polled: Polled) -> None:
    for page in range(300, 500):
        client.table.put(page, ZERO)
    client.marks[MOST] = 5
    for page in (300, 301, 303):
        client.has_read(page)
    assert client.states(*range(300, 306)) == [DIRTY] * 5 + [ZERO]
    client.read(305)
    polled.until(lambda: client.left)
    assert client.states(305) == [ZERO]


def test_victims_make_room_for_what_is_filled_ahead(client: Client) -> None:
    client.resident([*range(100, 140)], CLEAN)
    for page in range(300, 500):
        client.table.put(page, ZERO)
    client.marks[MOST] = 40
    client.lane.evict(40, 0)
    page = 300
    for window in (1, 2, 4, 8):
        client.has_read(page)
        page += window
    assert client.states(*range(300, 316)) == [DIRTY] * 15 + [ZERO]


def test_what_is_filled_ahead_ends_before_a_page_that_somebody_else_has_filled(client: Client) -> None:
    for page in range(300, 500):
        client.table.put(page, ZERO)
    client.resident([302], DIRTY)
    client.table.put(302, ZERO)
    client.has_read(300)
    client.has_read(301)
    assert client.states(300, 301, 302, 303) == [DIRTY, DIRTY, ZERO, ZERO]


def test_above_the_high_mark_clean_victims_leave_without_the_interpreter(
    client: Client, polled: Polled
) -> None:
    client.resident([100, 200, 400], CLEAN)
    client.marks[HIGH], client.marks[LOW] = 3, 2
    client.has_read(500)
    polled.until(lambda: not client.lane.offered)
    assert client.states(100, 200, 400, 500) == [ON_DEVICE, ON_DEVICE, CLEAN, CLEAN]


def test_above_the_high_mark_dirty_victims_are_got_ready_without_the_interpreter(
    client: Client, polled: Polled
) -> None:
    client.resident([400, 100, 200], DIRTY)
    client.marks[HIGH], client.marks[LOW] = 3, 1
    with AlignedBuffer(64 * PAGE_SIZE) as buffer:
        client.lane.lend(buffer.view)
        client.has_read(500)
        polled.until(lambda: client.lane.is_ready)
        assert client.lane.take() == ([(100, 1, 0), (200, 1, 1), (400, 1, 2)], [])
    assert client.calls


def test_the_interpreter_is_asked_once_for_a_buffer(client: Client, polled: Polled) -> None:
    client.resident([100], DIRTY)
    assert not client.lane.wants_buffer
    client.lane.evict(1, 0)
    assert client.lane.wants_buffer
    polled.until(lambda: client.calls)
    polled.poll(OFTEN)
    assert (client.calls, client.lane.is_ready) == (1, False)
    with AlignedBuffer(PAGE_SIZE) as buffer:
        client.lane.lend(buffer.view)
        assert not client.lane.wants_buffer
        polled.until(lambda: client.lane.is_ready)
        assert (client.calls, client.lane.take()) == (2, ([(100, 1, 0)], []))


def test_pages_that_are_to_be_given_back_are_so_at_once_on_demand(client: Client) -> None:
    client.resident([100, 200, 300], CLEAN)
    client.lane.evict(3, 0)
    client.lane.give_back(2)
    assert client.lane.offered == 1
    assert client.states(100, 200, 300) == [ON_DEVICE, ON_DEVICE, CLEAN]


def test_no_more_events_are_read_before_those_that_were_left_are_taken(
    client: Client, polled: Polled
) -> None:
    client.on_attention = lambda: None
    client.marks[MOST] = 0
    client.read(300)
    polled.until(lambda: client.calls)
    client.read(500)
    client.waits()
    polled.until(lambda: client.calls > 1)
    assert [page for page, _, _ in client.lane.left()] == [300]
    client.on_attention = client.take
    polled.until(lambda: client.left)
    assert [page for page, _, _ in client.left] == [500]


def test_an_access_is_left_when_too_many_are_being_read(polled: Polled) -> None:
    client = polled.client(pages=(SINGLE_READS + 1) * 65)
    device = PipeDevice(client)
    for page in range(0, client.pages - 65, 65):
        client.read(page)
    polled.until(lambda: client.lane.in_flight == SINGLE_READS)
    client.read(client.pages - 65)
    polled.until(lambda: client.left)
    assert client.accesses_left() == [(client.pages - 65, 0)]
    assert client.table.counts[READING_STATE] == SINGLE_READS
    client.lane.close()
    device.close()


def test_the_interpreter_is_told_when_accesses_wait_for_room_and_a_page_has_come(
    client: Client, polled: Polled
) -> None:
    client.has_read(300)
    assert client.calls == 0
    client.marks[DEFERRED] = 1
    client.has_read(500)
    assert client.calls == 1


def test_the_interpreter_is_told_when_more_is_in_memory_than_can_leave_without_it(
    client: Client, polled: Polled
) -> None:
    client.resident([100, 300], DIRTY)
    client.order.victims(2)
    client.marks[HIGH] = client.marks[LOW] = 1
    assert client.calls == 0
    polled.until(client.write(500, b"new").ended)
    polled.until(lambda: client.calls)
    assert client.lane.wants_buffer


def test_nothing_leaves_of_a_client_whose_lane_was_turned_off_when_a_read_comes(
    client: Client, polled: Polled, device: PipeDevice
) -> None:
    """It is being detached: all of it is on its way in."""
    client.resident([100, 200], CLEAN)
    client.resident([400], DIRTY)
    access = client.read(500)
    polled.until(lambda: client.lane.in_flight)
    client.marks[HIGH] = client.marks[LOW] = 0
    client.lane.turn(on=False)
    device.answer(content_of(500))
    polled.until(access.ended)
    assert (client.lane.offered, client.lane.chosen) == (0, 0)
    assert client.states(100, 200, 400, 500) == [CLEAN, CLEAN, DIRTY, CLEAN]


# Writes


def test_a_write_to_a_clean_page_is_let_through(client: Client, polled: Polled) -> None:
    client.resident([300], CLEAN)
    access = client.write(300, b"new")
    polled.until(access.ended)
    assert client.states(300) == [DIRTY]
    assert not client.protected(300)
    assert client.held(300) == b"new" + content_of(300)[3:]
    assert (client.left, client.lane.counted()[:2]) == ([], (1, 0))


def test_writes_in_order_are_let_through_ahead_of(client: Client, polled: Polled) -> None:
    client.resident([*range(300, 310)], CLEAN)
    for page in (300, 301, 303):
        polled.until(client.write(page, b"new").ended)
    assert client.states(*range(300, 310)) == [DIRTY] * 7 + [CLEAN] * 3
    assert [client.protected(page) for page in (306, 307)] == [False, True]
    assert (client.left, client.lane.counted()[0]) == ([], 3)


def test_writes_that_leave_out_pages_are_let_through_one_by_one(client: Client, polled: Polled) -> None:
    client.resident([*range(300, 310)], CLEAN)
    for page in (300, 302, 304):
        polled.until(client.write(page, b"new").ended)
    assert client.states(*range(300, 306)) == [DIRTY, CLEAN] * 3


def test_a_write_to_a_page_that_is_being_written_out_is_left(client: Client, polled: Polled) -> None:
    client.resident([300], CLEAN)
    client.table.put(300, WRITING)
    client.write(300, b"new")
    polled.until(lambda: client.left)
    assert client.accesses_left() == [(300, FLAG_WRITE | FLAG_WP)]
    assert client.states(300) == [WRITING]


# Pages that are given back


def test_clean_victims_are_given_back_while_nothing_else_is_to_be_done(
    client: Client, polled: Polled
) -> None:
    client.resident([100, 101, 102, 300], CLEAN)
    client.resident([500, 400], DIRTY)
    client.lane.evict(8, 0)
    assert (client.lane.offered, client.lane.chosen) == (4, 2)
    polled.until(lambda: not client.lane.offered)
    assert client.states(100, 101, 102, 300) == [ON_DEVICE] * 4
    assert resident_bytes(client.memfd) == 2 * PAGE_SIZE
    assert client.lane.counted()[4] == 4
    assert (len(client.order), len(client.store)) == (0, 0)
    assert client.has_read(101) == content_of(101)


def test_no_more_victims_are_chosen_than_asked_for(client: Client, polled: Polled) -> None:
    client.resident([100, 300, 500], CLEAN)
    client.lane.evict(2, 0)
    assert client.lane.offered == 2
    polled.until(lambda: not client.lane.offered)
    assert client.states(100, 300, 500) == [ON_DEVICE, ON_DEVICE, CLEAN]


def test_more_victims_are_given_back_than_are_remembered_at_a_time(client: Client, polled: Polled) -> None:
    client.resident(list(range(700)), CLEAN)
    while len(client.order):
        client.lane.evict(300, 0)
        polled.poll()
    polled.until(lambda: not client.lane.offered)
    assert client.table.counts[ON_DEVICE] == PAGES
    assert resident_bytes(client.memfd) == 0


def test_a_victim_that_is_written_to_stays(client: Client, polled: Polled) -> None:
    client.resident([100, 101, 102], CLEAN)
    client.lane.evict(3, 3)
    client.write(101, b"new")
    client.waits()
    polled.until(lambda: not client.lane.offered)
    assert client.states(100, 101, 102) == [ON_DEVICE, DIRTY, ON_DEVICE]
    assert client.held(101) == b"new" + content_of(101)[3:]
    assert client.order.victims(3) == [101]
    assert [page in client.store for page in (100, 101, 102)] == [True, False, True]


def test_an_access_with_no_room_takes_a_victims_place(client: Client, polled: Polled) -> None:
    client.resident([100, 200, 300], CLEAN)
    client.marks[MOST] = 3
    client.lane.evict(2, 0)
    access = client.read(500)
    client.waits()
    polled.until(access.ended)
    assert access.content == content_of(500)
    assert client.states(100, 500) == [ON_DEVICE, CLEAN]
    assert client.left == []


def test_a_page_that_comes_back_soon_is_the_last_to_leave_again(client: Client, polled: Polled) -> None:
    client.resident([100, 300], CLEAN)
    client.lane.evict(1, 0)
    polled.until(lambda: not client.lane.offered)
    client.has_read(100)
    client.has_read(500)
    client.lane.evict(2, 0)
    polled.until(lambda: not client.lane.offered)
    assert client.states(100, 300, 500) == [CLEAN, ON_DEVICE, ON_DEVICE]
    client.lane.evict(1, 0)
    polled.until(lambda: not client.lane.offered)
    assert client.states(100) == [ON_DEVICE]


def test_victims_that_are_called_back_stay(client: Client, polled: Polled) -> None:
    client.resident([100, 300], CLEAN)
    client.lane.evict(2, 2)
    client.lane.recall()
    assert client.lane.offered == 0
    polled.poll(OFTEN)
    assert client.states(100, 300) == [CLEAN, CLEAN]
    assert sorted(client.order.victims(3)) == [100, 300]
    assert len(client.store) == 0


def test_as_many_victims_as_are_asked_for_go_to_the_ram_tier(client: Client, polled: Polled) -> None:
    client.resident([100, 101, 300], CLEAN)
    client.lane.evict(3, 2)
    polled.until(lambda: not client.lane.offered)
    assert [page in client.store for page in (100, 101, 300)] == [True, True, False]
    client.lane.use(-1, 0, 0.0)
    assert client.has_read(101) == content_of(101)


def test_the_interpreter_is_told_of_room_when_accesses_wait_for_it(client: Client, polled: Polled) -> None:
    client.resident([100], CLEAN)
    client.marks[DEFERRED] = 1
    client.lane.evict(1, 0)
    polled.until(lambda: client.calls)
    assert client.states(100) == [ON_DEVICE]


# Page-outs


def test_dirty_victims_are_protected_and_read_and_zero_ones_given_back(client: Client) -> None:
    client.resident([300, 301, 104, 100, 101, 103], DIRTY, lambda page: content_of(page, 2))
    client.resident([102, 302], DIRTY, lambda _page: bytes(PAGE_SIZE))
    with AlignedBuffer(64 * PAGE_SIZE) as buffer:
        runs, busy = client.got_ready(buffer, 8)
        assert (runs, busy) == ([(100, 2, 0), (103, 2, 3), (300, 2, 5)], [])
        for first, count, place in runs:
            for index in range(count):
                page, at = first + index, (place + index) * PAGE_SIZE
                assert buffer.view[at : at + PAGE_SIZE] == content_of(page, 2)
                assert client.table.checksum[page] == page_checksum(memoryview(content_of(page, 2)))
                assert client.states(page) == [WRITING]
                assert client.protected(page)
    assert client.states(102, 302) == [ZERO, ZERO]
    assert (client.held(102), client.held(302)) == (None, None)
    assert client.lane.counted()[5] == 2
    assert client.lane.counted()[5] == 0


def test_victims_that_cannot_be_protected_now_are_busy(client: Client) -> None:
    client.resident([100, 300, 301], DIRTY)
    client.uffd.unregister(client.start + 300 * PAGE_SIZE, 2 * PAGE_SIZE)
    with AlignedBuffer(64 * PAGE_SIZE) as buffer:
        assert client.got_ready(buffer, 3) == ([(100, 1, 0)], [300])
        assert client.got_ready(buffer) == ([], [301])
    assert client.states(100, 300, 301) == [WRITING, DIRTY, DIRTY]


def test_victims_whose_content_cannot_be_read_go_back_into_the_order(client: Client) -> None:
    client.resident([100, 700], DIRTY)
    client.lane.evict(2, 0)
    os.ftruncate(client.memfd, 200 * PAGE_SIZE)
    with AlignedBuffer(64 * PAGE_SIZE) as buffer:
        with pytest.raises(OSError, match="cannot be read"):
            client.got_ready(buffer)
        assert not client.lane.is_ready
    assert client.states(100, 700) == [DIRTY, DIRTY]
    assert sorted(client.order.victims(3)) == [100, 700]


def test_no_more_victims_are_got_ready_than_the_buffer_holds(client: Client) -> None:
    client.resident([*range(100, 170), 300], DIRTY)
    with AlignedBuffer(80 * PAGE_SIZE) as buffer:
        assert client.got_ready(buffer, 71) == ([(100, 64, 0)], [])
        assert client.got_ready(buffer) == ([(164, 6, 0), (300, 1, 6)], [])
    with AlignedBuffer(PAGE_SIZE) as buffer:
        client.resident([500, 501], DIRTY)
        assert client.got_ready(buffer, 2) == ([(500, 1, 0)], [])


def test_so_many_writes_leave_together_while_the_device_is_read_as_a_slice_has(
    client: Client, polled: Polled, device: PipeDevice
) -> None:
    pages = list(range(100, 100 + 4 * (SLICE_RUNS + 4), 4))
    client.resident(pages, DIRTY)
    client.read(1000)
    polled.until(lambda: client.lane.in_flight)
    with AlignedBuffer(64 * PAGE_SIZE) as buffer:
        first, _ = client.got_ready(buffer, len(pages))
        client.lane.lend(buffer.view)
        polled.until(lambda: client.lane.is_ready)
        then, _ = client.lane.take()
    assert [page for page, _, _ in first] == pages[:SLICE_RUNS]
    assert [page for page, _, _ in then] == pages[SLICE_RUNS:]
    device.answer(content_of(1000))


def test_more_writes_leave_together_while_nothing_is_read(client: Client) -> None:
    pages = list(range(100, 100 + 4 * (SLICE_RUNS + 4), 4))
    client.resident(pages, DIRTY)
    with AlignedBuffer(64 * PAGE_SIZE) as buffer:
        together, _ = client.got_ready(buffer, len(pages))
    assert [page for page, _, _ in together] == pages


def test_no_more_victims_are_got_ready_than_may_be_on_their_way(client: Client, polled: Polled) -> None:
    client.resident([100, 101, 102, 300], DIRTY)
    client.marks[WRITABLE] = 2
    with AlignedBuffer(64 * PAGE_SIZE) as buffer:
        assert client.got_ready(buffer, 4) == ([(100, 2, 0)], [])
        client.lane.lend(buffer.view)
        polled.poll(OFTEN)
        assert (client.lane.is_ready, client.lane.chosen) == (False, 2)
        client.lane.acknowledged([(100, 2, 0)], buffer.view, 0)
        polled.until(lambda: client.lane.is_ready)
        assert client.lane.take() == ([(102, 1, 0), (300, 1, 1)], [])


def test_more_victims_are_got_ready_when_more_may_be_on_their_way(client: Client, polled: Polled) -> None:
    """As when a server fails that has some, which do not count any more."""
    client.resident([100, 200, 300], DIRTY)
    client.marks[WRITABLE] = 1
    with AlignedBuffer(64 * PAGE_SIZE) as buffer:
        assert client.got_ready(buffer, 3) == ([(100, 1, 0)], [])
        client.lane.lend(buffer.view)
        polled.poll(OFTEN)
        client.marks[WRITABLE] = 3
        client.lane.look()
        polled.until(lambda: client.lane.is_ready)
        assert client.lane.take() == ([(200, 1, 0), (300, 1, 1)], [])


def test_what_is_ready_is_told_of_when_no_more_may_be_on_its_way(client: Client, polled: Polled) -> None:
    client.resident(list(range(0, 128, 2)), DIRTY)
    client.marks[DEFERRED] = 1
    with AlignedBuffer(64 * PAGE_SIZE) as buffer:
        client.lane.evict(64, 0)
        client.lane.lend(buffer.view)
        other = os.eventfd(1, os.EFD_NONBLOCK)
        polled.watch(other)
        polled.poll()  # the loop is busy: just one run is got ready
        assert (client.lane.is_ready, client.table.counts[WRITING]) == (False, 1)
        polled.unwatch(other)
        os.close(other)
        client.marks[WRITABLE] = 1
        polled.until(lambda: client.lane.is_ready)
        assert client.lane.take() == ([(0, 1, 0)], [])


def test_a_page_that_is_not_to_be_written_stays(client: Client) -> None:
    client.resident([100, 101, 102], DIRTY)
    client.marks[UNWRITABLE] = 101
    with AlignedBuffer(64 * PAGE_SIZE) as buffer:
        assert client.got_ready(buffer, 3) == ([(100, 1, 0), (102, 1, 1)], [])
    assert client.states(101) == [DIRTY]
    assert client.order.victims(3) == [101]


def test_victims_that_are_not_dirty_any_more_are_not_written(client: Client, polled: Polled) -> None:
    client.resident([100, 101, 102], DIRTY)
    client.lane.evict(3, 0)
    client.table.put(100, CLEAN)
    client.table.put(102, ZERO)
    with AlignedBuffer(64 * PAGE_SIZE) as buffer:
        assert client.got_ready(buffer) == ([(101, 1, 0)], [])
    polled.until(lambda: not client.lane.offered)
    assert client.states(100, 101, 102) == [ON_DEVICE, WRITING, ZERO]


def test_what_was_got_ready_is_called_back(client: Client, polled: Polled) -> None:
    client.resident([100, 101, 200, 300], DIRTY)
    client.uffd.unregister(client.start + 300 * PAGE_SIZE, PAGE_SIZE)
    with AlignedBuffer(64 * PAGE_SIZE) as buffer:
        client.lane.evict(4, 0)
        client.lane.lend(buffer.view)
        polled.until(lambda: client.lane.is_ready)
        client.table.put(101, REWRITTEN)
        client.lane.recall()
        assert not client.lane.is_ready
        assert client.lane.take() == ([], [])
    assert client.states(100, 101, 200, 300) == [DIRTY] * 4
    assert sorted(client.order.victims(5)) == [100, 101, 200, 300]


@pytest.mark.parametrize("later", [[200, 301, 600], [1, 2], [700, 800], [99, 101, 299, 501]])
def test_victims_that_are_chosen_later_are_got_ready_among_those_before(
    client: Client, later: list[int]
) -> None:
    client.resident([300, 100, 500], DIRTY)
    client.lane.evict(3, 0)
    client.resident(later, DIRTY)
    with AlignedBuffer(64 * PAGE_SIZE) as buffer:
        runs, _ = client.got_ready(buffer, 5)
    pages = [page for first, count, _ in runs for page in range(first, first + count)]
    assert pages == sorted([100, 300, 500, *later])


def test_a_few_victims_wait_until_nothing_else_is_to_be_done(client: Client, polled: Polled) -> None:
    client.resident([100, 101, 300], DIRTY)
    client.marks[HIGH] = client.pages - 8 * 4
    other = os.eventfd(1, os.EFD_NONBLOCK)
    polled.watch(other)
    with AlignedBuffer(64 * PAGE_SIZE) as buffer:
        client.lane.evict(3, 0)
        client.lane.lend(buffer.view)
        polled.poll()
        assert client.states(100, 101, 300) == [DIRTY] * 3
        client.resident([500], DIRTY)
        client.lane.evict(1, 0)
        polled.poll()
        assert client.states(100, 101, 300) == [WRITING, WRITING, DIRTY]
        polled.unwatch(other)
        os.close(other)
        polled.until(lambda: client.lane.is_ready)
        assert client.lane.take() == ([(100, 2, 0), (300, 1, 2), (500, 1, 3)], [])


def test_a_buffer_that_nothing_is_in_is_given_up(client: Client, polled: Polled) -> None:
    with AlignedBuffer(PAGE_SIZE) as buffer:
        client.lane.lend(buffer.view)
        assert client.lane.give_up_buffer()
        assert not client.lane.give_up_buffer()
        client.resident([100], DIRTY)
        client.lane.evict(1, 0)
        client.lane.lend(buffer.view)
        polled.until(lambda: client.lane.is_ready)
        assert not client.lane.give_up_buffer()
        assert client.lane.take() == ([(100, 1, 0)], [])


def test_there_is_one_buffer_at_a_time(client: Client) -> None:
    with AlignedBuffer(PAGE_SIZE) as buffer:
        client.lane.lend(buffer.view)
        with pytest.raises(ValueError, match="there is a buffer"):
            client.lane.lend(buffer.view)
        client.lane.recall()
        client.lane.lend(buffer.view)
        client.lane.close()


def test_written_pages_are_given_back_but_those_that_were_written_to_meanwhile(
    client: Client, polled: Polled
) -> None:
    client.resident([100, 101, 102, 300], DIRTY)
    with AlignedBuffer(64 * PAGE_SIZE) as buffer:
        runs, _ = client.got_ready(buffer, 4)
        client.table.put(101, REWRITTEN)
        client.lane.acknowledged(runs, buffer.view, 1)
    assert client.states(101) == [DIRTY]
    assert client.order.victims(1) == [101]
    polled.until(lambda: not client.lane.offered)
    assert client.states(100, 102, 300) == [ON_DEVICE] * 3
    assert (client.held(100), client.held(101)) == (None, content_of(101))
    assert [page in client.store for page in (100, 101, 102, 300)] == [True, False, False, False]
    assert client.lane.counted()[4] == 3
    assert client.has_read(300) == content_of(300)


def test_more_written_pages_are_given_back_than_are_remembered_at_a_time(
    client: Client, polled: Polled
) -> None:
    client.resident(list(range(700)), DIRTY)
    taken: list[tuple[int, int, int]] = []
    with AlignedBuffer(64 * PAGE_SIZE) as buffer:
        while len(client.order) or client.lane.chosen:
            runs, _ = client.got_ready(buffer, 50)
            taken += [(first, count, 0) for first, count, _ in runs]
        for run in taken:
            client.lane.acknowledged([run], buffer.view, 0)
    polled.until(lambda: not client.lane.offered)
    assert client.table.counts[ON_DEVICE] == PAGES
    assert resident_bytes(client.memfd) == 0
    assert client.lane.counted()[4] == 700
    assert len(client.store) == 0


@pytest.mark.parametrize("pages", [0, 1, 64, 150])
def test_checksums_are_those_of_whole_pages(client: Client, pages: int) -> None:
    content = memoryview(b"".join(content_of(page) for page in range(pages)) + b"rest")
    assert client.lane.checksums(content) == [page_checksum(memoryview(content_of(n))) for n in range(pages)]


# The hub


def test_a_lane_that_is_closed_with_reads_in_flight_touches_nothing_any_more(
    client: Client, polled: Polled, device: PipeDevice
) -> None:
    other = polled.client()
    client.read(300)
    client.waits()
    polled.poll()
    assert client.lane.in_flight == 1
    client.resident([700, 800], CLEAN)
    client.lane.evict(2, 0)
    before = bytes(client.table.state)
    client.lane.close()
    device.answer(content_of(300))
    assert other.has_read(300) == content_of(300)
    assert bytes(client.table.state) == before
    assert client.held(300) is None
    assert client.order.victims(3) == [700, 800]
    client.lane.close()


def test_events_of_a_lane_that_is_turned_off_are_left_to_the_loop(client: Client, polled: Polled) -> None:
    client.lane.turn(on=False)
    access = client.read(300)
    polled.until(lambda: polled.told)
    assert polled.told[0] == (client.uffd.fileno(), select.EPOLLIN)
    assert client.uffd.state.pending_faults == 1
    client.lane.turn(on=True)
    polled.until(access.ended)
    assert access.content == content_of(300)


@pytest.mark.parametrize("may_look", [False, True])
@pytest.mark.parametrize("seconds", [0.0, 0.02])
def test_a_poll_ends_in_time(polled: Polled, seconds: float, may_look: bool) -> None:
    began, polls = time.monotonic(), 0
    while not polls or time.monotonic() - began < seconds:
        assert polled.hub.poll(seconds, may_look) == []
        polls += 1
    assert time.monotonic() - began < DEADLINE_SECONDS
    assert polls <= 3  # one that a signal ends, as of a ring that was closed before, is not the last


def test_a_poll_ends_in_time_while_a_read_is_in_flight(
    client: Client, polled: Polled, device: PipeDevice
) -> None:
    client.read(300)
    polled.until(lambda: client.lane.in_flight)
    began = time.monotonic()
    assert polled.hub.poll(0.02, False) == []
    assert 0.02 <= time.monotonic() - began < DEADLINE_SECONDS


def test_a_poll_tells_of_other_descriptors(client: Client, polled: Polled) -> None:
    other = os.eventfd(1, os.EFD_NONBLOCK)
    polled.watch(other)
    access = client.read(300)
    client.waits()
    assert polled.hub.poll(-1.0, False) == [(other, select.EPOLLIN)]
    assert client.states(300) != [ON_DEVICE]
    os.close(other)
    polled.until(access.ended)


def test_a_glance_answers_accesses_and_leaves_everything_else_to_the_next_poll(
    client: Client, polled: Polled
) -> None:
    other = os.eventfd(1, os.EFD_NONBLOCK)
    polled.watch(other)
    client.table.put(200, ZERO)
    touch, access = client.read(200), client.read(300)
    client.waits(2)
    end = time.monotonic() + DEADLINE_SECONDS
    while not (touch.ended() and access.ended()):
        assert time.monotonic() < end
        polled.hub.glance()
    assert (touch.content, access.content) == (bytes(PAGE_SIZE), content_of(300))
    assert client.calls == 0
    assert (other, select.EPOLLIN) in polled.hub.poll(0, False)
    os.close(other)


def test_a_glance_leaves_to_the_next_poll_what_needs_the_interpreter(client: Client, polled: Polled) -> None:
    client.marks[MOST] = 0
    client.read(300)
    client.waits()
    polled.hub.glance()
    assert client.calls == 0
    polled.poll()
    assert client.accesses_left() == [(300, 0)]


def test_every_lane_that_needs_the_interpreter_is_attended_to(polled: Polled) -> None:
    first, second, third = (polled.client() for _ in range(3))
    for client in (first, third):
        client.marks[MOST] = 0
        client.read(300)
        client.waits()
    polled.until(lambda: first.left and third.left)
    assert (first.calls, second.calls, third.calls) == (1, 0, 1)


def test_a_lane_that_another_ones_callback_closes_is_not_attended_to(polled: Polled) -> None:
    first, second, third = (polled.client() for _ in range(3))
    for client in (first, second, third):
        client.marks[MOST] = 0
        client.read(300)
        client.waits()
    first.on_attention = second.lane.close
    assert polled.hub.poll(0, False) == [(polled.hub.fileno(), select.EPOLLIN)]
    polled.hub.attend()
    assert (first.calls, second.calls, third.calls) == (1, 0, 1)
    assert third.accesses_left() == [(300, 0)]


def test_a_callback_that_fails_keeps_no_other_lane_from_being_attended_to(polled: Polled) -> None:
    first, second = polled.client(), polled.client()
    for client in (first, second):
        client.marks[MOST] = 0
        client.read(300)
        client.waits()

    def fail() -> None:
        raise RuntimeError("failed")

    first.on_attention = fail
    polled.hub.poll(0, False)
    with pytest.raises(RuntimeError, match="failed"):
        polled.hub.attend()
    first.on_attention = first.take
    polled.until(lambda: second.left)


def test_an_event_loop_that_waits_with_a_hub_goes_on_as_ever(tmp_path: Path) -> None:
    async def main() -> None:
        polled = OnLoop(tmp_path)
        client = polled.client()
        access = client.read(300)
        await polled.comes(access.ended)
        assert access.content == content_of(300)
        client.marks[MOST] = 0
        client.write(500, b"new")
        await polled.comes(lambda: client.left)
        assert client.accesses_left() == [(500, FLAG_WRITE)]
        other, readable = os.eventfd(1, os.EFD_NONBLOCK), asyncio.Event()
        asyncio.get_running_loop().add_reader(other, readable.set)
        async with asyncio.timeout(DEADLINE_SECONDS):
            await readable.wait()
        asyncio.get_running_loop().remove_reader(other)
        os.close(other)
        assert polled.told == []
        client.lane.turn(on=False)
        client.read(700)
        await polled.comes(lambda: polled.told)
        polled.close()

    with asyncio.Runner(loop_factory=eventloop.DataPlaneLoop) as runner:
        runner.run(main())


def test_accesses_are_answered_between_two_readers_of_the_loop(tmp_path: Path) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        polled = OnLoop(tmp_path)
        client = polled.client()
        client.table.put(200, ZERO)
        readable = [os.eventfd(1, os.EFD_NONBLOCK) for _ in range(2)]
        touches: list[Access] = []
        answered: list[bool] = []

        def read() -> None:
            if not touches:
                touches.append(client.read(200))
                client.waits()
            else:
                touches[0].join(DEADLINE_SECONDS)
                answered.append(touches[0].ended())
            eventloop.remove_reader(loop, readable[len(answered)])

        for descriptor in readable:
            eventloop.add_reader(loop, descriptor, read)
        await polled.comes(lambda: answered)
        assert answered == [True]
        for descriptor in readable:
            os.close(descriptor)
        polled.close()

    with asyncio.Runner(loop_factory=eventloop.DataPlaneLoop) as runner:
        runner.run(main())


def test_a_descriptor_has_one_lane(client: Client) -> None:
    with pytest.raises(ValueError, match="has a lane"):
        client.new_lane()


def test_a_queue_that_is_too_short_is_refused(polled: Polled) -> None:
    assert COMPILED is not None
    with pytest.raises(ValueError, match="too short"):
        COMPILED.hub(polled.epoll.fileno(), Ring(16))


# What nobody should do, and what must do no harm all the same


class Number:
    """A page's number that something happens along with."""

    def __init__(self, page: int, happens: Callable[[], object]) -> None:
        self._page = page
        self._happens = happens

    def __int__(self) -> int:
        self._happens()
        return self._page


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_a_lane_that_is_closed_does_nothing(client: Client, polled: Polled) -> None:
    client.resident([100, 101], CLEAN)
    client.resident([200], DIRTY)
    client.lane.evict(1, 0)
    before = bytes(client.table.state), len(client.order)
    client.lane.close()
    opened = descriptors()
    client.lane.turn(on=True)
    client.use_file()
    assert descriptors() == opened
    client.lane.evict(3, 3)
    assert client.lane.withdraw() == []
    client.lane.give_back(10)
    client.lane.recall()
    assert not client.lane.join(300, True)
    with AlignedBuffer(PAGE_SIZE) as buffer:
        client.lane.lend(buffer.view)
        assert (client.lane.wants_buffer, client.lane.is_ready) == (False, False)
        assert client.lane.take() == ([], [])
        client.lane.acknowledged([(200, 1, 0)], buffer.view, 1)
    assert (client.lane.left(), client.lane.back()) == ([], [])
    assert (client.lane.offered, client.lane.in_flight, client.lane.chosen) == (0, 0, 0)
    client.lane.close()
    polled.poll()
    assert (bytes(client.table.state), len(client.order)) == (before[0], before[1] + 1)
    assert len(client.store) == 0


@pytest.mark.parametrize("page", [-1, PAGES, 1 << 40])
def test_pages_that_are_not_the_clients_are_not_acknowledged(client: Client, page: int) -> None:
    with (
        AlignedBuffer(64 * PAGE_SIZE) as buffer,
        pytest.raises(IndexError, match=f"1 pages from {page} on"),
    ):
        client.lane.acknowledged([(page, 1, 0)], buffer.view, 1)


@pytest.mark.parametrize(
    "run", [(100, 2, 1), (100, 1, -1), (100, -1, 0), (PAGES - 1, 2, 0), (100, 1, 1 << 30)]
)
def test_runs_that_the_buffer_does_not_hold_are_not_acknowledged(
    client: Client, run: tuple[int, int, int]
) -> None:
    client.resident([100, 101], DIRTY)
    with AlignedBuffer(2 * PAGE_SIZE) as buffer:
        client.got_ready(buffer, 2)
        with pytest.raises(IndexError, match="pages into 2"):
            client.lane.acknowledged([run], buffer.view, 2)
    assert client.states(100, 101) == [WRITING, WRITING]
    assert len(client.store) == 0


def test_only_memory_that_may_be_written_to_is_read_into(client: Client, polled: Polled) -> None:
    client.resident([100], DIRTY)
    client.lane.evict(1, 0)
    content = bytes(PAGE_SIZE)
    with pytest.raises(BufferError):
        client.lane.lend(memoryview(content))
    with pytest.raises(ValueError, match="aligned"):
        client.lane.lend(memoryview(bytearray(PAGE_SIZE + 1))[1:])
    with pytest.raises(ValueError, match="no page"):
        client.lane.lend(memoryview(bytearray(PAGE_SIZE - 8)))
    polled.poll(OFTEN)
    assert content == bytes(PAGE_SIZE)
    assert (client.lane.wants_buffer, client.states(100)) == (True, [DIRTY])


def test_a_lane_that_is_closed_in_the_middle_of_a_list_goes_no_further(client: Client) -> None:
    client.resident([100, 101], DIRTY)
    closing: Any = Number(101, client.lane.close)
    with AlignedBuffer(2 * PAGE_SIZE) as buffer:
        runs, _ = client.got_ready(buffer, 1)
        client.lane.acknowledged([*runs, (closing, 1, 1)], buffer.view, 0)
    assert client.states(100, 101) == [CLEAN, DIRTY]


def test_reads_that_fail_are_left_to_the_interpreter_when_nobody_takes_those_before(polled: Polled) -> None:
    client = polled.client(32 * 65)
    client.on_attention = lambda: None
    os.truncate(client.file, 0)
    asked = 0
    while not (left := client.lane.left()):
        page = asked % 32 * 65
        if asked < 32:
            client.read(page)
        else:  # it asks again
            client.table.put(page, ON_DEVICE)
            client.uffd.wake(client.start + page * PAGE_SIZE, PAGE_SIZE)
        asked += 1
        client.waits()
        polled.until(lambda: not client.lane.in_flight and not client.uffd.state.pending_faults)
    assert asked == GIVEN_BACK + 1
    assert [page for page, _, _ in left] == [asked % 32 * 65 - 65]
    assert len(client.lane.back()) == GIVEN_BACK


@pytest.mark.parametrize(
    "changed",
    [
        {"counts": array("q", [0] * (STATE_COUNT - 1))},
        {"marks": array("q", [0] * AHEAD)},
        {"state": memoryview(bytearray(PAGES - 1))},
        {"checksum": memoryview(bytearray(4 * PAGES - 4)).cast("I")},
        {"order": PAGES - 1},
        {"order": PAGES + 1},
        {"streams": PAGES - 1},
    ],
    ids="".join,
)
def test_arrays_that_do_not_fit_are_refused(client: Client, changed: dict[str, Any]) -> None:
    client.lane.close()
    assert COMPILED is not None
    if "order" in changed:
        changed = {"order": COMPILED.order(changed["order"])}
    if "streams" in changed:
        changed = {"streams": COMPILED.streams(changed["streams"])}
    with pytest.raises(ValueError, match="do not fit"):
        client.new_lane(**changed)


@pytest.mark.parametrize(
    "name", ["hub", "state", "checksum", "counts", "marks", "store", "order", "streams", "zero_ahead"]
)
def test_a_lane_has_all_that_it_works_on(client: Client, name: str) -> None:
    client.lane.close()
    with pytest.raises(TypeError):
        client.new_lane(**{name: None})
    with pytest.raises(TypeError):
        type(client.lane).__new__(type(client.lane))


def test_a_lane_is_made_once(client: Client, polled: Polled, device: PipeDevice) -> None:
    access = client.read(300)
    polled.until(lambda: client.lane.in_flight)
    client.lane.__init__()  # type: ignore[misc]
    assert client.lane.in_flight == 1
    device.answer(content_of(300))
    polled.until(access.ended)
    assert client.states(300) == [CLEAN]


def test_what_a_lane_works_on_stays_until_it_is_closed(client: Client) -> None:
    client.lane.close()
    file = mmap.mmap(-1, 5 * PAGES)
    storage = memoryview(file)
    client.lane = client.new_lane(state=storage[4 * PAGES :], checksum=storage[: 4 * PAGES].cast("I"))
    storage.release()
    with pytest.raises(BufferError):
        file.close()
    with pytest.raises(BufferError):
        client.marks.append(0)
    client.lane.close()
    file.close()
    client.marks.append(0)


def test_a_lane_needs_a_descriptor(client: Client) -> None:
    with pytest.raises(ValueError, match="-1 is no descriptor"):
        client.new_lane(uffd=-1)


def test_a_lane_that_comes_after_one_with_reads_in_flight_does_not_get_their_answers(
    client: Client, polled: Polled, device: PipeDevice
) -> None:
    access = client.read(300)
    polled.until(lambda: client.lane.in_flight)
    client.lane.close()
    client.lane = client.new_lane()  # at the place of the older one, perhaps
    client.lane.turn(on=True)
    device.answer(content_of(300))
    assert client.states(300) == [READING_STATE]
    assert (client.lane.in_flight, client.lane.back(), access.ended()) == (0, [], False)
    client.use_file()
    client.table.put(300, ON_DEVICE)
    client.uffd.wake(client.start, PAGES * PAGE_SIZE)
    polled.until(access.ended)
    assert access.content == content_of(300)


class PlainRing(Ring):
    """A ring of a kernel that lets nothing be registered with it, as where memory must not be locked."""

    def register_memory(self, *areas: tuple[int, int]) -> bool:
        return False

    def register_file(self, descriptor: int) -> int | None:
        return None


def test_pages_come_where_nothing_can_be_registered(tmp_path: Path) -> None:
    polled = Polled(tmp_path, PlainRing)
    client = polled.client()
    assert client.has_read(100) == content_of(100)
    assert in_runs(client, 300, 64) == (64, [])
    polled.until(lambda: client.states(*range(300, 364)) == [CLEAN] * 64)
    assert all(client.held(page) == content_of(page) for page in range(300, 364))
    polled.close()


def test_more_files_are_read_than_are_registered(polled: Polled) -> None:
    clients = [polled.client(64) for _ in range(FILES + 2)]
    assert all(client.has_read(7) == content_of(7) for client in clients)


def test_files_that_are_read_no_more_are_closed_once(client: Client) -> None:
    before = len(descriptors())
    for _ in range(10):
        client.use_file()
    assert len(descriptors()) == before
    client.lane.use(-1, 0, 0.0)
    other = os.open(client.file, os.O_RDONLY)  # with the number that the last one had
    client.lane.use(-1, 0, 0.0)
    client.lane.close()
    assert os.pread(other, PAGE_SIZE, 0) == content_of(0)
    os.close(other)


def test_what_was_not_begun_by_the_hub_ends_nothing(tmp_path: Path) -> None:
    assert COMPILED is not None
    polled, ring = Polled(tmp_path), Ring(READS_IN_FLIGHT)
    polled.hub = COMPILED.hub(polled.epoll.fileno(), ring)
    polled.watch(polled.hub.fileno())
    client = polled.client()
    descriptor = os.open(client.file, os.O_RDONLY)
    with AlignedBuffer(PAGE_SIZE) as buffer:
        for token in (0, SINGLE_READS, SINGLE_READS + 32, 1 << 40, (1 << 64) - 2):
            ring.read(descriptor, buffer.address, PAGE_SIZE, 0, token)
        ring.submit()
        polled.poll(OFTEN)
        assert client.has_read(300) == content_of(300)
    os.close(descriptor)
    polled.close()


def test_no_other_thread_touches_a_lane_while_its_hub_waits(client: Client, polled: Polled) -> None:
    other = os.eventfd(0, os.EFD_NONBLOCK)
    polled.watch(other)
    waiting = threading.Thread(target=polled.hub.poll, args=(DEADLINE_SECONDS, False))
    waiting.start()
    try:
        with pytest.raises(RuntimeError, match="another thread"):
            while True:
                polled.hub.poll(0.0, False)
        for method in (client.lane.close, client.lane.recall, client.lane.withdraw, client.new_lane):
            with pytest.raises(RuntimeError, match="another thread"):
                method()
    finally:
        os.eventfd_write(other, 1)
        waiting.join()
        polled.unwatch(other)
        os.close(other)
