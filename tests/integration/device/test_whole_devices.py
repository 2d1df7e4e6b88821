"""What block devices and remote exports have in common: a label, one volume, claims on the device."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from farpage.blockio import BlockIO, Feature, read_bytes
from farpage.device.base import PagingDevice
from farpage.device.claim import Claim
from farpage.device.errors import (
    CapacityExceeded,
    DeviceUnusable,
    VolumeExists,
    VolumeInUse,
    VolumeMissing,
)
from farpage.device.layout import DATA_OFFSET_BYTES
from farpage.device.open import open_device
from tests.support.loopdevice import loop_device
from tests.support.nbd import short_folder
from tests.support.nbdkit import Nbdkit
from tests.support.volumes import carry_out_at_random, flush, trim, write, zero

SIZE = 4 << 20
STORAGE = SIZE + DATA_OFFSET_BYTES
ALICE, BOB = "a" * 16, "b" * 16


@pytest.fixture(params=["block", "nbd"])
async def spec(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """Unlabelled storage."""
    if request.param == "block":
        with loop_device(tmp_path / "disk", STORAGE) as path:
            yield f"block:{path}"
        return
    with short_folder() as folder:
        image = tmp_path / "disk"
        with image.open("wb") as file:
            file.truncate(STORAGE)
        async with Nbdkit(folder / "s", "file", str(image)) as server:
            yield server.uri


@contextlib.asynccontextmanager
async def opened(spec: str, **options: object) -> AsyncIterator[PagingDevice]:
    device = await open_device(spec, **options)  # type: ignore[arg-type]
    try:
        yield device
    finally:
        await device.close()


@pytest.fixture
async def device(spec: str) -> AsyncIterator[PagingDevice]:
    async with opened(spec, name="disk1") as device:
        yield device


@contextlib.asynccontextmanager
async def volume_of(device: PagingDevice, epoch: int | None = 1, owner: str = "") -> AsyncIterator[BlockIO]:
    if epoch is not None:
        assert await device.run(device.claim, "vm1", Claim(epoch, owner)) == Claim(epoch, owner)
    volume = await device.open_volume("vm1", epoch)
    try:
        yield volume
    finally:
        await volume.close()


async def test_the_first_to_open_it_labels_it_and_the_second_sees_the_same_device(spec: str) -> None:
    async with opened(spec, name="disk1") as one, opened(spec) as other:
        assert (one.id, one.name, one.size_bytes) == (other.id, "disk1", SIZE)
        assert other.name == "disk1"
        made = await one.run(one.create_volume, "vm1", SIZE)
        assert await other.run(other.volume, "vm1") == made
        assert await other.run(other.volumes) == [made]
        assert other.names() == ["vm1"]
        assert (await other.run(other.usage)).provisioned_bytes == SIZE


async def test_it_opens_again_with_its_volume(spec: str) -> None:
    async with opened(spec) as device:
        made = await device.run(device.create_volume, "vm1", 1 << 20)
        async with volume_of(device) as volume:
            assert await write(volume, 8192, b"x" * 4096, fua=True) == 0
        identifier = device.id
    async with opened(spec) as device:
        assert device.id == identifier
        assert device.names() == ["vm1"]
        stat = await device.run(device.volume, "vm1")
        assert (stat.id, stat.size_bytes, stat.claim) == (made.id, 1 << 20, Claim(1))
        async with volume_of(device, None) as volume:
            assert await read_bytes(volume, 8192, 4096) == b"x" * 4096


async def test_a_label_contradicted_is_refused(spec: str) -> None:
    async with opened(spec, name="disk1", size_bytes=1 << 20) as device:
        assert device.size_bytes == 1 << 20
    with pytest.raises(DeviceUnusable, match="not 2097152"):
        await open_device(spec, size_bytes=2 << 20)
    with pytest.raises(DeviceUnusable, match="'disk1', not 'disk2'"):
        await open_device(spec, name="disk2")


async def test_more_than_there_is_room_for_is_refused(spec: str) -> None:
    with pytest.raises(DeviceUnusable, match=f"room for {SIZE} bytes"):
        await open_device(spec, size_bytes=SIZE + 4096)
    async with opened(spec) as device:
        with pytest.raises(CapacityExceeded):
            await device.run(device.create_volume, "vm1", SIZE + 4096)


async def test_it_holds_one_volume(device: PagingDevice) -> None:
    await device.run(device.create_volume, "vm1", 1 << 20)
    with pytest.raises(VolumeExists):
        await device.run(device.create_volume, "vm1", 1 << 20)
    with pytest.raises(CapacityExceeded):
        await device.run(device.create_volume, "vm2", 1 << 20)
    with pytest.raises(VolumeMissing):
        await device.run(device.volume, "vm2")
    await device.run(device.delete_volume, "vm1")
    assert await device.run(device.volumes) == []
    await device.run(device.create_volume, "vm2", SIZE)


async def test_a_new_volume_shows_nothing_of_the_one_before(device: PagingDevice) -> None:
    await device.run(device.create_volume, "vm1", SIZE)
    async with volume_of(device) as volume:
        assert await write(volume, 0, os.urandom(SIZE)) == 0
    await device.run(device.delete_volume, "vm1")
    await device.run(device.create_volume, "vm1", SIZE)
    async with volume_of(device) as volume:
        assert await read_bytes(volume, 0, SIZE) == bytes(SIZE)


async def test_an_open_volume_is_not_deleted_without_force(device: PagingDevice) -> None:
    await device.run(device.create_volume, "vm1", SIZE)
    async with volume_of(device) as volume:
        with pytest.raises(VolumeInUse):
            await device.run(device.delete_volume, "vm1")
        await device.run(lambda: device.delete_volume("vm1", force=True))
        assert await write(volume, 0, bytes(4096)) == errno.ESHUTDOWN


async def test_random_commands_leave_what_a_plain_buffer_would_hold(device: PagingDevice) -> None:
    await device.run(device.create_volume, "vm1", SIZE)
    async with volume_of(device) as volume:
        units = [max(512, volume.limits.minimum), 4096]
        model = await carry_out_at_random(volume, SIZE, units=units, counts=[1, 3, 16, 600])
        assert await trim(volume, 0, 64 << 10) == 0
        assert await flush(volume) == 0
        assert await read_bytes(volume, 64 << 10, SIZE - (64 << 10)) == model[64 << 10 :]


async def test_neighbouring_and_overlapping_writes_at_once(device: PagingDevice) -> None:
    await device.run(device.create_volume, "vm1", SIZE)
    async with volume_of(device) as volume:
        unit = max(512, volume.limits.minimum)
        pieces = [(offset, os.urandom(unit)) for offset in range(0, 256 << 10, unit)]
        assert not any(await asyncio.gather(*(write(volume, offset, data) for offset, data in pieces)))
        assert await read_bytes(volume, 0, 256 << 10) == b"".join(data for _, data in pieces)


async def test_an_older_owner_cannot_write_whichever_vios_it_uses(spec: str) -> None:
    async with opened(spec) as one, opened(spec) as other:
        await one.run(one.create_volume, "vm1", SIZE)
        async with volume_of(one, 3, ALICE) as old:
            assert await write(old, 0, b"o" * 4096) == 0
            async with volume_of(other, 4, ALICE) as new:
                assert await write(old, 0, b"x" * 4096) == errno.ESHUTDOWN
                assert await zero(old, 0, 4096) == errno.ESHUTDOWN
                assert await write(new, 4096, b"n" * 4096) == 0
                assert await read_bytes(old, 0, 8192) == b"o" * 4096 + b"n" * 4096


async def test_of_two_owners_of_one_epoch_the_first_keeps_it(spec: str) -> None:
    async with opened(spec) as one, opened(spec) as other:
        await one.run(one.create_volume, "vm1", SIZE)
        assert await one.run(one.claim, "vm1", Claim(3, ALICE)) == Claim(3, ALICE)
        assert await other.run(other.claim, "vm1", Claim(3, BOB)) == Claim(3, ALICE)
        assert await other.run(other.claim, "vm1", Claim(4, BOB)) == Claim(4, BOB)
        # Replaced: it can only be somebody who has not heard of it.
        assert await one.run(one.claim, "vm1", Claim(5, ALICE)) == Claim(4, BOB)
        assert (await one.run(one.volume, "vm1")).claim == Claim(4, BOB)


async def test_claims_survive_any_number_of_claims(spec: str) -> None:
    async with opened(spec) as device:
        await device.run(device.create_volume, "vm1", SIZE)
        for epoch in range(1, 100):
            assert await device.run(device.claim, "vm1", Claim(epoch, ALICE)) == Claim(epoch, ALICE)
    async with opened(spec) as device:
        assert (await device.run(device.volume, "vm1")).claim == Claim(99, ALICE)


async def test_a_read_only_view_is_not_changed(device: PagingDevice) -> None:
    await device.run(device.create_volume, "vm1", SIZE)
    async with volume_of(device, None) as view:
        assert view.read_only
        assert await write(view, 0, bytes(4096)) == errno.EPERM
        assert await zero(view, 0, 4096) == errno.EPERM


async def test_a_range_outside_is_a_bug_of_the_caller(device: PagingDevice) -> None:
    await device.run(device.create_volume, "vm1", 1 << 20)
    async with volume_of(device) as volume:
        for offset, length in ((1 << 20, 4096), (-4096, 4096), ((1 << 20) - 4096, 8192)):
            with pytest.raises(ValueError, match="outside"):
                volume.read(offset, length, lambda _error, _payload: None)
            with pytest.raises(ValueError, match="outside"):
                volume.write(offset, memoryview(bytes(length)), lambda _error: None)


async def test_a_volume_offers_what_its_storage_can_do(device: PagingDevice) -> None:
    await device.run(device.create_volume, "vm1", SIZE)
    async with volume_of(device) as volume:
        assert volume.features == device.features
        assert Feature.FLUSH | Feature.ZERO | Feature.TRIM | Feature.MULTI_CONN in volume.features
        assert (Feature.EXTENTS in volume.features) is (device.kind == "nbd")


@pytest.mark.parametrize("spec", ["block"], indirect=True)
async def test_what_a_former_use_left_at_both_ends_is_gone(spec: str, tmp_path: Path) -> None:
    with (tmp_path / "disk").open("r+b") as disk:
        disk.write(os.urandom(STORAGE))
    async with opened(spec, force=True):
        pass
    content = (tmp_path / "disk").read_bytes()
    assert content[8192 : 1 << 20] == bytes((1 << 20) - 8192)
    assert content[-(1 << 20) :] == bytes(1 << 20)
