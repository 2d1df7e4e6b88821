"""Where a campaign takes place: the set of `farpage up`, its devices and four busy clients.

Three VIOS reach the common device. Two of them answer on UNIX sockets, the third over TCP and a link into a
network namespace. A small device, which can be filled, is common too and takes the volume of one client.
Without root there is neither a link nor a small device.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from farpage.embedded.child import ChildEvent
from farpage.embedded.set import EmbeddedSet, SetSettings, ViosPlacement
from farpage.errors import FarpageError
from farpage.hypervisor.model import Attachment, ClientInfo, WorkerInfo
from farpage.vios.model import DeviceAdd
from farpage.volume.state import PathState
from tests.faults.campaign.busy import BusyClient, BusyProcess, Findings, compile_stamper
from tests.faults.campaign.network import NamespaceLink
from tests.faults.campaign.small_device import SmallDevice

MIB = 1 << 20
PAGES = 3072
LIMIT_BYTES = 3 * MIB
SMALL_BYTES = 16 * MIB
"""Room for one volume."""
FAR_PORT = 10809
PROBE_SECONDS = 2.0
FINISH_SECONDS = 120.0
TOKEN_VARIABLE = "FARPAGE_CAMPAIGN"
"""In the environment of every process of the campaign, so that those left behind are found."""

CLIENTS = {"alpha": "path", "beta": "path", "gamma": "path", "delta": "path"}
"""Redundancy by client."""


@dataclass
class Place:
    """The set, and what is known of it."""

    embedded: EmbeddedSet
    library: Path
    seed: int
    path_timeout_seconds: float
    link: NamespaceLink | None
    small: SmallDevice | None
    findings: Findings = field(default_factory=Findings)
    clients: dict[str, BusyProcess] = field(default_factory=dict)
    known: tuple[ClientInfo, ...] = ()
    """The clients as the hypervisor described them last."""
    workers: tuple[WorkerInfo, ...] = ()
    finished_reads: int = 0
    finished_writes: int = 0
    _lives: int = 0

    @property
    def reads(self) -> int:
        """Pages verified so far."""
        return self.finished_reads + sum(client.reads for client in self.clients.values())

    @property
    def writes(self) -> int:
        """Pages written so far."""
        return self.finished_writes + sum(client.writes for client in self.clients.values())

    async def start_client(self, name: str) -> BusyProcess:
        """Start a busy client; it is quiet until `go`. Each life has stamps of its own."""
        self._lives += 1
        client = BusyClient(name, self._lives, CLIENTS[name], PAGES, LIMIT_BYTES)
        busy = await BusyProcess.start(
            client, self.library, self.embedded.layout.root, self.seed + self._lives, self.findings
        )
        self.clients[name] = busy
        return busy

    async def finish_client(self, name: str) -> None:
        """Have a client verify everything and end."""
        busy = self.clients[name]
        await busy.finish(FINISH_SECONDS)
        self.finished_reads += busy.reads
        self.finished_writes += busy.writes
        del self.clients[name]

    async def look(self) -> str:
        """Ask everybody; returns what is missing for the set to be whole, "" when nothing is."""
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                info = await self.embedded.hypervisor.info()
                clients = await self.embedded.hypervisor.clients()
                for vios in self.embedded.vioses.values():
                    await vios.health()
        except (FarpageError, TimeoutError) as error:
            return str(error) or "no answer in time"
        self.workers = info.workers
        self.known = tuple(client for client in clients if client.name in self.clients)
        return self._missing()

    def _missing(self) -> str:
        if len(self.workers) != self.embedded.settings.workers:
            return f"only {len(self.workers)} workers"
        attached = {client.name for client in self.known if client.attachment is Attachment.REGION}
        if away := set(self.clients) - attached:
            return f"{', '.join(sorted(away))} not attached"
        for client in self.known:
            states = sorted(path.state for path in client.paths)
            if not states or any(s not in (PathState.ACTIVE, PathState.STANDBY) for s in states):
                return f"paths of {client.name}: " + ", ".join(
                    f"{path.vios} {path.state} ({path.reason})" for path in client.paths
                )
        now = asyncio.get_running_loop().time()
        for name, busy in self.clients.items():
            since = busy.waiting_since_seconds
            if since is not None and now - since > PROBE_SECONDS:
                return f"{name} waits since {now - since:.1f} s"
        return ""

    def active_vioses(self) -> list[str]:
        """Return the VIOS of the active paths, as far as is known."""
        return sorted(
            {path.vios for client in self.known for path in client.paths if path.state is PathState.ACTIVE}
        )

    def descriptors(self) -> dict[str, int]:
        """Count the descriptors of each daemon; those of all workers together."""
        pids = {name: [self.embedded.vios_pid(name)] for name in self.embedded.vioses}
        pids["hypervisor"] = [self.embedded.hypervisor_pid]
        pids["workers"] = [worker.pid for worker in self.workers]
        return {
            name: sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in those if pid)
            for name, those in pids.items()
        }


def is_of_campaign(pid: int, token: str) -> bool:
    """Tell whether a process was started by the campaign of a token, and runs."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it has ended, or is somebody else's
        return False
    return f"{TOKEN_VARIABLE}={token}".encode() in environment.split(b"\0")


def left_behind(token: str) -> list[str]:
    """Return the processes with the campaign's token in their environment, except this one."""
    pids = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    return [
        f"process {pid}: {_command_line(pid)}"
        for pid in pids
        if pid != os.getpid() and is_of_campaign(pid, token)
    ]


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "ended meanwhile"


@asynccontextmanager
async def running_place(
    seed: int, path_timeout_seconds: float, notify: list[ChildEvent]
) -> AsyncIterator[Place]:
    """Make everything, and take it down again, however it stands by then."""
    folder = Path(tempfile.mkdtemp(prefix="fpcamp-", dir="/tmp"))
    root = os.geteuid() == 0
    link = NamespaceLink() if root else None
    small = SmallDevice(folder / "small", SMALL_BYTES) if root else None
    placements = {}
    if link:
        far = ViosPlacement(data=(f"tcp:{link.far_address}:{FAR_PORT}",), launcher=link.launcher)
        placements["vios3"] = far
    embedded = EmbeddedSet(
        SetSettings(
            state_dir=folder / "s",
            vios_count=3,
            workers=2,
            path_timeout_seconds=path_timeout_seconds,
            placements=placements,
        ),
        notify.append,
    )
    place = Place(embedded, compile_stamper(folder), seed, path_timeout_seconds, link, small)
    try:
        if link:
            link.create()
        if small:
            small.create()
        await embedded.start()
        await _add_devices(place)
        for name in CLIENTS:
            await place.start_client(name)
        yield place
    finally:
        await _take_down(place)
        shutil.rmtree(folder)


async def _add_devices(place: Place) -> None:
    if place.small:
        for vios in place.embedded.vioses.values():
            await vios.add_device(DeviceAdd(spec=f"dir:{place.small.device}"))
    await place.embedded.hypervisor.refresh_devices()


async def _take_down(place: Place) -> None:
    embedded = place.embedded
    try:
        if place.link:
            place.link.mend()
        if place.small:
            place.small.empty()
        for pid in (embedded.hypervisor_pid, *map(embedded.vios_pid, embedded.vioses)):
            if pid:
                os.kill(pid, signal.SIGCONT)
        for busy in place.clients.values():
            await busy.kill()
        await embedded.stop()
    finally:
        if place.small:
            place.small.remove()
        if place.link:
            place.link.remove()


def new_token() -> str:
    """Mark this process, and so all that it starts, as one campaign's; returns the mark."""
    token = secrets.token_hex(8)
    os.environ[TOKEN_VARIABLE] = token
    return token
