"""The `farpage` command."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from farpage import __version__
from farpage.cli.options import TLS, TLS_VARIABLE
from farpage.cli.report import report
from farpage.embedded.parent import follow_parent

COMMANDS = (
    "up",
    "demo",
    "client",
    "vios",
    "hypervisor",
    "intermediary",
    "device",
    "path",
    "definition",
    "pool",
    "alarm",
)
"""Modules of `farpage.cli.commands`, each with its `app`, in the order of the help."""


LOADED_FASTER = {"PYDANTIC_DISABLE_PLUGINS": "__all__", "OPENBLAS_NUM_THREADS": "1"}
"""pydantic would look through all installed packages for plugins, and numpy start threads for matrices.

In the environment, so that it goes for the processes that this one starts, too; what is set there counts.
"""


class _Commands(typer.core.TyperGroup):
    """Loads the module of the command that is used alone: a guest may wait for the daemon that is started."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        holder = typer.Typer()
        holder.add_typer(import_module(f"farpage.cli.commands.{cmd_name}").app)
        return typer.main.get_group(holder).commands[cmd_name]


app = typer.Typer(
    name="farpage",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Start with: farpage demo",
)


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
    os.environ.update(LOADED_FASTER | os.environ)
    follow_parent()
    try:
        status = app(args=arguments, prog_name="farpage", standalone_mode=False)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as problem:
        return report(problem)
    return status if isinstance(status, int) else 0
