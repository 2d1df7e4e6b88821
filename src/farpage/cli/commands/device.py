"""`farpage device`: the paging devices."""

from __future__ import annotations

from typing import Annotated

import typer

from farpage.cli.options import AsJson, AtATime, Bandwidth, Indirect, MoveInBackground, State, size_option

app = typer.Typer(name="device", help="Paging devices: storage that holds the clients' volumes.")


@app.command("add", epilog="Example: farpage device add dir:/srv/paging --vios vios1 --vios vios2 --size 64G")
def add(
    spec: Annotated[
        str,
        typer.Argument(
            metavar="SPEC",
            help="dir:PATH for a folder (dir:PATH?allocate=full allocates volumes at once), "
            "block:PATH for a block device, nbd://HOST/EXPORT or nbd+unix:///EXPORT?socket=PATH for an NBD "
            "server's export, memory:SIZE for a test's device.",
        ),
    ],
    *,
    vioses: Annotated[
        list[str] | None,
        typer.Option(
            "--vios", metavar="NAME", help="A VIOS that reaches it; may be repeated; by default all."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the device.")] = None,
    size: Annotated[int | None, size_option("--size", "Space that volumes may take on it.")] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Take it although it looks as if something else uses it; destroys what is on it."
        ),
    ] = False,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """Have one or more VIOSes serve a device; with two it is common, and paths over it are redundant."""
    from farpage.cli.devices import add_device
    from farpage.cli.output import print_json, print_text
    from farpage.cli.wanted import wanted
    from farpage.cli.wording.device import overview
    from farpage.vios.model import DeviceAdd

    document = wanted(DeviceAdd, spec=spec, name=name, size_bytes=size, force=force)
    added = add_device(state, document, vioses or [])
    print_json(added) if as_json else print_text(overview(added))


@app.command("list", epilog="Example: farpage device list --vios vios1")
def list_devices(
    vios: Annotated[
        str | None, typer.Option("--vios", metavar="NAME", help="Only what this VIOS reaches.")
    ] = None,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """List the devices, asking every VIOS that reaches them."""
    from farpage.cli.devices import reached_devices
    from farpage.cli.output import print_json, print_text
    from farpage.cli.wording.device import overview, problems

    reached = reached_devices(state, vios)
    if as_json:
        print_json(reached)
    else:
        print_text(overview(reached), *problems(reached))


@app.command("replace", epilog="Example: farpage device replace disk1 disk3")
def replace(
    old: Annotated[str, typer.Argument(metavar="OLD", help="Name of the device that is to be free.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Name of the device that takes its clients.")],
    *,
    background: Annotated[
        bool, typer.Option("--background", help="Begin only; 'farpage client show NAME' tells how far it is.")
    ] = False,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """Move every client's volume from one device to another while the clients run.

    Waits for the end, which Ctrl-C does not bring about; exits with 1 when a client could not be moved. Given
    again, it goes on where it was cut short.
    """
    from farpage.cli.output import print_json, print_text
    from farpage.cli.replacing import run_replacement
    from farpage.cli.wording.device import replaced
    from farpage.hypervisor.model import ReplaceStage

    replacement = run_replacement(state, old, new, wait=not background)
    print_json(replacement) if as_json else print_text(replaced(replacement))
    if any(client.stage is ReplaceStage.FAILED for client in replacement.clients):
        raise typer.Exit(1)


@app.command("evacuate", epilog="Example: farpage device evacuate disk1 --at-a-time 4")
def evacuate_device(
    name: Annotated[str, typer.Argument(metavar="DEVICE", help="Name of the device that is to be empty.")],
    *,
    at_a_time: AtATime = 1,
    indirect: Indirect = False,
    bandwidth: Bandwidth = None,
    background: MoveInBackground = False,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """Move each client's volume off a device, to the device that fits it best, while the clients run.

    Waits for the end, which Ctrl-C does not bring about; exits with 1 when a client could not be moved. Given
    again, it goes on where it was cut short.
    """
    from farpage.cli.evacuating import evacuate
    from farpage.cli.wanted import wanted
    from farpage.hypervisor.movement import EvacuationStart

    order = wanted(EvacuationStart, at_a_time=at_a_time, indirect=indirect, bandwidth_bytes=bandwidth)
    evacuate(state, "devices", name, order, wait=not background, as_json=as_json)
