"""`farpage vios`: the virtual I/O servers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farpage.cli.options import (
    AsJson,
    AtATime,
    Bandwidth,
    DaemonControl,
    DaemonTls,
    DataProcesses,
    Indirect,
    Lease,
    MoveInBackground,
    State,
)

app = typer.Typer(name="vios", help="Virtual I/O servers: reach paging devices and serve their volumes.")

ViosName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the VIOS.")]


@app.command(
    "run", epilog="Example: farpage vios run vios1 --dir /var/lib/farpage/vios1 --device dir:/srv/paging"
)
def run(
    *,
    name: ViosName,
    folder: Annotated[
        Path, typer.Option("--dir", metavar="DIR", help="Folder of its sockets, database and state.")
    ],
    control: DaemonControl = None,
    tls: DaemonTls = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", metavar="ADDRESS", help="NBD address; may be given again; by default DIR/data.sock."
        ),
    ] = None,
    devices: Annotated[
        list[str] | None,
        typer.Option("--device", metavar="SPEC", help="Device to serve, as 'device add' takes it."),
    ] = None,
    lease: Lease = 5.0,
    workers: DataProcesses = 1,
) -> None:
    """Run a VIOS in the foreground until SIGTERM or Ctrl-C."""
    from farpage.cli.daemons import run_vios

    run_vios(
        name=name,
        folder=folder,
        control=control or [],
        tls=tls,
        data=data or [],
        devices=devices or [],
        lease_seconds=lease,
        workers=workers,
    )


@app.command("stop", epilog="Example: farpage vios stop vios1")
def stop(
    name: ViosName,
    force: Annotated[
        bool, typer.Option("--force", help="Stop it also when clients cannot be paged without it; they wait.")
    ] = False,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """Move a VIOS's clients to their other paths, then stop it with nothing in flight.

    Refused, without a change, when it is the only working path of a client.
    """
    from farpage.cli.output import print_json, print_text
    from farpage.cli.session import ask_hypervisor
    from farpage.cli.wanted import named
    from farpage.cli.wording.vios import stopped

    name = named(name)
    answer = ask_hypervisor(state, lambda hypervisor: hypervisor.stop_vios(name, force=force))
    print_json(answer) if as_json else print_text(*stopped(answer))


@app.command("start", epilog="Example: farpage vios start vios1")
def start(name: ViosName, state: State = None, as_json: AsJson = False) -> None:
    """Start a VIOS of a 'farpage up' again after 'vios stop'; others are started with 'vios run'."""
    from farpage.cli.output import print_json, print_text
    from farpage.cli.session import ask_set
    from farpage.cli.wanted import named
    from farpage.cli.wording.vios import started

    name = named(name)
    answer = ask_set(state, lambda control: control.start_vios(name))
    print_json(answer) if as_json else print_text(*started(answer))


@app.command("list", epilog="Example: farpage vios list")
def list_vioses(state: State = None, as_json: AsJson = False) -> None:
    """List the VIOSes as the hypervisor sees them."""
    from farpage.cli.output import print_json, print_text
    from farpage.cli.session import ask_hypervisor
    from farpage.cli.wording.vios import overview

    vioses = ask_hypervisor(state, lambda hypervisor: hypervisor.vioses())
    print_json(vioses) if as_json else print_text(overview(vioses))


@app.command("show", epilog="Example: farpage vios show vios1")
def show(name: ViosName, state: State = None, as_json: AsJson = False) -> None:
    """Show what a VIOS tells of itself: health, devices and volumes."""
    from farpage.cli.output import print_json, print_text
    from farpage.cli.session import ask_vios
    from farpage.cli.wording.vios import details

    found = ask_vios(state, name, lambda vios: vios.details())
    print_json(found) if as_json else print_text(*details(found))


@app.command("evacuate", epilog="Example: farpage vios evacuate vios2 --at-a-time 4")
def evacuate_vios(
    name: ViosName,
    *,
    at_a_time: AtATime = 1,
    indirect: Indirect = False,
    bandwidth: Bandwidth = None,
    background: MoveInBackground = False,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """Move the clients that only this VIOS reaches to devices that others reach, while they run.

    Waits for the end, which Ctrl-C does not bring about; exits with 1 when a client could not be moved. Given
    again, it goes on where it was cut short.
    """
    from farpage.cli.evacuating import evacuate
    from farpage.cli.wanted import wanted
    from farpage.hypervisor.movement import EvacuationStart

    order = wanted(EvacuationStart, at_a_time=at_a_time, indirect=indirect, bandwidth_bytes=bandwidth)
    evacuate(state, "vioses", name, order, wait=not background, as_json=as_json)
