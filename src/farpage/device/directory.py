"""`dir:PATH`: a directory with a label and one file per volume.

    PATH/label.json       what the device is
    PATH/volumes/NAME     the volumes
    PATH/headers/NAME     their identities and claims

Several VIOS may share the directory. Volumes are made and deleted under a lock (flock(2)) on it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from farpage.blockio import BlockIO, Feature
from farpage.device.base import (
    BLOCK_BYTES,
    EPOCH_MAX,
    NAME,
    Admit,
    PagingDevice,
    Usage,
    VolumeStat,
    admit_all,
    check_new_volume,
    never,
    refuse_relabelling,
)
from farpage.device.claim import Claim
from farpage.device.engine import Engine
from farpage.device.errors import (
    CapacityExceeded,
    DeviceUnusable,
    VolumeBeingMade,
    VolumeExists,
    VolumeInUse,
    VolumeMissing,
)
from farpage.device.file import FEATURES, FileVolume
from farpage.device.freeing import free_slowly
from farpage.device.label import Header, Label, read_label, sync_folder, write_label
from farpage.device.newfile import NewFile, clear_unfinished, unfinished
from farpage.device.spec import Allocate, CacheMode, DirectorySpec
from farpage.device.threads import IoThreads
from farpage.device.volumefile import Access, VolumeFile

UNCOUNTED = frozenset({"lost+found"})
"""Not a sign that a directory is in use: every new ext file system has it."""

DEFAULT_SIZE_UNIT_BYTES = 1 << 20

LOCK_SECONDS = 5.0
LOCK_RETRY_SECONDS = 0.002

Result = TypeVar("Result")


class DirectoryDevice(PagingDevice):
    """A labelled directory; `prepare_directory` labels one."""

    kind = "dir"

    def __init__(self, spec: DirectorySpec, label: Label, *, text: str | None = None) -> None:
        """Open a labelled directory, in the event loop that will use its volumes.

        `text` is the specification as the user wrote it.

        :raise DeviceUnusable: it cannot be written to.
        """
        self._folder = Path(spec.path)
        self.id, self.name, self.size_bytes = label.uuid, label.name, label.size_bytes
        self.spec = text or str(spec)
        with self._problems_named():
            for folder in (self._folder / "volumes", self._folder / "headers"):
                folder.mkdir(mode=0o700, exist_ok=True)
            if spec.cache is CacheMode.BUFFERED:
                self._access = Access.BUFFERED
            else:
                self._access = Access.DIRECT if _direct_works(self._folder / "volumes") else Access.DROP
        self.access = str(self._access)
        self.features = FEATURES | (Feature.CACHE if self._access is Access.BUFFERED else Feature.NONE)
        self.allocate = spec.allocate
        self._engine = Engine(label.name, direct=self._access is Access.DIRECT)
        # One at a time: the device has other things to do, and so have the engine's threads.
        full = self.allocate is Allocate.FULL
        self._maker = IoThreads(f"make-{label.name}"[:15], 1) if full else None
        self._closing = False

    # Looking

    def volumes(self) -> list[VolumeStat]:
        """List the volumes, also those that another VIOS has made."""
        found: list[VolumeStat] = []
        with self._problems_named():
            for name in self._names():
                with contextlib.suppress(VolumeMissing):
                    found.append(self.volume(name))
        return found

    def names(self) -> list[str]:
        """List the names of the volumes, from the directory alone."""
        with self._problems_named():
            return self._names()

    def volume(self, name: str) -> VolumeStat:
        """Look at the volume's file and header."""
        with self._problems_named(), self._header(name) as header:
            try:
                status = self._file(name).stat()
            except FileNotFoundError as error:
                raise self._missing(name) from error
            return VolumeStat(name, header.id, status.st_size, status.st_blocks * 512, header.current)

    def usage(self) -> Usage:
        """Add up the sizes and the allocated blocks of the files, of those too that are just being made."""
        provisioned = used = count = 0
        with self._problems_named():
            for name in self._names():
                with contextlib.suppress(FileNotFoundError):
                    status = self._file(name).stat()
                    provisioned += status.st_size
                    used += status.st_blocks * 512
                    count += 1
            for status in unfinished(self._folder / "volumes"):
                provisioned += status.st_size
                used += status.st_blocks * 512
        return Usage(provisioned, used, count)

    # Changing

    def create_volume(self, name: str, size_bytes: int) -> VolumeStat:
        """Make a file, sparse or allocated in full; it appears whole or not at all.

        The directory is not locked while all of a file is written.
        """
        check_new_volume(name, size_bytes)
        with self._problems_named(), contextlib.ExitStack() as undo:
            with self._locked():
                file = undo.enter_context(self._begin(name, size_bytes))
                if self.allocate is Allocate.SPARSE:
                    file.sync()
                    return self._finish(name, file)
                free_bytes = file.free_bytes()
                try:
                    file.reserve()
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    raise CapacityExceeded(
                        self.name, self.size_bytes, free_bytes, name, size_bytes
                    ) from error
            file.fill(lambda: self._closing)
            file.sync()
            with self._locked():
                return self._finish(name, file)

    def _begin(self, name: str, size_bytes: int) -> NewFile:
        clear_unfinished(self._folder / "volumes")
        path = self._file(name)
        if path.exists():
            raise VolumeExists(name, self.name)
        free_bytes = max(0, self.size_bytes - self.usage().provisioned_bytes)
        if size_bytes > free_bytes:
            raise CapacityExceeded(self.name, self.size_bytes, free_bytes, name, size_bytes)
        try:
            return NewFile(path, size_bytes, access=self._access)
        except FileExistsError as error:
            raise VolumeBeingMade(name, self.name) from error

    def _finish(self, name: str, file: NewFile) -> VolumeStat:
        if self._file(name).exists():  # put there by hand meanwhile
            raise VolumeExists(name, self.name)
        self._header_path(name).unlink(missing_ok=True)
        Header.create(self._header_path(name), full=self.allocate is Allocate.FULL)
        file.name_it()
        return self.volume(name)

    async def make_volume(self, name: str, size_bytes: int) -> VolumeStat:
        """Make a file, one after the other where all of it is written."""
        return await (self._maker or self._engine).run(self.create_volume, name, size_bytes)

    def delete_volume(self, name: str, *, force: bool = False) -> None:
        """Remove the file, whose room becomes free in the background.

        Whoever has it open yet finds itself superseded.
        """
        with self._problems_named(), self._locked(), self._header(name) as header:
            path = self._file(name)
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            with contextlib.ExitStack() as undo:
                undo.callback(os.close, descriptor)
                if not force:
                    try:
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError as error:
                        raise VolumeInUse(name, self.name, ", maybe through another VIOS") from error
                header.claim(Claim(EPOCH_MAX))
                path.unlink()
                sync_folder(path.parent)
                self._header_path(name).unlink(missing_ok=True)
                undo.pop_all()
                free_slowly(descriptor)

    def claim(self, name: str, claim: Claim) -> Claim:
        """Record the claim in the volume's header, which every VIOS looks at before it writes."""
        with self._problems_named(), self._header(name) as header:
            return header.claim(claim)

    async def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Run it in one of the device's threads."""
        return await self._engine.run(work, *arguments)

    async def open_volume(self, name: str, epoch: int | None, over: Callable[[], bool] = never) -> BlockIO:
        """Open the volume's file, with a lock that keeps it from being deleted."""
        descriptor, size_bytes, full, superseded = await self._engine.run(self._open_files, name, epoch)
        file = VolumeFile(
            descriptor, size_bytes, access=self._access, superseded=superseded, over=over, full=full
        )
        return FileVolume(file, engine=self._engine, gate=self._engine.gate(name))

    async def close(self) -> None:
        """End the threads; a volume that is being written is given up."""
        self._closing = True
        if self._maker is not None:
            await self._maker.close()
        await self._engine.close()

    def _open_files(self, name: str, epoch: int | None) -> tuple[int, int, bool, Callable[[], bool] | None]:
        with self._problems_named():
            header = self._header(name)
            flags = (os.O_RDONLY if epoch is None else os.O_RDWR) | os.O_NOFOLLOW
            if self._access is Access.DIRECT:
                flags |= os.O_DIRECT
            try:
                descriptor = os.open(self._file(name), flags | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise self._missing(name) from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                size_bytes = os.fstat(descriptor).st_size
            except OSError:
                os.close(descriptor)
                raise
        if epoch is None:
            header.close()
            return descriptor, size_bytes, header.full, None
        # The header stays open as long as the volume refers to this function.
        return descriptor, size_bytes, header.full, lambda: header.current.epoch > epoch

    # Helpers

    def _file(self, name: str) -> Path:
        return self._folder / "volumes" / name

    def _header_path(self, name: str) -> Path:
        return self._folder / "headers" / name

    def _names(self) -> list[str]:
        return sorted(
            entry.name
            for entry in os.scandir(self._folder / "volumes")
            if NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
        )

    def _header(self, name: str) -> Header:
        """Open a volume's header; a file that was put there by hand gets one now."""
        if NAME.fullmatch(name) is None or not _is_plain_file(self._file(name)):
            raise self._missing(name)
        path = self._header_path(name)
        with contextlib.suppress(FileNotFoundError):
            return Header(path)
        Header.create(path)
        return Header(path)

    def _missing(self, name: str) -> VolumeMissing:
        return VolumeMissing(name, f"device {self.name!r}")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with folder_locked(self._folder):
            yield

    @contextlib.contextmanager
    def _problems_named(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise unusable(self.spec, error) from error


def _is_plain_file(path: Path) -> bool:
    """Tell a file from what must not be opened as a volume: a link out of the directory, a FIFO, a folder."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def unusable(spec: str, error: OSError | ValueError) -> DeviceUnusable:
    """Say what the file system, or the parser of a label or header, had to say."""
    problem = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    return DeviceUnusable(spec, problem + where, "check the directory, its permissions and its file system")


@contextlib.contextmanager
def folder_locked(folder: Path) -> Iterator[None]:
    """Hold the directory's lock; other threads and processes wait.

    :raise OSError: ETIMEDOUT when another holds it too long: a VIOS that was stopped keeps its lock.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline = time.monotonic() + LOCK_SECONDS
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise OSError(
                        errno.ETIMEDOUT, "its lock is held by another process, which may hang", str(folder)
                    ) from None
                time.sleep(LOCK_RETRY_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _direct_works(folder: Path) -> bool:
    """Try direct I/O in blocks of `BLOCK_BYTES` on the file system of `folder`."""
    probe = folder / f".direct-{os.getpid()}"
    try:
        descriptor = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    except OSError:
        probe.unlink(missing_ok=True)
        return False
    try:
        with mmap.mmap(-1, BLOCK_BYTES) as block:
            os.pwrite(descriptor, block, 0)
            return os.preadv(descriptor, [block], 0) == BLOCK_BYTES
    except OSError:
        return False
    finally:
        os.close(descriptor)
        probe.unlink(missing_ok=True)


def default_name(path: str) -> str:
    """Make a device name of a path's last part."""
    name = re.sub(r"[^a-z0-9._-]+", "-", Path(path).name.lower()).lstrip("._-")[:63]
    return name or "device"


def prepare_directory(
    spec: DirectorySpec,
    *,
    text: str | None = None,
    name: str | None = None,
    size_bytes: int | None = None,
    force: bool = False,
    admit: Admit = admit_all,
) -> Label:
    """Return the directory's label, and label it first if it has none.

    A directory that is not there is made, its parent is not. What a process has left that was killed while it
    made a volume is cleared away. `size_bytes` goes before the size in the specification; without either the
    size is the room that the file system has now. `text` is the specification as the user wrote it.

    :raise DeviceUnusable: not a directory, in use by something else, another size or name than asked for.
    """
    text, folder = text or str(spec), Path(spec.path)
    new_name = name or default_name(spec.path)
    wanted_bytes = size_bytes if size_bytes is not None else spec.size_bytes
    try:
        if not folder.exists():
            admit("", new_name)
            folder.mkdir(mode=0o700, exist_ok=True)  # another VIOS may make it meanwhile
        with folder_locked(folder):
            label = read_label(folder)
            admit(label.uuid if label else "", label.name if label else new_name)
            if label is None:
                _refuse_foreign(text, folder, force)
                label = Label(name=new_name, size_bytes=wanted_bytes or _room(folder))
                write_label(folder, label)
            if (folder / "volumes").is_dir():
                clear_unfinished(folder / "volumes")
    except (OSError, ValueError) as error:
        raise unusable(text, error) from error
    refuse_relabelling(text, label, name=name, size_bytes=wanted_bytes)
    return label


def _refuse_foreign(spec: str, folder: Path, force: bool) -> None:
    foreign = sorted(entry.name for entry in os.scandir(folder) if entry.name not in UNCOUNTED)
    if foreign and not force:
        raise DeviceUnusable(
            spec,
            f"the directory has no farpage label and is not empty ({foreign[0]})",
            "use an empty directory, or add the device with --force to keep those files beside the volumes",
        )


def _room(folder: Path) -> int:
    status = os.statvfs(folder)
    size_bytes = status.f_bavail * status.f_frsize // DEFAULT_SIZE_UNIT_BYTES * DEFAULT_SIZE_UNIT_BYTES
    if size_bytes == 0:
        raise OSError(errno.ENOSPC, "the file system is full", str(folder))
    return size_bytes
