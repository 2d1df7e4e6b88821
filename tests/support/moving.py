"""Two VIOS with a device each, a client whose volume is to go from one to the other, intermediate clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from farpage.api.client import ControlClient
from farpage.definition import moving, rules
from farpage.definition.model import Definition, Redundancy, ViosRecord
from farpage.definition.rules import FoundDevice
from farpage.intermediary.model import IntermediaryStatus
from farpage.nbd.client import Connection
from farpage.vios.model import CopyStatus, VolumeCreate, VolumeInfo
from tests.support.commands import wait_done, write_bytes
from tests.support.nbd import short_folder
from tests.support.vios import ViosProcess

OWNER = "00000000000000aa"
CLIENT, PRINCIPAL = "vm1", "0000000000000001"
"""The first client of two VIOS, and the intermediate client of its move."""
FIRST, SECOND = "one", "two"
PAGE = 4096
DEADLINE_SECONDS = 60.0


class IntermediaryProcess:
    """One `farpage intermediary run`."""

    def __init__(self, folder: Path, client: str, arguments: Sequence[str]) -> None:
        self.folder = folder
        self.control = f"unix:{folder}/{client}.c"
        self.relay = f"unix:{folder}/{client}.r"
        self.log_path = folder / f"{client}.log"
        command = [
            sys.executable, "-W", "error", "-m", "farpage", "intermediary", "run", client,
            "--listen", self.relay, "--control", self.control, *arguments,
        ]  # fmt: skip
        with self.log_path.open("ab") as log:
            self._began_at = log.tell()
            self.process = subprocess.Popen(command, stderr=log, stdout=log)

    def kill(self) -> None:
        """Kill it with SIGKILL, unless it has ended."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    async def end(self) -> int:
        """Wait for its end and return its exit status."""
        return await asyncio.to_thread(self.process.wait, DEADLINE_SECONDS)

    def log(self) -> str:
        """What it has written."""
        return self.log_path.read_text()[self._began_at :]

    def events(self) -> list[str]:
        """The names of its log lines."""
        lines = [line for line in self.log().splitlines() if line.startswith("{") and line.endswith("}")]
        return [json.loads(line)["event"] for line in lines]

    async def until(self, event: str) -> None:
        """Wait until it has logged an event."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while event not in self.events():
                assert self.process.poll() is None, self.log()
                await asyncio.sleep(0.05)

    async def status(self) -> IntermediaryStatus:
        async with ControlClient(self.control) as client:
            return await client.get("/v1/status", IntermediaryStatus)


class TwoVios:
    """VIOS `one` and `two` with a device each, and a definition that both have.

    `options` are those of the devices' specifications.
    """

    def __init__(self, folder: Path, options: tuple[str, str] = ("", "")) -> None:
        self.folder = folder
        (folder / "d1").mkdir()
        (folder / "d2").mkdir()
        self.first = ViosProcess(folder, FIRST, [f"dir:{folder}/d1/first{options[0]}"])
        self.second = ViosProcess(folder, SECOND, [f"dir:{folder}/d2/second{options[1]}"])
        self.target = self.source = ""
        self.clients = 0

    async def start(self) -> None:
        """Start both, and make them known to each other."""
        definition = Definition()
        for vios in (self.first, self.second):
            vios.start()
            device = await vios.device()
            record = ViosRecord(control=vios.control, data=(str(vios.data),))
            found = FoundDevice(
                device.id, device.name, device.kind, device.spec, device.size_bytes, device.commands
            )
            definition = rules.register_vios(definition, vios.name, record, [found])
        self.target, self.source = (await self.first.device()).id, (await self.second.device()).id
        for vios in (self.first, self.second):
            await self.put(vios, definition)

    async def definition(self, vios: ViosProcess) -> Definition:
        async with vios.client() as client:
            return await client.get("/v1/definition", Definition)

    async def put(self, vios: ViosProcess, definition: Definition) -> None:
        has = await self.definition(vios)
        async with vios.client() as client:
            await client.put(
                "/v1/definition", definition, Definition, params={"expected_revision": has.revision}
            )

    def close(self) -> None:
        self.first.close()
        self.second.close()


class Moved:
    """A client whose volume is moved from `two` to `one`; the test is its hypervisor and reaches `one`."""

    def __init__(self, vioses: TwoVios, pages: int) -> None:
        vioses.clients += 1
        self.client = f"vm{vioses.clients}"
        self.principal = f"{vioses.clients:016x}"
        self.vioses = vioses
        self.first, self.second = vioses.first, vioses.second
        self.source, self.target = vioses.source, vioses.target
        self.pages = pages
        self.claim = moving.Claim(OWNER, 0)
        self._intermediaries: list[IntermediaryProcess] = []

    @property
    def source_file(self) -> Path:
        return self.vioses.folder / "d2" / "second" / "volumes" / self.client

    @property
    def target_file(self) -> Path:
        return self.vioses.folder / "d1" / "first" / "volumes" / self.client

    async def begin(self, data: Sequence[bool], *, seed: int = 1) -> None:
        """Make the client's volume on the source, with data where it says so, and begin the move.

        Only VIOS `one` is told of the move.
        """
        definition = self._with_client(await self.vioses.definition(self.first))
        for vios in (self.first, self.second):
            await self.vioses.put(vios, definition)
        await self._make(self.second, self.source)
        await self._fill(data, definition.clients[self.client].epoch, seed)
        route = moving.Route(self.source, SECOND, self.target, FIRST)
        await self.change(lambda d: moving.begin(d, self.client, self.claim, route, self.principal))
        await self._make(self.first, self.target)

    def _with_client(self, definition: Definition) -> Definition:
        """Add the client on the source, wherever placement would have it."""
        devices = {self.source: definition.devices[self.source]}
        alone = Definition(vioses=definition.vioses, devices=devices)
        added = rules.add_client(
            alone, self.client, memory_bytes=self.pages * PAGE, hypervisor="host", redundancy=Redundancy.NONE
        )
        added = rules.claim(added, self.client, OWNER, "host")
        return rules.next_revision(definition, clients={**definition.clients, **added.clients})

    async def _make(self, vios: ViosProcess, device: str) -> None:
        wanted = VolumeCreate(name=self.client, device=device, size_bytes=self.pages * PAGE)
        async with vios.client() as client:
            await client.post("/v1/volumes", wanted, VolumeInfo)

    async def _fill(self, data: Sequence[bool], epoch: int, seed: int) -> None:
        connection = await self.second.connect(f"{self.client}@{epoch}:{OWNER}")
        chance = random.Random(seed)
        for page, has_data in enumerate(data):
            if has_data:
                assert await write_bytes(connection, page * PAGE, chance.randbytes(PAGE)) == 0
        assert await wait_done(connection.flush) == 0
        await connection.close()

    # What the client's hypervisor does

    async def change(self, edit: Callable[[Definition], Definition]) -> Definition:
        """Change the definition at VIOS `one`, which is the one that the hypervisor reaches."""
        changed = edit(await self.vioses.definition(self.first))
        await self.vioses.put(self.first, changed)
        return changed

    async def adjust(self, bandwidth_bytes: int | None, *, paused: bool = False) -> None:
        """Pause or go on, within a bandwidth."""
        await self.change(
            lambda d: moving.adjust(d, self.client, paused=paused, bandwidth_bytes=bandwidth_bytes)
        )

    async def copy_status(self) -> CopyStatus:
        async with self.first.client() as client:
            return await client.get(
                f"/v1/volumes/{self.client}/copy", CopyStatus, params={"device": self.target}
            )

    async def until(self, holds: Callable[[CopyStatus], bool]) -> CopyStatus:
        """Wait until the copy is as it should be."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not holds(status := await self.copy_status()):
                await asyncio.sleep(0.05)
        return status

    async def finish(self) -> None:
        """Make the target the volume's place, as soon as it has everything."""
        await self.until(lambda status: status.present_pages == status.total_pages)
        await self.change(lambda definition: moving.finish(definition, self.client, self.claim))

    async def forget(self) -> None:
        """End the move, as soon as the volume on the source is gone."""
        await self.until(lambda status: bool(status.intermediary and status.intermediary.freed))
        await self.change(lambda definition: moving.forget(definition, self.client))

    def owner_export(self, epoch: int) -> str:
        """What the hypervisor opens at VIOS `one`."""
        return f"{self.client}/{self.target}<{self.source}@{epoch}:{OWNER}"

    async def open(self) -> Connection:
        """Open the volume as its owner does."""
        definition = await self.vioses.definition(self.first)
        return await self.first.connect(self.owner_export(definition.clients[self.client].epoch))

    # Intermediate clients

    def intermediary(self) -> IntermediaryProcess:
        """Start one."""
        vioses = [f"{vios.name}={vios.control}" for vios in (self.first, self.second)]
        arguments = ["--vios", vioses[0], "--vios", vioses[1]]
        process = IntermediaryProcess(self.vioses.folder, self.client, arguments)
        self._intermediaries.append(process)
        return process

    def close(self) -> None:
        for intermediary in self._intermediaries:
            intermediary.kill()


class MovingSet(Moved):
    """One client with two VIOS of its own."""

    def __init__(self, folder: Path, size_bytes: int, options: tuple[str, str] = ("", "")) -> None:
        super().__init__(TwoVios(folder, options), size_bytes // PAGE)
        self.folder = folder

    async def begin(self, data: Sequence[bool], *, seed: int = 1) -> None:
        """Start both VIOS first."""
        await self.vioses.start()
        self.source, self.target = self.vioses.source, self.vioses.target
        await super().begin(data, seed=seed)

    async def definition(self, vios: ViosProcess) -> Definition:
        return await self.vioses.definition(vios)

    async def put(self, vios: ViosProcess, definition: Definition) -> None:
        await self.vioses.put(vios, definition)

    def close(self) -> None:
        super().close()
        self.vioses.close()


@contextlib.asynccontextmanager
async def moving_set(size_bytes: int, options: tuple[str, str] = ("", "")) -> AsyncIterator[MovingSet]:
    """A set whose processes are not started yet; `options` are of the target's device and of the source's."""
    with short_folder() as folder:
        found = MovingSet(folder, size_bytes, options)
        try:
            yield found
        finally:
            found.close()


@contextlib.asynccontextmanager
async def two_vios() -> AsyncIterator[TwoVios]:
    """Both VIOS, running."""
    with short_folder() as folder:
        vioses = TwoVios(folder)
        try:
            await vioses.start()
            yield vioses
        finally:
            vioses.close()


def allocated_bytes(path: Path) -> int:
    """Return what a file takes on its device."""
    return path.stat().st_blocks * 512
