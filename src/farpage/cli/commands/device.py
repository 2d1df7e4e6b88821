"""`farpage device`: the paging devices."""

from __future__ import annotations

from typing import Annotated

import typer

from farpage.cli.options import AsJson, State, size_option

app = typer.Typer(name="device", help="Paging devices: storage that holds the clients' volumes.")


@app.command("add", epilog="Example: farpage device add dir:/srv/paging --vios vios1 --vios vios2 --size 64G")
def add(
    spec: Annotated[
        str,
        typer.Argument(
            metavar="SPEC",
            help="dir:PATH for a folder, block:PATH for a block device, nbd://HOST/EXPORT or "
            "nbd+unix:///EXPORT?socket=PATH for an NBD server's export, memory:SIZE for a test's device.",
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
    from farpage.cli.session import wanted
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
