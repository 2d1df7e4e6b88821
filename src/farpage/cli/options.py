"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from farpage.pager.limit import LARGEST_TIER_PERCENT
from farpage.terminal.sizes import parse_duration, parse_percent, parse_size

State: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--state",
        metavar="DIR",
        envvar="FARPAGE_STATE",
        help="State folder of the set; by default /var/lib/farpage for root, else ~/.local/state/farpage.",
    ),
]

TLS: ContextVar[Path | None] = ContextVar("TLS", default=None)
"""Folder of certificates that was named with the command, before its noun."""

TLS_VARIABLE = "FARPAGE_TLS"

DaemonTls: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--tls",
        metavar="DIR",
        envvar=TLS_VARIABLE,
        help="Folder with ca.pem, cert.pem and key.pem, for control addresses that are TCP ports.",
    ),
]

DaemonControl: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--control",
        metavar="ADDRESS",
        help="Control API's address; may be given again; tcp:HOST:PORT needs --tls. It is always served at a "
        "UNIX socket too, by default DIR/control.sock.",
    ),
]

DirectReads: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--direct-reads/--no-direct-reads",
        help="Read paged-out memory straight from devices of VIOSes on this host, or only through VIOSes.",
    ),
]

AsJson: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print JSON: the control API's document, and nothing else.")
]


def size_option(name: str, help_text: str, default: str = "") -> Any:
    """Return an option that takes a size such as 512M; its value is bytes. `default` is what help shows."""
    return typer.Option(
        name,
        metavar="SIZE",
        parser=_naming(parse_size, name),
        help=help_text,
        show_default=default or True,
    )


def duration_option(name: str, help_text: str) -> Any:
    """Return an option that takes a time such as 250ms; its value is seconds."""
    return typer.Option(name, metavar="TIME", parser=_naming(parse_duration, name), help=help_text)


def _naming(parse: Callable[..., float], name: str) -> Callable[[str | float], float]:
    def parser(value: str | float) -> float:
        # Typer also passes a default through the parser.
        return parse(value, field=name) if isinstance(value, str) else value

    return parser


Indirect: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--indirect",
        help="By an intermediate client, also where the hypervisor reaches both devices itself.",
    ),
]

Bandwidth: TypeAlias = Annotated[
    int | None,
    size_option(
        "--bandwidth", "The most that an intermediate client copies per second; by default no limit."
    ),
]

MoveInBackground: TypeAlias = Annotated[
    bool,
    typer.Option("--background", help="Begin only; 'farpage client move-status NAME' tells how far it is."),
]

AtATime: TypeAlias = Annotated[
    int, typer.Option("--at-a-time", metavar="N", help="Move so many clients beside each other.")
]

Workers: TypeAlias = Annotated[
    int | None, typer.Option("--workers", min=1, max=256, help="Data workers; by default one per core.")
]

WorkerCpus: TypeAlias = Annotated[
    str,
    typer.Option(
        "--worker-cpus",
        metavar="any|clients|LIST",
        help="Where data workers run: on any CPU, on those that the threads of their clients are pinned to, "
        "or on those of a list such as 0-3,8.",
    ),
]

DataProcesses: TypeAlias = Annotated[
    int,
    typer.Option(
        "--workers",
        metavar="N",
        min=1,
        max=64,
        help="Processes that serve volumes, each volume by one of them; with 1 the VIOS itself. More than 1 "
        "need dir: and block: devices.",
    ),
]

PathTimeout: TypeAlias = Annotated[
    float, duration_option("--path-timeout", "A command that waits longer makes its path suspect.")
]

NoPathTimeout: TypeAlias = Annotated[
    float | None,
    duration_option(
        "--no-path-timeout",
        "After so long without a path, accesses that wait fail for good; by default they wait on.",
    ),
]

Lease: TypeAlias = Annotated[
    float,
    duration_option(
        "--lease", "A VIOS carries out no writes of a hypervisor that it has not heard of for so long."
    ),
]

Limit: TypeAlias = Annotated[int | None, size_option("--limit", "Limit of clients that name none.")]

RamTier: TypeAlias = Annotated[
    int,
    typer.Option(
        "--ram-tier",
        metavar="PERCENT",
        parser=_naming(partial(parse_percent, most=LARGEST_TIER_PERCENT), "--ram-tier"),
        help="Share of a client's limit that holds pages which left memory, compressed, so that those that "
        f"come back soon need no device; 0 for none, at most {LARGEST_TIER_PERCENT}%.",
    ),
]

PoolSize: TypeAlias = Annotated[int | None, size_option("--pool-size", "Size of the memory pool.")]
