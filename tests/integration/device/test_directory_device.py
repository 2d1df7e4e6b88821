from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from farpage.device import directory
from farpage.device.base import PagingDevice
from farpage.device.claim import Claim
from farpage.device.directory import prepare_directory
from farpage.device.errors import (
    CapacityExceeded,
    DeviceUnusable,
    VolumeExists,
    VolumeInUse,
    VolumeMissing,
)
from farpage.device.label import Header
from farpage.device.open import open_device
from farpage.device.spec import DirectorySpec, parse_spec
from farpage.errors import InvalidInput

from .conftest import opening


async def test_a_directory_is_labelled_once_and_known_again(tmp_path: Path) -> None:
    spec = f"dir:{tmp_path}/a?size=8M"
    async with opening(spec) as one, opening(f"dir:{tmp_path}/a") as other:
        assert one.id == other.id
        assert (one.name, other.size_bytes) == ("a", 8 << 20)
        assert one.spec == spec


async def test_two_that_share_a_directory_see_each_other_s_volumes(tmp_path: Path) -> None:
    async with opening(f"dir:{tmp_path}/a?size=8M") as one, opening(f"dir:{tmp_path}/a") as other:
        made = one.create_volume("vm1", 1 << 20)
        assert other.volume("vm1") == made
        other.claim("vm1", Claim(7))
        assert one.volume("vm1").claim == Claim(7)
        assert one.claim("vm1", Claim(5)) == Claim(7)


def opened_below(folder: Path) -> list[Path]:
    """Return the files below a folder that this process has open."""
    entries = [entry.readlink() for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return [path for path in entries if path.is_relative_to(folder)]


async def test_a_closed_volume_has_no_file_open_however_long_it_is_referred_to(tmp_path: Path) -> None:
    async with opening(f"dir:{tmp_path}/a?size=8M") as device:
        device.create_volume("vm1", 1 << 20)
        volume = await device.open_volume("vm1", 1)
        assert len(opened_below(tmp_path)) == 2
        await volume.close()
        assert opened_below(tmp_path) == []
        assert volume.size_bytes == 1 << 20


async def test_the_size_defaults_to_the_room_of_the_file_system(tmp_path: Path) -> None:
    async with opening(f"dir:{tmp_path}/a") as device:
        status = os.statvfs(tmp_path)
        assert 0 < device.size_bytes <= status.f_blocks * status.f_frsize


async def test_a_directory_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(DeviceUnusable, match="thesis"):
        await open_device(f"dir:{tmp_path}")
    assert not (tmp_path / "label.json").exists()
    device = await open_device(f"dir:{tmp_path}", force=True)
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    await device.close()


async def test_a_file_system_s_own_lost_and_found_is_no_use(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    async with opening(f"dir:{tmp_path}"):
        pass


async def test_another_size_or_name_than_the_label_s_is_refused(tmp_path: Path) -> None:
    async with opening(f"dir:{tmp_path}/a?size=8M"):
        pass
    with pytest.raises(DeviceUnusable, match="8388608"):
        await open_device(f"dir:{tmp_path}/a?size=16M")
    with pytest.raises(DeviceUnusable, match="'a'"):
        await open_device(f"dir:{tmp_path}/a", name="b")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format":9}', b"\xff\xfe"])
async def test_a_damaged_label_is_reported_not_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "label.json").write_bytes(content)
    with pytest.raises(DeviceUnusable):
        await open_device(f"dir:{tmp_path}", force=True)
    assert (tmp_path / "label.json").read_bytes() == content


@pytest.mark.parametrize("path", ["/proc/nothing/here", "/dev/null", "/proc/self"])
async def test_a_path_that_cannot_hold_volumes_is_refused(path: str) -> None:
    with pytest.raises(DeviceUnusable):
        await open_device(f"dir:{path}", force=True)


def test_directories_and_labels_made_at_once_are_one(tmp_path: Path) -> None:
    specs = [parse_spec(f"dir:{tmp_path}/{number}?size=1M") for number in range(64)]
    found: list[list[str]] = [[] for _ in specs]
    barrier = threading.Barrier(8)

    def label() -> None:
        for spec, uuids in zip(specs, found, strict=True):
            assert isinstance(spec, DirectorySpec)
            barrier.wait(timeout=10)
            uuids.append(prepare_directory(spec).uuid)

    threads = [threading.Thread(target=label) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(uuids) for uuids in found] == [8] * len(specs)
    assert [len(set(uuids)) for uuids in found] == [1] * len(specs)


CREATE_MANY = """
import asyncio, sys
from farpage.device.errors import CapacityExceeded
from farpage.device.label import Header
from farpage.device.open import open_device

async def main():
    device = await open_device(sys.argv[1])
    print("ready", flush=True)
    sys.stdin.readline()
    made = 0
    for number in range(20):
        try:
            device.create_volume(f"{sys.argv[2]}-{number}", 1 << 20)
            made += 1
        except CapacityExceeded:
            pass
    print(made, flush=True)
    await device.close()

asyncio.run(main())
"""


async def test_two_processes_that_create_at_once_cannot_overrun_the_capacity(tmp_path: Path) -> None:
    spec = f"dir:{tmp_path}/a?size=16M"
    async with opening(spec) as device:
        processes = [
            await asyncio.create_subprocess_exec(
                sys.executable, "-c", CREATE_MANY, spec, name, stdin=PIPE, stdout=PIPE
            )
            for name in ("one", "two")
        ]
        for process in processes:
            assert process.stdout is not None
            assert await process.stdout.readline() == b"ready\n"
        answers = await asyncio.gather(*(process.communicate(b"go\n") for process in processes))
        assert sum(int(output) for output, _errors in answers) == 16
        assert device.usage().provisioned_bytes == 16 << 20


async def test_a_volume_beyond_the_capacity_is_refused_and_leaves_nothing(device: PagingDevice) -> None:
    device.create_volume("vm1", 12 << 20)
    with pytest.raises(CapacityExceeded) as caught:
        device.create_volume("vm2", 8 << 20)
    assert caught.value.free_bytes == 4 << 20
    assert [volume.name for volume in device.volumes()] == ["vm1"]
    device.delete_volume("vm1")
    device.create_volume("vm2", 8 << 20)


async def test_a_name_is_taken_once(device: PagingDevice) -> None:
    device.create_volume("vm1", 4096)
    with pytest.raises(VolumeExists):
        device.create_volume("vm1", 4096)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "A", ".hidden", "a" * 64, "a\n", "ä", "-a"])
async def test_a_name_that_is_no_file_name_is_refused(device: PagingDevice, name: str) -> None:
    with pytest.raises(InvalidInput):
        device.create_volume(name, 4096)
    with pytest.raises(VolumeMissing):
        device.volume(name)
    assert device.volumes() == []


@pytest.mark.parametrize("size_bytes", [0, -4096, 1, 4097])
async def test_a_size_that_is_not_in_pages_is_refused(device: PagingDevice, size_bytes: int) -> None:
    with pytest.raises(InvalidInput):
        device.create_volume("vm1", size_bytes)


async def test_a_volume_that_somebody_has_open_is_deleted_only_by_force(device: PagingDevice) -> None:
    device.create_volume("vm1", 4096)
    opened = await device.open_volume("vm1", 1)
    with pytest.raises(VolumeInUse):
        device.delete_volume("vm1")
    await opened.close()
    device.delete_volume("vm1")
    with pytest.raises(VolumeMissing):
        device.volume("vm1")


async def test_a_volume_made_anew_is_another_one_and_starts_at_epoch_zero(device: PagingDevice) -> None:
    old = device.create_volume("vm1", 4096)
    device.claim("vm1", Claim(9))
    device.delete_volume("vm1")
    new = device.create_volume("vm1", 4096)
    assert new.id != old.id
    assert new.claim == Claim()


async def test_a_volume_of_another_vios_cannot_be_deleted_from_under_it(tmp_path: Path) -> None:
    async with opening(f"dir:{tmp_path}/a?size=8M") as one, opening(f"dir:{tmp_path}/a") as other:
        one.create_volume("vm1", 4096)
        opened = await other.open_volume("vm1", 1)
        with pytest.raises(VolumeInUse, match="another VIOS"):
            one.delete_volume("vm1")
        await opened.close()
        one.delete_volume("vm1")


async def test_files_that_are_no_volumes_are_not_shown(tmp_path: Path) -> None:
    async with opening(f"dir:{tmp_path}/a?size=8M") as device:
        volumes = tmp_path / "a" / "volumes"
        (volumes / ".vm1.new").touch()
        (volumes / "README").touch()
        (volumes / "link").symlink_to("/etc/passwd")
        (volumes / "folder").mkdir()
        assert device.volumes() == []
        with pytest.raises(VolumeMissing):
            device.volume("link")
        with pytest.raises(VolumeMissing):
            await device.open_volume("link", None)


async def test_a_volume_without_its_header_gets_a_new_one(tmp_path: Path) -> None:
    async with opening(f"dir:{tmp_path}/a?size=8M") as device:
        (tmp_path / "a" / "volumes" / "vm1").write_bytes(bytes(8192))
        found = device.volume("vm1")
        assert (found.size_bytes, found.claim) == (8192, Claim())
        assert device.volume("vm1").id == found.id


async def test_a_damaged_header_closes_the_volume(tmp_path: Path) -> None:
    async with opening(f"dir:{tmp_path}/a?size=8M") as device:
        device.create_volume("vm1", 4096)
        (tmp_path / "a" / "headers" / "vm1").write_bytes(b"rubbish")
        with pytest.raises(DeviceUnusable, match="header"):
            await device.open_volume("vm1", 1)


async def test_the_label_is_readable_by_people(tmp_path: Path) -> None:
    async with opening(f"dir:{tmp_path}/My Disk?size=8M") as device:
        label = json.loads((tmp_path / "My Disk" / "label.json").read_text())
        assert label["uuid"] == device.id
        assert label["size_bytes"] == 8 << 20
        assert device.name == "my-disk"


def test_epochs_raised_by_many_at_once_keep_the_highest(tmp_path: Path) -> None:
    Header.create(tmp_path / "vm1")
    barrier = threading.Barrier(8)

    def raise_many(first: int) -> None:
        with Header(tmp_path / "vm1") as header:
            barrier.wait()
            for epoch in range(first, 2000, 8):
                assert header.claim(Claim(epoch)).epoch >= epoch

    threads = [threading.Thread(target=raise_many, args=(first,)) for first in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Header(tmp_path / "vm1") as header:
        assert header.current == Claim(1999)


async def test_a_stopped_process_that_holds_the_lock_delays_no_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "LOCK_SECONDS", 0.02)
    async with opening(f"dir:{tmp_path}/a?size=8M") as device:
        device.create_volume("vm1", 4096)
        with directory.folder_locked(tmp_path / "a"):
            assert device.claim("vm1", Claim(3)) == Claim(3)
            opened = await device.open_volume("vm1", 3)
            assert device.volumes()[0].claim == Claim(3)
            with pytest.raises(DeviceUnusable, match="lock is held"):
                device.create_volume("vm2", 4096)
            with pytest.raises(DeviceUnusable, match="lock is held"):
                device.delete_volume("vm1", force=True)
        await opened.close()
        device.create_volume("vm2", 4096)
