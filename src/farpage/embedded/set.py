"""Starts and keeps a whole set, with the very commands that also start its daemons one by one."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from farpage.address import UnixAddress, parse_address
from farpage.api.sockets import is_listening
from farpage.embedded.child import Child, ChildEvent, describe_exit
from farpage.embedded.control import HypervisorControl, ViosControl
from farpage.embedded.layout import NoSuchVios, SetDocument, StateLayout
from farpage.errors import ExitStatus, FarpageError, InvalidInput, Unreachable
from farpage.hypervisor.workercpus import ANY, parse_worker_cpus
from farpage.kernel.affinity import own_cpus
from farpage.pager.limit import DEFAULT_TIER_PERCENT
from farpage.vios.model import DeviceAdd

READY_SECONDS = 60.0
PROBE_SECONDS = 0.02
PROBE_TIMEOUT_SECONDS = 2.0
HYPERVISOR_GRACE_SECONDS = 120.0
"""A hypervisor that stops may first page its clients' memory back in."""
PATIENCE_SECONDS = 2.0
"""After so long it is told what a hypervisor that stops waits for."""
VIOS_GRACE_SECONDS = 10.0
VIOS_COUNT_MAX = 8


@dataclass(eq=False)
class StateInUse(FarpageError):
    """Another process runs a set in the folder."""

    code = "state_in_use"
    template = "a farpage set runs in {folder} already"
    remedy = "use that one, stop it, or name another folder with --state"
    exit_status = ExitStatus.CONFLICT
    folder: str


@dataclass(eq=False)
class DaemonFailed(FarpageError):
    """A daemon of the set did not come up."""

    code = "daemon_failed"
    template = "{daemon} {how} before it was ready: {last_words}"
    remedy = "look into {log}"
    daemon: str
    how: str
    last_words: str
    log: str


@dataclass(frozen=True)
class ViosPlacement:
    """How a VIOS of the set differs from the others."""

    data: tuple[str, ...] = ()
    """Its NBD addresses, instead of a UNIX socket in its folder."""
    launcher: tuple[str, ...] = ()
    """What starts its command and then becomes it, such as `nsenter --net=/run/netns/NAME`."""


@dataclass(frozen=True)
class SetSettings:
    """What an embedded set consists of; without `devices` it has one folder that every VIOS reaches.

    A device is `SPEC`, which every VIOS reaches, or `VIOS=SPEC`, which that one alone does.
    """

    state_dir: Path
    vios_count: int = 2
    devices: tuple[str, ...] = ()
    run_dir: Path | None = None
    """Run folder of the hypervisor; None for one in `state_dir`."""
    workers: int | None = None
    worker_cpus: str = ANY
    """Where data workers run, as `farpage.hypervisor.workercpus` spells it."""
    path_timeout_seconds: float = 1.0
    no_path_timeout_seconds: float | None = None
    lease_seconds: float = 5.0
    direct_reads: bool = True
    default_limit_bytes: int | None = None
    ram_tier_percent: int = DEFAULT_TIER_PERCENT
    pool_size_bytes: int | None = None
    placements: Mapping[str, ViosPlacement] = field(default_factory=dict)
    """By name of the VIOS; those not named are as all."""

    def __post_init__(self) -> None:
        if not 1 <= self.vios_count <= VIOS_COUNT_MAX:
            raise InvalidInput(
                "--vios-count",
                f"{self.vios_count} is not from 1 to {VIOS_COUNT_MAX}",
                "two make paths redundant",
            )
        parse_worker_cpus(self.worker_cpus, own_cpus())


class _HasPid(Protocol):
    @property
    def pid(self) -> int: ...


class EmbeddedSet:
    """The daemons of one state folder as child processes; use it from one event loop.

    `notify` hears of every start and end of a daemon, and what an end waits for.
    """

    def __init__(
        self, settings: SetSettings, notify: Callable[[ChildEvent], None] = lambda _event: None
    ) -> None:
        self.settings = settings
        self._notify = notify
        self.layout = StateLayout.at(settings.state_dir)
        names = tuple(f"vios{number}" for number in range(1, settings.vios_count + 1))
        self.document: SetDocument = _placed(self.layout.describe(names), settings.placements)
        self.hypervisor = HypervisorControl(self.document.hypervisor.control)
        self.vioses = {name: ViosControl(vios.control, name) for name, vios in self.document.vioses.items()}
        self._vios_children = {
            name: Child(
                name,
                self._vios_arguments(name),
                self.layout.vios_dir(name) / "log",
                notify,
                settings.placements.get(name, ViosPlacement()).launcher,
                restarts_after_success=False,
            )
            for name in names
        }
        self._hypervisor_child = Child(
            "hypervisor", self._hypervisor_arguments(), self.layout.hypervisor_dir / "log", notify
        )
        self._lock: int | None = None

    @property
    def hypervisor_pid(self) -> int | None:
        """Process id of the hypervisor while it runs."""
        return self._hypervisor_child.pid

    def vios_pid(self, name: str) -> int | None:
        """Return the process id of a VIOS while it runs.

        :raise NoSuchVios:
        """
        return self._vios_child(name).pid

    async def start(self) -> None:
        """Start everything; on return every daemon answers and the devices are known.

        On an error nothing is left running.

        :raise StateInUse: another process runs a set in the folder.
        :raise InvalidInput: the folder or a device cannot be used.
        :raise DaemonFailed: a daemon did not come up.
        """
        self.layout.create_root()
        self._take_lock()
        try:
            self.layout.create(self.document)
            await asyncio.gather(*(self._start_vios(name) for name in self._vios_children))
            await self._add_devices()
            await self.start_hypervisor()
            await self.hypervisor.refresh_devices()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop the hypervisor, then the VIOSes that it still needs until its end; safe to call twice."""
        await self.stop_hypervisor()
        await asyncio.gather(*(child.stop(VIOS_GRACE_SECONDS) for child in self._vios_children.values()))
        for control in (self.hypervisor, *self.vioses.values()):
            await control.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def stop_hypervisor(self) -> None:
        """Stop the hypervisor; VIOSes may be started meanwhile, without which it may be unable to end."""
        loop = asyncio.get_running_loop()
        telling = loop.call_later(PATIENCE_SECONDS, self._tell_what_is_waited_for)
        try:
            await self._hypervisor_child.stop(HYPERVISOR_GRACE_SECONDS)
        finally:
            telling.cancel()

    def _tell_what_is_waited_for(self) -> None:
        message = (
            "brings its clients' memory back before it ends; "
            f"it is killed when that takes longer than {HYPERVISOR_GRACE_SECONDS:g} s"
        )
        away = [name for name, child in self._vios_children.items() if child.pid is None]
        if away:
            message += (
                f"; not running: {', '.join(away)}. If it needs one of them, start that in another terminal: "
                f"'farpage vios start {away[0]} --state {self.layout.root}'"
            )
        self._notify(ChildEvent("hypervisor", asyncio.get_running_loop().time(), message))

    def supervise_vios(self, name: str, supervised: bool) -> None:
        """Say whether a VIOS that dies is started again by itself.

        :raise NoSuchVios:
        """
        self._vios_child(name).supervised = supervised

    def kill_vios(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a VIOS.

        :raise NoSuchVios:
        """
        self._vios_child(name).send_signal(number)

    async def vios_exited(self, name: str) -> None:
        """Wait until a VIOS's process has ended.

        :raise NoSuchVios:
        """
        await self._vios_child(name).exited()

    async def start_vios(self, name: str) -> None:
        """Start a VIOS that has ended, and wait until it answers.

        :raise NoSuchVios:
        :raise DaemonFailed: it did not come up.
        """
        self._vios_child(name)
        await self._start_vios(name)

    async def tell_hypervisor(self) -> None:
        """Have the hypervisor look at its VIOSes now, not just with its next look; it may be away itself."""
        with contextlib.suppress(FarpageError):
            await self.hypervisor.refresh_devices(timeout_seconds=PROBE_TIMEOUT_SECONDS)

    def supervise_hypervisor(self, supervised: bool) -> None:
        """Say whether a hypervisor that dies is started again by itself."""
        self._hypervisor_child.supervised = supervised

    def kill_hypervisor(self, number: signal.Signals) -> None:
        """Send a signal to the hypervisor's control process."""
        self._hypervisor_child.send_signal(number)

    async def hypervisor_exited(self) -> None:
        """Wait until the hypervisor's control process has ended."""
        await self._hypervisor_child.exited()

    async def start_hypervisor(self) -> None:
        """Start a hypervisor that has ended, and wait until it answers.

        :raise DaemonFailed: it did not come up.
        """
        self._hypervisor_child.supervised = False
        await self._hypervisor_child.start()
        await self._until_ready(
            self._hypervisor_child, self.document.hypervisor.control, self._hypervisor_info
        )
        self._hypervisor_child.supervised = True

    async def _start_vios(self, name: str) -> None:
        child = self._vios_children[name]
        child.supervised = False
        await child.start()
        await self._until_ready(
            child,
            self.document.vioses[name].control,
            lambda: self.vioses[name].health(timeout_seconds=PROBE_TIMEOUT_SECONDS),
        )
        child.supervised = True

    async def _hypervisor_info(self) -> _HasPid:
        return await self.hypervisor.info(timeout_seconds=PROBE_TIMEOUT_SECONDS)

    async def _until_ready(self, child: Child, control: str, probe: Callable[[], Awaitable[_HasPid]]) -> None:
        """Ask until the very process that was started answers."""
        address = parse_address(control)
        deadline = asyncio.get_running_loop().time() + READY_SECONDS
        while True:
            # A look costs nothing beside a request: the daemon needs the processor to start.
            if not isinstance(address, UnixAddress) or is_listening(address.path):
                with contextlib.suppress(Unreachable):
                    if (await probe()).pid == child.pid:
                        return
            if child.pid is None:
                how = describe_exit(child.last_exit or 0)
                raise DaemonFailed(child.name, how, child.log_tail(), str(child.log))
            if asyncio.get_running_loop().time() > deadline:
                how = f"did not answer in {READY_SECONDS:g} s"
                raise DaemonFailed(child.name, how, child.log_tail(), str(child.log))
            await asyncio.sleep(PROBE_SECONDS)

    async def _add_devices(self) -> None:
        """Have every VIOS reach every device, which makes them common; known ones are left as they are."""
        own: dict[str, list[str]] = {name: [] for name in self.vioses}
        common: list[str] = []
        for device in self.settings.devices:
            name, equals, spec = device.partition("=")
            if equals and name in own:
                own[name].append(spec)
            else:
                common.append(device)
        if not common:
            self.layout.common_device.mkdir(mode=0o700, parents=True, exist_ok=True)
            common = [f"dir:{self.layout.common_device}"]
        for name, vios in self.vioses.items():
            known = {device.spec for device in await vios.devices()}
            for spec in [*common, *own[name]]:
                if spec not in known:
                    await vios.add_device(DeviceAdd(spec=spec))

    def _take_lock(self) -> None:
        lock = os.open(self.layout.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            os.close(lock)
            raise StateInUse(str(self.layout.root)) from problem
        self._lock = lock

    def _vios_child(self, name: str) -> Child:
        child = self._vios_children.get(name)
        if child is None:
            raise NoSuchVios(name, ", ".join(self._vios_children))
        return child

    def _vios_arguments(self, name: str) -> list[str]:
        vios = self.document.vioses[name]
        arguments = ["vios", "run", name, "--dir", str(self.layout.vios_dir(name)), "--control", vios.control]
        for address in vios.data:
            arguments += ["--data", address]
        return [*arguments, "--lease", f"{self.settings.lease_seconds * 1000:g}ms"]

    def _hypervisor_arguments(self) -> list[str]:
        settings, hypervisor = self.settings, self.document.hypervisor
        arguments = ["hypervisor", "run", hypervisor.name, "--dir", str(self.layout.hypervisor_dir)]
        arguments += ["--control", hypervisor.control, "--attach", hypervisor.attach]
        for name, vios in self.document.vioses.items():
            arguments += ["--vios", f"{name}={vios.control}"]
        arguments += ["--path-timeout", f"{settings.path_timeout_seconds * 1000:g}ms"]
        arguments += ["--ram-tier", f"{settings.ram_tier_percent}%"]
        arguments += ["--worker-cpus", settings.worker_cpus]
        if not settings.direct_reads:
            arguments.append("--no-direct-reads")
        if settings.no_path_timeout_seconds is not None:
            arguments += ["--no-path-timeout", f"{settings.no_path_timeout_seconds * 1000:g}ms"]
        for option, value in (
            ("--run-dir", settings.run_dir and settings.run_dir.expanduser().absolute()),
            ("--workers", settings.workers),
            ("--limit", settings.default_limit_bytes),
            ("--pool-size", settings.pool_size_bytes),
        ):
            if value is not None:
                arguments += [option, str(value)]
        return arguments


def _placed(document: SetDocument, placements: Mapping[str, ViosPlacement]) -> SetDocument:
    """Put the addresses of VIOSes that are elsewhere into a set's description."""
    vioses = {
        name: vios.model_copy(update={"data": placements[name].data})
        if name in placements and placements[name].data
        else vios
        for name, vios in document.vioses.items()
    }
    return document.model_copy(update={"vioses": vioses})
