"""`farpage intermediary`: the intermediate client of a move."""

from __future__ import annotations

from typing import Annotated

import typer

from farpage.cli.options import DaemonTls

app = typer.Typer(
    name="intermediary",
    help="The intermediate client of a move: copies a volume from one VIOS to another while its client runs.",
)


@app.command(
    "run",
    epilog="Example: farpage intermediary run vm1 --vios vios1=unix:/run/vios1.sock "
    "--vios vios2=tcp:10.0.0.2:7000 --tls /etc/farpage/tls --listen tcp:10.0.0.3:10810",
)
def run(
    client: Annotated[str, typer.Argument(metavar="CLIENT", help="The client whose volume is moved.")],
    *,
    vioses: Annotated[
        list[str],
        typer.Option(
            "--vios",
            metavar="NAME=ADDRESS",
            help="A VIOS's control address as this host reaches it; for both VIOSes of the move.",
        ),
    ],
    listen: Annotated[
        str,
        typer.Option(
            "--listen",
            metavar="ADDRESS",
            help="Where its relay listens, as the VIOS of the move's target reaches it.",
        ),
    ],
    control: Annotated[
        list[str] | None,
        typer.Option(
            "--control",
            metavar="ADDRESS",
            help="Serve status and metrics there; may be given again; tcp:HOST:PORT needs --tls.",
        ),
    ] = None,
    tls: DaemonTls = None,
) -> None:
    """Run the intermediate client of a move in the foreground until the move is over, SIGTERM or Ctrl-C.

    It keeps nothing: killed, it is started again with the same command, on any host that reaches both VIOSes.
    """
    from farpage.cli.daemons import run_intermediary

    run_intermediary(client=client, vioses=vioses, listen=listen, control=control or [], tls=tls)
