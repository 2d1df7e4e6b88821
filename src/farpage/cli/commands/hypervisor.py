"""`farpage hypervisor`: the daemon on the VMs' host."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farpage.cli.options import (
    AsJson,
    DaemonControl,
    DaemonTls,
    DirectReads,
    Limit,
    NoPathTimeout,
    PathTimeout,
    PoolSize,
    RamTier,
    State,
    WorkerCpus,
    Workers,
    size_option,
)
from farpage.hypervisor.workercpus import ANY
from farpage.pager.limit import DEFAULT_TIER_PERCENT

app = typer.Typer(
    name="hypervisor", help="The hypervisor: owns the memory pool, pages in and out, picks paths."
)


@app.command(
    "run",
    epilog="Example: farpage hypervisor run host1 --dir /var/lib/farpage/host1 "
    "--vios vios1=unix:/run/vios1.sock --vios vios2=unix:/run/vios2.sock",
)
def run(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the hypervisor.")],
    *,
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="Folder of its sockets and state.")],
    vioses: Annotated[
        list[str],
        typer.Option("--vios", metavar="NAME=ADDRESS", help="A VIOS's control address; once for each."),
    ],
    control: DaemonControl = None,
    tls: DaemonTls = None,
    attach: Annotated[
        str | None,
        typer.Option(
            "--attach", metavar="ADDRESS", help="Address that regions connect to; by default DIR/attach.sock."
        ),
    ] = None,
    run_folder: Annotated[
        Path | None,
        typer.Option(
            "--run-dir",
            metavar="DIR",
            help="Folder of what its next process needs when this one is killed; best on tmpfs, as /run is; "
            "by default 'run' in its --dir.",
        ),
    ] = None,
    workers: Workers = None,
    worker_cpus: WorkerCpus = ANY,
    path_timeout: PathTimeout = 1.0,
    resync_bandwidth: Annotated[
        int,
        size_option(
            "--resync-bandwidth", "The most a second that is copied to a replica that missed pages.", "100M"
        ),
    ] = 100 << 20,
    no_path_timeout: NoPathTimeout = None,
    direct_reads: DirectReads = True,
    limit: Limit = None,
    ram_tier: RamTier = DEFAULT_TIER_PERCENT,
    pool_size: PoolSize = None,
) -> None:
    """Run a hypervisor in the foreground until SIGTERM or Ctrl-C."""
    from farpage.cli.daemons import run_hypervisor

    run_hypervisor(
        name=name,
        folder=folder,
        control=control or [],
        tls=tls,
        attach=attach,
        vioses=vioses,
        run_folder=run_folder,
        workers=workers,
        worker_cpus=worker_cpus,
        path_timeout_seconds=path_timeout,
        no_path_timeout_seconds=no_path_timeout,
        resync_bytes_per_second=resync_bandwidth,
        direct_reads=direct_reads,
        default_limit_bytes=limit,
        ram_tier_percent=ram_tier,
        pool_size_bytes=pool_size,
    )


@app.command("show", epilog="Example: farpage hypervisor show --json")
def show(state: State = None, as_json: AsJson = False) -> None:
    """Show the set's hypervisor and its workers."""
    from farpage.cli.output import print_json, print_text
    from farpage.cli.session import ask_hypervisor
    from farpage.cli.wording.hypervisor import details

    info = ask_hypervisor(state, lambda hypervisor: hypervisor.info())
    print_json(info) if as_json else print_text(*details(info))
