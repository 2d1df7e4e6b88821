"""The host's own swap as a contender: a swap file, a memory cgroup with a limit, and vm.page-cluster.

Every piece is a context manager that puts things back as they were.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from farpage.errors import Unsupported

PAGE_CLUSTER: Final = Path("/proc/sys/vm/page-cluster")
TOOLS: Final = ("mkswap", "swapon", "swapoff")
HIGHEST_PRIORITY: Final = 32767
"""Of swap areas; this one is filled before any that the host has already."""
ZRAM_CONTROL: Final = Path("/sys/class/zram-control")
_CHUNK_BYTES: Final = 1 << 20
_PAGE_BYTES: Final = 4096
_PREFIX: Final = "farpage-bench-"


def why_no_limit() -> str:
    """Return why the kernel's own limits of memory cannot be used here; empty when they can."""
    if os.geteuid() != 0:
        return "memory limits and swapon(2) need root"
    try:
        _find_memory_controller()
    except Unsupported as problem:
        return str(problem)
    return ""


def why_unavailable() -> str:
    """Return why host swap cannot be measured here; empty when it can."""
    missing = [tool for tool in TOOLS if _tool(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found; install util-linux and mount"
    if not PAGE_CLUSTER.exists():
        return "this kernel has no swap"
    return why_no_limit()


def _tool(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _run(name: str, *arguments: str) -> None:
    """Run a tool to its end, out of reach of a Ctrl-C, which would leave a swap area half switched.

    :raise Unsupported: it fails.
    """
    tool = _tool(name) or name
    done = subprocess.run(
        [tool, *arguments], capture_output=True, text=True, check=False, start_new_session=True
    )
    if done.returncode:
        cause = done.stderr.strip() or f"{name} exits with status {done.returncode}"
        raise Unsupported(
            "host swap", cause, "use a --dir on ext4 or xfs on a disk, and a host that may swap"
        )


@contextlib.contextmanager
def swap_file(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Make a swap file of which every block is allocated and written; remove it afterwards."""
    path = folder / "swap"
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            for _ in range(size_bytes // _CHUNK_BYTES):
                file.write(bytes(_CHUNK_BYTES))
            file.flush()
            os.fsync(file.fileno())
        _run("mkswap", str(path))
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def swapping_on(path: Path, priority: int = HIGHEST_PRIORITY) -> Iterator[None]:
    """Let the host swap to the file or device; returns after everything in it was taken back."""
    try:
        _run("swapon", "--priority", str(priority), str(path))
        yield
    finally:
        if _is_swap(path):
            _run("swapoff", str(path))


def why_no_zram() -> str:
    """Return why zram cannot be measured here; empty when it can."""
    if why := why_unavailable():
        return why
    return "" if ZRAM_CONTROL.exists() else "this kernel has no zram"


@contextlib.contextmanager
def zram_swapping_on(size_bytes: int) -> Iterator[None]:
    """Make a zram device of LZ4 for so much, let the host swap to it first, and remove it.

    :raise Unsupported: it cannot be made.
    """
    number = int((ZRAM_CONTROL / "hot_add").read_text())
    try:
        settings = Path(f"/sys/block/zram{number}")
        try:
            (settings / "comp_algorithm").write_text("lz4")
            (settings / "disksize").write_text(str(size_bytes // _PAGE_BYTES * _PAGE_BYTES))
        except OSError as error:
            raise Unsupported("zram with LZ4", str(error), "use a kernel that has it") from error
        _run("mkswap", f"/dev/zram{number}")
        with swapping_on(Path(f"/dev/zram{number}")):
            yield
    finally:
        (ZRAM_CONTROL / "hot_remove").write_text(str(number))


def _is_swap(path: Path) -> bool:
    lines = Path("/proc/swaps").read_text().splitlines()[1:]
    return any(line.split()[0] == str(path) for line in lines)


@contextlib.contextmanager
def page_cluster(exponent: int) -> Iterator[None]:
    """Have the host read 2**exponent pages at a swap-in."""
    before = PAGE_CLUSTER.read_text()
    try:
        PAGE_CLUSTER.write_text(str(exponent))
        yield
    finally:
        PAGE_CLUSTER.write_text(before)


@dataclass(frozen=True)
class MemoryCgroup:
    """A cgroup whose processes are limited in memory, but not in swap."""

    folder: Path

    def add(self, pid: int) -> None:
        """Put a process in; memory that it has already stays charged where it is."""
        (self.folder / "cgroup.procs").write_text(str(pid))


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[MemoryCgroup]:
    """Make a cgroup with a limit; its processes have to be gone at the end.

    :raise Unsupported: there is no memory controller that can be used.
    """
    parent, limit_file = _find_memory_controller()
    _remove_left_over(parent)
    folder = parent / f"{_PREFIX}{os.getpid()}"
    folder.mkdir(exist_ok=True)
    try:
        (folder / limit_file).write_text(str(limit_bytes))
        yield MemoryCgroup(folder)
    finally:
        folder.rmdir()


def _find_memory_controller() -> tuple[Path, str]:
    """Return where memory cgroups are made and the name of their limit's file: cgroup v1 or v2."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mounted, kind, options = line.split()[:4]
        if kind == "cgroup" and "memory" in options.split(","):
            return Path(mounted), "memory.limit_in_bytes"
        if kind == "cgroup2" and "memory" in (Path(mounted) / "cgroup.subtree_control").read_text().split():
            return Path(mounted), "memory.max"
    raise Unsupported(
        "the memory cgroup controller", "it is mounted neither as v1 nor enabled in v2", "mount it"
    )


def _remove_left_over(parent: Path) -> None:
    """Remove cgroups of earlier runs that were killed."""
    for folder in parent.glob(f"{_PREFIX}*"):
        if not Path("/proc", folder.name.removeprefix(_PREFIX)).exists():
            with contextlib.suppress(OSError):
                folder.rmdir()


def pages_swapped_in() -> int:
    """Return the host's count of pages read from swap, those that were read ahead included."""
    for line in Path("/proc/vmstat").read_text().splitlines():
        name, value = line.split()
        if name == "pswpin":
            return int(value)
    return 0


def pages_read_by(pid: int) -> int:
    """Return how many pages were read from storage for a process, those that were read ahead included."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        name, value = line.split(": ")
        if name == "read_bytes":
            return int(value) // _PAGE_BYTES
    return 0
