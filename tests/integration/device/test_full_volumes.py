"""Volumes that get all of their blocks when they are made, and keep them."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import signal
import subprocess
import sys
import threading
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import pytest

from farpage.blockio import Allocation, BlockIO, Done, Extent, read_bytes, wait_done
from farpage.device import newfile, volumefile
from farpage.device.base import PagingDevice
from farpage.device.claim import Claim
from farpage.device.errors import CapacityExceeded, DeviceUnusable, VolumeBeingMade, VolumeExists
from farpage.device.open import open_device
from farpage.device.spec import Allocate
from farpage.device.volumefile import VolumeFile
from farpage.device.writes import AsyncWriter, Write
from farpage.kernel.memory import AlignedBuffer
from tests.support.fiemap import extent_bytes
from tests.support.volumes import extents, flush, trim, write, zero

from .conftest import opening

SIZE = 3 << 20
CACHES = pytest.mark.parametrize("cache", ["direct", "buffered"])


@pytest.fixture(params=["direct", "buffered"])
async def device(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[PagingDevice]:
    """A device whose volumes are allocated in full."""
    async with opening(f"dir:{tmp_path}/disk?size=16M&cache={request.param}&allocate=full") as opened:
        yield opened


@pytest.fixture
async def volume(device: PagingDevice) -> AsyncIterator[BlockIO]:
    """A volume of it, for its owner."""
    await device.make_volume("vm1", SIZE)
    device.claim("vm1", Claim(1))
    opened = await device.open_volume("vm1", 1)
    yield opened
    await opened.close()


def file_of(folder: Path, volume: str = "vm1") -> Path:
    return folder / "disk" / "volumes" / volume


def written_and_not(path: Path) -> tuple[int, int]:
    try:
        return extent_bytes(path)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY):
            raise
        pytest.skip("the file system does not tell the extents of files")


def left_in(folder: Path) -> list[str]:
    return [path.name for part in ("volumes", "headers") for path in (folder / "disk" / part).iterdir()]


@pytest.mark.usefixtures("volume")
async def test_all_of_a_new_volume_is_written(device: PagingDevice, tmp_path: Path) -> None:
    assert device.allocate is Allocate.FULL
    assert device.volume("vm1").used_bytes >= SIZE
    assert device.usage().used_bytes >= SIZE
    assert written_and_not(file_of(tmp_path)) == (SIZE, 0)


async def test_it_reads_as_zeros_and_has_no_hole(volume: BlockIO) -> None:
    assert await read_bytes(volume, 0, SIZE) == bytes(SIZE)
    assert await extents(volume, 0, SIZE) == (0, [Extent(SIZE, Allocation.DATA)])


async def test_first_writes_need_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opening(f"dir:{tmp_path}/disk?size=16M&allocate=full") as device:
        if device.access != "direct":
            pytest.skip("no direct I/O on this file system")
        await device.make_volume("vm1", SIZE)
        volume = await device.open_volume("vm1", 1)
        queued = AsyncWriter.open()
        if queued is None:
            pytest.skip("no asynchronous writes")
        pages = random.Random(1).sample(range(SIZE >> 12), 200)
        with AlignedBuffer(4096) as page:
            page.view[:] = b"x" * 4096
            descriptor = os.open(file_of(tmp_path), os.O_RDWR | os.O_DIRECT)

            def begin(done: Done) -> None:
                queued.write(descriptor, page.address, pages[0] << 12, Write(page.view, lambda: 0, done))

            result = await wait_done(begin)
            os.close(descriptor)
            await queued.close()
            if result == -errno.EOPNOTSUPP:
                pytest.skip("the file system does not tell whether a write would wait")
            assert result == 4096
            monkeypatch.delattr(VolumeFile, "write")
            volume_writes = (
                wait_done(partial(volume.write, number << 12, page.view)) for number in pages[1:]
            )
            assert not any(await asyncio.gather(*volume_writes))
        await volume.close()


@pytest.mark.parametrize("place", [(0, SIZE), (4096, 8192), (100, 5000), (5000, 7), (4095, 4098)])
@pytest.mark.parametrize("punch", [True, False], ids=["punch", "no hole"])
async def test_zeroed_ranges_are_written_with_zeros(
    volume: BlockIO, device: PagingDevice, tmp_path: Path, place: tuple[int, int], punch: bool
) -> None:
    offset, length = place
    content = os.urandom(SIZE)
    assert await write(volume, 0, content) == 0
    assert await zero(volume, offset, length, punch=punch) == 0
    expected = content[:offset] + bytes(length) + content[offset + length :]
    assert await read_bytes(volume, 0, SIZE) == expected
    assert await flush(volume) == 0
    assert device.volume("vm1").used_bytes >= SIZE
    assert written_and_not(file_of(tmp_path)) == (SIZE, 0)


async def test_zeros_that_are_to_come_fast_are_refused(volume: BlockIO) -> None:
    assert await write(volume, 0, b"x" * 4096) == 0
    for punch in (True, False):
        assert await zero(volume, 0, 4096, punch=punch, fast=True) == errno.ENOTSUP
    assert await read_bytes(volume, 0, 4096) == b"x" * 4096


async def test_a_trim_keeps_the_blocks_and_what_is_in_them(
    volume: BlockIO, device: PagingDevice, tmp_path: Path
) -> None:
    content = os.urandom(SIZE)
    assert await write(volume, 0, content, fua=True) == 0
    assert await trim(volume, 0, SIZE) == 0
    assert await read_bytes(volume, 0, SIZE) == content
    assert device.volume("vm1").used_bytes >= SIZE
    assert written_and_not(file_of(tmp_path)) == (SIZE, 0)


async def test_zeros_and_trims_of_an_older_owner_are_refused(volume: BlockIO, device: PagingDevice) -> None:
    device.claim("vm1", Claim(2))
    assert await zero(volume, 0, 8192) == errno.ESHUTDOWN
    assert await trim(volume, 0, 8192) == errno.ESHUTDOWN


async def test_zeros_beyond_the_end_of_a_cut_file_do_not_make_it_longer(
    volume: BlockIO, tmp_path: Path
) -> None:
    os.truncate(file_of(tmp_path), SIZE // 2)
    assert await zero(volume, SIZE - 8192, 8192) == errno.EIO
    assert file_of(tmp_path).stat().st_size == SIZE // 2


async def test_neighbouring_zeros_and_writes_in_one_block_do_not_undo_each_other(volume: BlockIO) -> None:
    content = bytearray(b"x" * SIZE)
    assert await write(volume, 0, bytes(content)) == 0
    commands = []
    for at in range(0, 64 << 10, 1000):
        commands += [zero(volume, at, 500), write(volume, at + 500, b"y" * 500)]
        content[at : at + 1000] = bytes(500) + b"y" * 500
    assert not any(await asyncio.gather(*commands))
    assert await read_bytes(volume, 0, SIZE) == content


@CACHES
async def test_how_a_volume_was_made_holds_however_its_device_is_opened_later(
    tmp_path: Path, cache: str
) -> None:
    used: dict[str, int] = {}
    for number, allocate in enumerate(("full", "sparse", "full"), start=1):
        async with opening(f"dir:{tmp_path}/disk?size=64M&cache={cache}&allocate={allocate}") as device:
            await device.make_volume(f"vm{number}", SIZE)
            for name in (volume.name for volume in device.volumes()):
                volume = await device.open_volume(name, 1)
                assert await write(volume, 0, os.urandom(SIZE), fua=True) == 0
                assert await trim(volume, 0, SIZE) == 0
                await volume.close()
            used = {volume.name: volume.used_bytes for volume in device.volumes()}
    assert {name: bytes_ >= SIZE for name, bytes_ in used.items()} == {"vm1": True, "vm2": False, "vm3": True}


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@CACHES
async def test_a_volume_that_the_file_system_has_no_room_for_is_refused_and_leaves_nothing(
    small_file_system: Path, cache: str
) -> None:
    async with opening(f"dir:{small_file_system}/disk?size=64M&cache={cache}&allocate=full") as device:
        free_bytes = os.statvfs(small_file_system).f_bavail * os.statvfs(small_file_system).f_frsize
        with pytest.raises(CapacityExceeded) as caught:
            await device.make_volume("vm1", 2 << 20)
        assert 0 < caught.value.free_bytes < 1 << 20
        assert left_in(small_file_system) == []
        assert os.statvfs(small_file_system).f_bavail * os.statvfs(small_file_system).f_frsize == free_bytes
        await device.make_volume("vm1", 512 << 10)


class Held:
    """Volumes stop halfway as they are written, until they may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        really = volumefile.write_fully

        def slow(descriptor: int, data: memoryview, offset: int) -> None:
            if offset:
                self.reached.set()
                self.go_on.wait()
            really(descriptor, data, offset)

        monkeypatch.setattr(newfile, "write_fully", slow)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """What holds the making of volumes."""
    held = Held(monkeypatch)
    yield held
    held.go_on.set()


async def test_while_a_volume_is_made_its_room_and_its_name_are_taken_and_nothing_else_waits(
    device: PagingDevice, held: Held, tmp_path: Path
) -> None:
    making = asyncio.create_task(device.make_volume("vm1", SIZE))
    await asyncio.to_thread(held.reached.wait)
    async with opening(f"dir:{tmp_path}/disk") as other:
        assert other.names() == []
        assert other.usage().provisioned_bytes == SIZE
        assert other.usage().volumes == 0
        with pytest.raises(VolumeBeingMade):
            await other.make_volume("vm1", SIZE)
        with pytest.raises(CapacityExceeded):
            await other.make_volume("vm2", 14 << 20)
        await other.make_volume("vm2", 4096)
        held.go_on.set()
        made = await making
        assert other.volume("vm1") == made
        with pytest.raises(VolumeExists):
            await other.make_volume("vm1", SIZE)


async def test_a_device_that_is_closed_gives_up_the_volume_that_it_makes(tmp_path: Path, held: Held) -> None:
    device = await open_device(f"dir:{tmp_path}/disk?size=16M&allocate=full")
    making = asyncio.create_task(device.make_volume("vm1", SIZE))
    await asyncio.to_thread(held.reached.wait)
    closing = asyncio.create_task(device.close())
    await asyncio.sleep(0)
    held.go_on.set()
    with pytest.raises(DeviceUnusable, match="closed"):
        await making
    await closing
    assert left_in(tmp_path) == []


async def test_a_name_that_was_given_meanwhile_is_not_taken_away(
    device: PagingDevice, held: Held, tmp_path: Path
) -> None:
    making = asyncio.create_task(device.make_volume("vm1", SIZE))
    await asyncio.to_thread(held.reached.wait)
    file_of(tmp_path).write_bytes(b"x" * 4096)
    held.go_on.set()
    with pytest.raises(VolumeExists):
        await making
    assert file_of(tmp_path).read_bytes() == b"x" * 4096
    assert device.usage().provisioned_bytes == 4096


MAKE = """
import asyncio, sys, threading
from farpage.device import newfile
from farpage.device.open import open_device

def hang(descriptor, data, offset):
    print("writing", flush=True)
    threading.Event().wait()

newfile.write_fully = hang

async def main():
    device = await open_device(sys.argv[1])
    await device.make_volume("vm1", int(sys.argv[2]))

asyncio.run(main())
"""


@pytest.mark.parametrize("reopened", [True, False], ids=["the device is opened", "a volume is made"])
async def test_what_is_left_of_a_volume_whose_maker_was_killed_goes_when(
    tmp_path: Path, reopened: bool
) -> None:
    spec = f"dir:{tmp_path}/disk?size=4M&allocate=full"
    async with opening(spec) as device:
        maker = await asyncio.create_subprocess_exec(
            sys.executable, "-c", MAKE, spec, str(SIZE), stdin=PIPE, stdout=PIPE
        )
        assert maker.stdout is not None
        assert await maker.stdout.readline() == b"writing\n"
        with pytest.raises(CapacityExceeded):
            await device.make_volume("vm2", SIZE)
        maker.send_signal(signal.SIGKILL)
        await maker.wait()
        assert left_in(tmp_path) == [".vm1.new"]
        if reopened:
            async with opening(spec):
                assert left_in(tmp_path) == []
                assert device.usage().provisioned_bytes == 0
        else:
            await device.make_volume("vm2", SIZE)
            assert sorted(left_in(tmp_path)) == ["vm2", "vm2"]
