"""Kernel AIO against real files."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from farpage.kernel.aio import AsyncWrites
from farpage.kernel.memory import AlignedBuffer

MIB = 1 << 20


@pytest.fixture
def writes() -> Iterator[AsyncWrites]:
    writes = AsyncWrites(8)
    yield writes
    writes.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """Sixteen pages, all allocated, opened for direct I/O."""
    path = tmp_path / "pages"
    path.write_bytes(bytes(16 * 4096))
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:
        pytest.skip("this file system has no direct I/O")
    leave_page_cache(descriptor)
    yield descriptor
    os.close(descriptor)


def leave_page_cache(descriptor: int) -> None:
    """Write everything to the device; a write that finds a page in the page cache would have to wait."""
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def take(writes: AsyncWrites, count: int) -> dict[int, int]:
    """Wait for `count` completions on the eventfd; returns the results by token."""
    poll = select.poll()
    poll.register(writes.fileno(), select.POLLIN)
    found: dict[int, int] = {}
    while len(found) < count:
        assert poll.poll(10_000), "no completion"
        found.update(writes.completions())
    return found


def test_writes_of_one_submission_each_reach_their_place(writes: AsyncWrites, file: int) -> None:
    with AlignedBuffer(8 * 4096) as buffer:
        for page in range(8):
            buffer.view[page * 4096 : (page + 1) * 4096] = bytes((page + 1,)) * 4096
            assert writes.write(file, buffer.address + page * 4096, 4096, (15 - page) * 4096, page)
        assert not writes.write(file, buffer.address, 4096, 0, 8), "more than it takes"
        assert writes.submit() == []
        assert take(writes, 8) == dict.fromkeys(range(8), 4096)
        os.preadv(file, [buffer.view], 8 * 4096)
        assert [buffer.view[page * 4096] for page in range(8)] == [8, 7, 6, 5, 4, 3, 2, 1]


def test_one_that_may_wait_writes_into_a_hole(file: int) -> None:
    writes = AsyncWrites(8, waits=True)
    os.ftruncate(file, 0)
    os.ftruncate(file, 16 * 4096)
    with AlignedBuffer(4096) as buffer:
        buffer.view[:] = b"w" * 4096
        assert writes.write(file, buffer.address, 4096, 8 * 4096, 1)
        assert writes.submit() == []
        assert take(writes, 1) == {1: 4096}
        os.preadv(file, [buffer.view], 8 * 4096)
        assert bytes(buffer.view) == b"w" * 4096
    writes.close()


def test_one_write_that_is_refused_holds_up_no_other(writes: AsyncWrites, file: int) -> None:
    with AlignedBuffer(4096) as buffer:
        for token, descriptor in enumerate((file, 1 << 20, file)):
            assert writes.write(descriptor, buffer.address, 4096, 0, token)
        assert writes.submit() == [(1, -errno.EBADF)]
        assert take(writes, 2) == {0: 4096, 2: 4096}


def test_what_was_not_submitted_can_be_dropped(writes: AsyncWrites, file: int) -> None:
    with AlignedBuffer(4096) as buffer:
        assert writes.write(file, buffer.address, 4096, 0, 7)
        assert writes.drop() == [7]
    assert writes.in_flight == 0


def test_a_context_that_was_let_go_of_is_used_again(file: int) -> None:
    """The kernel takes tens of milliseconds to end one, and whoever ends it waits."""
    first = AsyncWrites(24)
    context = first.context
    first.close()
    with AlignedBuffer(4096) as buffer:
        second, third = AsyncWrites(24), AsyncWrites(24)
        assert second.context == context
        assert third.context != context
        for writes, fill in ((second, b"a"), (third, b"b")):
            buffer.view[:] = fill * 4096
            assert writes.write(file, buffer.address, 4096, 0, 7)
            assert writes.submit() == []
            assert take(writes, 1) == {7: 4096}
            os.preadv(file, [buffer.view], 0)
            assert bytes(buffer.view) == fill * 4096
        third.close()
        second.close()


def test_a_forked_child_has_contexts_of_its_own() -> None:
    AsyncWrites(40).close()
    child = os.fork()
    if child == 0:
        try:
            writes = AsyncWrites(40)
            os._exit(0 if writes.completions() == [] else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


WRITER = """
import os, sys, time
from farpage.kernel.aio import AsyncWrites
from farpage.kernel.memory import AlignedBuffer
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)
writes, buffer = AsyncWrites(64), AlignedBuffer(1 << 20)
buffer.view[:] = b"n" * (1 << 20)
for number in range(32):
    assert writes.write(descriptor, buffer.address, 1 << 20, number << 20, number)
refused = {token for token, _ in writes.submit()}
refused.update(token for token, result in writes.completions() if result < 0)
print(*sorted(refused), flush=True)
time.sleep(60)
"""


def test_a_killed_process_is_gone_only_when_its_writes_are_over(tmp_path: Path, file: int) -> None:
    """What a VIOS had in flight is repeated elsewhere as soon as its process is gone."""
    os.fstat(file)  # there is direct I/O
    path = tmp_path / "volume"
    path.write_bytes(b"o" * (32 * MIB))
    with path.open("rb") as written:
        leave_page_cache(written.fileno())
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    refused = process.stdout.readline().split()
    assert len(refused) < 32
    gone = os.pidfd_open(process.pid)
    process.send_signal(signal.SIGKILL)
    assert select.select([gone], [], [], 30)[0]
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    with AlignedBuffer(MIB) as buffer:
        for number in range(32):
            os.preadv(descriptor, [buffer.view], number * MIB)
            if str(number) not in refused:
                assert bytes(buffer.view) == b"n" * MIB, f"the write of {number} arrived after the end"
    os.close(descriptor)
    os.close(gone)
    process.wait()
    process.stdout.close()
