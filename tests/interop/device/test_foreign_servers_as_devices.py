"""The NBD servers of the field as paging devices."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import select
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from farpage.address import UnixAddress
from farpage.blockio import BlockIO, Feature, read_bytes
from farpage.device.base import PagingDevice
from farpage.device.claim import Claim
from farpage.device.layout import DATA_OFFSET_BYTES
from farpage.device.open import open_device
from farpage.nbd.uri import NbdUri
from tests.support.commands import condition
from tests.support.nbd import short_folder
from tests.support.tools import need, run, running
from tests.support.volumes import flush, trim, write, zero

SIZE = 4 << 20
STORAGE = SIZE + DATA_OFFSET_BYTES


@pytest.fixture
def image(tmp_path: Path) -> Path:
    with (tmp_path / "image").open("wb") as file:
        file.truncate(STORAGE)
    return tmp_path / "image"


def fill(image: Path) -> None:
    """Put something behind the label's place, which a new volume must not show."""
    with image.open("r+b") as file:
        file.seek(DATA_OFFSET_BYTES)
        file.write(b"old" * (SIZE // 3))


def volume_in(image: Path) -> bytes:
    return image.read_bytes()[DATA_OFFSET_BYTES:]


def greets(path: Path) -> bool:
    """Look whether a server greets whoever connects: nbd-server listens before it is ready to."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        probe.connect(str(path))
        return probe.recv(8) == b"NBDMAGIC"
    return False


@contextlib.asynccontextmanager
async def nbd_server(folder: Path, image: Path) -> AsyncIterator[NbdUri]:
    """Run nbd-server as a daemon: in the foreground it ends with its first client."""
    need("nbd-server")
    config, path, pid = folder / "config", folder / "s", folder / "pid"
    config.write_text(
        f"[generic]\nunixsock = {path}\nallowlist = true\n"
        f"[disk]\nexportname = {image}\nflush = true\nfua = true\ntrim = true\n"
    )
    await run("nbd-server", "-C", str(config), "-p", str(pid))
    await condition(lambda: pid.exists() and pid.read_text().strip() != "" and greets(path))
    pidfd = os.pidfd_open(int(pid.read_text()))
    try:
        yield NbdUri(UnixAddress(str(path)), "disk")
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        select.select([pidfd], [], [], 5)
        os.close(pidfd)


@contextlib.asynccontextmanager
async def server(kind: str, image: Path) -> AsyncIterator[NbdUri]:
    """Run a server that exports the raw image, or RAM; several connections may come."""
    with short_folder() as folder:
        path, export = folder / "s", "" if kind.startswith("nbdkit") else "disk"
        match kind.split():
            case ["nbdkit", plugin, *options]:
                flags = [option for option in options if option.startswith("--")]
                parameters = [option for option in options if not option.startswith("--")]
                place = str(STORAGE) if plugin == "memory" else str(image)
                command = ["nbdkit", "-f", "-U", str(path), *flags, plugin, place, *parameters]
            case ["qemu-nbd", *options]:
                command = ["qemu-nbd", "-t", "-f", "raw", "-x", "disk", "-k", str(path), *options, str(image)]
            case ["qemu-storage-daemon"]:
                command = [
                    "qemu-storage-daemon",
                    *("--blockdev", f"driver=file,node-name=disk,filename={image},discard=unmap"),
                    *("--nbd-server", f"addr.type=unix,addr.path={path},max-connections=0"),
                    *("--export", "type=nbd,id=disk,node-name=disk,name=disk,writable=on"),
                ]
            case _:
                async with nbd_server(folder, image) as uri:
                    yield uri
                return
        need(command[0])
        async with running(path, *command) as address:
            assert isinstance(address, UnixAddress)
            yield NbdUri(address, export)


async def exercise(volume: BlockIO) -> bytes:
    """Carry random commands out, 8 at a time on disjoint ranges; returns what the volume holds then."""
    chance = random.Random(4)
    model = bytearray(SIZE)
    unit = 4096

    async def on_slot(slot: int, seed: int) -> None:
        chance = random.Random(seed)
        base, pages = slot * (SIZE // 8), SIZE // 8 // unit
        for _ in range(30):
            first, last = sorted(chance.randrange(pages + 1) for _ in range(2))
            offset, length = base + first * unit, (last - first) * unit
            if not length:
                continue
            match chance.randrange(4):
                case 0 | 1:
                    data = chance.randbytes(length)
                    assert await write(volume, offset, data, fua=Feature.FUA in volume.features) == 0
                    model[offset : offset + length] = data
                case 2 if Feature.ZERO in volume.features:
                    assert await zero(volume, offset, length) == 0
                    model[offset : offset + length] = bytes(length)
                case _:
                    assert await read_bytes(volume, offset, length) == model[offset : offset + length]

    await asyncio.gather(*(on_slot(slot, chance.getrandbits(32)) for slot in range(8)))
    if Feature.TRIM in volume.features:
        assert await trim(volume, 0, 65536) == 0
        model[:65536] = await read_bytes(volume, 0, 65536)
    if Feature.FLUSH in volume.features:
        assert await flush(volume) == 0
    assert await read_bytes(volume, 0, SIZE) == model
    return bytes(model)


async def page_to(device: PagingDevice) -> bytes:
    """Make a volume and use it as its owner."""
    await device.run(device.create_volume, "vm1", SIZE)
    assert await device.run(device.claim, "vm1", Claim(1, "a" * 16)) == Claim(1, "a" * 16)
    volume = await device.open_volume("vm1", 1)
    try:
        assert await read_bytes(volume, 0, SIZE) == bytes(SIZE)
        return await exercise(volume)
    finally:
        await volume.close()


SERVERS = [
    "nbdkit memory",
    "nbdkit memory --filter=noextents --filter=nozero",
    "nbdkit memory --no-sr",
    "nbdkit file",
    "nbdkit file --filter=fua fuamode=emulate",
    "nbdkit file --filter=multi-conn multi-conn-mode=disable",
    "nbdkit file --filter=blocksize-policy blocksize-minimum=4096 blocksize-preferred=4096 "
    "blocksize-maximum=65536 blocksize-error-policy=error",
    "qemu-nbd -e 8",
    "qemu-nbd",
    "qemu-storage-daemon",
    "nbd-server",
]


@pytest.mark.parametrize("kind", SERVERS, ids=lambda kind: str(kind)[:60])
async def test_a_server_is_paged_to_and_shows_the_same_volume_again(kind: str, image: Path) -> None:
    fill(image)
    async with server(kind, image) as uri:
        device = await open_device(str(uri))
        try:
            assert device.size_bytes == SIZE
            content = await page_to(device)
            identifier = device.id
        finally:
            await device.close()
        device = await open_device(str(uri))
        try:
            assert device.id == identifier
            assert (await device.run(device.volume, "vm1")).claim == Claim(1, "a" * 16)
            view = await device.open_volume("vm1", None)
            assert await read_bytes(view, 0, SIZE) == content
            await view.close()
        finally:
            await device.close()
    if "memory" not in kind:
        assert volume_in(image) == content


async def test_the_volume_is_a_part_of_the_image_that_qemu_img_compares(image: Path, tmp_path: Path) -> None:
    need("qemu-img")
    async with server("nbdkit file", image) as uri:
        device = await open_device(str(uri))
        try:
            content = await page_to(device)
        finally:
            await device.close()
    (tmp_path / "volume").write_bytes(content)
    part = f"driver=raw,offset={DATA_OFFSET_BYTES},size={SIZE},file.driver=file,file.filename={image}"
    compared = await run(
        "qemu-img",
        "compare",
        "--image-opts",
        part,
        f"driver=raw,file.driver=file,file.filename={tmp_path}/volume",
    )
    assert "identical" in compared
