"""`farpage definition`: the device interface definition."""

from __future__ import annotations

from typing import Annotated

import typer

from farpage.cli.options import AsJson, State

app = typer.Typer(
    name="definition",
    help="The device interface definition: which devices hold which client's volumes.",
)


@app.callback()
def _definition() -> None:
    """The device interface definition: which devices hold which client's volumes."""


@app.command("show", epilog="Example: farpage definition show --vios vios2 --json")
def show(
    vios: Annotated[
        str | None,
        typer.Option("--vios", metavar="NAME", help="The copy that this VIOS stores, not the hypervisor's."),
    ] = None,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """Show the definition that the hypervisor goes by, or the copy that a VIOS stores."""
    from farpage.cli.output import print_json, print_text
    from farpage.cli.session import ask_hypervisor, ask_vios
    from farpage.cli.wording.definition import details

    definition = (
        ask_hypervisor(state, lambda hypervisor: hypervisor.definition())
        if vios is None
        else ask_vios(state, vios, lambda server: server.definition())
    )
    print_json(definition) if as_json else print_text(*details(definition))
