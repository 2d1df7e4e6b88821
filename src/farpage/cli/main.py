"""The `farpage` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from farpage import __version__
from farpage.cli.commands import (
    alarm,
    client,
    definition,
    demo,
    device,
    hypervisor,
    intermediary,
    path,
    pool,
    up,
    vios,
)
from farpage.cli.options import TLS, TLS_VARIABLE
from farpage.cli.report import report
from farpage.embedded.parent import follow_parent

app = typer.Typer(
    name="farpage",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Start with: farpage demo",
)

app.command("up", epilog=up.EXAMPLE)(up.up)
app.command("demo", epilog=demo.EXAMPLE)(demo.demo)
for noun in (client, vios, hypervisor, intermediary, device, path, definition, pool, alarm):
    app.add_typer(noun.app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"farpage {__version__}")
        raise typer.Exit


@app.callback()
def _farpage(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    tls: Annotated[
        Path | None,
        typer.Option(
            "--tls",
            metavar="DIR",
            envvar=TLS_VARIABLE,
            help="Folder of the certificates that this command shows to daemons at TCP ports.",
        ),
    ] = None,
) -> None:
    """Page the memory of virtual machines out to storage, through redundant I/O servers."""
    TLS.set(tls)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status; errors are worded on stderr."""
    follow_parent()
    try:
        status = app(args=arguments, prog_name="farpage", standalone_mode=False)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as problem:
        return report(problem)
    return status if isinstance(status, int) else 0
