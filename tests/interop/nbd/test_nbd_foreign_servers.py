"""Farpage's client against the servers of the field."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path

import pytest

from farpage.address import UnixAddress
from farpage.blockio import CONNECTION_LOST, Feature, read_bytes
from farpage.nbd.client import Connection, list_exports
from farpage.nbd.errors import ConnectFailed, ServerRefused
from tests.support.commands import condition, extents_of, wait_done, write_bytes, zero_bytes
from tests.support.nbd import short_folder
from tests.support.tools import listening, need, run, running

SIZE = 8 << 20


async def exercise(connection: Connection, seed: int = 3, rounds: int = 200) -> None:
    """Carry random commands out, 16 at a time on disjoint ranges, and check every read against a model."""
    chance = random.Random(seed)
    block = connection.limits.minimum
    slot_bytes = SIZE // 16 // block * block
    model = bytearray(await read_bytes(connection, 0, SIZE))

    async def on_slot(slot: int, seed: int) -> None:
        chance = random.Random(seed)
        base = slot * slot_bytes
        for _ in range(rounds // 16):
            first, last = sorted(chance.randrange(slot_bytes // block + 1) for _ in range(2))
            offset, length = base + first * block, (last - first) * block
            if not length:
                continue
            match chance.randrange(4):
                case 0:
                    data = chance.randbytes(length)
                    assert await write_bytes(connection, offset, data) == 0
                    model[offset : offset + length] = data
                case 1 if Feature.ZERO in connection.features:
                    assert await zero_bytes(connection, offset, length) == 0
                    model[offset : offset + length] = bytes(length)
                case _:
                    assert await read_bytes(connection, offset, length) == model[offset : offset + length]

    await asyncio.gather(*(on_slot(slot, chance.getrandbits(32)) for slot in range(16)))
    if Feature.FLUSH in connection.features:
        assert await wait_done(connection.flush) == 0
    assert await read_bytes(connection, 0, SIZE) == model


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
@pytest.mark.parametrize(
    "options",
    [
        ["memory", str(SIZE)],
        ["memory", str(SIZE), "--filter=noextents"],
        ["memory", str(SIZE), "--filter=nozero"],
        ["memory", str(SIZE), "--filter=fua", "fuamode=discard"],
        ["memory", str(SIZE), "--filter=delay", "rdelay=1ms", "wdelay=2ms"],
        ["memory", str(SIZE), "--no-sr"],
        [
            "memory",
            str(SIZE),
            "--filter=blocksize-policy",
            "blocksize-minimum=4096",
            "blocksize-preferred=8192",
            "blocksize-maximum=65536",
            "blocksize-error-policy=error",
        ],
    ],
    ids=lambda options: " ".join(options[2:]) or "plain",
)
async def test_nbdkit(options: list[str], structured: bool) -> None:
    need("nbdkit")
    flags = [option for option in options if option.startswith("--")]
    rest = [option for option in options if not option.startswith("--")]
    with short_folder() as folder:
        path = folder / "s"
        async with running(path, "nbdkit", "-f", "-U", str(path), *flags, *rest) as address:
            connection = await Connection.open(address, "", structured_replies=structured)
            assert connection.structured_replies is (structured and "--no-sr" not in flags)
            if "blocksize-minimum=4096" in rest:
                assert connection.limits.minimum == 4096
                assert connection.limits.maximum == 65536
            assert (Feature.EXTENTS in connection.features) is connection.structured_replies
            await exercise(connection)
            await connection.close()


async def test_nbdkits_file_plugin_reports_holes(tmp_path: Path) -> None:
    need("nbdkit")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(SIZE)
        file.seek(1 << 20)
        file.write(b"x" * (1 << 20))
    with short_folder() as folder:
        path = folder / "s"
        async with running(path, "nbdkit", "-f", "-U", str(path), "file", str(image)) as address:
            connection = await Connection.open(address, "")
            extents = await extents_of(connection, 0, SIZE)
            assert [(extent.length >> 20, int(extent.allocation)) for extent in extents] == [
                (1, 3),
                (1, 0),
                (6, 3),
            ]
            await exercise(connection)
            await connection.close()


async def test_errors_of_nbdkits_error_filter_arrive_as_they_are() -> None:
    need("nbdkit")
    with short_folder() as folder:
        path = folder / "s"
        command = ("nbdkit", "-f", "-U", str(path), "--filter=error", "memory", str(SIZE))
        extra = ("error-pread=EIO", "error-pwrite=ENOSPC", "error-pread-rate=50%", "error-pwrite-rate=50%")
        async with running(path, *command, *extra) as address:
            connection = await Connection.open(address, "")
            seen: set[int] = set()
            for _ in range(100):
                seen.add(await write_bytes(connection, 0, b"x" * 4096))
                try:
                    await read_bytes(connection, 0, 4096)
                except OSError as error:
                    seen.add(error.errno or 0)
            assert seen == {0, errno.EIO, errno.ENOSPC}
            await connection.close()


async def test_a_killed_server_is_noticed_at_once() -> None:
    need("nbdkit")
    with short_folder() as folder:
        path = folder / "s"
        command = ("nbdkit", "-f", "-U", str(path), "--filter=delay", "memory", str(SIZE), "rdelay=60")
        process = await asyncio.create_subprocess_exec(*command)
        await condition(lambda: listening(path))
        connection = await Connection.open(UnixAddress(str(path)), "")
        assert connection.peer_pid == process.pid
        lost: list[Exception] = []
        finished: list[int] = []
        connection.on_lost = lost.append
        connection.read(0, 4096, lambda error, payload: finished.append(error))
        connection.push()
        process.kill()
        await process.wait()
        await condition(lambda: bool(finished))
        assert finished == [CONNECTION_LOST]
        assert len(lost) == 1


async def test_nbdkit_says_why_it_refuses() -> None:
    need("nbdkit")
    with short_folder() as folder:
        path = folder / "s"
        command = ("nbdkit", "-f", "-U", str(path), "--filter=exportname", "memory", str(SIZE))
        extra = ("exportname-strict=true", "exportname=only", "exportname-list=explicit")
        async with running(path, *command, *extra) as address:
            assert [name for name, _ in await list_exports(address)] == ["only"]
            with pytest.raises((ServerRefused, ConnectFailed)):
                await Connection.open(address, "other")
            connection = await Connection.open(address, "only")
            await connection.close()


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
async def test_qemu_nbd(tmp_path: Path, image_format: str, structured: bool) -> None:
    need("qemu-nbd", "qemu-img")
    image = str(tmp_path / "image")
    await run("qemu-img", "create", "-f", image_format, image, str(SIZE))
    with short_folder() as folder:
        path = folder / "s"
        command = ("qemu-nbd", "-t", "-f", image_format, "-x", "disk", "-e", "4", "-k", str(path), image)
        async with running(path, *command) as address:
            assert [name for name, _ in await list_exports(address)] == ["disk"]
            connection = await Connection.open(address, "disk", structured_replies=structured)
            assert Feature.TRIM in connection.features
            await exercise(connection)
            assert await wait_done(lambda d: connection.trim(0, SIZE, d)) == 0
            await connection.close()
            with pytest.raises(ServerRefused, match="export 'other' not present") as caught:
                await Connection.open(address, "other")
            assert caught.value.reply == "NBD_REP_ERR_UNKNOWN"


async def test_nbd_server(tmp_path: Path) -> None:
    need("nbd-server")
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    with short_folder() as folder:
        path = folder / "s"
        config = folder / "config"
        config.write_text(
            f"[generic]\nunixsock = {path}\nallowlist = true\n"
            f"[disk]\nexportname = {image}\nflush = true\nfua = true\ntrim = true\n"
        )
        pid = str(folder / "pid")
        async with running(path, "nbd-server", "-d", "-C", str(config), "-p", pid) as address:
            connection = await Connection.open(address, "disk")
            assert connection.size_bytes == SIZE
            await exercise(connection)
            await connection.close()
            with pytest.raises(ConnectFailed):
                await Connection.open(address, "other")
