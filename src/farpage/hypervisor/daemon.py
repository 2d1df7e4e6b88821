"""The hypervisor's control process: what `farpage hypervisor run` runs."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING

from farpage.address import UnixAddress, parse_address
from farpage.api.tls import check_addresses
from farpage.attach.listener import AttachListener
from farpage.daemon import CONTROL_NICENESS, run_early, started
from farpage.errors import InvalidInput
from farpage.hypervisor.service import Hypervisor
from farpage.hypervisor.settings import HypervisorSettings
from farpage.log import configure_logging, get_logger
from farpage.pager.launch import LaunchedWorker

if TYPE_CHECKING:
    from farpage.api.serve import ControlServer

log = get_logger()


async def run(settings: HypervisorSettings, launched: Sequence[LaunchedWorker] = ()) -> None:
    """Serve until SIGTERM or SIGINT; then give every client its memory back and stop.

    Data workers that were `launched` before are used.

    :raise FarpageError: when it cannot start.
    """
    configure_logging(hypervisor=settings.name)
    loop = asyncio.get_running_loop()
    told_to_stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_stop.set)
    addresses = [parse_address(text, field="control") for text in settings.control]
    check_addresses(addresses, settings.tls, field="control")
    hypervisor = Hypervisor(settings, launched)
    control: ControlServer | None = None
    listener = AttachListener(
        _unix_path(settings.attach, "attach"),
        hypervisor.attaching.region,
        hypervisor.detaching.region_closed,
        hypervisor.detaching.close_named,
    )
    try:
        await hypervisor.start()
        # Not sooner: what serves the API takes longer to load than clients of a killed one should wait.
        from farpage.api import serve
        from farpage.hypervisor.api import create_api

        control = serve.ControlServer(create_api(hypervisor, loop), addresses, settings.tls)
        await control.start()
        await listener.start()
        started()
        run_early(CONTROL_NICENESS)
        log.info(
            "hypervisor_ready",
            hypervisor=settings.name,
            control=[str(address) for address in control.addresses],
        )
        await told_to_stop.wait()
        log.info("hypervisor_stopping", clients=len(hypervisor.clients.attached))
    finally:
        await listener.close()
        await hypervisor.stop()
        if control is not None:
            await control.stop()


def _unix_path(address: str, field: str) -> str:
    parsed = parse_address(address, field=field)
    if not isinstance(parsed, UnixAddress):
        raise InvalidInput(field, f"{address} is not a UNIX socket", "write unix:PATH")
    return parsed.path
