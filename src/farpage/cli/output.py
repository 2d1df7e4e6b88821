"""Prints a result: as the control API's JSON document, or as words and tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import RenderableType

_PIPE_WIDTH = 10_000
"""Lines that go to a program are not folded."""


def console() -> Console:
    """Return a console for stdout; its lines are folded only on a terminal."""
    # Names and paths may hold brackets and colons, so nothing in a string is markup.
    return Console(
        width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False, markup=False, emoji=False
    )


def print_json(document: BaseModel | Sequence[BaseModel]) -> None:
    """Print a document, or a list of them as a JSON array."""
    if isinstance(document, Sequence):
        items = ",\n".join(item.model_dump_json(indent=2) for item in document)
        text = f"[\n{items}\n]" if items else "[]"
    else:
        text = document.model_dump_json(indent=2)
    sys.stdout.write(text + "\n")


def print_text(*parts: RenderableType) -> None:
    """Print words and tables, one after the other."""
    out = console()
    if out.is_terminal:
        for part in parts:
            out.print(part)
        return
    with out.capture() as captured:
        for part in parts:
            out.print(part)
    # Columns are padded to their width; a program's input need not be.
    sys.stdout.write("".join(line.rstrip() + "\n" for line in captured.get().splitlines()))


def table(headers: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> Table:
    """Return a plain table that programs can cut apart too; headers in capitals, numbers are text."""
    result = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in headers:
        result.add_column(header.upper(), no_wrap=True, overflow="fold", header_style="bold")
    for row in rows:
        result.add_row(*row)
    return result


def fields(pairs: Iterable[tuple[str, str]]) -> Table:
    """Return name and value in two columns."""
    result = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    result.add_column(style="bold", no_wrap=True)
    result.add_column(overflow="fold")
    for name, value in pairs:
        result.add_row(name, value)
    return result
