"""A pager that is killed when a page has just come in and been written to; prints what recovery does with it.

`python -m tests.integration.pager.killed_pager tier|device`, with `kill_after_copy.c` in LD_PRELOAD.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import sys
import tempfile
import threading
from array import array
from typing import NamedTuple

import numpy as np

from farpage.kernel.io_uring import Ring
from farpage.kernel.memory import address_of, create_memfd, resident_ranges
from farpage.kernel.userfaultfd import Mode, Userfaultfd
from farpage.pager.checksum import page_checksum
from farpage.pager.compiled import COMPILED, libraries
from farpage.pager.lane import AHEAD, HIGH, MOST, READING, READS_IN_FLIGHT, UNWRITABLE, WRITABLE
from farpage.pager.recovery import recover
from farpage.pager.states import ON_DEVICE, STATE_NAMES
from farpage.pager.table import PAGE_BYTES, PageTable

PAGES = 64
PAGE = 7
OLD, NEW = b"old " * (PAGE_BYTES // 4), b"new " * (PAGE_BYTES // 4)


class Client(NamedTuple):
    """What a pager has of the client."""

    uffd: Userfaultfd
    start: int
    memfd: int
    table: PageTable


def page_on(client: Client, way: str, written: int) -> None:
    """Answer the client's accesses until this process is killed."""
    uffd, table = client.uffd, client.table
    called = libraries()
    assert COMPILED is not None and called is not None
    epoll = select.epoll()
    hub = COMPILED.hub(epoll.fileno(), Ring(READS_IN_FLIGHT))
    marks = array("q", [0] * (AHEAD + 1))
    marks[MOST] = marks[READING] = marks[AHEAD] = marks[WRITABLE] = PAGES
    marks[HIGH], marks[UNWRITABLE] = 1 << 60, -1
    store = COMPILED.store(PAGES * PAGE_BYTES, *called)
    lane = COMPILED.lane(
        hub=hub,
        uffd=uffd.fileno(),
        start=client.start,
        memfd=client.memfd,
        memfd_offset=0,
        state=table.state,
        checksum=table.checksum,
        counts=table.counts,
        marks=marks,
        store=store,
        order=COMPILED.order(PAGES),
        streams=COMPILED.streams(PAGES),
        zero_ahead=COMPILED.read_ahead(256, gaps=True),
        write_ahead=COMPILED.read_ahead(32, gaps=False),
        on_attention=lambda: None,
    )
    if way == "tier":
        assert store.keep(PAGE, memoryview(OLD)) == 1
    else:
        with tempfile.TemporaryFile() as file:
            file.write(OLD * PAGES)
            file.flush()
            lane.use(file.fileno(), 0, 60.0)
    epoll.register(hub.fileno(), select.EPOLLIN)
    epoll.register(uffd.fileno(), select.EPOLLIN)
    lane.turn(on=True)
    ctypes.c_int.in_dll(ctypes.CDLL(os.environ["LD_PRELOAD"]), "kill_after_copy").value = written
    for _ in range(100):
        for descriptor, _ in hub.poll(0.1, False):
            if descriptor == hub.fileno():
                hub.attend()


def main(way: str) -> None:
    """Print whether the write was done, what the recovered table says of its page, and whether it is kept."""
    memfd = create_memfd("client", PAGES * PAGE_BYTES)
    mapping = mmap.mmap(memfd, PAGES * PAGE_BYTES)
    start = address_of(mapping)
    uffd = Userfaultfd.create()
    uffd.handshake()
    uffd.register(start, PAGES * PAGE_BYTES, Mode.MISSING | Mode.WP | Mode.MINOR)
    table = PageTable(PAGES, memoryview(mmap.mmap(-1, PAGES * 5)))
    table.restate(np.full(PAGES, ON_DEVICE, np.uint8))
    table.checksums[:] = page_checksum(memoryview(OLD))
    written, tell_written = os.pipe()
    pager = os.fork()
    if pager == 0:
        page_on(Client(uffd, start, memfd, table), way, written)
        os._exit(1)
    content = ctypes.create_string_buffer(NEW, PAGE_BYTES)
    copy = ctypes.CDLL(None).memcpy
    copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    access = threading.Thread(
        target=lambda: copy(start + PAGE * PAGE_BYTES, ctypes.addressof(content), PAGE_BYTES), daemon=True
    )
    access.start()
    access.join(10)
    os.write(tell_written, b"!")
    os.waitpid(pager, 0)
    present = np.zeros(PAGES, bool)
    for offset, length in resident_ranges(memfd, 0, PAGES * PAGE_BYTES):
        present[offset // PAGE_BYTES : (offset + length) // PAGE_BYTES] = True
    recovered = recover(table.states, present)
    kept = os.pread(memfd, PAGE_BYTES, PAGE * PAGE_BYTES) == NEW and PAGE not in recovered.surplus
    print("written" if not access.is_alive() else "waits", STATE_NAMES[recovered.states[PAGE]], kept)
    sys.stdout.flush()
    os._exit(0)


main(sys.argv[1])
