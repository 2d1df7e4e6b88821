"""What a VIOS refuses, besides what its devices and its store do."""

from __future__ import annotations

from dataclasses import dataclass

from farpage.errors import ExitStatus, FarpageError


@dataclass(eq=False)
class DeviceMissing(FarpageError):
    """This VIOS does not reach the device."""

    code = "device_not_found"
    template = "device {device} is not reached by VIOS {vios!r}"
    remedy = "list its devices with 'farpage vios show {vios}', or add it with 'farpage device add'"
    exit_status = ExitStatus.NOT_FOUND
    device: str
    vios: str


@dataclass(eq=False)
class DeviceNameTaken(FarpageError):
    """The VIOS serves another device of that name."""

    code = "device_name_taken"
    template = "device {spec}: VIOS {vios!r} has another device named {name!r}: {other}"
    remedy = (
        "choose another name with 'farpage device add --name'; one that is labelled keeps its name: "
        "add it to another VIOS"
    )
    exit_status = ExitStatus.CONFLICT
    spec: str
    vios: str
    name: str
    other: str


@dataclass(eq=False)
class VolumeOwned(FarpageError):
    """A client in the definition has its pages there."""

    code = "volume_owned"
    template = "volume {volume!r} belongs to client {client!r}"
    remedy = "delete the client, or give its epoch ({epoch}) or a newer one to delete the volume under it"
    exit_status = ExitStatus.CONFLICT
    volume: str
    client: str
    epoch: int


@dataclass(eq=False)
class CommandRefused(FarpageError):
    """The definition does not let this command through to the device."""

    code = "command_refused"
    template = "volume {volume!r}: device {device!r} is not configured for the command {command!r}"
    remedy = "see the device's commands with 'farpage definition show'"
    exit_status = ExitStatus.CONFLICT
    volume: str
    device: str
    command: str


@dataclass(eq=False)
class LeaseOver(FarpageError):
    """The lease that an owner's writes are to go with is not alive here."""

    code = "lease_over"
    template = "volume {volume!r}: lease {lease} is not known here, or has run out"
    remedy = "open a new lease and name that one"
    exit_status = ExitStatus.CONFLICT
    volume: str
    lease: str


@dataclass(eq=False)
class DeviceHangs(FarpageError):
    """Clients who have gone have left commands behind in the device: one more would do so, too."""

    code = "device_hangs"
    template = "volume {volume!r}: its device hangs, with what {clients} clients wanted who have gone"
    remedy = "find out why the device does not answer; when it does the volume can be opened again"
    exit_status = ExitStatus.UNREACHABLE
    volume: str
    clients: int


@dataclass(eq=False)
class StateInUse(FarpageError):
    """Another VIOS runs on the same folder."""

    code = "state_in_use"
    template = "a VIOS runs on the state folder {folder} already"
    remedy = "stop it, or give this one another folder"
    exit_status = ExitStatus.CONFLICT
    folder: str
