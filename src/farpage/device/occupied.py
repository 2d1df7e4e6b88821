"""Who else uses a block device: what must be known before its contents are overwritten."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

from farpage.device.errors import DeviceUnusable

BLKID_SECONDS = 30.0
_NOTHING_FOUND = 2
"""Exit status of blkid(8)."""
_AMBIGUOUS = 8


def refuse_used(spec: str, path: str) -> None:
    """Refuse a device that is mounted, is swapped to, or carries other devices.

    The kernel is asked by opening the device exclusively (O_EXCL, open(2)): who mounts a device or builds
    another on it holds it so. Two that look at the same moment would take each other for a user, so the
    caller holds a lock.

    :raise DeviceUnusable:
    :raise OSError: it cannot be opened at all.
    """
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise DeviceUnusable(
            spec,
            f"it is in use: {_user_of(path)}",
            "free it first; --force takes it all the same, and destroys what uses it",
        ) from error


def refuse_signed(spec: str, path: str) -> None:
    """Refuse a device on which blkid(8) finds a file system, a partition table or the like.

    :raise DeviceUnusable: it does, or it cannot be asked.
    """
    if shutil.which("blkid") is None:
        raise DeviceUnusable(
            spec,
            "nobody can tell whether it holds something: blkid is not installed",
            "install util-linux, or add the device with --force if it may be overwritten",
        )
    try:
        found = subprocess.run(
            ["blkid", "--probe", "--output", "export", "--", path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BLKID_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DeviceUnusable(spec, "blkid cannot read it", "check the device") from error
    if found.returncode == _NOTHING_FOUND:
        return
    values = dict(line.partition("=")[::2] for line in found.stdout.splitlines())
    what = values.get("TYPE") or values.get("PTTYPE")
    if what:
        problem = f"it holds something: blkid finds {what}"
    elif found.returncode == _AMBIGUOUS:
        problem = "it holds several things: blkid finds signatures that contradict each other"
    else:
        problem = f"blkid cannot tell what it holds: {found.stderr.strip() or f'status {found.returncode}'}"
    raise DeviceUnusable(
        spec, problem, "use an empty device, or add it with --force if what is on it may be overwritten"
    )


def _user_of(path: str) -> str:
    """Say who uses a device, as far as /proc and /sys tell."""
    number = Path(path).stat().st_rdev
    at = f"{os.major(number)}:{os.minor(number)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        # Some file systems, btrfs for one, have device numbers of their own: then the source says it.
        if fields[2] == at or path in fields[fields.index("-") + 1 :]:
            return f"mounted at {fields[4]}"
    for line in Path("/proc/swaps").read_text().splitlines()[1:]:
        try:
            if Path(line.split()[0]).stat().st_rdev == number:
                return "host swap"
        except OSError:
            continue
    folder = Path("/sys/dev/block") / at
    holders = folder / "holders"
    if holders.is_dir() and (names := sorted(holder.name for holder in holders.iterdir())):
        return f"it is a part of {', '.join(names)}"
    used = sorted(part.parent.name for part in folder.glob("*/partition"))
    if used:
        return f"a partition of it ({', '.join(used)}) or another program holds it"
    return "another program holds it"
