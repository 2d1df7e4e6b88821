"""The guest's files, built once into a cache folder: Debian's kernel, and an initramfs with busybox."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import lzma
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from farpage.errors import ExitStatus, FarpageError
from farpage.guest.cpio import Entry, archive, file_entry, link_entry

KERNEL_PACKAGE = "linux-image-amd64"
"""Depends on the package of the current kernel."""

MEMTESTER = "memtester"

_COMPILE = ("gcc", "-static", "-O2", "-fno-tree-vectorize", "-Wall", "-Werror")
"""Without vector instructions: their emulation costs more than they save."""

_XZ_MAGIC = b"\xfd7zXZ\0"
_XEN_PHYS32_ENTRY = 18
_UNFINISHED = ".new"

_SEARCH_PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin:/bin"


@dataclass(eq=False)
class PackagesMissing(FarpageError):
    """Programs that make or run the guest are not installed."""

    code = "packages_missing"
    template = "the guest needs Debian packages that are not installed: {packages}"
    remedy = "run 'apt-get install {packages}' as root"
    exit_status = ExitStatus.UNSUPPORTED
    packages: str


@dataclass(eq=False)
class ImageNotBuilt(FarpageError):
    """A step of building the guest failed."""

    code = "guest_image_not_built"
    template = "cannot build the guest: {step}: {cause_text}"
    remedy = "{hint}"
    exit_status = ExitStatus.UNSUPPORTED
    step: str
    cause_text: str
    hint: str


@dataclass(frozen=True)
class GuestImage:
    """Files to boot: a kernel and an initramfs."""

    kernel: Path
    initramfs: Path


def default_cache() -> Path:
    """Return `farpage/guest` in $XDG_CACHE_HOME, or in ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "farpage" / "guest"


def missing_packages(programs: Sequence[str] = ()) -> list[str]:
    """Return the Debian packages that are needed to make and run a guest with these programs, and missing."""
    needed = {
        "qemu-system-x86_64": "qemu-system-x86",
        "gcc": "gcc",
        "busybox": "busybox-static",
        "apt-get": "apt",
        "apt-cache": "apt",
        "dpkg-deb": "dpkg",
        **{program: program for program in programs},
    }
    missing = {package for program, package in needed.items() if _find(program) is None}
    if "gcc" not in missing and not _has_static_libc():
        missing.add("libc6-dev")
    return sorted(missing)


def build_image(cache: Path | None = None, programs: Sequence[str] = ()) -> GuestImage:
    """Return the guest's files, making those that the cache folder does not have.

    Blocks, the first time for about 10 s. `programs` are further ones of this host to put in, with their
    libraries.

    :raise PackagesMissing: naming all of them.
    :raise ImageNotBuilt: when the kernel cannot be downloaded or the verifier not compiled.
    """
    missing = missing_packages(programs)
    if missing:
        raise PackagesMissing(" ".join(missing))
    folder = cache or default_cache()
    source = resources.files("farpage.guest").joinpath("verify.c").read_bytes()
    binaries = [_find_or_raise("busybox"), *(_find_or_raise(program) for program in programs)]
    with _locked(folder):
        return GuestImage(_kernel(folder), _initramfs(folder, source, binaries))


def commands_archive(commands: Sequence[str]) -> bytes:
    """Return what follows the initramfs of a guest that is to run these shell commands."""
    return archive([file_entry("commands", "".join(f"{command}\n" for command in commands).encode(), 0o644)])


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one builder at a time into the folder; the others then find its work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ImageNotBuilt(
            f"cache folder {folder}", os.strerror(error.errno or 0), "set XDG_CACHE_HOME to a folder of yours"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _publish(path: Path, data: bytes) -> Path:
    """Make a file appear complete or not at all."""
    temporary = path.with_name(path.name + _UNFINISHED)
    temporary.write_bytes(data)
    temporary.rename(path)
    return path


def _run(step: str, command: Sequence[str], hint: str, folder: Path | None = None) -> bytes:
    environment = {**os.environ, "LC_ALL": "C", "PATH": _SEARCH_PATH}
    completed = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if completed.returncode:
        lines = completed.stderr.decode(errors="replace").strip().splitlines()
        raise ImageNotBuilt(step, lines[-1] if lines else f"exit status {completed.returncode}", hint)
    return completed.stdout


def _kernel(folder: Path) -> Path:
    """Return a kernel that the cache has, else Debian's current one."""
    cached = [path for path in folder.glob("vmlinu[xz]-*") if path.suffix != _UNFINISHED]
    if cached:
        return max(cached)
    hint = "run 'apt-get update' as root, with a network and Debian's package sources"
    depends = _run(f"find {KERNEL_PACKAGE}", ["apt-cache", "depends", KERNEL_PACKAGE], hint).decode()
    found = re.search(r"Depends: (linux-image-\d\S*)", depends)
    if found is None:
        raise ImageNotBuilt(f"find {KERNEL_PACKAGE}", "apt does not know its current version", hint)
    with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as name:
        download = Path(name)
        _run(f"download {found[1]}", ["apt-get", "download", found[1]], hint, download)
        package = next(download.glob("*.deb"))
        # The whole package would be 400 MB of modules.
        unpack = 'dpkg-deb --fsys-tarfile "$1" | tar -x --wildcards "./boot/vmlinuz-*"'
        _run(
            f"unpack {package.name}",
            ["sh", "-c", unpack, "sh", package.name],
            "free some space in the cache folder",
            download,
        )
        vmlinuz = next(download.glob("boot/vmlinuz-*"))
        compressed = vmlinuz.read_bytes()
        vmlinux = uncompressed_kernel(compressed)
        if vmlinux is None:
            return _publish(folder / vmlinuz.name, compressed)
        return _publish(folder / vmlinuz.name.replace("vmlinuz", "vmlinux"), vmlinux)


def uncompressed_kernel(vmlinuz: bytes) -> bytes | None:
    """Return the ELF image in a kernel compressed with xz, if QEMU can boot it directly.

    The guest would need 5 s for what takes half a second here. QEMU boots an ELF image that
    has a PVH entry: the note XEN_ELFNOTE_PHYS32_ENTRY (xen/include/public/elfnote.h of Xen).
    """
    offset = vmlinuz.find(_XZ_MAGIC)
    if offset < 0:
        return None
    try:
        image = lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(vmlinuz[offset:])
    except lzma.LZMAError:
        return None
    has_entry = any(struct.pack("<III", 4, size, _XEN_PHYS32_ENTRY) + b"Xen\0" in image for size in (4, 8))
    return image if image.startswith(b"\x7fELF") and has_entry else None


def _initramfs(folder: Path, source: bytes, binaries: Sequence[Path]) -> Path:
    digest = hashlib.sha256(" ".join(_COMPILE).encode())
    digest.update(source)
    for binary in binaries:
        digest.update(binary.name.encode())
        digest.update(binary.read_bytes())
    path = folder / f"initramfs-{digest.hexdigest()[:16]}"
    if path.exists():
        return path
    entries = {
        entry.path: entry
        for entry in (
            file_entry("init", _compile(folder, source)),
            link_entry("bin/sh", "busybox"),
            *(entry for binary in binaries for entry in _with_libraries(binary)),
        )
    }
    return _publish(path, archive(entries.values()))


def _compile(folder: Path, source: bytes) -> bytes:
    with tempfile.TemporaryDirectory(dir=folder, prefix="compile-") as name:
        build = Path(name)
        (build / "verify.c").write_bytes(source)
        _run(
            "compile the verifier",
            [*_COMPILE, "-o", "verify", "verify.c"],
            "run 'apt-get install gcc libc6-dev'",
            build,
        )
        return (build / "verify").read_bytes()


def _with_libraries(binary: Path) -> Iterator[Entry]:
    """Yield a program for /bin, and the libraries and loader that ldd(1) names at their own places."""
    yield file_entry(f"bin/{binary.name}", binary.read_bytes())
    listed = subprocess.run(["ldd", str(binary)], capture_output=True, text=True, check=False)
    if listed.returncode:
        return
    for library in re.findall(r"(?:=> )?(/\S+) \(0x", listed.stdout):
        yield file_entry(library.lstrip("/"), Path(library).read_bytes())


def _find(program: str) -> str | None:
    return shutil.which(program, path=_SEARCH_PATH)


def _find_or_raise(program: str) -> Path:
    found = _find(program)
    if found is None:
        raise PackagesMissing(program)
    return Path(found)


def _has_static_libc() -> bool:
    answer = subprocess.run(
        ["gcc", "-print-file-name=libc.a"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return Path(answer).is_absolute()
