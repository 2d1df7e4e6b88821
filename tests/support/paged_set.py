"""A running set with one client whose region is paged: what the fault tests work on."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farpage.api.remote import RemoteError
from farpage.definition.model import Definition
from farpage.embedded.control import HypervisorControl
from farpage.embedded.set import EmbeddedSet, SetSettings
from farpage.hypervisor.model import ClientInfo, PathInfo, PoolSet

CLIENT = Path(__file__).with_name("region_client.py")
DEADLINE_SECONDS = 60.0


async def once_free(request: Callable[[], Awaitable[object]]) -> None:
    """Ask for something, again while something else is done with the client."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            try:
                await request()
            except RemoteError as error:
                if error.code != "client_busy":
                    raise
                await asyncio.sleep(0.001)
            else:
                return


@dataclass
class RegionProcess:
    """The client's process; a command is sent, and its answer can be awaited later."""

    process: asyncio.subprocess.Process

    @classmethod
    async def start(
        cls,
        state: Path,
        pages: int,
        limit_bytes: int,
        name: str = "client",
        version: int = 0,
        *,
        launcher: Sequence[str] = (),
    ) -> RegionProcess:
        """Start the process and wait until its region is attached, as the client of that name.

        With a version it expects what another process has written at that version. A launcher starts it and
        then becomes it.
        """
        process = await asyncio.create_subprocess_exec(
            *launcher,
            sys.executable,
            str(CLIENT),
            str(state),
            str(pages),
            str(limit_bytes),
            name,
            str(version),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        client = cls(process)
        assert await client.answer() == "ready"
        return client

    def send(self, command: str) -> None:
        """Send a command without waiting for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n".encode())

    async def answer(self) -> str:
        """Wait for the next answer."""
        assert self.process.stdout is not None
        async with asyncio.timeout(DEADLINE_SECONDS):
            return (await self.process.stdout.readline()).decode().strip()

    async def do(self, command: str) -> str:
        """Send a command and wait for its answer."""
        self.send(command)
        return await self.answer()

    async def stop(self) -> None:
        """End the process, however it stands."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


class PagedSet:
    """A set and its client."""

    def __init__(self, embedded: EmbeddedSet, client: RegionProcess, pages: int) -> None:
        self.embedded = embedded
        self.client = client
        self.pages = pages

    async def info(self) -> ClientInfo:
        """Ask the hypervisor for the client."""
        return await self.embedded.hypervisor.client("client")

    async def until(self, condition: Callable[[ClientInfo], bool], what: str) -> ClientInfo:
        """Wait until the client, as its hypervisor describes it, fulfils a condition."""
        return await until_client(self.embedded.hypervisor, "client", condition, what)

    async def active(self) -> str:
        """Return the VIOS of the active path."""
        info = await self.until(lambda info: path_in(info, "active") is not None, "any path active")
        path = path_in(info, "active")
        assert path is not None
        return path.vios

    async def until_state(self, vios: str, state: str) -> ClientInfo:
        """Wait until the path over a VIOS is in a state."""
        return await self.until(
            lambda info: any(path.vios == vios and path.state == state for path in info.paths),
            f"{state} over {vios}",
        )

    async def until_sent(self, vios: str) -> ClientInfo:
        """Wait until a VIOS that hangs was sent something; it may have been given up for that since."""
        return await self.until(
            lambda info: any(
                path.vios == vios and (path.in_flight > 0 or path.state == "failed") for path in info.paths
            ),
            f"in flight over {vios}",
        )

    async def until_stored(self, definition: Definition) -> None:
        """Wait until every VIOS stores a definition."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            for vios in self.embedded.vioses.values():
                while await vios.definition() != definition:
                    await asyncio.sleep(0.05)

    async def until_alarm(self, kind: str) -> None:
        """Wait until the hypervisor has raised an alarm."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while kind not in [alarm.kind for alarm in await self.embedded.hypervisor.alarms()]:
                await asyncio.sleep(0.05)

    def signal(self, vios: str, number: signal.Signals) -> None:
        """Send a signal to a VIOS; one that dies of it stays dead until it is started."""
        self.embedded.supervise_vios(vios, supervised=False)
        self.embedded.kill_vios(vios, number)

    async def restart(self, vios: str) -> None:
        """Start a VIOS that was killed."""
        await self.embedded.vios_exited(vios)
        await self.embedded.start_vios(vios)

    async def set_limit(self, limit_bytes: int) -> None:
        """Change the client's limit."""
        await self.embedded.hypervisor.set_pool(PoolSet(client="client", limit_bytes=limit_bytes))

    async def write_all(self) -> None:
        """Give every page a new version."""
        assert await self.client.do(f"write 0 {self.pages}") == "done"

    async def verify_all(self) -> None:
        """Compare every byte."""
        assert await self.client.do(f"verify 0 {self.pages}") == "wrong 0"


async def until_client(
    hypervisor: HypervisorControl, name: str, condition: Callable[[ClientInfo], bool], what: str
) -> ClientInfo:
    """Wait until a client, as its hypervisor describes it, fulfils a condition."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + DEADLINE_SECONDS
    while True:
        info = await hypervisor.client(name)
        if condition(info):
            return info
        assert loop.time() < deadline, f"never {what}: {info}"
        await asyncio.sleep(0.05)


@asynccontextmanager
async def running_set(**settings: Any) -> AsyncIterator[EmbeddedSet]:
    """Run two VIOS with a common device and a hypervisor in a folder of their own; see `SetSettings`."""
    folder = Path(tempfile.mkdtemp(prefix="fpset-", dir="/tmp"))
    embedded = EmbeddedSet(SetSettings(state_dir=folder / "s", **settings))
    try:
        await embedded.start()
        yield embedded
    finally:
        for vios in embedded.vioses:
            if embedded.vios_pid(vios):
                embedded.kill_vios(vios, signal.SIGCONT)
        await embedded.stop()
        shutil.rmtree(folder)


@asynccontextmanager
async def paged_region(embedded: EmbeddedSet, pages: int, limit_bytes: int) -> AsyncIterator[PagedSet]:
    """Run a process whose region of `pages` pages the set's hypervisor pages under a limit."""
    client = await RegionProcess.start(embedded.layout.root, pages, limit_bytes)
    try:
        yield PagedSet(embedded, client, pages)
    finally:
        await client.stop()


def path_in(info: ClientInfo, state: str) -> PathInfo | None:
    """Return the first path in a state."""
    return next((path for path in info.paths if path.state == state), None)
