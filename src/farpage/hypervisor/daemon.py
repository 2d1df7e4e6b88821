"""The hypervisor's control process: what `farpage hypervisor run` runs."""

from __future__ import annotations

import asyncio
import signal

import structlog

from farpage.address import UnixAddress, parse_address
from farpage.api.serve import ControlServer
from farpage.attach.listener import AttachListener
from farpage.errors import InvalidInput
from farpage.hypervisor.api import create_api
from farpage.hypervisor.service import Hypervisor
from farpage.hypervisor.settings import HypervisorSettings

log = structlog.get_logger()


async def run(settings: HypervisorSettings) -> None:
    """Serve until SIGTERM or SIGINT; then give every client its memory back and stop.

    :raise FarpageError: when it cannot start.
    """
    loop = asyncio.get_running_loop()
    told_to_stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_stop.set)
    hypervisor = Hypervisor(settings)
    clients = hypervisor.clients
    control = ControlServer(create_api(hypervisor, loop), _unix_path(settings.control, "control"))
    listener = AttachListener(
        _unix_path(settings.attach, "attach"), clients.attach_region, clients.region_closed
    )
    try:
        await hypervisor.start()
        await control.start()
        await listener.start()
        log.info("hypervisor_ready", hypervisor=settings.name, control=settings.control)
        await told_to_stop.wait()
        log.info("hypervisor_stopping", clients=len(clients.attached))
    finally:
        await listener.close()
        await hypervisor.stop()
        await control.stop()


def _unix_path(address: str, field: str) -> str:
    parsed = parse_address(address, field=field)
    if not isinstance(parsed, UnixAddress):
        raise InvalidInput(field, f"{address} is not a UNIX socket", "write unix:PATH")
    return parsed.path
