"""The NBD servers that `bench.nbd` compares: each a process of its own that serves the same file."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench._nbd_load import stamped
from farpage.device.open import open_device
from farpage.nbd import options
from farpage.nbd import protocol as p

OURS: Final = "farpage"
RAW: Final = "io_uring"
"""No server: fio reads the file itself."""
ROOT: Final = Path(__file__).parents[1]
EXPORT: Final = "v"
_GOODBYE: Final = options.CLIENT_FLAGS.pack(p.NBD_FLAG_C_FIXED_NEWSTYLE) + options.encode_option(
    p.NBD_OPT_ABORT, b""
)
_START_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Served:
    """What a server is asked to serve, and where."""

    folder: Path
    """Of the volume, and for sockets and settings."""
    direct: bool
    """With O_DIRECT; else through the page cache."""
    tcp: bool
    """On a port of 127.0.0.1; else on a UNIX socket."""

    @property
    def image(self) -> Path:
        """The file."""
        return self.folder / "device" / "volumes" / EXPORT


@dataclass(frozen=True)
class Peer:
    """A foreign server."""

    program: str
    direct: bool
    """Whether it can serve a file with O_DIRECT."""


PEERS: Final = {
    "nbdkit": Peer("nbdkit", direct=False),
    "qemu-nbd": Peer("qemu-nbd", direct=True),
    "nbd-server": Peer("nbd-server", direct=False),
    "qemu-storage-daemon": Peer("qemu-storage-daemon", direct=True),
}


def installed(names: Sequence[str]) -> list[str]:
    """Return those of the peers whose programs are there."""
    return [name for name in names if shutil.which(PEERS[name].program)]


_numbers = itertools.count()


class Place:
    """Where one server listens: a UNIX socket or a port."""

    def __init__(self, served: Served, name: str) -> None:
        # A name of its own each time: nbd-server removes its files some time after it was told to end.
        self.socket = served.folder / f"{name}-{next(_numbers)}.sock"
        self.port = _free_port() if served.tcp else 0
        self.pid_file = self.socket.with_suffix(".pid")
        """Of a server that leaves the foreground and cannot be kept from it."""

    @property
    def address(self) -> str:
        """How farpage names it."""
        return f"tcp:127.0.0.1:{self.port}" if self.port else f"unix:{self.socket}"

    @property
    def uri(self) -> str:
        """How an NBD client names it."""
        if self.port:
            return f"nbd://127.0.0.1:{self.port}/{EXPORT}"
        return f"nbd+unix:///{EXPORT}?socket={self.socket}"

    async def listening(self) -> bool:
        """Tell whether somebody greets clients."""
        try:
            if self.port:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            else:
                reader, writer = await asyncio.open_unix_connection(str(self.socket))
        except OSError:
            return False
        # A client that is gone without a word gets nbd-server and qemu-storage-daemon to complain.
        greeting = await reader.read(options.GREETING.size)
        writer.write(_GOODBYE)
        writer.close()
        return bool(greeting)


def command(name: str, served: Served, place: Place) -> list[str]:
    """Return a server's command line; nbd-server's settings are written on the way."""
    image, unix, port = str(served.image), str(place.socket), str(place.port)
    cache = "direct" if served.direct else "buffered"
    if name == OURS:
        device = f"dir:{served.folder / 'device'}?cache={cache}"
        return [sys.executable, "-m", "bench._nbd_server", place.address, device, EXPORT]
    if name == "nbdkit":
        where = ["-i", "127.0.0.1", "-p", port] if served.tcp else ["-U", unix]
        return ["nbdkit", "-f", *where, "file", image]
    if name == "qemu-nbd":
        where = ["-b", "127.0.0.1", "-p", port] if served.tcp else ["-k", unix]
        mode = ",cache.direct=on,file.aio=io_uring" if served.direct else ""
        # Locking is off since several servers have the file open, one of them at work at a time.
        options = f"driver=raw,file.driver=file,file.filename={image},file.locking=off{mode}"
        return ["qemu-nbd", "-t", "-e", "8", "-x", EXPORT, *where, "--image-opts", options]
    if name == "qemu-storage-daemon":
        blockdev = f"driver=file,node-name=f,filename={image},locking=off"
        if served.direct:
            blockdev += ",cache.direct=on,aio=io_uring"
        kind = f"inet,addr.host=127.0.0.1,addr.port={port}" if served.tcp else f"unix,addr.path={unix}"
        return [
            "qemu-storage-daemon",
            "--blockdev",
            blockdev,
            "--nbd-server",
            f"addr.type={kind},max-connections=8",
            "--export",
            f"type=nbd,id=e,node-name=f,name={EXPORT},writable=on",
        ]
    settings = served.folder / "nbd-server.conf"
    where = [f"port = {port}", "listenaddr = 127.0.0.1"] if served.tcp else [f"unixsock = {unix}"]
    settings.write_text("\n".join(["[generic]", *where, f"[{EXPORT}]", f"exportname = {image}", ""]))
    return ["nbd-server", "-C", str(settings), "-p", str(place.pid_file)]


async def make_volume(folder: Path, size_bytes: int) -> None:
    """Make a volume of incompressible data, with its stamps, and leave it in the page cache."""
    device = await open_device(f"dir:{folder / 'device'}?cache=buffered", size_bytes=2 * size_bytes)
    device.create_volume(EXPORT, size_bytes)
    await device.close()
    with (folder / "device" / "volumes" / EXPORT).open("r+b") as file:
        for offset in range(0, size_bytes, 1 << 20):
            file.write(stamped(offset, 1 << 20, os.urandom(1 << 20)))
        file.flush()
        os.fsync(file.fileno())  # nothing is left to be written back while others are measured


def on_core(core: int | None) -> list[str]:
    """Return what goes before a command to have it run on one core alone."""
    return [] if core is None else ["taskset", "-c", str(core)]


@asynccontextmanager
async def running(arguments: Sequence[str], place: Place, core: int | None = None) -> AsyncIterator[None]:
    """Run a server from when it listens on, and end it afterwards.

    :raise SystemExit: it ended, or does not listen in time.
    """
    process = await asyncio.create_subprocess_exec(
        *on_core(core),
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        async with asyncio.timeout(_START_SECONDS):
            while not (place.pid_file.exists() if arguments[0] == "nbd-server" else await place.listening()):
                if process.returncode:
                    raise SystemExit(f"{arguments[0]} ended with status {process.returncode}")
                await asyncio.sleep(0.02)
        yield
    except TimeoutError as error:
        raise SystemExit(f"{arguments[0]} does not listen") from error
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
        if place.pid_file.exists():
            os.kill(int(place.pid_file.read_text()), signal.SIGTERM)
            place.pid_file.unlink(missing_ok=True)  # it does so itself, sooner or later


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
