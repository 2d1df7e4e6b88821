"""`python -m tests.support.nbd_server SOCKET NAME=BYTES...`: memory volumes behind a server process.

Prints a line when it listens. Ends with its standard input.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
from collections import deque

from farpage.address import UnixAddress
from farpage.blockio import BlockIO
from farpage.nbd.eventloop import DataPlaneLoop
from farpage.nbd.server import Server
from tests.support.blockio import MemoryIO
from tests.support.nbd import Exports


def content_of(name: str, size_bytes: int) -> bytes:
    """What a volume holds at first."""
    return random.Random(name).randbytes(size_bytes)


async def serve(socket_path: str, volumes: list[str]) -> None:
    exports: dict[str, BlockIO] = {}
    for volume in volumes:
        name, _, size = volume.partition("=")
        exports[name] = io = MemoryIO(int(size))
        io.log = deque(maxlen=0)
        io.content[:] = content_of(name, int(size))
    server = Server(Exports(exports))
    await server.start([UnixAddress(socket_path)])
    print("listening", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    with asyncio.Runner(loop_factory=DataPlaneLoop) as runner:
        runner.run(serve(sys.argv[1], sys.argv[2:]))
