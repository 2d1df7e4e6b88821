"""`farpage up`: the embedded set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farpage.cli.options import (
    AsJson,
    DirectReads,
    Lease,
    Limit,
    NoPathTimeout,
    PathTimeout,
    PoolSize,
    RamTier,
    State,
    WorkerCpus,
    Workers,
)
from farpage.hypervisor.workercpus import ANY
from farpage.pager.limit import DEFAULT_TIER_PERCENT

app = typer.Typer()


@app.command("up", epilog="Example: farpage up --state /var/lib/farpage --limit 128M")
def up(
    *,
    state: State = None,
    vios_count: Annotated[int, typer.Option("--vios-count", help="Number of VIOSes, 1 to 8.")] = 2,
    devices: Annotated[
        list[str] | None,
        typer.Option(
            "--device",
            metavar="[VIOS=]SPEC",
            help="Paging device of every VIOS, by default a folder in the state folder; or, with its name, "
            "of one VIOS alone, as mirrors need. May be repeated.",
        ),
    ] = None,
    run_folder: Annotated[
        Path | None,
        typer.Option(
            "--run-dir",
            metavar="DIR",
            help="Folder of what a hypervisor that is started again needs; best on tmpfs, as /run is; "
            "by default in the state folder.",
        ),
    ] = None,
    workers: Workers = None,
    worker_cpus: WorkerCpus = ANY,
    path_timeout: PathTimeout = 1.0,
    no_path_timeout: NoPathTimeout = None,
    lease: Lease = 5.0,
    direct_reads: DirectReads = True,
    limit: Limit = None,
    ram_tier: RamTier = DEFAULT_TIER_PERCENT,
    pool_size: PoolSize = None,
    as_json: AsJson = False,
) -> None:
    """Start VIOSes, a hypervisor and a device of files, and stay until Ctrl-C.

    The other commands find the set by the same --state (or FARPAGE_STATE).
    """
    from farpage.cli.foreground import run_set
    from farpage.embedded.layout import default_state_dir
    from farpage.embedded.set import SetSettings

    settings = SetSettings(
        state_dir=state or default_state_dir(),
        vios_count=vios_count,
        devices=tuple(devices or ()),
        run_dir=run_folder,
        workers=workers,
        worker_cpus=worker_cpus,
        path_timeout_seconds=path_timeout,
        no_path_timeout_seconds=no_path_timeout,
        lease_seconds=lease,
        direct_reads=direct_reads,
        default_limit_bytes=limit,
        ram_tier_percent=ram_tier,
        pool_size_bytes=pool_size,
    )
    run_set(settings, as_json=as_json)
