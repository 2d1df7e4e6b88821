"""Reads and writes of a device through the kernel's queues, and without them."""

from __future__ import annotations

import asyncio
import errno
from functools import partial
from pathlib import Path

import pytest

from farpage.blockio import BlockIO, Done, read_bytes, wait_done
from farpage.device import reads, writes
from farpage.device.claim import Claim, new_owner
from farpage.device.open import open_device
from farpage.device.reads import RingReader
from farpage.errors import Unsupported
from farpage.kernel.aio import AsyncWrites
from farpage.kernel.io_uring import Ring
from farpage.kernel.memory import AlignedBuffer

PAGES = 600
"""More than a ring takes at once."""


@pytest.mark.parametrize("allowed", [True, False], ids=["io_uring", "threads"])
async def test_many_reads_at_once_are_all_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    def refused(entries: int) -> Ring:
        raise Unsupported("io_uring", "not permitted", "")

    if not allowed:
        monkeypatch.setattr(reads, "Ring", refused)
    device = await open_device(f"dir:{tmp_path}")
    await device.run(device.create_volume, "vm1", PAGES * 4096)
    volume = await device.open_volume("vm1", 1)
    with AlignedBuffer(PAGES * 4096) as content:
        for page in range(PAGES):
            content.view[page * 4096 : (page + 1) * 4096] = page.to_bytes(2, "little") * 2048
        await wait_done(lambda done: volume.write(0, content.view, done))
        found = await asyncio.gather(*(read_bytes(volume, page * 4096, 4096) for page in range(PAGES)))
    await volume.close()
    await device.close()
    assert found == [page.to_bytes(2, "little") * 2048 for page in range(PAGES)]


async def test_a_read_does_not_come_after_all_those_of_another_client(tmp_path: Path) -> None:
    device = await open_device(f"dir:{tmp_path}")
    for name in ("greedy", "modest"):
        await device.run(device.create_volume, name, PAGES * 4096)
    greedy, modest = await device.open_volume("greedy", 1), await device.open_volume("modest", 1)
    finished: list[str] = []

    async def read(volume: BlockIO, name: str, page: int) -> None:
        await read_bytes(volume, page * 4096, 4096)
        finished.append(name)

    commands = [read(greedy, "greedy", page) for page in range(PAGES)]
    await asyncio.gather(*commands, read(modest, "modest", 0))
    await greedy.close()
    await modest.close()
    await device.close()
    assert len(finished) == PAGES + 1
    assert finished.index("modest") < PAGES // 2


async def test_closing_waits_for_reads_in_flight(tmp_path: Path) -> None:
    reader = RingReader.open()
    if reader is None:
        pytest.skip("io_uring is not allowed")
    path = tmp_path / "page"
    path.write_bytes(b"x" * 4096)
    results: list[int] = []
    with path.open("rb") as file, AlignedBuffer(4096) as buffer:
        assert reader.read(file.fileno(), buffer, 4096, 0, results.append)
        await reader.close()
        assert results == [4096]
        assert bytes(buffer.view) == b"x" * 4096


@pytest.mark.parametrize("allowed", [True, False], ids=["aio", "threads"])
async def test_many_writes_at_once_all_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    def refused(entries: int) -> AsyncWrites:
        raise Unsupported("asynchronous writes", "not permitted", "")

    if not allowed:
        monkeypatch.setattr(writes, "AsyncWrites", refused)
    device = await open_device(f"dir:{tmp_path}")
    await device.run(device.create_volume, "vm1", PAGES * 4096)
    volume = await device.open_volume("vm1", 1)
    with AlignedBuffer(PAGES * 4096) as content:
        for half in (1, 2):  # into holes, and then over what is there
            expected = [(half * page).to_bytes(2, "little") * 2048 for page in range(PAGES)]
            for page in range(PAGES):
                content.view[page * 4096 : (page + 1) * 4096] = expected[page]
            await asyncio.gather(
                *(
                    wait_done(
                        partial(volume.write, page * 4096, content.view[page * 4096 : (page + 1) * 4096])
                    )
                    for page in range(PAGES)
                )
            )
            assert await read_bytes(volume, 0, PAGES * 4096) == b"".join(expected)
    await volume.close()
    await device.close()


async def test_a_write_whose_owner_is_replaced_before_it_starts_is_refused(tmp_path: Path) -> None:
    device = await open_device(f"dir:{tmp_path}")
    await device.run(device.create_volume, "vm1", 4096)
    device.claim("vm1", Claim(1, new_owner(1, "0" * 8)))
    volume = await device.open_volume("vm1", 1)
    with AlignedBuffer(4096) as content:
        content.view[:] = b"a" * 4096
        assert await wait_done(partial(volume.write, 0, content.view)) == 0
        content.view[:] = b"b" * 4096

        def write_and_lose(done: Done) -> None:
            volume.write(0, content.view, done)
            device.claim("vm1", Claim(2, new_owner(2, "1" * 8)))

        assert await wait_done(write_and_lose) == errno.ESHUTDOWN
    assert await read_bytes(volume, 0, 4096) == b"a" * 4096
    await volume.close()
    await device.close()
