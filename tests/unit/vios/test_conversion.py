"""Clause A2: commands sent to the VIOS become commands of the paging device, by one table."""

from __future__ import annotations

import errno
from collections import Counter

import pytest

from farpage.blockio import BlockIO, Feature, wait_done
from farpage.definition.model import PagingCommand
from farpage.vios.commands import (
    CONVERSIONS,
    NBD_NUMBERS,
    ConvertedVolume,
    commands_of,
    offered_features,
)
from tests.support.blockio import ALL_FEATURES, MemoryIO

ALL = tuple(PagingCommand)


def without(*commands: PagingCommand) -> tuple[PagingCommand, ...]:
    return tuple(command for command in ALL if command not in commands)


def test_the_table_has_every_paging_command_once() -> None:
    assert Counter(conversion.command for conversion in CONVERSIONS) == Counter(ALL)


def test_the_table_has_every_nbd_command_once() -> None:
    numbers = [number for name, number in NBD_NUMBERS.items() if name.startswith("NBD_CMD_")]
    assert sorted(numbers) == list(range(8))


def test_the_table_has_every_command_of_a_volume_once() -> None:
    methods = [method for conversion in CONVERSIONS for method in conversion.device]
    interface = {
        name for name in vars(BlockIO) if not name.startswith("_") and callable(getattr(BlockIO, name))
    }
    assert sorted(methods) == sorted(interface)


def test_a_device_is_configured_for_what_its_features_allow() -> None:
    assert commands_of(ALL_FEATURES) == ALL
    assert commands_of(Feature.NONE) == (
        PagingCommand.OPEN,
        PagingCommand.PAGE_IN,
        PagingCommand.PAGE_OUT,
        PagingCommand.CLOSE,
    )


@pytest.mark.parametrize(
    ("command", "feature"),
    [
        (PagingCommand.DISCARD, Feature.TRIM),
        (PagingCommand.ZERO, Feature.ZERO | Feature.FAST_ZERO),
        (PagingCommand.FLUSH, Feature.FLUSH | Feature.FUA),
        (PagingCommand.QUERY, Feature.EXTENTS),
    ],
)
def test_what_is_not_configured_is_not_offered(command: PagingCommand, feature: Feature) -> None:
    assert offered_features(ALL_FEATURES, without(command)) == ALL_FEATURES & ~feature


def test_a_device_without_a_feature_offers_it_in_no_case() -> None:
    assert offered_features(Feature.TRIM, ALL) == Feature.TRIM


async def test_configured_commands_reach_the_device() -> None:
    device = MemoryIO(1 << 16)
    volume = ConvertedVolume(device, ALL)
    assert await wait_done(lambda done: volume.write(0, memoryview(b"x" * 4096), done)) == 0
    assert await wait_done(lambda done: volume.zero(0, 4096, done, punch=False)) == 0
    assert await wait_done(lambda done: volume.trim(0, 4096, done)) == 0
    assert await wait_done(volume.flush) == 0
    assert [entry[0] for entry in device.log] == ["write", "zero", "trim", "flush"]
    await volume.close()
    assert device.closed


async def test_other_commands_are_refused_and_do_not_reach_the_device() -> None:
    device = MemoryIO(1 << 16)
    volume = ConvertedVolume(device, ())
    errors: list[int] = []
    volume.read(0, 4096, lambda error, _payload: errors.append(error))
    volume.extents(0, 4096, lambda error, _found: errors.append(error))
    volume.zero(0, 4096, errors.append)
    volume.trim(0, 4096, errors.append)
    volume.cache(0, 4096, errors.append)
    volume.flush(errors.append)
    assert set(errors) == {errno.ENOTSUP}
    assert not volume.read_now(0, memoryview(bytearray(4096)))
    assert await wait_done(lambda done: volume.write(0, memoryview(b"x"), done)) == errno.EPERM
    assert volume.read_only
    assert device.log == []
    await volume.close()
    assert device.closed
