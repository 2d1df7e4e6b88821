"""A client changes parts of its paged memory, which are mappings of their own then."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator

import pytest

from farpage.attach.memory import REGISTER_MODE, ClientKind, ClientMemory
from farpage.kernel.memory import AlignedBuffer, address_of, create_memfd
from farpage.kernel.userfaultfd import Userfaultfd
from farpage.pager.memory import PagedMemory
from farpage.pager.table import PAGE_BYTES

PAGES = 64
FIRST, COUNT = 18, 8
"""A run that begins in one mapping and ends in the next one."""
PROT_READ = 1


def advised(mapping: mmap.mmap) -> None:
    mapping.madvise(mmap.MADV_RANDOM, 20 * PAGE_BYTES, 16 * PAGE_BYTES)


def read_only(mapping: mmap.mmap) -> None:
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert mprotect(address_of(mapping) + 20 * PAGE_BYTES, 16 * PAGE_BYTES, PROT_READ) == 0


@pytest.fixture(params=[advised, read_only])
def memory(request: pytest.FixtureRequest) -> Iterator[PagedMemory]:
    split: Callable[[mmap.mmap], None] = request.param
    memfd = create_memfd("client", PAGES * PAGE_BYTES)
    with mmap.mmap(memfd, PAGES * PAGE_BYTES) as mapping:
        uffd = Userfaultfd.create()
        uffd.handshake()
        start = address_of(mapping)
        uffd.register(start, PAGES * PAGE_BYTES, REGISTER_MODE)
        split(mapping)
        client = ClientMemory(
            kind=ClientKind.REGION,
            pid=os.getpid(),
            pidfd=os.pidfd_open(os.getpid()),
            uffd=uffd,
            memfd=memfd,
            start_address=start,
            length_bytes=PAGES * PAGE_BYTES,
            memfd_offset_bytes=0,
            remote_uffd=None,
        )
        yield PagedMemory(client)
        uffd.unregister(start, PAGES * PAGE_BYTES)
        client.close_descriptors()


def all_done(fill: Callable[[int, int], int]) -> None:
    page = FIRST
    while page < FIRST + COUNT:
        done = fill(page, FIRST + COUNT - page)
        assert done > 0
        page += done


def test_a_run_comes_in_across_them(memory: PagedMemory) -> None:
    with AlignedBuffer(COUNT * PAGE_BYTES) as content:
        content.view[:] = bytes(range(256)) * (len(content.view) // 256)
        all_done(
            lambda page, count: memory.copy_in(
                page, content.address + (page - FIRST) * PAGE_BYTES, count, protect=True
            )
        )
        found = bytearray(COUNT * PAGE_BYTES)
        memory.read_out(FIRST, memoryview(found))
        assert found == content.view
    assert memory.present_runs() == [(FIRST, COUNT)]


def test_a_run_is_filled_with_zeros_and_protected_across_them(memory: PagedMemory) -> None:
    all_done(memory.zero_in)
    assert memory.present_runs() == [(FIRST, COUNT)]
    assert memory.protect(FIRST, COUNT)
    assert memory.unprotect(FIRST, COUNT)
