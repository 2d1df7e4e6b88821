"""What the `run` commands of daemons do: settings from the command line, then the daemon.

What takes long to load is imported by the functions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from farpage.address import UnixAddress, parse_address
from farpage.api.tls import check_addresses
from farpage.daemon import begin_to_start
from farpage.errors import InvalidInput
from farpage.hypervisor.workercpus import parse_worker_cpus
from farpage.kernel.affinity import own_cpus
from farpage.pager.launch import launch_missing, worker_count, workers_folder


def run_hypervisor(
    *,
    name: str,
    folder: Path,
    control: Sequence[str],
    tls: Path | None,
    attach: str | None,
    vioses: Sequence[str],
    run_folder: Path | None,
    workers: int | None,
    worker_cpus: str,
    path_timeout_seconds: float,
    no_path_timeout_seconds: float | None,
    resync_bytes_per_second: int,
    direct_reads: bool,
    default_limit_bytes: int | None,
    ram_tier_percent: int,
    pool_size_bytes: int | None,
) -> None:
    """Run a hypervisor until it is told to stop.

    :raise InvalidInput: naming the option that is wrong.
    """
    begin_to_start()
    folder = _made(folder)
    run_folder = run_folder.expanduser().absolute() if run_folder else folder / "run"
    controls = _controls(control, folder / "control.sock", tls)
    cpus = parse_worker_cpus(worker_cpus, own_cpus()).listed
    # First of all: clients of an earlier process may wait for a worker, which loads while this one does.
    launched = launch_missing(workers_folder(run_folder), worker_count(workers, cpus))
    from farpage.cli.wanted import wanted
    from farpage.hypervisor.daemon import run
    from farpage.hypervisor.settings import HypervisorSettings

    settings = wanted(
        HypervisorSettings,
        name=name,
        state_dir=folder,
        control=controls,
        tls=tls,
        attach=_unix(attach, folder / "attach.sock", "--attach"),
        vioses=dict(_named_address(text) for text in vioses),
        run_dir=run_folder,
        workers=workers,
        worker_cpus=worker_cpus,
        path_timeout_seconds=path_timeout_seconds,
        no_path_timeout_seconds=no_path_timeout_seconds,
        resync_bytes_per_second=resync_bytes_per_second,
        direct_reads=direct_reads,
        default_limit_bytes=default_limit_bytes,
        ram_tier_percent=ram_tier_percent,
        pool_size_bytes=pool_size_bytes,
    )
    try:
        asyncio.run(run(settings, launched))
    finally:
        for worker in launched:
            worker.forget()


def run_vios(
    *,
    name: str,
    folder: Path,
    control: Sequence[str],
    tls: Path | None,
    data: Sequence[str],
    devices: Sequence[str],
    lease_seconds: float,
    workers: int,
) -> None:
    """Run a VIOS until it is told to stop.

    :raise InvalidInput: naming the option that is wrong.
    """
    begin_to_start()
    from farpage.cli.wanted import wanted
    from farpage.nbd.eventloop import DataPlaneLoop
    from farpage.vios.daemon import run
    from farpage.vios.settings import ViosSettings

    folder = _made(folder)
    settings = wanted(
        ViosSettings,
        name=name,
        state_dir=folder,
        control=_controls(control, folder / "control.sock", tls),
        tls=tls,
        data=[str(parse_address(text, field="--data")) for text in data or [f"unix:{folder / 'data.sock'}"]],
        devices=devices,
        lease_seconds=lease_seconds,
        workers=workers,
    )
    with asyncio.Runner(loop_factory=DataPlaneLoop) as runner:
        runner.run(run(settings))


def run_intermediary(
    *, client: str, vioses: Sequence[str], listen: str, control: Sequence[str], tls: Path | None
) -> None:
    """Run an intermediate client until the move is over.

    :raise InvalidInput: naming the option that is wrong.
    """
    from farpage.cli.wanted import wanted
    from farpage.intermediary.daemon import run
    from farpage.intermediary.settings import IntermediarySettings
    from farpage.nbd.eventloop import DataPlaneLoop

    controls = [parse_address(text, field="--control") for text in control]
    check_addresses(controls, tls, field="--control")
    named = dict(_named_address(text) for text in vioses)
    check_addresses([parse_address(text) for text in named.values()], tls, field="--vios")
    settings = wanted(
        IntermediarySettings,
        client=client,
        vioses=named,
        listen=str(parse_address(listen, field="--listen")),
        control=[str(address) for address in controls],
        tls=tls,
    )
    with asyncio.Runner(loop_factory=DataPlaneLoop) as runner:
        runner.run(run(settings))


def _named_address(text: str) -> tuple[str, str]:
    name, separator, address = text.partition("=")
    if not (name and separator):
        raise InvalidInput("--vios", f"{text!r} has no name", "write NAME=unix:PATH or NAME=tcp:HOST:PORT")
    return name, str(parse_address(address, field="--vios"))


def _controls(texts: Sequence[str], default: Path, tls: Path | None) -> list[str]:
    """Return the control API's addresses: for an operator on its own host there is always a UNIX socket."""
    addresses = [parse_address(text, field="--control") for text in texts]
    if not any(isinstance(address, UnixAddress) for address in addresses):
        addresses.insert(0, parse_address(f"unix:{default}", field="--control"))
    check_addresses(addresses, tls, field="--control")
    return [str(address) for address in addresses]


def _unix(text: str | None, default: Path, option: str) -> str:
    address = parse_address(text or f"unix:{default}", field=option)
    if not isinstance(address, UnixAddress):
        raise InvalidInput(option, f"{text!r} is no UNIX socket", "write unix:PATH")
    return str(address)


def _made(folder: Path) -> Path:
    folder = folder.expanduser().absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as problem:
        raise InvalidInput(
            "--dir", f"{problem.filename}: {problem.strerror}", "name a folder that you can write to"
        ) from problem
    return folder
