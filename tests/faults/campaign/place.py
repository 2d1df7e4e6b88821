"""Where a campaign takes place: the set of `farpage up`, its devices and four busy clients.

Three VIOS reach the common device. Two of them answer on UNIX sockets, the third over TCP and a link into a
network namespace. Each VIOS has a device of its own besides, for the replicas of mirrored clients. One more
common device and one of the independent ones are small, take one volume each, and can be filled.
Without root there is no link, and no device can be filled.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from farpage.embedded.child import ChildEvent
from farpage.embedded.set import EmbeddedSet, SetSettings, ViosPlacement
from farpage.errors import FarpageError
from farpage.hypervisor.model import Attachment, ClientInfo, WorkerInfo
from farpage.vios.model import DeviceAdd
from farpage.volume.state import PathState, ReplicaHealth
from tests.faults.campaign.busy import BusyClient, BusyProcess, Findings, compile_stamper
from tests.faults.campaign.network import NamespaceLink
from tests.faults.campaign.small_device import SmallDevice

MIB = 1 << 20
PAGES = 3072
LIMIT_BYTES = 3 * MIB
SMALL_BYTES = 16 * MIB
"""Room for one volume."""
INDEPENDENT = {"vios1": "14M", "vios2": "60M", "vios3": "26M"}
"""Sizes of the devices of one VIOS each, such that one mirrored client has its replicas at the first and
the third, the other at the third and the second: the least room that fits is taken first."""
SMALL = "small"
"""Name of the common device that can be filled."""
FAR_PORT = 10809
PROBE_SECONDS = 2.0
STILL_SECONDS = 0.25
"""An access that is under way for longer still waits for what is over: progress is told each 0.2 s."""
FINISH_SECONDS = 120.0
TOKEN_VARIABLE = "FARPAGE_CAMPAIGN"
"""In the environment of every process of the campaign, so that those left behind are found."""

CLIENTS = {"alpha": "path", "beta": "path", "gamma": "mirror", "delta": "mirror"}
"""Redundancy by client."""
FILLED_BY = {"alpha": "common", "gamma": "vios1"}
"""Whose volume or replica is on a device that can be filled: the common one, or the one of that VIOS."""


@dataclass
class Place:
    """The set, and what is known of it."""

    embedded: EmbeddedSet
    library: Path
    seed: int
    path_timeout_seconds: float
    link: NamespaceLink | None
    small: dict[str, SmallDevice]
    """The devices that can be filled, as `FILLED_BY` names them."""
    findings: Findings = field(default_factory=Findings)
    clients: dict[str, BusyProcess] = field(default_factory=dict)
    known: tuple[ClientInfo, ...] = ()
    """The clients as the hypervisor described them last."""
    workers: tuple[WorkerInfo, ...] = ()
    damaged_pages: int = 0
    repaired_pages: int = 0
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

    def folder_of(self, device: str) -> Path:
        """Return the folder of a device by its name; an independent one has the name of its VIOS."""
        small = {SMALL if name == "common" else name: found for name, found in self.small.items()}
        return small[device].device if device in small else self.embedded.layout.root / "devices" / device

    async def start_client(self, name: str) -> BusyProcess:
        """Start a busy client; it is quiet until `go`. Each life has stamps of its own."""
        self._lives += 1
        client = BusyClient(name, self._lives, CLIENTS[name], PAGES, LIMIT_BYTES)
        busy = await BusyProcess.start(
            client, self.library, self.embedded.layout.root, self.seed + self._lives, self.findings
        )
        self.clients[name] = busy
        return busy

    def mirrored(self) -> list[ClientInfo]:
        """Return the clients with several replicas, as far as is known."""
        return [client for client in self.known if len(client.replicas) > 1]

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
            broken = [
                path for path in client.paths if path.state not in (PathState.ACTIVE, PathState.STANDBY)
            ]
            if broken or not client.paths:
                return f"paths of {client.name}: " + ", ".join(
                    f"{path.vios} {path.state} ({path.reason})" for path in broken
                )
            if bad := [r for r in client.replicas if r.state is not ReplicaHealth.IN_SYNC]:
                return f"replicas of {client.name}: " + ", ".join(f"{r.device} {r.state}" for r in bad)
        now = asyncio.get_running_loop().time()
        for name, busy in self.clients.items():
            since = busy.waiting_since_seconds
            if since is not None and now - since > STILL_SECONDS:
                return f"{name} waits since {now - since:.1f} s"
        return ""

    def active_vioses(self) -> list[str]:
        """Return the VIOS of the active paths, as far as is known."""
        return sorted(
            {path.vios for client in self.known for path in client.paths if path.state is PathState.ACTIVE}
        )

    def descriptors(self) -> dict[str, Counter[str]]:
        """Count the descriptors of each daemon by what they are; those of all workers together."""
        pids = {name: [self.embedded.vios_pid(name)] for name in self.embedded.vioses}
        pids["hypervisor"] = [self.embedded.hypervisor_pid]
        pids["workers"] = [worker.pid for worker in self.workers]
        return {
            name: sum((_descriptors_of(pid) for pid in those if pid), Counter())
            for name, those in pids.items()
        }


def _descriptors_of(pid: int) -> Counter[str]:
    """Count the descriptors of a process: files by their path, others by their kind."""
    found: Counter[str] = Counter()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            found[str(entry.readlink()).partition(":[")[0]] += 1
    return found


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
    seed: int, path_timeout_seconds: float, notify: list[ChildEvent], parent: Path
) -> AsyncIterator[Place]:
    """Make everything in a new folder of `parent`, and take it down again, however it stands by then."""
    folder = Path(tempfile.mkdtemp(prefix="fpcamp-", dir=parent))
    root = os.geteuid() == 0
    link = NamespaceLink() if root else None
    small = {name: SmallDevice(folder / f"small-{name}", SMALL_BYTES) for name in FILLED_BY.values() if root}
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
        for device in small.values():
            device.create()
        await embedded.start()
        await _add_devices(place)
        for name in CLIENTS:
            await place.start_client(name)
        yield place
    finally:
        await _take_down(place)
        shutil.rmtree(folder)


async def _add_devices(place: Place) -> None:
    if "common" in place.small:
        for vios in place.embedded.vioses.values():
            await vios.add_device(DeviceAdd(spec=f"dir:{place.small['common'].device}", name=SMALL))
    for name, size in INDEPENDENT.items():
        spec = f"dir:{place.folder_of(name)}?size={size}"
        await place.embedded.vioses[name].add_device(DeviceAdd(spec=spec, name=name))
    await place.embedded.hypervisor.refresh_devices()


async def _take_down(place: Place) -> None:
    embedded = place.embedded
    try:
        if place.link:
            place.link.mend()
        for device in place.small.values():
            device.empty()
        for pid in (embedded.hypervisor_pid, *map(embedded.vios_pid, embedded.vioses)):
            if pid:
                os.kill(pid, signal.SIGCONT)
        for busy in place.clients.values():
            await busy.kill()
        await embedded.stop()
    finally:
        for device in place.small.values():
            device.remove()
        if place.link:
            place.link.remove()


def new_token() -> str:
    """Mark this process, and so all that it starts, as one campaign's; returns the mark."""
    token = secrets.token_hex(8)
    os.environ[TOKEN_VARIABLE] = token
    return token
