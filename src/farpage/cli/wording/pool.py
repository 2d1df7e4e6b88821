"""Words for the memory pool."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from farpage.cli.output import fields, table
from farpage.terminal.sizes import format_size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from farpage.hypervisor.model import PoolInfo


def details(pool: PoolInfo) -> Iterator[RenderableType]:
    """Return the pool and its members."""
    default = pool.default_limit_bytes
    yield fields(
        [
            ("size", format_size(pool.size_bytes)),
            ("resident", format_size(pool.resident_bytes)),
            ("RAM tier", format_size(pool.ram_tier_bytes)),
            ("default limit", "none" if default is None else format_size(default)),
        ]
    )
    if pool.members:
        yield ""
        yield table(
            ["client", "limit", "resident", "RAM tier"],
            (
                (
                    member.client,
                    format_size(member.limit_bytes),
                    format_size(member.resident_bytes),
                    format_size(member.ram_tier_bytes),
                )
                for member in pool.members
            ),
        )
