from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator

import pytest

from farpage.attach.memory import AlreadyAttached, ClientKind, NotPageable, why_not_pageable
from farpage.attach.process import NoSharedMemory, SeveralMemories, close_process, open_process, take
from farpage.kernel.inject import ProcessNotFound, TraceRefused
from farpage.kernel.memory import PAGE_SIZE
from farpage.kernel.process import read_descriptors
from tests.integration.attach.scripted import Scripted
from tests.integration.attach.tiny_pager import TinyPager

PAGES = 64

MAKE_MEMORY = f"""
import hashlib, mmap, os
def make(name, pages, flags=mmap.MAP_SHARED):
    memfd = os.memfd_create(name)
    os.ftruncate(memfd, pages * {PAGE_SIZE})
    return memfd, mmap.mmap(memfd, pages * {PAGE_SIZE}, flags)
def digest(memory):
    return hashlib.sha256(memory).hexdigest()
"""


def own_descriptors() -> set[int]:
    return {file.number for file in read_descriptors(os.getpid())}


@pytest.fixture
async def process() -> AsyncIterator[Scripted]:
    async with Scripted() as scripted:
        await scripted.run(MAKE_MEMORY)
        yield scripted


@pytest.fixture
async def client(process: Scripted) -> Scripted:
    await process.run(f"small = make('small', 1); memfd, memory = make('ram', {PAGES})")
    await process.run(f"memory[:] = os.urandom({PAGES * PAGE_SIZE})")
    return process


async def test_the_memory_of_a_process_is_paged_out_and_in_and_left_as_it_was(client: Scripted) -> None:
    before = await client.run("digest(memory)")
    remote_before = read_descriptors(client.pid)
    memory = await asyncio.to_thread(open_process, client.pid)
    pager = TinyPager(memory)
    pager.start()
    for page in range(PAGES):
        pager.evict(page)
    assert pager.resident_pages() == []
    assert await client.run("digest(memory)") == before
    assert pager.faults >= PAGES
    for page in range(0, PAGES, 3):
        pager.evict(page)
    pager.stop()
    pager.restore_all()
    memory.unregister()
    await asyncio.to_thread(close_process, memory)
    assert read_descriptors(client.pid) == remote_before
    assert await client.run("digest(memory)") == before


async def test_what_was_found_is_described(client: Scripted) -> None:
    memory = await asyncio.to_thread(open_process, client.pid)
    assert (memory.kind, memory.pid) == (ClientKind.PROCESS, client.pid)
    assert memory.length_bytes == PAGES * PAGE_SIZE
    assert memory.memfd_offset_bytes == 0
    assert os.fstat(memory.memfd).st_ino == await client.run("os.fstat(memfd).st_ino")
    await asyncio.to_thread(close_process, memory)


async def test_a_process_can_be_attached_again_and_again(client: Scripted) -> None:
    before = own_descriptors()
    for _ in range(5):
        memory = await asyncio.to_thread(open_process, client.pid)
        memory.register()
        memory.unregister()
        await asyncio.to_thread(close_process, memory)
    assert own_descriptors() == before
    assert len(await client.run("memory[:4].hex()")) == 8


async def test_attaching_twice_is_refused(client: Scripted) -> None:
    first = await asyncio.to_thread(open_process, client.pid)
    second = await asyncio.to_thread(open_process, client.pid)
    first.register()
    with pytest.raises(AlreadyAttached) as caught:
        second.register()
    assert str(client.pid) in caught.value.cause
    await asyncio.to_thread(close_process, second)
    with pytest.raises(AlreadyAttached):
        await asyncio.to_thread(open_process, client.pid)
    small = await asyncio.to_thread(open_process, client.pid, "small")  # of which nothing is registered
    await asyncio.to_thread(close_process, small)
    first.unregister()
    await asyncio.to_thread(close_process, first)


SANDBOX_A_THREAD = """
import ctypes, threading
libc = ctypes.CDLL(None, use_errno=True)
class Statement(ctypes.Structure):
    _fields_ = [(name, getattr(ctypes, f"c_{kind}")) for name, kind in
                (("code", "ushort"), ("jt", "ubyte"), ("jf", "ubyte"), ("k", "uint"))]
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("statements", ctypes.POINTER(Statement))]
def sandboxed():
    # userfaultfd(2), number 323, kills the process (SECCOMP_RET_KILL_PROCESS); all else is allowed.
    kill, allow = (6, 0, 0, 0x80000000), (6, 0, 0, 0x7fff0000)
    statements = (Statement * 4)((0x20, 0, 0, 0), (0x15, 0, 1, 323), kill, allow)
    program = Program(4, statements)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.syscall(317, 1, 0, ctypes.byref(program)) == 0  # seccomp(2), SECCOMP_SET_MODE_FILTER
    reader, _ = os.pipe()
    inside.set()
    os.read(reader, 1)
inside = threading.Event()
threading.Thread(target=sandboxed, daemon=True).start()
inside.wait()
"""


async def test_a_process_with_a_sandboxed_thread_outlives_an_attachment(client: Scripted) -> None:
    await client.run(SANDBOX_A_THREAD)
    # The thread that has no filter computes, so the other one, which waits, is the better one to be used.
    await client.send("while True: pass")
    try:
        memory = await asyncio.to_thread(open_process, client.pid)
    except TraceRefused as refusal:
        pytest.skip(str(refusal))  # PTRACE_O_SUSPEND_SECCOMP needs CAP_SYS_ADMIN
    await asyncio.to_thread(close_process, memory)
    assert client.process.returncode is None


async def test_memory_whose_pages_cannot_be_freed_is_refused(process: Scripted) -> None:
    await process.run("import fcntl; memfd = os.memfd_create('ram', os.MFD_ALLOW_SEALING)")
    await process.run(
        f"os.ftruncate(memfd, {PAGES * PAGE_SIZE}); memory = mmap.mmap(memfd, {PAGES * PAGE_SIZE})"
    )
    await process.run("fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, 0x10)")  # F_SEAL_FUTURE_WRITE
    with pytest.raises(NotPageable, match="sealed against writing"):
        await asyncio.to_thread(open_process, process.pid)


def take_own(pid: int, number: int) -> int:
    pidfd = os.pidfd_open(pid)
    try:
        return take(pid, pidfd, number)
    finally:
        os.close(pidfd)


async def test_a_descriptor_that_may_only_be_read_is_not_taken_where_there_is_another(
    process: Scripted,
) -> None:
    await process.run(f"written, memory = make('ram', {PAGES})")
    await process.run("reading = os.open(f'/proc/self/fd/{written}', os.O_RDONLY)")
    await process.run("last = os.dup(written); os.dup2(reading, written); os.close(reading)")
    memory = await asyncio.to_thread(open_process, process.pid)
    assert fcntl.fcntl(memory.memfd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    await asyncio.to_thread(close_process, memory)


async def test_memory_of_huge_pages_is_refused(process: Scripted) -> None:
    try:
        await process.run("memfd = os.memfd_create('huge', os.MFD_HUGETLB)")
    except AssertionError as error:
        pytest.skip(str(error))
    memfd = take_own(process.pid, await process.run("memfd"))
    assert "huge pages" in (why_not_pageable(memfd) or "")
    os.close(memfd)


async def test_what_has_the_number_of_a_userfaultfd_that_the_process_has_closed_stays_open(
    client: Scripted,
) -> None:
    memory = await asyncio.to_thread(open_process, client.pid)
    number = memory.remote_uffd
    await client.run(f"os.close({number}); other = os.dup2(memfd, {number})")
    await asyncio.to_thread(close_process, memory)
    assert await client.run(f"os.fstat({number}).st_ino == os.fstat(memfd).st_ino")


async def test_memory_can_be_chosen_by_name_and_by_address(client: Scripted) -> None:
    small = await asyncio.to_thread(open_process, client.pid, "small")
    assert small.length_bytes == PAGE_SIZE
    again = await asyncio.to_thread(open_process, client.pid, hex(small.start_address))
    assert again.start_address == small.start_address
    for memory in (small, again):
        await asyncio.to_thread(close_process, memory)


async def test_a_name_that_is_not_there_is_answered_with_those_that_are(client: Scripted) -> None:
    with pytest.raises(NoSharedMemory) as caught:
        await asyncio.to_thread(open_process, client.pid, "rom")
    assert "'rom'" in caught.value.cause
    assert "small" in caught.value.advice
    assert "ram" in caught.value.advice


async def test_two_memories_of_one_size_have_to_be_chosen_from(process: Scripted) -> None:
    await process.run("one, two = make('one', 4), make('two', 4)")
    with pytest.raises(SeveralMemories) as caught:
        await asyncio.to_thread(open_process, process.pid)
    assert "one at 0x" in caught.value.cause
    assert "two at 0x" in caught.value.cause
    assert "--memory" in caught.value.advice


async def test_a_process_without_shared_memory_is_told_how_to_start_qemu(process: Scripted) -> None:
    await process.run("private = make('private', 4, mmap.MAP_PRIVATE)")
    with pytest.raises(NoSharedMemory, match="memory-backend-memfd"):
        await asyncio.to_thread(open_process, process.pid)


async def test_memory_whose_descriptor_was_closed_is_taken_from_the_mapping(process: Scripted) -> None:
    # A mmap object keeps its own duplicate, hence the C library.
    await process.run(
        "import ctypes; libc = ctypes.CDLL(None); libc.mmap.restype = ctypes.c_void_p\n"
        f"memfd = os.memfd_create('ram'); os.ftruncate(memfd, {4 * PAGE_SIZE})\n"
        f"address = libc.mmap(None, {4 * PAGE_SIZE}, 3, mmap.MAP_SHARED, memfd, ctypes.c_long(0))\n"
        "os.close(memfd)"
    )
    memory = await asyncio.to_thread(open_process, process.pid)
    assert memory.start_address == await process.run("address")
    assert os.fstat(memory.memfd).st_size == 4 * PAGE_SIZE
    await asyncio.to_thread(close_process, memory)


async def test_a_mapping_that_the_kernel_has_split_is_one_memory(process: Scripted) -> None:
    await process.run(
        f"memfd, memory = make('ram', 8); memory.madvise(mmap.MADV_DONTFORK, {PAGE_SIZE}, {PAGE_SIZE})"
    )
    memory = await asyncio.to_thread(open_process, process.pid)
    assert memory.length_bytes == 8 * PAGE_SIZE
    memory.register()
    memory.unregister()
    await asyncio.to_thread(close_process, memory)


@pytest.mark.parametrize("pid", [0, -1, 2**22 + 1])
def test_a_process_that_does_not_exist_is_an_error(pid: int) -> None:
    before = own_descriptors()
    with pytest.raises(ProcessNotFound, match=str(pid)):
        open_process(pid)
    assert own_descriptors() == before


async def test_closing_after_the_end_of_the_process_is_quiet(client: Scripted) -> None:
    before = own_descriptors()
    memory = await asyncio.to_thread(open_process, client.pid)
    client.process.kill()
    await client.process.wait()
    await asyncio.to_thread(close_process, memory)
    assert own_descriptors() <= before
