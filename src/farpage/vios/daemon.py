"""The VIOS process: brings devices, data plane and control plane together."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from farpage.address import Address, parse_address
from farpage.api.tls import check_addresses
from farpage.daemon import allow_descriptors, prepare_for_paging, started
from farpage.definition.database import Database
from farpage.definition.rules import claims
from farpage.definition.store import DefinitionStore, EpochStore
from farpage.errors import InvalidInput
from farpage.log import configure_logging, get_logger
from farpage.vios.copying.copies import Copies
from farpage.vios.errors import StateInUse
from farpage.vios.exports import VolumeExports
from farpage.vios.handovers import Handovers
from farpage.vios.leases import Leases
from farpage.vios.remembered import RememberedDevice, RememberedDevices
from farpage.vios.service import ViosService
from farpage.vios.settings import ViosSettings
from farpage.vios.volumes import Volumes

if TYPE_CHECKING:
    from farpage.api.serve import ControlServer
    from farpage.vios.processes.routing import Routing

log = get_logger()

DATABASE_NAME = "vios.db"
LOCK_NAME = "vios.lock"

LOCK_SECONDS = 1.0
"""So long the end of a VIOS is waited for that was killed: its data processes end a moment after it."""
_LOCK_RETRY_SECONDS = 0.01


async def run(settings: ViosSettings) -> None:
    """Serve until SIGTERM, SIGINT or a request to stop.

    It is ready when the control socket accepts connections; then a line `ready` is logged.

    :raise InvalidInput: a setting is wrong.
    :raise CertificatesUnusable: those for TCP ports cannot be used.
    :raise StateInUse: another VIOS runs on the state folder.
    :raise AddressInUse: another process listens at an address.
    :raise StoreDamaged: the database cannot be used.
    :raise DeviceUnusable: none of the devices in the settings can be used.
    """
    configure_logging(vios=settings.name)
    data = tuple(parse_address(text, field="data") for text in settings.data)
    control = [parse_address(text, field="control") for text in settings.control]
    check_addresses(control, settings.tls, field="control")
    # Sockets, database and volumes are for this user alone.
    os.umask(0o077)
    allow_descriptors()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        lock = stack.enter_context(_state_locked(settings.state_dir))
        service = await _start(settings, data, stop, stack, lock)
        prepare_for_paging()
        # Made in a thread, while clients are served: they would wait for what it takes long to load.
        server = await asyncio.to_thread(_control_server, service, control, settings.tls)
        await server.start()
        stack.push_async_callback(server.stop)
        started()
        log.info(
            "ready",
            control=[str(address) for address in server.addresses],
            data=service.health().data,
            devices=[device.name for device in service.volumes.devices],
            definition_revision=service.definitions.current().revision,
        )
        await stop.wait()
        await service.look()
        log.info("stopping", open_exports=service.exports.open_exports)
    log.info("stopped")


def _control_server(service: ViosService, control: Sequence[Address], tls: Path | None) -> ControlServer:
    from farpage.api.serve import ControlServer
    from farpage.vios.api import make_app

    return ControlServer(make_app(service), control, tls)


async def _start(
    settings: ViosSettings, data: tuple[Address, ...], stop: asyncio.Event, stack: AsyncExitStack, lock: int
) -> ViosService:
    """Open the database and the devices, and begin to serve NBD; `stack` undoes it in reverse."""
    routing = None
    if settings.workers > 1:
        # First of all: they load while this process does.
        from farpage.vios.processes.routing import Routing

        routing = Routing(settings.name, settings.workers, lock)
        stack.push_async_callback(routing.end)
    database = Database(settings.state_dir / DATABASE_NAME)
    stack.callback(database.close)
    definitions = DefinitionStore(database)
    epochs = EpochStore(database)
    volumes = Volumes(settings.name, definitions, epochs)
    handovers = Handovers(settings.state_dir)
    copies = Copies(settings.name, volumes, definitions, settings.state_dir)

    def deleted(volume_id: str) -> None:
        handovers.remove(volume_id)
        copies.forget(volume_id)

    volumes.on_deleted = deleted
    shared = _Shared(
        name=settings.name,
        loop=asyncio.get_running_loop(),
        volumes=volumes,
        definitions=definitions,
        remembered=RememberedDevices(database),
        handovers=handovers,
        told_to_stop=stop,
    )
    if routing is None:
        leases = Leases(settings.lease_seconds)
        service = ViosService(**shared, exports=VolumeExports(volumes, leases, copies))
    else:
        service = _front(shared, routing, epochs, copies, settings.lease_seconds)
    await stack.enter_async_context(service.draining())
    await _open_devices(settings, service)
    await service.begin()
    service.begin_claims(claims(definitions.current()))
    service.exports.follow_definition()
    await service.exports.server.start(data)
    return service


class _Shared(TypedDict):
    """What a VIOS consists of, whoever serves its volumes."""

    name: str
    loop: asyncio.AbstractEventLoop
    volumes: Volumes
    definitions: DefinitionStore
    remembered: RememberedDevices
    handovers: Handovers
    told_to_stop: asyncio.Event


def _front(
    shared: _Shared, routing: Routing, epochs: EpochStore, copies: Copies, lease_seconds: float
) -> ViosService:
    from farpage.vios.processes.front import FrontExports, FrontService
    from farpage.vios.processes.leasetable import LeaseTable

    leases = LeaseTable(lease_seconds)
    exports = FrontExports(shared["volumes"], leases, copies, routing)
    return FrontService(**shared, exports=exports, routing=routing, epochs=epochs, leases=leases)


async def _open_devices(settings: ViosSettings, service: ViosService) -> None:
    """Open the devices of the settings, and those that were added.

    One that cannot be used yet is tried again in the background, so that the others are served.

    :raise InvalidInput: a specification in the settings cannot be read.
    :raise DeviceUnusable: none of those in the settings can be used.
    """
    problems = [
        await service.serve_from_start(RememberedDevice(spec, None, None)) for spec in settings.devices
    ]
    if problems and problems[0] is not None and None not in problems:
        raise problems[0]
    for device in service.remembered.all():
        try:
            await service.serve_from_start(device)
        except InvalidInput as error:
            log.error("device_unusable", spec=device.spec, problem=str(error))


@contextlib.contextmanager
def _state_locked(folder: Path) -> Iterator[int]:
    """Keep a second VIOS out of the folder; the lock goes with the process, however that ends.

    Data processes hold it too: no other VIOS serves their volumes before each of them has ended.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InvalidInput(
            "state_dir", f"{folder}: {error.strerror}", "name a folder that you can write to"
        ) from error
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise StateInUse(str(folder)) from error
                time.sleep(_LOCK_RETRY_SECONDS)
        yield descriptor
    finally:
        os.close(descriptor)
