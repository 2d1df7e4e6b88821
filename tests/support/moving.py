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
from farpage.api.remote import RemoteError
from farpage.definition import moving, rules
from farpage.definition.model import Definition, Redundancy, ViosRecord
from farpage.definition.rules import FoundDevice
from farpage.intermediary.model import IntermediaryStatus
from farpage.vios.model import CopyStatus, VolumeCreate, VolumeInfo
from tests.support.commands import wait_done, write_bytes
from tests.support.nbd import short_folder
from tests.support.vios import ViosProcess

CLIENT, OWNER, PRINCIPAL = "vm1", "00000000000000aa", "00000000000000cc"
FIRST, SECOND = "one", "two"
PAGE = 4096
DEADLINE_SECONDS = 60.0


class IntermediaryProcess:
    """One `farpage intermediary run`."""

    def __init__(self, folder: Path, arguments: Sequence[str], *, name: str = "i") -> None:
        self.folder = folder
        self.control = f"unix:{folder}/{name}.c"
        self.relay = f"unix:{folder}/{name}.r"
        self.log_path = folder / f"{name}.log"
        command = [
            sys.executable, "-W", "error", "-m", "farpage", "intermediary", "run", CLIENT,
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
                await asyncio.sleep(0.02)

    async def status(self) -> IntermediaryStatus:
        async with ControlClient(self.control) as client:
            return await client.get("/v1/status", IntermediaryStatus)


class MovingSet:
    """VIOS `one` has the target, `two` the source; the test is the client's hypervisor and reaches `one`."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self.folder = folder
        self.size_bytes = size_bytes
        (folder / "d1").mkdir()
        (folder / "d2").mkdir()
        self.first = ViosProcess(folder, FIRST, [f"dir:{folder}/d1/v"])
        self.second = ViosProcess(folder, SECOND, [f"dir:{folder}/d2/v"])
        self.source = self.target = ""
        self.intermediaries: list[IntermediaryProcess] = []

    @property
    def source_file(self) -> Path:
        return self.folder / "d2" / "v" / "volumes" / CLIENT

    @property
    def target_file(self) -> Path:
        return self.folder / "d1" / "v" / "volumes" / CLIENT

    async def begin(self, data: Sequence[bool], *, seed: int = 1) -> None:
        """Make the client's volume on the source, with data where it says so, and begin the move.

        Only VIOS `one` is told of the move.
        """
        definition = Definition()
        for vios in (self.first, self.second):
            vios.start()
            device = await vios.device()
            record = ViosRecord(control=vios.control, data=(str(vios.data),))
            found = FoundDevice(
                device.id,
                device.name + vios.name,
                device.kind,
                device.spec,
                device.size_bytes,
                device.commands,
            )
            definition = rules.register_vios(definition, vios.name, record, [found])
        self.target, self.source = (await self.first.device()).id, (await self.second.device()).id
        definition = self._with_client(definition)
        for vios in (self.first, self.second):
            await self.put(vios, definition)
        await self._make(self.second, self.source)
        await self._fill(data, seed)
        await self._make(self.first, self.target)
        route = moving.Route(self.source, SECOND, self.target, FIRST)
        claim = moving.Claim(OWNER, 0)
        await self.change(lambda d: moving.begin(d, CLIENT, claim, route, PRINCIPAL))

    def _with_client(self, definition: Definition) -> Definition:
        """Add the client, wherever placement would have it, on the source."""
        only = {self.source: definition.devices[self.source]}
        alone = definition.model_copy(update={"devices": only})
        added = rules.add_client(
            alone, CLIENT, memory_bytes=self.size_bytes, hypervisor="host", redundancy=Redundancy.NONE
        )
        added = rules.claim(added, CLIENT, OWNER, "host")
        return added.model_copy(update={"devices": definition.devices})

    async def _make(self, vios: ViosProcess, device: str) -> None:
        wanted = VolumeCreate(name=CLIENT, device=device, size_bytes=self.size_bytes)
        async with vios.client() as client:
            with contextlib.suppress(RemoteError):
                await client.post("/v1/volumes", wanted, VolumeInfo)

    async def _fill(self, data: Sequence[bool], seed: int) -> None:
        epoch = (await self.definition(self.second)).clients[CLIENT].epoch
        connection = await self.second.connect(f"{CLIENT}@{epoch}:{OWNER}")
        chance = random.Random(seed)
        for page, has_data in enumerate(data):
            if has_data:
                assert await write_bytes(connection, page * PAGE, chance.randbytes(PAGE)) == 0
        assert await wait_done(connection.flush) == 0
        await connection.close()

    # What the client's hypervisor does

    async def definition(self, vios: ViosProcess) -> Definition:
        async with vios.client() as client:
            return await client.get("/v1/definition", Definition)

    async def put(self, vios: ViosProcess, definition: Definition) -> None:
        has = await self.definition(vios)
        async with vios.client() as client:
            await client.put(
                "/v1/definition", definition, Definition, params={"expected_revision": has.revision}
            )

    async def change(self, edit: Callable[[Definition], Definition]) -> Definition:
        """Change the definition at VIOS `one`, which is the one that the hypervisor reaches."""
        changed = edit(await self.definition(self.first))
        await self.put(self.first, changed)
        return changed

    async def copy_status(self) -> CopyStatus:
        async with self.first.client() as client:
            return await client.get(f"/v1/volumes/{CLIENT}/copy", CopyStatus, params={"device": self.target})

    async def until(self, holds: Callable[[CopyStatus], bool]) -> CopyStatus:
        """Wait until the copy is as it should be."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not holds(status := await self.copy_status()):
                await asyncio.sleep(0.02)
        return status

    async def finish(self) -> None:
        """Make the target the volume's place, as soon as it has everything."""
        await self.until(lambda status: status.present_pages == status.total_pages)
        await self.change(lambda definition: moving.finish(definition, CLIENT, moving.Claim(OWNER, 0)))

    async def forget(self) -> None:
        """End the move, as soon as the volume on the source is gone."""
        await self.until(lambda status: bool(status.intermediary and status.intermediary.freed))
        await self.change(lambda definition: moving.forget(definition, CLIENT))

    def owner_export(self, epoch: int) -> str:
        """What the hypervisor opens at VIOS `one`."""
        return f"{CLIENT}/{self.target}<{self.source}@{epoch}:{OWNER}"

    # Intermediate clients

    def vios_arguments(self) -> list[str]:
        return [
            "--vios", f"{FIRST}={self.first.control}", "--vios", f"{SECOND}={self.second.control}",
        ]  # fmt: skip

    def intermediary(self, *arguments: str) -> IntermediaryProcess:
        """Start one."""
        process = IntermediaryProcess(self.folder, arguments or self.vios_arguments())
        self.intermediaries.append(process)
        return process

    def close(self) -> None:
        for intermediary in self.intermediaries:
            intermediary.kill()
        self.first.close()
        self.second.close()


@contextlib.asynccontextmanager
async def moving_set(size_bytes: int) -> AsyncIterator[MovingSet]:
    """A set whose processes are not started yet."""
    with short_folder() as folder:
        found = MovingSet(folder, size_bytes)
        try:
            yield found
        finally:
            found.close()


def allocated_bytes(path: Path) -> int:
    """Return what a file takes on its device."""
    return path.stat().st_blocks * 512
