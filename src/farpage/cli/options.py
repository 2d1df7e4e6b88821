"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from farpage.cli.sizes import parse_duration, parse_size

State: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--state",
        metavar="DIR",
        envvar="FARPAGE_STATE",
        help="State folder of the set; by default /var/lib/farpage for root, else ~/.local/state/farpage.",
    ),
]

AsJson: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print JSON: the control API's document, and nothing else.")
]


def size_option(name: str, help_text: str) -> Any:
    """Return an option that takes a size such as 512M; its value is bytes."""
    return typer.Option(name, metavar="SIZE", parser=_naming(parse_size, name), help=help_text)


def duration_option(name: str, help_text: str) -> Any:
    """Return an option that takes a time such as 250ms; its value is seconds."""
    return typer.Option(name, metavar="TIME", parser=_naming(parse_duration, name), help=help_text)


def _naming(parse: Callable[..., float], name: str) -> Callable[[str | float], float]:
    def parser(value: str | float) -> float:
        # Typer also passes a default through the parser.
        return parse(value, field=name) if isinstance(value, str) else value

    return parser
