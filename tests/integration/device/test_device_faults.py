"""A device that is full, cut, slow or failing."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from farpage.blockio import read_bytes
from farpage.device import volumefile
from farpage.device.reads import RingReader
from farpage.log import Line, diverted
from tests.support.volumes import extents, flush, read_error, write, zero

from .conftest import opening

CACHES = pytest.mark.parametrize("cache", ["direct", "buffered"])


@pytest.fixture
def tiny_file_system(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@CACHES
async def test_a_full_file_system_is_no_space_left(tiny_file_system: Path, cache: str) -> None:
    async with opening(f"dir:{tiny_file_system}/a?size=1M&cache={cache}") as device:
        device.create_volume("vm1", 1 << 20)
        volume = await device.open_volume("vm1", 1)
        errors = [await write(volume, offset, os.urandom(64 << 10)) for offset in range(0, 1 << 20, 64 << 10)]
        assert errors[0] == 0
        assert errors[-1] == errno.ENOSPC
        assert await read_error(volume, 0, 4096) == 0
        assert await zero(volume, 0, 1 << 20) == 0
        assert await write(volume, 1 << 19, os.urandom(64 << 10)) == 0
        await volume.close()


@CACHES
async def test_writes_that_come_together_each_have_an_outcome_of_their_own(
    tiny_file_system: Path, cache: str
) -> None:
    async with opening(f"dir:{tiny_file_system}/a?size=1M&cache={cache}") as device:
        device.create_volume("vm1", 1 << 20)
        volume = await device.open_volume("vm1", 1)
        contents = [os.urandom(16 << 10) for _ in range(32)]
        errors = await asyncio.gather(
            *(write(volume, number * (32 << 10), content) for number, content in enumerate(contents))
        )
        assert set(errors) == {0, errno.ENOSPC}
        for number, (content, error) in enumerate(zip(contents, errors, strict=True)):
            if not error:
                assert await read_bytes(volume, number * (32 << 10), len(content)) == content
        await volume.close()


@CACHES
async def test_a_file_that_was_cut_gives_errors_and_never_zeros(tmp_path: Path, cache: str) -> None:
    async with opening(f"dir:{tmp_path}/a?size=1M&cache={cache}") as device:
        device.create_volume("vm1", 1 << 20)
        volume = await device.open_volume("vm1", 1)
        assert await write(volume, 0, os.urandom(1 << 20)) == 0
        os.truncate(tmp_path / "a" / "volumes" / "vm1", 512 << 10)
        assert await read_error(volume, 0, 4096) == 0
        assert await read_error(volume, (512 << 10) - 4096, 8192) == errno.EIO
        assert await read_error(volume, 768 << 10, 4096) == errno.EIO
        assert (await extents(volume, 768 << 10, 4096))[0] == errno.EIO
        # A write beyond the cut would turn what is missing before it into zeros.
        assert await write(volume, 768 << 10, bytes(4096)) == errno.EIO
        assert await read_error(volume, 600 << 10, 4096) == errno.EIO
        await volume.close()


@pytest.fixture
def reading_with_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where io_uring is not allowed."""
    monkeypatch.setattr(RingReader, "open", lambda: None)


@CACHES
@pytest.mark.usefixtures("reading_with_threads")
async def test_one_slow_read_does_not_hold_up_the_others(
    tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, release = threading.Event(), threading.Event()
    really = volumefile.read_fully

    def slow(descriptor: int, into: memoryview, offset: int) -> None:
        if offset == 0:
            stuck.set()
            release.wait()
        really(descriptor, into, offset)

    async with opening(f"dir:{tmp_path}/a?size=1M&cache={cache}") as device:
        device.create_volume("vm1", 1 << 20)
        volume = await device.open_volume("vm1", 1)
        assert await write(volume, 0, b"a" * 8192) == 0
        monkeypatch.setattr(volumefile, "read_fully", slow)
        first = asyncio.create_task(read_bytes(volume, 0, 4096))
        await asyncio.to_thread(stuck.wait)
        for _ in range(20):
            assert await read_bytes(volume, 4096, 4096) == b"a" * 4096
        assert await write(volume, 8192, b"b" * 4096) == 0
        assert not first.done()
        release.set()
        assert await first == b"a" * 4096
        await volume.close()


async def test_a_failed_flush_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opening(f"dir:{tmp_path}/a?size=1M&cache=buffered") as device:
        device.create_volume("vm1", 1 << 20)
        volume = await device.open_volume("vm1", 1)
        assert await write(volume, 0, b"a" * 4096) == 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", _fail)
            assert await flush(volume) == errno.EIO
        # The kernel would say that all is well now; the lost pages would be taken for written.
        assert await flush(volume) == errno.EIO
        assert await write(volume, 0, b"a" * 4096, fua=True) == errno.EIO
        await volume.close()


def _fail(_descriptor: int) -> None:
    raise OSError(errno.EIO, "injected")


@pytest.mark.usefixtures("reading_with_threads")
async def test_a_bug_in_a_thread_ends_one_command_and_not_the_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opening(f"dir:{tmp_path}/a?size=1M") as device:
        device.create_volume("vm1", 1 << 20)
        volume = await device.open_volume("vm1", 1)
        logs: list[Line] = []
        with monkeypatch.context() as patch, diverted(logs.append):
            patch.setattr(volumefile, "read_fully", lambda *_arguments: 1 // 0)
            assert [await read_error(volume, 0, 4096) for _ in range(9)] == [errno.EIO] * 9
        assert {line["event"] for line in logs} == {"io_thread_failed"}
        assert await read_error(volume, 0, 4096) == 0
        await volume.close()
