"""What `bench.nbd` measures: kinds of work, ways to the server, and what farpage asks of itself. No I/O."""

from __future__ import annotations

from typing import Final, Literal, get_args

from pydantic import BaseModel, ConfigDict

from bench._nbd_contenders import RAW

Work = Literal["read", "write", "mixed", "sequential"]
Storage = Literal["warm", "direct"]
Transport = Literal["unix", "tcp"]
Placement = Literal["free", "apart", "together"]
Client = Literal["fio", "load"]

WORKS: Final[tuple[Work, ...]] = get_args(Work)
STORAGES: Final[tuple[Storage, ...]] = get_args(Storage)
TRANSPORTS: Final[tuple[Transport, ...]] = get_args(Transport)
PLACEMENTS: Final[tuple[Placement, ...]] = get_args(Placement)
CLIENTS: Final[tuple[Client, ...]] = get_args(Client)

CORES: Final[dict[Placement, tuple[int | None, int | None]]] = {
    "free": (None, None),
    "apart": (0, 1),
    "together": (0, 0),
}
"""Cores of the client and of the server: the kernel's choice, one each, one for both."""
FIO_OPTIONS: Final[dict[Work, tuple[str, ...]]] = {
    "read": ("--rw=randread", "--bs=4k"),
    "write": ("--rw=randwrite", "--bs=4k"),
    "mixed": ("--rw=randrw", "--rwmixread=50", "--bs=4k"),
    "sequential": ("--rw=read", "--bs=256k"),
}
BLOCK_BYTES: Final[dict[Work, int]] = {"read": 4096, "write": 4096, "mixed": 4096, "sequential": 256 << 10}
_WORDS: Final[dict[Work, str]] = {
    "read": "4 KiB random reads",
    "write": "4 KiB random writes",
    "mixed": "4 KiB random reads and writes",
    "sequential": "256 KiB sequential reads",
}


class Case(BaseModel):
    """One kind of work and the way to the server."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    work: Work = "read"
    storage: Storage = "warm"
    """`warm`: the file is in the page cache; `direct`: read and written with O_DIRECT."""
    transport: Transport = "unix"
    connections: int = 1
    depth: int = 16
    """Commands under way on each connection."""
    placement: Placement = "free"

    @property
    def text(self) -> str:
        """The case in words."""
        file = "warm file" if self.storage == "warm" else "O_DIRECT"
        many = "1 connection" if self.connections == 1 else f"{self.connections} connections"
        where = {"free": "free placement", "apart": "a core each", "together": "on one core"}[self.placement]
        way = "UNIX" if self.transport == "unix" else "TCP"
        return f"{_WORDS[self.work]}, {file}, {way}, {many}, QD{self.depth}, {where}"

    def target(self, contender: str) -> float | None:
        """Return the ratio to a contender that farpage sets itself."""
        if contender == RAW:
            return 0.9 if self.work == "read" and self.depth >= 16 else None
        if self.storage != "warm" or contender not in ("nbdkit", "qemu-nbd"):
            return None
        if contender == "qemu-nbd":
            return 2.5 if self.work == "read" and self.depth >= 16 else None
        if self.work == "sequential":
            return 1.0
        if self.depth >= 16:
            return 1.5
        return 1.0 if self.placement == "together" else 0.8


CHOSEN: Final = (
    Case(),
    Case(depth=1),
    Case(depth=1, placement="together"),
    Case(connections=4),
    Case(transport="tcp"),
    Case(work="write"),
    Case(work="mixed"),
    Case(work="sequential", depth=4),
    Case(storage="direct"),
)
"""What is measured unless something else is asked for."""
