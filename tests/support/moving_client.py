"""A running set with two VIOSes that reach one device each, and a client that can be moved between them."""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from farpage.definition.model import Definition, Redundancy
from farpage.hypervisor.model import ClientCreate
from farpage.hypervisor.movement import ENDED, ClientMove, MoveAdjust, MoveInfo
from tests.support.paged_set import DEADLINE_SECONDS, PagedSet, paged_region, running_set

DEVICE_SIZE = "256M"


@dataclass
class MovingClient:
    """A client whose region is paged; vios1 reaches one of two devices, vios2 the other."""

    paged: PagedSet
    folder: Path
    places: tuple[str, str]
    """The names of the device that the client is on, and of the other one."""

    # What there is

    async def definition(self) -> Definition:
        return await self.paged.embedded.hypervisor.definition()

    async def alarms(self) -> set[str]:
        """Return the kinds of alarms that were raised."""
        return {alarm.kind for alarm in await self.paged.embedded.hypervisor.alarms()}

    async def volumes(self) -> dict[str, set[str]]:
        """Return the volumes that there are, by the name of their device."""
        definition = await self.definition()
        found: dict[str, set[str]] = {device.name: set() for device in definition.devices.values()}
        for vios in self.paged.embedded.vioses.values():
            for volume in await vios.volumes():
                found[definition.devices[volume.device].name].add(volume.name)
        return found

    def vios_of(self, device: str) -> str:
        """Return the VIOS that reaches a device."""
        return "vios1" if device == "a" else "vios2"

    def intermediary_pid(self) -> int | None:
        """Return the process of the intermediate client, if one runs."""
        hypervisor = self.paged.embedded.hypervisor_pid
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                except OSError:
                    continue
                if b"intermediary" in words and parent == hypervisor:
                    return int(entry.name)
        return None

    @staticmethod
    def runs(pid: int) -> bool:
        """Tell whether a process is there, and not just to be waited for."""
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    # Moving

    async def move(self, to: str | None = None, *, bandwidth_bytes: int | None = None) -> MoveInfo:
        """Begin to move the client by an intermediate client."""
        wanted = ClientMove(to=to or self.places[1], indirect=True, bandwidth_bytes=bandwidth_bytes)
        return await self.paged.embedded.hypervisor.move("client", wanted)

    async def adjust(self, wanted: MoveAdjust) -> MoveInfo:
        return await self.paged.embedded.hypervisor.adjust_move("client", wanted)

    async def progress(self) -> MoveInfo:
        return await self.paged.embedded.hypervisor.move_progress("client")

    async def until(self, holds: Callable[[MoveInfo], bool], what: str) -> MoveInfo:
        """Wait until a move is as it should be."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + DEADLINE_SECONDS
        while not holds(info := await self.progress()):
            assert loop.time() < deadline, f"never {what}: {info}"
            await asyncio.sleep(0.05)
        return info

    async def still(self) -> MoveInfo:
        """Wait until nothing is copied any more: what was under way when it was paused has ended."""
        before = await self.progress()
        async with asyncio.timeout(DEADLINE_SECONDS):
            while True:
                await asyncio.sleep(0.1)
                now = await self.progress()
                if now.filled_pages == before.filled_pages and now.rate_bytes == 0:
                    return now
                before = now

    async def ended(self) -> MoveInfo:
        """Wait until a move has ended."""
        return await self.until(lambda info: info.stage in ENDED, "ended")

    async def until_left(self, device: str) -> None:
        """Wait until the definition has nothing of the client on a device."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while True:
                definition = await self.definition()
                replicas = definition.clients["client"].volumes[0].replicas
                if device not in [definition.devices[replica.device].name for replica in replicas]:
                    return
                await asyncio.sleep(0.05)

    async def whole_on(self, device: str) -> None:
        """Check that the client's volume is on one device alone, and that its memory is right from there."""
        definition = await self.definition()
        (replica,) = definition.clients["client"].volumes[0].replicas
        assert definition.devices[replica.device].name == device
        assert (definition.moves, definition.grants) == ({}, ())
        volumes = await self.volumes()
        assert {name for name, there in volumes.items() if "client" in there} == {device}
        assert {path.device for path in (await self.paged.info()).paths} == {device}
        await self.paged.verify_all()
        await self.paged.write_all()
        await self.paged.verify_all()
        if device != self.places[0]:
            self.places = (self.places[1], self.places[0])

    async def half(self, what: str) -> None:
        """Have the client `write` or `verify` half of its pages: to do so with all brings them all over."""
        answer = await self.paged.client.do(f"{what} 0 {self.paged.pages // 2}")
        assert answer in ("done", "wrong 0")

    async def restart_hypervisor(self) -> None:
        """Kill the control process, and start another one."""
        embedded = self.paged.embedded
        embedded.supervise_hypervisor(supervised=False)
        embedded.kill_hypervisor(signal.SIGKILL)
        await embedded.hypervisor_exited()
        await embedded.start_hypervisor()


@asynccontextmanager
async def moving_client(pages: int, limit_bytes: int) -> AsyncIterator[MovingClient]:
    """Page a region whose volume is on one of two devices."""
    folder = Path(tempfile.mkdtemp(prefix="fpmov-", dir="/tmp"))
    for name in ("a", "b"):
        (folder / name).mkdir()
    try:
        # Of devices that fit the smallest is taken: these are, whatever room the file system has just now.
        devices = tuple(
            f"{vios}=dir:{folder / name}?size={DEVICE_SIZE}"
            for vios, name in (("vios1", "a"), ("vios2", "b"))
        )
        async with running_set(workers=1, devices=devices) as embedded:
            wanted = ClientCreate(
                name="client",
                memory_bytes=pages * 4096,
                limit_bytes=limit_bytes,
                redundancy=Redundancy.NONE,
            )
            await embedded.hypervisor.create_client(wanted)
            definition = await embedded.hypervisor.definition()
            used = definition.devices[definition.clients["client"].volumes[0].replicas[0].device].name
            async with paged_region(embedded, pages, limit_bytes) as paged:
                yield MovingClient(paged, folder, ("a", "b") if used == "a" else ("b", "a"))
    finally:
        shutil.rmtree(folder)
