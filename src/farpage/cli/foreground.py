"""What `farpage up` does: starts a set, says how to use it, keeps it until a signal comes."""

from __future__ import annotations

import asyncio
import signal
import sys

from farpage.address import parse_address
from farpage.api.serve import ControlServer
from farpage.cli.output import fields, print_json, print_text
from farpage.embedded.child import ChildEvent
from farpage.embedded.set import EmbeddedSet, SetSettings


def run_set(settings: SetSettings, *, as_json: bool) -> None:
    """Run an embedded set until SIGINT or SIGTERM.

    With `as_json` the set's description goes to stdout once everything answers; what happens later always
    goes to stderr.
    """
    asyncio.run(_run_set(settings, as_json))


async def _run_set(settings: SetSettings, as_json: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    embedded = EmbeddedSet(settings, _tell)
    starting = loop.create_task(embedded.start())
    stopping = loop.create_task(stop.wait())
    await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        stopping.cancel()
        return
    starting.result()
    from farpage.embedded.api import create_api

    control = ControlServer(create_api(embedded, loop), [parse_address(embedded.layout.control)])
    try:
        await control.start()
        if as_json:
            print_json(embedded.document)
        else:
            _say_how_to_use(embedded)
        sys.stdout.flush()
        await stopping
    finally:
        await embedded.stop_hypervisor()
        await control.stop()
        await embedded.stop()


def _say_how_to_use(embedded: EmbeddedSet) -> None:
    state, document = embedded.layout.root, embedded.document
    print_text(
        "",
        fields(
            [
                ("state", str(state)),
                *((f"VIOS {name}", vios.control) for name, vios in document.vioses.items()),
                ("hypervisor", document.hypervisor.control),
                ("regions", document.hypervisor.attach),
            ]
        ),
        "",
        "In another terminal:",
        f"  export FARPAGE_STATE={state}",
        "  farpage client attach NAME --pid PID --limit 128M    page the memory of a running QEMU",
        "  farpage client list                                  see what is paged",
        "  farpage path list                                    see which path is active",
        "",
        "Ctrl-C stops everything.",
    )


def _tell(event: ChildEvent) -> None:
    sys.stderr.write(f"{event.child}: {event.message}\n")
    sys.stderr.flush()
