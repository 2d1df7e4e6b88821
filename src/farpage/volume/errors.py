"""Why a volume cannot be used."""

from __future__ import annotations

from dataclasses import dataclass

from farpage.errors import ExitStatus, FarpageError


@dataclass(eq=False)
class NoPath(FarpageError):
    """No path to a volume became active in time."""

    code = "no_path"
    template = "no path to volume {volume!r} works: {reasons}"
    remedy = "start one of its VIOS; 'farpage vios list' shows what is reachable"
    exit_status = ExitStatus.UNREACHABLE
    volume: str
    reasons: str


@dataclass(eq=False)
class ClientFenced(FarpageError):
    """Another owner has claimed the volume."""

    code = "fenced"
    template = "client {volume!r} is fenced: {reason}"
    remedy = "end the client here if it runs elsewhere now; attach it anew to claim it back"
    exit_status = ExitStatus.CONFLICT
    volume: str
    reason: str


@dataclass(eq=False)
class SeveralReplicas(FarpageError):
    """Only a volume of one replica goes over to another device as a whole."""

    code = "several_replicas"
    template = "volume {volume!r} has several replicas"
    remedy = "replace the device of one of them with 'farpage device replace'"
    exit_status = ExitStatus.CONFLICT
    volume: str
