"""Ten thousand hostile dialogues with a server process, beside a client that must not notice."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import struct
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from farpage.address import UnixAddress
from farpage.blockio import read_bytes
from farpage.nbd import codec, options
from farpage.nbd import protocol as p
from farpage.nbd.client import Connection
from tests.support.commands import condition
from tests.support.nbd import short_folder
from tests.support.nbd_server import content_of

CASES = 10_000
SEED = 20_240_229
AT_ONCE = 16
VOLUME_BYTES = 256 << 10
GROWTH_MAX_BYTES = 64 << 20
ROOT = Path(__file__).parents[3]

COMMANDS = (0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0xFFFF)
LENGTHS = (0, 1, 100, 512, 4096, 65536, VOLUME_BYTES, VOLUME_BYTES + 1, 1 << 25, 0xFFFFFFFF)
OFFSETS = (0, 0, 1, 512, 4096, VOLUME_BYTES - 1, VOLUME_BYTES, 1 << 40, (1 << 64) - 1)


def random_options(chance: random.Random) -> list[bytes]:
    """Return what a client may send before GO, and some that it may not."""
    name = chance.choice(["target", "target", "", "unknown", "x" * 4096, "nä\u2028me"])
    query = options.encode_context_query(
        options.ContextQuery(
            name, tuple(chance.choices(["base:allocation", "base:", "x:y", ""], k=chance.randrange(4)))
        )
    )
    info = options.encode_info_request(options.InfoRequest(name, tuple(chance.choices(range(5), k=2))))
    return [
        options.encode_option(p.NBD_OPT_STRUCTURED_REPLY),
        options.encode_option(p.NBD_OPT_STARTTLS),
        options.encode_option(p.NBD_OPT_LIST),
        options.encode_option(p.NBD_OPT_INFO, info),
        options.encode_option(p.NBD_OPT_SET_META_CONTEXT, query),
        options.encode_option(p.NBD_OPT_LIST_META_CONTEXT, query),
        options.encode_option(p.NBD_OPT_EXTENDED_HEADERS),
        options.encode_option(p.NBD_OPT_ABORT),
        options.encode_option(chance.randrange(1 << 32), chance.randbytes(chance.randrange(40))),
        options.encode_option(p.NBD_OPT_LIST, chance.randbytes(chance.choice([1, 20_000]))),
    ]


def requests(chance: random.Random) -> bytes:
    parts = []
    for _ in range(chance.randrange(8)):
        command = chance.choice(COMMANDS)
        flags = chance.choice([0, 0, 0, 1, 2, 4, 8, 16, 0xFFFF])
        length = chance.choice(LENGTHS)
        offset = chance.choice(OFFSETS)
        parts.append(codec.encode_request(command, flags, chance.getrandbits(64), offset, length))
        if command == p.NBD_CMD_WRITE:
            parts.append(bytes(min(length, chance.choice([length, length // 2, 65536]), 1 << 17)))
    return b"".join(parts)


def mutated(chance: random.Random, data: bytes) -> bytes:
    """Spoil a dialogue in one of the ways in which clients go wrong."""
    result = bytearray(data)
    at = chance.randrange(len(result))
    match chance.randrange(7):
        case 0:
            result[at] ^= 1 << chance.randrange(8)
        case 1:
            del result[at:]
        case 2:
            result[at:at] = chance.randbytes(chance.randrange(1, 64))
        case 3:
            del result[at : at + chance.randrange(1, 32)]
        case 4:
            result[at : at + 4] = struct.pack(">I", chance.choice([0, 1, 1 << 20, 1 << 31, 0xFFFFFFFF]))
        case 5:
            result[at:at] = result[: chance.randrange(1, 200)]
        case _:
            pass
    return bytes(result)


def dialogue(seed: int) -> bytes:
    chance = random.Random(seed)
    flags = chance.choice([3, 3, 3, 1, 0, 2, 1 << 31])
    chosen = chance.choices(random_options(chance), k=chance.randrange(4))
    enter = chance.choice(
        [
            options.encode_option(
                p.NBD_OPT_GO, options.encode_info_request(options.InfoRequest("target", (3,)))
            ),
            options.encode_option(p.NBD_OPT_EXPORT_NAME, b"target"),
        ]
    )
    return mutated(chance, options.CLIENT_FLAGS.pack(flags) + b"".join([*chosen, enter]) + requests(chance))


async def converse(path: str, data: bytes) -> None:
    """Send everything, say no more, and read until the server closes."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, path)

        async def send() -> None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                await loop.sock_sendall(sock, data)
                sock.shutdown(socket.SHUT_WR)

        async def receive() -> None:
            with contextlib.suppress(ConnectionResetError):
                while await loop.sock_recv(sock, 1 << 18):
                    pass

        async with asyncio.timeout(60):
            await asyncio.gather(send(), receive())


class ServerProcess:
    def __init__(self, process: asyncio.subprocess.Process, path: str) -> None:
        self.process = process
        self.path = path

    @property
    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/statm").read_text()
        return int(status.split()[1]) * os.sysconf("SC_PAGESIZE")

    @property
    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


@asynccontextmanager
async def server_process() -> AsyncIterator[ServerProcess]:
    with short_folder() as folder:
        path = str(folder / "s")
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "tests.support.nbd_server", path),
            *(f"{name}={VOLUME_BYTES}" for name in ("target", "bystander")),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=ROOT,
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"listening\n"
        yield ServerProcess(process, path)
        _, complaints = await process.communicate(b"")
        assert complaints.decode() == ""
        assert process.returncode == 0


async def test_hostile_dialogues_neither_harm_the_server_nor_disturb_others() -> None:
    async with server_process() as server:
        bystander = await Connection.open(UnixAddress(server.path), "bystander")
        expected = content_of("bystander", VOLUME_BYTES)
        over = False
        verified = 0

        async def verify() -> None:
            nonlocal verified
            chance = random.Random(SEED)
            while not over:
                offset = chance.randrange(VOLUME_BYTES - 8192)
                assert await read_bytes(bystander, offset, 8192) == expected[offset : offset + 8192]
                verified += 1

        async def attack(cases: Iterable[int]) -> None:
            todo = iter(cases)

            async def one_after_the_other() -> None:
                for case in todo:
                    try:
                        await converse(server.path, dialogue(SEED + case))
                    except TimeoutError:
                        raise AssertionError(f"the server held case {case} open") from None

            await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE)))

        verifying = asyncio.create_task(verify())
        await attack(range(CASES // 5))  # so many at once take their share of memory, once
        descriptors, resident_bytes = server.descriptors, server.resident_bytes
        await attack(range(CASES // 5, CASES))
        over = True
        await verifying
        assert verified > 100
        await condition(lambda: server.descriptors <= descriptors)
        assert server.resident_bytes - resident_bytes < GROWTH_MAX_BYTES
        await bystander.close()
