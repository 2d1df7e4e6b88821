"""The hypervisor's control API. Requests run in the API's thread and act on the daemon's loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from farpage import __version__
from farpage.api.errors import create_app
from farpage.api.framework import FastAPI, Path, Response
from farpage.definition.errors import ClientMissing
from farpage.definition.model import Definition, Name
from farpage.errors import FarpageError, InvalidInput
from farpage.hypervisor.attached import ATTACHMENTS
from farpage.hypervisor.model import (
    Alarm,
    Attachment,
    ClientAdopt,
    ClientAttach,
    ClientCreate,
    ClientInfo,
    ClientRelease,
    DefinitionPromote,
    DefinitionPromotion,
    HypervisorInfo,
    PathInfo,
    PoolInfo,
    PoolMember,
    PoolSet,
    ScrubStart,
    ViosStatus,
    ViosStop,
    ViosStopped,
)
from farpage.hypervisor.moving_api import add_moving_routes
from farpage.hypervisor.reports import client_info
from farpage.hypervisor.service import Hypervisor

Result = TypeVar("Result")

ViosName = Annotated[Name, Path(description="Name of the VIOS")]
ClientName = Annotated[Name, Path(description="Name of the client")]


class _Operations:
    """What the requests do; everything here runs on the daemon's loop."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._hypervisor = hypervisor

    async def client(self, name: str) -> ClientInfo:
        hypervisor = self._hypervisor
        record = hypervisor.clients.records.of(name)
        attached = hypervisor.clients.attached.get(name)
        return client_info(
            name,
            record,
            attachment=ATTACHMENTS[attached.memory.kind] if attached else Attachment.NONE,
            pid=attached.memory.pid if attached else None,
            worker=attached.worker.index if attached else None,
            limit_bytes=attached.limit_bytes if attached else record.limit_bytes or record.memory_bytes,
            qmp=attached.qmp if attached else None,
            guest_paused=attached.guest_paused if attached else False,
            scrub_rate_bytes=attached.record.scrub_rate_bytes if attached else None,
            report=await hypervisor.clients.report(name),
            now_seconds=time.monotonic(),
        )

    async def clients(self) -> tuple[ClientInfo, ...]:
        async def known(name: str) -> ClientInfo | None:
            with suppress(ClientMissing):  # deleted while another one was asked
                return await self.client(name)
            return None

        found = await asyncio.gather(*map(known, sorted(self._hypervisor.keeper.current.clients)))
        return tuple(info for info in found if info is not None)

    async def create(self, wanted: ClientCreate) -> ClientInfo:
        await self._hypervisor.clients.create(wanted)
        return await self.client(wanted.name)

    async def attach(self, name: str, wanted: ClientAttach) -> ClientInfo:
        await self._hypervisor.attaching.process(name, wanted)
        return await self.client(name)

    async def start_scrub(self, name: str, wanted: ScrubStart) -> ClientInfo:
        await self._hypervisor.scrubs.start(name, wanted.rate_bytes)
        return await self.client(name)

    async def detach(self, name: str) -> ClientInfo:
        await self._hypervisor.detaching.detach(name)
        return await self.client(name)

    async def release(self, name: str, wanted: ClientRelease) -> ClientInfo:
        await self._hypervisor.releases.release(name, wanted.qmp, force=wanted.force)
        return await self.client(name)

    async def adopt(self, name: str, wanted: ClientAdopt) -> ClientInfo:
        await self._hypervisor.releases.adopt(name, force=wanted.force)
        return await self.client(name)

    async def paths(self, client: str | None) -> tuple[PathInfo, ...]:
        clients = [await self.client(client)] if client else await self.clients()
        return tuple(path for info in clients for path in info.paths)

    async def pool(self) -> PoolInfo:
        pool = self._hypervisor.pool
        members = tuple(
            PoolMember(
                client=info.name,
                limit_bytes=info.limit_bytes,
                resident_bytes=info.resident_bytes,
                ram_tier_bytes=info.ram_tier.taken_bytes,
            )
            for info in await self.clients()
            if info.attachment is not Attachment.NONE
        )
        return PoolInfo(
            size_bytes=pool.size_bytes,
            resident_bytes=sum(member.resident_bytes for member in members),
            ram_tier_bytes=sum(member.ram_tier_bytes for member in members),
            default_limit_bytes=pool.default_limit_bytes,
            members=members,
        )

    async def set_pool(self, wanted: PoolSet) -> PoolInfo:
        if (wanted.client is None) != (wanted.limit_bytes is None):
            raise InvalidInput("client", "a client and its limit go together", "give both or neither")
        if wanted.client is None and wanted.size_bytes is None:
            raise InvalidInput("size_bytes", "nothing to change", "give a size, or a client and its limit")
        pool, client_limits = self._hypervisor.pool, self._hypervisor.limits
        size_before = pool.size_bytes
        limits: dict[str, int] = {}
        if wanted.client is not None and wanted.limit_bytes is not None:
            limits[wanted.client] = client_limits.rounded(wanted.client, wanted.limit_bytes)
        if wanted.size_bytes is not None:
            pool.resize(wanted.size_bytes, limits)
        try:
            for client, limit_bytes in limits.items():
                await client_limits.set(client, limit_bytes)
        except FarpageError:
            pool.size_bytes = size_before
            raise
        return await self.pool()

    async def metrics(self) -> bytes:
        from farpage.hypervisor.metrics import DefinitionFigures, MoveFigures, render

        hypervisor = self._hypervisor
        # All at once: a worker that hangs holds up the answer once, not once for each of its clients.
        reports = await asyncio.gather(*map(hypervisor.clients.report, list(hypervisor.clients.attached)))
        return render(
            [report for report in reports if report],
            [vios.status() for vios in hypervisor.vioses.values()],
            hypervisor.alarms.counts,
            hypervisor.pool.size_bytes,
            definition=DefinitionFigures(
                hypervisor.keeper.current.revision,
                hypervisor.keeper.unproven is not None,
                hypervisor.keeper.repairs,
            ),
            recovery=hypervisor.recovery.counts,
            handovers=hypervisor.handovers.counts,
            replacements=hypervisor.replacements.left(),
            moves=MoveFigures(hypervisor.moves.counts, hypervisor.moves.figures()),
            compiled={
                worker.index: worker.compiled
                for worker in hypervisor.workers.workers
                if worker.compiled is not None
            },
        )


def create_api(hypervisor: Hypervisor, loop: asyncio.AbstractEventLoop) -> FastAPI:
    """Make the API of a hypervisor that runs on `loop`."""
    app = create_app("farpage hypervisor", __version__)
    operations = _Operations(hypervisor)

    async def on_loop(work: Coroutine[Any, Any, Result]) -> Result:
        # Shielded: an operation goes on to its end also when the requester does not wait for it.
        return await asyncio.shield(asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop)))

    async def call(function: Callable[[], Result]) -> Result:
        async def work() -> Result:
            return function()

        return await on_loop(work())

    @app.get("/v1/hypervisor")
    async def get_hypervisor() -> HypervisorInfo:
        """The daemon, its workers and the revision of its definition."""
        return await call(hypervisor.info)

    @app.get("/v1/clients")
    async def get_clients() -> tuple[ClientInfo, ...]:
        """All clients."""
        return await on_loop(operations.clients())

    @app.post("/v1/clients", status_code=HTTPStatus.CREATED)
    async def post_client(wanted: ClientCreate) -> ClientInfo:
        """Make a client and its volume."""
        return await on_loop(operations.create(wanted))

    @app.get("/v1/clients/{name}")
    async def get_client(name: ClientName) -> ClientInfo:
        """One client."""
        return await on_loop(operations.client(name))

    @app.delete("/v1/clients/{name}", status_code=HTTPStatus.NO_CONTENT)
    async def delete_client(name: ClientName) -> None:
        """Remove a client that is not attached, and its volume."""
        await on_loop(hypervisor.clients.delete(name))

    _add_attachments(app, operations, on_loop)

    @app.post("/v1/clients/{name}/scrub")
    async def scrub_client(name: ClientName, wanted: ScrubStart) -> ClientInfo:
        """Begin to read what every replica holds and to repair what is wrong; goes on in the background."""
        return await on_loop(operations.start_scrub(name, wanted))

    @app.delete("/v1/clients/{name}/scrub", status_code=HTTPStatus.NO_CONTENT)
    async def stop_scrub(name: ClientName) -> None:
        """End the scrub of a client, if one runs."""
        await on_loop(hypervisor.scrubs.stop(name))

    @app.get("/v1/vioses")
    async def get_vioses() -> tuple[ViosStatus, ...]:
        """The VIOS that this hypervisor knows."""
        return await call(lambda: tuple(vios.status() for vios in hypervisor.vioses.values()))

    @app.post("/v1/vioses/{name}/stop")
    async def stop_vios(name: ViosName, wanted: ViosStop) -> ViosStopped:
        """Move a VIOS's clients to their other paths and stop it; answered when it has ended."""
        return await on_loop(hypervisor.stops.stop(name, force=wanted.force))

    @app.get("/v1/paths")
    async def get_paths(client: Name | None = None) -> tuple[PathInfo, ...]:
        """The paths of one client or of all."""
        return await on_loop(operations.paths(client))

    @app.get("/v1/pool")
    async def get_pool() -> PoolInfo:
        """The memory pool."""
        return await on_loop(operations.pool())

    @app.put("/v1/pool")
    async def put_pool(wanted: PoolSet) -> PoolInfo:
        """Change the pool's size or a client's limit."""
        return await on_loop(operations.set_pool(wanted))

    @app.get("/v1/definition")
    async def get_definition() -> Definition:
        """The definition as this hypervisor knows it."""
        return await call(lambda: hypervisor.keeper.current)

    @app.post("/v1/definition/promote")
    async def promote_definition(wanted: DefinitionPromote) -> DefinitionPromotion:
        """Make the copy at a VIOS the newest; without `force` only say what that would do."""
        return await on_loop(hypervisor.promote(wanted.vios, force=wanted.force))

    @app.post("/v1/devices/refresh")
    async def refresh_devices() -> Definition:
        """Ask the VIOS for their devices and record them in the definition, which those that are back get."""
        return await on_loop(hypervisor.refresh_devices())

    add_moving_routes(app, hypervisor, on_loop)

    @app.get("/v1/alarms")
    async def get_alarms() -> tuple[Alarm, ...]:
        """The latest alarms, oldest first."""
        return await call(hypervisor.alarms.all)

    @app.get("/metrics", response_class=Response)
    async def get_metrics() -> Response:
        """Metrics in Prometheus' text format."""
        # Loaded with the first scrape, and here, where the data plane's loop does not wait for it.
        from prometheus_client import CONTENT_TYPE_LATEST

        return Response(await on_loop(operations.metrics()), media_type=CONTENT_TYPE_LATEST)

    return app


def _add_attachments(
    app: FastAPI,
    operations: _Operations,
    on_loop: Callable[[Coroutine[Any, Any, ClientInfo]], Coroutine[Any, Any, ClientInfo]],
) -> None:
    """Add the requests by which a client comes, goes, or goes to another hypervisor."""

    @app.post("/v1/clients/{name}/attach")
    async def attach_client(name: ClientName, wanted: ClientAttach) -> ClientInfo:
        """Page the memory of a running process."""
        return await on_loop(operations.attach(name, wanted))

    @app.post("/v1/clients/{name}/detach")
    async def detach_client(name: ClientName) -> ClientInfo:
        """Page everything back in and let go of the process."""
        return await on_loop(operations.detach(name))

    @app.post("/v1/clients/{name}/release")
    async def release_client(name: ClientName, wanted: ClientRelease) -> ClientInfo:
        """Bring every page of a stopped client to its devices and let go of it, for another hypervisor."""
        return await on_loop(operations.release(name, wanted))

    @app.post("/v1/clients/{name}/adopt")
    async def adopt_client(name: ClientName, wanted: ClientAdopt) -> ClientInfo:
        """Take a client that another hypervisor has released; its next attachment begins with its pages."""
        return await on_loop(operations.adopt(name, wanted))
