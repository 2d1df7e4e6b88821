"""`farpage demo`: the whole thing on one machine, with faults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farpage.cli.options import AsJson, size_option

app = typer.Typer()


@app.command("demo", epilog="Example: farpage demo --guest none --json")
def demo(
    *,
    guest: Annotated[
        str | None,
        typer.Option(
            "--guest",
            metavar="qemu|none",
            help="A Linux guest in QEMU, or a process with a Region; by default qemu where it is installed.",
        ),
    ] = None,
    memory: Annotated[int, size_option("--memory", "Memory of the guest.", "512M")] = 512 << 20,
    fill: Annotated[
        int, size_option("--fill", "Memory that the guest fills with checked data.", "300M")
    ] = 300 << 20,
    limit: Annotated[int, size_option("--limit", "Memory that may be resident.", "128M")] = 128 << 20,
    state: Annotated[
        Path | None,
        typer.Option("--state", metavar="DIR", help="Keep logs and state in this empty folder afterwards."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Page a guest through two VIOSes, kill one, hang the other, and have the guest check every page.

    Exit status 0 only if the guest verified everything.
    """
    from farpage.cli.demonstrate import run_demo

    raise typer.Exit(
        run_demo(
            guest=guest,
            memory_bytes=memory,
            fill_bytes=fill,
            limit_bytes=limit,
            state=state,
            as_json=as_json,
        )
    )
