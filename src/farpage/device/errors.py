"""What can be wrong with a paging device or with a volume on it."""

from __future__ import annotations

from dataclasses import dataclass

from farpage.errors import ExitStatus, FarpageError


@dataclass(eq=False)
class DeviceUnusable(FarpageError):
    """The storage is not there, not fit, or must not be touched."""

    code = "device_unusable"
    template = "device {spec}: {problem}"
    remedy = "{hint}"
    exit_status = ExitStatus.CONFLICT
    spec: str
    problem: str
    hint: str


@dataclass(eq=False)
class VolumeExists(FarpageError):
    """The name is taken."""

    code = "volume_exists"
    template = "volume {volume!r} exists already on device {device!r}"
    remedy = "choose another name, or delete that volume"
    exit_status = ExitStatus.CONFLICT
    volume: str
    device: str


@dataclass(eq=False)
class VolumeBeingMade(FarpageError):
    """Somebody else is making a volume of that name, which takes as long as it takes to write all of it."""

    code = "volume_being_made"
    template = "volume {volume!r} is just being made on device {device!r}, maybe by another VIOS"
    remedy = "wait until it is there; what a VIOS leaves that ends before is cleared away"
    exit_status = ExitStatus.CONFLICT
    volume: str
    device: str


@dataclass(eq=False)
class VolumeMissing(FarpageError):
    """There is no such volume."""

    code = "volume_not_found"
    template = "volume {volume!r} is not on {where}"
    remedy = "list the volumes with 'farpage vios show'"
    exit_status = ExitStatus.NOT_FOUND
    volume: str
    where: str


@dataclass(eq=False)
class VolumeInUse(FarpageError):
    """Somebody has the volume open."""

    code = "volume_in_use"
    template = "volume {volume!r} on device {device!r} is open{by}"
    remedy = "detach its client first, or give an epoch above the one in use"
    exit_status = ExitStatus.CONFLICT
    volume: str
    device: str
    by: str = ""


@dataclass(eq=False)
class VolumeFenced(FarpageError):
    """The volume was opened with a newer epoch, maybe through another VIOS."""

    code = "stale_epoch"
    template = "volume {volume!r}: epoch {epoch} is older than epoch {current}, which owns it now"
    remedy = "read the definition again and open it with a newer epoch"
    exit_status = ExitStatus.CONFLICT
    volume: str
    epoch: int
    current: int


@dataclass(eq=False)
class VolumeTaken(VolumeFenced):
    """Another owner has claimed the volume, maybe through another VIOS."""

    code = "another_owner"
    template = "volume {volume!r}: epoch {epoch} is refused, because another owner has it at epoch {current}"
    remedy = (
        "let only one hypervisor have the client: detach it from the other one first, then attach it anew"
    )


@dataclass(eq=False)
class CapacityExceeded(FarpageError):
    """The volumes of a device may not add up to more than its size."""

    code = "capacity_exceeded"
    template = (
        "device {device!r} has {free_bytes} of {size_bytes} bytes left, "
        "and volume {volume!r} needs {needed_bytes}"
    )
    remedy = "delete volumes, or use a device with more room"
    exit_status = ExitStatus.CONFLICT
    device: str
    size_bytes: int
    free_bytes: int
    volume: str
    needed_bytes: int
