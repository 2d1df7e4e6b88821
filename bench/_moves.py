"""Two VIOSes and volumes that intermediate clients copy from one to the other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from farpage.address import parse_address
from farpage.api.client import ControlClient
from farpage.definition import moving, replacing, rules
from farpage.definition.model import Definition, Redundancy, ReplicaState, ViosRecord
from farpage.definition.rules import FoundDevice
from farpage.errors import Unreachable
from farpage.nbd.client import list_exports
from farpage.vios.model import DeviceInfo, VolumeCreate, VolumeInfo

OWNER: Final = "00000000000000aa"
ROOT: Final = Path(__file__).parents[1]
RUN_BYTES: Final = 256 << 10
_START_SECONDS: Final = 60.0
_COPY_SECONDS: Final = 600.0


class _Vios:
    """One `farpage vios run` with one device, whose volumes are in the page cache as nbdkit's files are."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.folder = folder / name
        self.control = f"unix:{self.folder}/control.sock"
        self.data = f"unix:{self.folder}/data.sock"
        self.client = ControlClient(self.control, who=f"VIOS {name}")
        self.device = ""
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self, size_bytes: int) -> FoundDevice:
        device = f"dir:{self.folder}/{self.name}-device?size={size_bytes}&cache=buffered"
        self._process = await _farpage(
            "vios", "run", self.name, "--dir", str(self.folder), "--device", device
        )
        async with asyncio.timeout(_START_SECONDS):
            while True:
                try:
                    (found,) = await self.client.get("/v1/devices", tuple[DeviceInfo, ...])
                    break
                except Unreachable:
                    await asyncio.sleep(0.05)
        await list_exports(parse_address(self.data))
        self.device = found.id
        return FoundDevice(found.id, found.name, found.kind, found.spec, found.size_bytes, found.commands)

    def file(self, volume: str) -> Path:
        return self.folder / f"{self.name}-device" / "volumes" / volume

    async def make(self, volume: str, size_bytes: int) -> None:
        wanted = VolumeCreate(name=volume, device=self.device, size_bytes=size_bytes)
        await self.client.post("/v1/volumes", wanted, VolumeInfo)

    async def put(self, definition: Definition) -> None:
        has = await self.client.get("/v1/definition", Definition)
        params = {"expected_revision": has.revision}
        await self.client.put("/v1/definition", definition, Definition, params=params)

    async def stop(self) -> None:
        await self.client.close()
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            await self._process.wait()


class Moves:
    """Both VIOSes; `first` has the target."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.first, self.second = _Vios(folder, "vios1"), _Vios(folder, "vios2")
        self._definition = Definition()
        self._principals = 0

    @contextlib.asynccontextmanager
    async def running(self, size_bytes: int) -> AsyncIterator[None]:
        """Run both."""
        try:
            for vios in (self.first, self.second):
                found = await vios.start(size_bytes)
                record = ViosRecord(control=vios.control, data=(vios.data,))
                self._definition = rules.register_vios(self._definition, vios.name, record, [found])
            yield
        finally:
            for vios in (self.first, self.second):
                await vios.stop()

    @property
    def pids(self) -> tuple[int, ...]:
        """Processes of the VIOSes."""
        return self.first.pid, self.second.pid

    async def make(self, client: str, size_bytes: int, percent: int) -> Path:
        """Make a client whose volume holds so much data, in runs of 256 KiB, warm in the page cache.

        Returns its file.
        """
        present = self._definition
        devices = {self.second.device: present.devices[self.second.device]}
        added = rules.add_client(
            Definition(vioses=present.vioses, devices=devices),
            client,
            memory_bytes=size_bytes,
            hypervisor="bench",
            redundancy=Redundancy.NONE,
        )
        added = rules.claim(added, client, OWNER, "bench")
        await self._put(rules.next_revision(present, clients={**present.clients, **added.clients}))
        await self.second.make(client, size_bytes)
        file = self.second.file(client)
        await asyncio.to_thread(_fill, file, size_bytes, percent)
        return file

    async def copy(self, client: str, size_bytes: int) -> float:
        """Copy a client's volume and return the seconds; the copy is compared, and goes again.

        It is taken from when the intermediate client has opened both volumes until everything is on stable
        storage.
        """
        self._principals += 1
        claim = moving.Claim(OWNER, 0)
        route = moving.Route(self.second.device, "vios2", self.first.device, "vios1")
        await self._put(moving.begin(self._definition, client, claim, route, f"{self._principals:016x}"))
        await self.first.make(client, size_bytes)
        seconds = await self._copied(client)
        await _compare(self.second.file(client), self.first.file(client))
        await self._put(moving.cancel(self._definition, client, claim))
        params: dict[str, str | int] = {
            "epoch": self._definition.clients[client].epoch,
            "device": self.first.device,
        }
        await self.first.client.delete(f"/v1/volumes/{client}", params=params)
        retired = ReplicaState.RETIRED
        await self._put(replacing.forget(self._definition, client, self.first.device, retired))
        return seconds

    async def _copied(self, client: str) -> float:
        vioses = (f"{vios.name}={vios.control}" for vios in (self.first, self.second))
        options = [part for text in vioses for part in ("--vios", text)]
        listen = f"unix:{self._folder}/relay.sock"
        process = await _farpage("intermediary", "run", client, *options, "--listen", listen)
        assert process.stderr is not None
        try:
            async with asyncio.timeout(_COPY_SECONDS):
                async for line in process.stderr:
                    entry = json.loads(line)
                    if entry["event"] == "copied":
                        return float(entry["seconds"])
            raise SystemExit("the intermediate client ended without having copied anything")
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            await process.communicate()

    async def _put(self, definition: Definition) -> None:
        for vios in (self.first, self.second):
            await vios.put(definition)
        self._definition = definition


async def _farpage(*arguments: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE if arguments[0] == "intermediary" else asyncio.subprocess.DEVNULL
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "farpage", *arguments, stderr=pipe, cwd=ROOT
    )


async def _compare(one: Path, other: Path) -> None:
    command = ("qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", str(one), str(other))
    process = await asyncio.create_subprocess_exec(*command)
    if await process.wait():
        raise SystemExit(f"{one} and {other} differ")


def _fill(file: Path, size_bytes: int, percent: int) -> None:
    places = range(0, size_bytes, RUN_BYTES)
    chosen = random.Random(percent).sample(places, max(len(places) * percent // 100, 1))
    with file.open("r+b") as stream:
        for place in sorted(chosen):
            stream.seek(place)
            stream.write(os.urandom(min(RUN_BYTES, size_bytes - place)))
        stream.flush()
        os.fsync(stream.fileno())  # nothing is left to be written back while others are measured
