"""`farpage path`: the ways from the clients over the VIOSes to their volumes."""

from __future__ import annotations

from typing import Annotated

import typer

from farpage.cli.options import AsJson, State

app = typer.Typer(name="path", help="Paths: client, over a VIOS, to its volume.")


@app.callback()
def _path() -> None:
    """Paths: client, over a VIOS, to its volume."""


@app.command("list", epilog="Example: farpage path list --client web1")
def list_paths(
    client: Annotated[
        str | None, typer.Option("--client", metavar="NAME", help="Only this client's paths.")
    ] = None,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """List the paths and their states: active, standby, suspect or failed."""
    from farpage.cli.output import print_json, print_text
    from farpage.cli.session import ask_hypervisor
    from farpage.cli.wording.path import overview

    paths = ask_hypervisor(state, lambda hypervisor: hypervisor.paths(client))
    print_json(paths) if as_json else print_text(overview(paths))


@app.command("explain", epilog="Example: farpage path explain web1 --to disk3")
def explain(
    client: Annotated[str, typer.Argument(metavar="CLIENT", help="Name of the client.")],
    to: Annotated[
        str | None, typer.Option("--to", metavar="DEVICE", help="A device to which it might be moved.")
    ] = None,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """Say how a client gets at its volume, or gets it to a device, and why not another way.

    Exits with 1 when there is no way.
    """
    from farpage.cli.output import print_json, print_text
    from farpage.cli.session import ask_hypervisor
    from farpage.cli.wanted import named
    from farpage.cli.wording.path import explained
    from farpage.hypervisor.ways import Way

    explanation = ask_hypervisor(state, lambda hypervisor: hypervisor.explain_path(named(client), to or ""))
    print_json(explanation) if as_json else print_text(*explained(explanation))
    if explanation.way is Way.UNREACHABLE:
        raise typer.Exit(1)
