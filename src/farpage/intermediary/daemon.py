"""The process of an intermediate client: from its settings to the end of the move."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import AsyncExitStack

from farpage.address import Address, TcpAddress, parse_address
from farpage.daemon import prepare_for_paging
from farpage.errors import InvalidInput
from farpage.intermediary.courier import Courier
from farpage.intermediary.places import WILDCARDS, Place
from farpage.intermediary.route import find_route
from farpage.intermediary.service import Intermediary
from farpage.intermediary.settings import IntermediarySettings
from farpage.log import configure_logging, get_logger

log = get_logger()


async def run(settings: IntermediarySettings) -> None:
    """Work until the move is over, SIGTERM or SIGINT.

    It is ready when the relay accepts connections; then a line `ready` is logged.

    :raise InvalidInput: a setting is wrong.
    :raise Unreachable: a VIOS of the move does not answer.
    :raise ClientMissing: there is no such client.
    :raise MoveMissing: the client is not being moved.
    :raise ViosNotNamed: a VIOS of the move is not in the settings.
    :raise NotGranted: the definition does not let it at the devices.
    :raise ListenFailed: the relay cannot listen.
    :raise Displaced: another intermediate client does the work.
    """
    listen = _listen_address(settings.listen)
    configure_logging(intermediary=settings.client)
    os.umask(0o077)  # sockets are for this user alone
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        places = [Place(name, control, settings.tls) for name, control in settings.vioses.items()]
        for place in places:
            stack.push_async_callback(place.client.close)
        working = loop.create_task(_work(settings, listen, places, stack))
        stopping = loop.create_task(stop.wait())
        try:
            await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (working, stopping):
                task.cancel()
            await asyncio.gather(working, stopping, return_exceptions=True)
        if not working.cancelled():
            working.result()
    log.info("stopped")


async def _work(
    settings: IntermediarySettings, listen: Address, places: list[Place], stack: AsyncExitStack
) -> None:
    courier = Courier(places)
    route = await find_route(settings.client, courier)
    intermediary = Intermediary(route, courier)
    await intermediary.relay.server.start([listen])
    stack.push_async_callback(intermediary.relay.server.close)
    prepare_for_paging()
    await _serve_control(settings, intermediary, stack)
    log.info(
        "ready",
        volume=route.move.volume,
        relay=str(intermediary.relay.server.addresses[0]),
        source=f"{route.move.source} through {route.second.name}",
        target=f"{route.move.target} through {route.first.name}",
        state=route.move.state,
    )
    await intermediary.run()
    log.info("over", volume=route.move.volume)


async def _serve_control(
    settings: IntermediarySettings, intermediary: Intermediary, stack: AsyncExitStack
) -> None:
    if not settings.control:
        return
    from farpage.api.serve import ControlServer
    from farpage.intermediary.api import make_app

    addresses = [parse_address(text, field="control") for text in settings.control]
    server = ControlServer(make_app(intermediary), addresses, settings.tls)
    await server.start()
    stack.push_async_callback(server.stop)


def _listen_address(text: str) -> Address:
    address = parse_address(text, field="listen")
    if isinstance(address, TcpAddress) and address.host in WILDCARDS:
        raise InvalidInput(
            "listen", f"{address} names no host", "name the address at which the first VIOS reaches this host"
        )
    return address
