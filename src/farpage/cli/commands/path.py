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
