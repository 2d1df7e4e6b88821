"""Why an intermediate client cannot do its work."""

from __future__ import annotations

from dataclasses import dataclass

from farpage.errors import ExitStatus, FarpageError


@dataclass(eq=False)
class OtherHandover(FarpageError):
    """A VIOS has the page table of another release than the one in force."""

    code = "other_handover"
    template = "VIOS {vios!r} stores the handover of another release of volume {volume!r}"
    remedy = "start another VIOS that reaches the device: the one that stored this release's"
    volume: str
    vios: str


@dataclass(eq=False)
class ViosNotNamed(FarpageError):
    """A VIOS of the move is not among those that were named on the command line."""

    code = "vios_not_named"
    template = (
        "the move of client {client!r} goes over VIOS {vios!r}, which is not among those named: {named}"
    )
    remedy = "add --vios {vios}=ADDRESS with the control address at which this host reaches it"
    exit_status = ExitStatus.USAGE
    client: str
    vios: str
    named: str


@dataclass(eq=False)
class NotGranted(FarpageError):
    """The definition does not let the move's intermediate client at one of the devices."""

    code = "not_granted"
    template = (
        "the intermediate client of {client!r} has no grant to {access} for its volume on device {device!r}"
    )
    remedy = "begin the move anew: 'farpage client cancel-move {client}', then 'farpage client move {client}'"
    exit_status = ExitStatus.CONFLICT
    client: str
    access: str
    device: str


@dataclass(eq=False)
class Displaced(FarpageError):
    """Another intermediate client does the work."""

    code = "displaced"
    template = "another intermediate client of {client!r} is at work at {relay}"
    remedy = "let one of them go on; the other one is not needed"
    exit_status = ExitStatus.CONFLICT
    client: str
    relay: str
