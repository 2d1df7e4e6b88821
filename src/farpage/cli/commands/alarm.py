"""`farpage alarm`: what an operator should look at."""

from __future__ import annotations

import typer

from farpage.cli.options import AsJson, State

app = typer.Typer(name="alarm", help="Alarms: what an operator should look at.")


@app.callback()
def _alarm() -> None:
    """Alarms: what an operator should look at."""


@app.command("list", epilog="Example: farpage alarm list")
def list_alarms(state: State = None, as_json: AsJson = False) -> None:
    """List the alarms, newest last."""
    from farpage.cli.output import print_json, print_text
    from farpage.cli.session import ask_hypervisor
    from farpage.cli.wording.alarm import overview

    alarms = ask_hypervisor(state, lambda hypervisor: hypervisor.alarms())
    print_json(alarms) if as_json else print_text(overview(alarms))
