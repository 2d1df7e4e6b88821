"""`farpage definition`: the device interface definition."""

from __future__ import annotations

from typing import Annotated

import typer

from farpage.cli.options import AsJson, State
from farpage.errors import ExitStatus

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


@app.command("verify", epilog="Example: farpage definition verify")
def verify(state: State = None, as_json: AsJson = False) -> ExitStatus:
    """Compare all copies with each other, and with the volumes; status 1 if all is not well."""
    import asyncio

    from farpage.cli.output import print_json, print_text
    from farpage.cli.session import read_set
    from farpage.cli.wording.definition import verification
    from farpage.embedded.verification import verify as verify_set

    found = asyncio.run(verify_set(read_set(state)))
    print_json(found) if as_json else print_text(*verification(found))
    return ExitStatus.OK if found.sound else ExitStatus.FAILURE


@app.command("promote", epilog="Example: farpage definition promote vios2 --force")
def promote(
    vios: Annotated[str, typer.Argument(metavar="VIOS", help="The VIOS whose copy is to be followed.")],
    force: Annotated[
        bool, typer.Option("--force", help="Do it; without, only the consequence is printed.")
    ] = False,
    state: State = None,
    as_json: AsJson = False,
) -> ExitStatus:
    """Make the copy of a VIOS the newest, when one that may be newer is lost for good."""
    from farpage.cli.output import print_json, print_text
    from farpage.cli.session import ask_hypervisor
    from farpage.cli.wanted import named
    from farpage.cli.wording.definition import promotion

    name = named(vios)
    answer = ask_hypervisor(state, lambda hypervisor: hypervisor.promote(name, force=force))
    print_json(answer) if as_json else print_text(*promotion(answer))
    return ExitStatus.OK if answer.done else ExitStatus.CONFLICT
