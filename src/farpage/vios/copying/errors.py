"""Why a volume that is copied cannot be used as asked for."""

from __future__ import annotations

from dataclasses import dataclass

from farpage.errors import ExitStatus, FarpageError


@dataclass(eq=False)
class NotCopied(FarpageError):
    """The definition that this VIOS has knows of no such move."""

    code = "not_copied"
    template = (
        "volume {volume!r} is not being copied from device {source!r} to device {device!r} by VIOS {vios!r}"
    )
    remedy = "see the moves with 'farpage definition show', and whether this VIOS has the newest definition"
    exit_status = ExitStatus.CONFLICT
    volume: str
    device: str
    source: str
    vios: str


@dataclass(eq=False)
class ReplicaIncomplete(FarpageError):
    """Pages that were not copied yet would read as zeros."""

    code = "replica_incomplete"
    template = "volume {volume!r} is being copied to device {device}, which does not have all of its pages"
    remedy = "open it as VOLUME/TARGET<SOURCE@EPOCH at the VIOS that it is moved over"
    exit_status = ExitStatus.CONFLICT
    volume: str
    device: str


@dataclass(eq=False)
class CopyIncomplete(FarpageError):
    """The move would end before everything is copied."""

    code = "copy_incomplete"
    template = "volume {volume!r} has {present_pages} of {total_pages} pages on its new device"
    remedy = "wait until all are there, or cancel the move"
    exit_status = ExitStatus.CONFLICT
    volume: str
    present_pages: int
    total_pages: int


@dataclass(eq=False)
class NotGranted(FarpageError):
    """The definition grants the principal nothing of the kind."""

    code = "not_granted"
    template = "volume {volume!r}: principal {principal} has no grant to {access} it on device {device}"
    remedy = (
        "see the grants with 'farpage definition show': a move makes them, and takes them back at its end"
    )
    exit_status = ExitStatus.CONFLICT
    volume: str
    principal: str
    access: str
    device: str


@dataclass(eq=False)
class IntermediaryDisplaced(FarpageError):
    """An intermediate client that started later does the work of this one."""

    code = "intermediary_displaced"
    template = "volume {volume!r}: an intermediate client that listens at {relay} has taken over"
    remedy = "end this one"
    exit_status = ExitStatus.CONFLICT
    volume: str
    relay: str
