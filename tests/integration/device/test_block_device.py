"""Which block devices are taken, and which are refused."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from farpage.device.errors import DeviceUnusable
from farpage.device.open import open_device
from tests.support.loopdevice import loop_device
from tests.support.tools import need, run

SIZE = 4 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    with loop_device(tmp_path / "disk", SIZE) as path:
        yield path


def content(path: str) -> bytes:
    return Path(path).read_bytes()


async def refused(spec: str) -> DeviceUnusable:
    with pytest.raises(DeviceUnusable) as caught:
        await open_device(spec)
    assert caught.value.spec == spec
    assert caught.value.advice
    return caught.value


async def test_an_empty_device_is_taken(disk: str) -> None:
    device = await open_device(f"block:{disk}")
    try:
        assert (device.kind, device.name) == ("block", Path(disk).name)
        assert device.size_bytes == SIZE - (1 << 20)
        assert device.limits.minimum == 512
    finally:
        await device.close()


async def test_a_swap_area_is_refused_until_forced(disk: str) -> None:
    need("mkswap", "blkid")
    await run("mkswap", disk)
    before = content(disk)
    assert "blkid finds swap" in (await refused(f"block:{disk}")).problem
    assert content(disk) == before
    device = await open_device(f"block:{disk}", force=True)
    await device.close()
    # Labelled, it needs no force any more, and no other program takes it for swap.
    device = await open_device(f"block:{disk}")
    await device.close()
    assert await run("blkid", "--probe", disk, fails=True) == ""


async def test_a_mounted_file_system_is_refused(disk: str, tmp_path: Path) -> None:
    need("mkfs.ext4", "mount", "umount")
    await run("mkfs.ext4", "-q", disk)
    assert "blkid finds ext4" in (await refused(f"block:{disk}")).problem
    folder = tmp_path / "mounted"
    folder.mkdir()
    await run("mount", disk, str(folder))
    try:
        assert (await refused(f"block:{disk}")).problem == f"it is in use: mounted at {folder}"
    finally:
        await run("umount", str(folder))


async def test_a_device_that_another_program_holds_is_refused_also_with_a_label(disk: str) -> None:
    device = await open_device(f"block:{disk}")
    await device.close()
    holder = os.open(disk, os.O_RDONLY | os.O_EXCL)
    try:
        assert "in use" in (await refused(f"block:{disk}")).problem
        device = await open_device(f"block:{disk}", force=True)
        await device.close()
    finally:
        os.close(holder)


async def test_two_that_open_it_at_the_same_moment_are_not_in_each_others_way(disk: str) -> None:
    devices = await asyncio.gather(*(open_device(f"block:{disk}") for _ in range(4)))
    try:
        assert len({device.id for device in devices}) == 1
    finally:
        for device in devices:
            await device.close()


async def test_without_blkid_an_unlabelled_device_is_refused(
    disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _program: None)
    assert "blkid is not installed" in (await refused(f"block:{disk}")).problem


async def test_what_is_no_block_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(SIZE))
    assert "no block device" in (await refused(f"block:{tmp_path}/file")).problem
    assert "No such file" in (await refused(f"block:{tmp_path}/nothing")).problem


async def test_a_device_without_room_is_refused(tmp_path: Path) -> None:
    with loop_device(tmp_path / "small", 1 << 20) as path:
        assert "too few" in (await refused(f"block:{path}")).problem


async def test_a_read_only_device_shows_its_volume_and_takes_no_owner(disk: str) -> None:
    device = await open_device(f"block:{disk}")
    await device.run(device.create_volume, "vm1", 1 << 20)
    await device.close()
    await run("blockdev", "--setro", disk)
    try:
        device = await open_device(f"block:{disk}")
        try:
            assert (await device.run(device.volume, "vm1")).size_bytes == 1 << 20
            await (await device.open_volume("vm1", None)).close()
            with pytest.raises(DeviceUnusable, match="read-only"):
                await device.open_volume("vm1", 1)
        finally:
            await device.close()
    finally:
        await run("blockdev", "--setrw", disk)
