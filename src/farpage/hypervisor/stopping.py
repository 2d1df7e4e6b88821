"""Stopping a VIOS on purpose: its clients are moved to their other paths first, or it is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from farpage.address import TcpAddress
from farpage.definition import rules
from farpage.definition.model import Definition, ReplicaState
from farpage.errors import ExitStatus, FarpageError
from farpage.hypervisor.clients import Clients
from farpage.hypervisor.definitions import DefinitionKeeper
from farpage.hypervisor.model import ViosStopped
from farpage.hypervisor.vioses import Vios
from farpage.hypervisor.workers import WorkerProcess
from farpage.log import get_logger
from farpage.pager.messages import ClientReport
from farpage.volume.server import ServerProcess
from farpage.volume.state import PathState

log = get_logger()

END_SECONDS = 20.0
"""A VIOS finishes what is in flight for at most 10 seconds when it stops."""

POLL_SECONDS = 0.05

WORKING = (PathState.ACTIVE, PathState.STANDBY)


@dataclass(eq=False)
class ViosUnknown(FarpageError):
    """The hypervisor does not know the VIOS."""

    code = "no_such_vios"
    template = "this hypervisor knows no VIOS {vios!r}"
    remedy = "use one of: {known}"
    exit_status = ExitStatus.NOT_FOUND
    vios: str
    known: str


@dataclass(eq=False)
class ViosAway(FarpageError):
    """The VIOS does not answer, so it cannot be asked to stop."""

    code = "vios_away"
    template = "VIOS {vios!r} does not answer: {problem}"
    remedy = "end its process, if there is one; its clients have been moved already, if they could be"
    exit_status = ExitStatus.UNREACHABLE
    vios: str
    problem: str


@dataclass(eq=False)
class ViosNeeded(FarpageError):
    """Clients cannot do without the VIOS."""

    code = "vios_needed"
    template = "VIOS {vios!r} is the only one over which these clients can be paged: {clients}"
    remedy = (
        "give them another path ('farpage path list' shows why they have none), or use --force: "
        "their accesses to paged-out memory then wait until it is back"
    )
    exit_status = ExitStatus.CONFLICT
    vios: str
    clients: str


@dataclass(eq=False)
class ViosNotStopped(FarpageError):
    """The VIOS took the request and went on running."""

    code = "vios_not_stopped"
    template = "VIOS {vios!r} (process {pid}) has not ended after {seconds:g} s"
    remedy = "look into its log; none of its clients uses it any more, so its process can be killed"
    vios: str
    pid: int
    seconds: float


def needing(vios: str, definition: Definition, reports: Mapping[str, ClientReport]) -> tuple[str, ...]:
    """Return the attached clients that cannot be paged without a VIOS. No I/O.

    A client can when another VIOS has a working path to a replica that is in sync; a client that
    has no path over this VIOS is not concerned.
    """
    return tuple(
        client
        for client, report in sorted(reports.items())
        if any(path.vios == vios for path in report.paths)
        and not {path.device for path in report.paths if path.vios != vios and path.state in WORKING}
        & _in_sync(definition, client)
    )


def _in_sync(definition: Definition, client: str) -> set[str]:
    """Return the names of the devices with a replica in sync."""
    return {
        definition.devices[path.device].name
        for path in rules.paths(definition, client)
        if path.replica is ReplicaState.IN_SYNC
    }


class ViosStops:
    """Stops VIOS, one at a time."""

    def __init__(self, vioses: Mapping[str, Vios], keeper: DefinitionKeeper, clients: Clients) -> None:
        self._vioses = vioses
        self._keeper = keeper
        self._clients = clients
        self._lock = asyncio.Lock()

    async def stop(self, name: str, *, force: bool) -> ViosStopped:
        """Move the clients of a VIOS to their other paths, then have it end with nothing in flight.

        :raise ViosUnknown: there is none of that name.
        :raise ViosAway: it does not answer.
        :raise ViosNeeded: without `force`, when some client cannot do without it; nothing has changed then.
        :raise ViosNotStopped: it did not end.
        """
        vios = self._vioses.get(name)
        if vios is None:
            raise ViosUnknown(name, ", ".join(self._vioses))
        async with self._lock:
            await vios.ask()
            if not vios.reachable or vios.health is None:
                raise ViosAway(name, vios.problem)
            reports = await self._reports()
            waiting = needing(name, self._keeper.current, reports)
            if waiting and not force:
                raise ViosNeeded(name, ", ".join(waiting))
            users = [
                client for client, report in reports.items() if any(p.vios == name for p in report.paths)
            ]
            moved: list[str] = []
            reason = ""
            try:
                await self._move(name, [client for client in users if client not in waiting], moved)
                log.info("vios_stopping", vios=name, moved=moved, waiting=waiting)
                await self._end(vios, vios.health.pid)
                reason = "stopped on request"
            finally:
                for client in moved:
                    await self._rejoin(name, client, reason)
            return ViosStopped(vios=name, pid=vios.health.pid, moved=tuple(moved), waiting=waiting)

    async def _reports(self) -> dict[str, ClientReport]:
        reports = {client: await self._clients.report(client) for client in list(self._clients.attached)}
        return {client: report for client, report in reports.items() if report}

    async def _move(self, vios: str, clients: list[str], moved: list[str]) -> None:
        """Have clients leave a VIOS, again when their worker was lost since; `moved` gets who has begun."""
        left: dict[str, WorkerProcess] = {}

        def behind() -> str | None:
            attached = {client: self._clients.attached.get(client) for client in clients}
            return next((c for c, a in attached.items() if a and left.get(c) is not a.worker), None)

        while client := behind():
            if client not in moved:
                moved.append(client)
            await self._leave(vios, client)
            if attached := self._clients.attached.get(client):
                left[client] = attached.worker

    async def _leave(self, vios: str, client: str) -> None:
        try:
            await self._clients.leave(client, vios)
        except FarpageError as error:
            if error.code == "not_attached" or client not in self._clients.attached:
                return  # it has ended meanwhile
            raise ViosNeeded(vios, f"{client} ({error.cause})") from error

    async def _rejoin(self, vios: str, client: str, reason: str) -> None:
        try:
            await self._clients.rejoin(client, vios, reason)
        except FarpageError as error:
            log.warning("path_not_rejoined", vios=vios, client=client, problem=error.cause)

    @staticmethod
    async def _end(vios: Vios, pid: int) -> None:
        """Tell the process to stop and wait for its end; of one on another host, until it does not answer."""
        if isinstance(vios.client.address, TcpAddress):
            try:
                await vios.stop()
                async with asyncio.timeout(END_SECONDS):
                    while vios.reachable:
                        await asyncio.sleep(POLL_SECONDS)
                        await vios.ask()
            except TimeoutError:
                raise ViosNotStopped(vios.name, pid, END_SECONDS) from None
            return
        ended = asyncio.Event()
        try:
            process = ServerProcess(pid)
        except ProcessLookupError:
            return
        process.when_gone(ended.set)
        try:
            await vios.stop()
            async with asyncio.timeout(END_SECONDS):
                await ended.wait()
        except TimeoutError:
            raise ViosNotStopped(vios.name, pid, END_SECONDS) from None
        finally:
            process.close()
