"""The lean client of `bench.nbd`."""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from bench._nbd_cases import BLOCK_BYTES, WORKS, Case, Work
from bench._nbd_contenders import EXPORT, OURS, Place, Served, command, make_volume, running
from bench._nbd_load import UNIT_BYTES, Load, LoadFailed, build, run, stamped
from bench.nbd import Settings, measure
from farpage.nbd import codec, options
from farpage.nbd import protocol as p

SIZE_BYTES = 4 << 20


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("load"))


@pytest.fixture(params=["unix", "tcp"])
async def served(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Served, Place]]:
    await make_volume(tmp_path, SIZE_BYTES)
    served = Served(tmp_path, direct=False, tcp=request.param == "tcp")
    place = Place(served, OURS)
    async with running(command(OURS, served, place), place):
        yield served, place


async def _load(program: Path, address: str, work: Work, *, connections: int = 2) -> Load:
    return await run(
        program,
        address,
        EXPORT,
        work,
        block_bytes=BLOCK_BYTES[work],
        depth=4,
        connections=connections,
        seconds=0.05,
        seed=1,
    )


@pytest.mark.parametrize("work", WORKS)
async def test_all_kinds_of_work_find_the_contents_right(
    program: Path, served: tuple[Served, Place], work: Work
) -> None:
    load = await _load(program, served[1].address, work)
    assert load.commands > 0
    assert (load.bytes, load.wrong) == (load.commands * BLOCK_BYTES[work], 0)
    assert load.per_second > 0
    assert load.cpu_seconds > 0


async def test_writes_leave_the_stamps_of_their_places(program: Path, served: tuple[Served, Place]) -> None:
    image = served[0].image
    with image.open("r+b") as file:
        file.write(bytes(SIZE_BYTES))
    load = await _load(program, served[1].address, "write")
    written = 0
    content = image.read_bytes()
    for offset in range(0, SIZE_BYTES, UNIT_BYTES):
        unit = content[offset : offset + UNIT_BYTES]
        if any(unit):
            assert unit == stamped(offset, UNIT_BYTES, unit)
            written += 1
    assert 0 < written <= load.commands


@pytest.mark.parametrize("harm", ["the first byte of a unit", "the last byte of a unit", "another unit"])
async def test_wrong_contents_are_found_and_told(
    program: Path, served: tuple[Served, Place], harm: str
) -> None:
    place = 7 * UNIT_BYTES
    with served[0].image.open("r+b") as file:
        unit = os.pread(file.fileno(), UNIT_BYTES, place)
        content = {
            "the first byte of a unit": bytes([unit[0] ^ 1]) + unit[1:],
            "the last byte of a unit": unit[:-1] + bytes([unit[-1] ^ 1]),
            "another unit": os.pread(file.fileno(), UNIT_BYTES, place + UNIT_BYTES),
        }[harm]
        os.pwrite(file.fileno(), content, place)
    with pytest.raises(LoadFailed, match=f"wrong content at {place}: "):
        await _load(program, served[1].address, "sequential")


def _reply(cookie: int, error: int = 0, magic: int = p.NBD_SIMPLE_REPLY_MAGIC) -> bytes:
    return struct.pack(">IIQ", magic, error, cookie)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda cookie: _reply(cookie, error=5), "a write at .* fails with error 5"),
        (lambda cookie: _reply(cookie, magic=p.NBD_STRUCTURED_REPLY_MAGIC), "a reply begins with 0x668e33ef"),
        (lambda cookie: _reply(cookie + 1), "a reply to a command that was not sent"),
        (lambda cookie: _reply(cookie) * 2, "a reply to a command that was not sent"),
        (lambda cookie: b"", "the server is gone"),
    ],
)
async def test_a_server_that_breaks_the_protocol_or_fails_ends_it(
    program: Path, tmp_path: Path, answer: Callable[[int], bytes], told: str
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        flags = p.NBD_FLAG_FIXED_NEWSTYLE | p.NBD_FLAG_NO_ZEROES
        writer.write(options.GREETING.pack(p.NBDMAGIC, p.IHAVEOPT, flags))
        await reader.readexactly(4 + 16 + 4 + len(EXPORT) + 2)
        head = struct.Struct(">QIII")
        info = struct.pack(">HQH", p.NBD_INFO_EXPORT, SIZE_BYTES, p.NBD_FLAG_HAS_FLAGS)
        writer.write(head.pack(p.NBD_OPTION_REPLY_MAGIC, p.NBD_OPT_GO, p.NBD_REP_INFO, len(info)) + info)
        writer.write(head.pack(p.NBD_OPTION_REPLY_MAGIC, p.NBD_OPT_GO, p.NBD_REP_ACK, 0))
        request = await reader.readexactly(codec.REQUEST.size + UNIT_BYTES)
        writer.write(answer(int.from_bytes(request[8:16], "big")))
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "server"):
        with pytest.raises(LoadFailed, match=told):
            await run(
                program,
                f"unix:{tmp_path / 'server'}",
                EXPORT,
                "write",
                block_bytes=UNIT_BYTES,
                depth=1,
                connections=1,
                seconds=0,
                seed=1,
            )


async def test_the_benchmark_measures_with_it_and_names_it(tmp_path: Path) -> None:
    settings = Settings(
        rounds=1,
        seconds=0.05,
        size_bytes=SIZE_BYTES,
        peers=(),
        cases=(Case(), Case(storage="direct", depth=1)),
        folder=tmp_path,
        realtime=False,
        client="load",
    )
    result = await measure(settings, tmp_path)
    assert [len(case.figures) for case in result.cases] == [1, 1]  # nobody but a server
    assert all(case.figures[0].per_second.median > 0 for case in result.cases)
    assert "commands a second with load" in result.as_text()
