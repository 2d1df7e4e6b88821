"""The memory pool: how much RAM the clients share, and each client's limit in it. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from farpage.definition.model import PAGE_BYTES
from farpage.errors import ExitStatus, FarpageError, InvalidInput
from farpage.pager.limit import SMALLEST_LIMIT_PAGES


@dataclass(eq=False)
class PoolTooSmall(FarpageError):
    """The limits of the clients would be more than the pool holds."""

    code = "pool_too_small"
    template = "the memory pool of {pool_bytes} bytes cannot hold limits of {wanted_bytes} bytes ({what})"
    remedy = "lower a client's limit ('farpage pool set --client NAME --limit SIZE') or enlarge the pool"
    exit_status = ExitStatus.CONFLICT
    pool_bytes: int
    wanted_bytes: int
    what: str


class MemoryPool:
    """Size of the pool in bytes and the limits of the attached clients."""

    def __init__(self, size_bytes: int, default_limit_bytes: int | None) -> None:
        self.size_bytes = size_bytes
        self.default_limit_bytes = default_limit_bytes
        self.limits: dict[str, int] = {}

    def limit_for(self, memory_bytes: int, wanted_bytes: int | None) -> int:
        """Return the limit in bytes of a client with `memory_bytes` of memory.

        :raise InvalidInput: when the limit wanted is too small to run in.
        """
        limit = wanted_bytes or self.default_limit_bytes or memory_bytes
        least = min(SMALLEST_LIMIT_PAGES * PAGE_BYTES, memory_bytes)
        if limit < least:
            raise InvalidInput(
                "limit_bytes", f"{limit} is too small to run in", f"give at least {least} bytes"
            )
        return min(limit, memory_bytes) // PAGE_BYTES * PAGE_BYTES

    def give(self, client: str, limit_bytes: int) -> None:
        """Give a client its share of the pool, in place of any that it had.

        :raise PoolTooSmall: when it does not.
        """
        others = sum(limit for name, limit in self.limits.items() if name != client)
        if others + limit_bytes > self.size_bytes:
            raise PoolTooSmall(self.size_bytes, others + limit_bytes, f"client {client!r} joins or grows")
        self.limits[client] = limit_bytes

    def resize(self, size_bytes: int, planned: Mapping[str, int] | None = None) -> None:
        """Change the pool's size; `planned` are limits that are changed along with it.

        :raise PoolTooSmall: when the limits given out do not fit.
        """
        changed = planned or {}
        given = sum(changed.get(client, limit) for client, limit in self.limits.items())
        if given > size_bytes:
            raise PoolTooSmall(size_bytes, given, "those given out already")
        self.size_bytes = size_bytes
