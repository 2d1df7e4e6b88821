"""Listening sockets; those of UNIX survive the death of the process that made them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from farpage.address import TcpAddress
from farpage.errors import ExitStatus, FarpageError, InvalidInput


@dataclass(eq=False)
class AddressInUse(FarpageError):
    """Another process listens at the address."""

    code = "address_in_use"
    template = "{path} is the socket of a running process"
    remedy = "stop that process, or choose another address"
    exit_status = ExitStatus.CONFLICT
    path: str


@contextlib.contextmanager
def _folder_locked(folder: Path) -> Iterator[None]:
    """Keep two starting daemons from taking each other's fresh socket for a stale one."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_listening(path: str) -> bool:
    """Tell whether a process listens at a UNIX socket, without asking it anything."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        # EAGAIN: the backlog of a live listener is full. A socket without a listener refuses.
        return probe.connect_ex(path) not in (errno.ECONNREFUSED, errno.ENOENT)


def remove_stale_socket(path: str) -> None:
    """Remove what a dead process left at `path`; nothing there is fine too.

    :raise AddressInUse: a process listens there.
    :raise InvalidInput: something that is no socket is there.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise InvalidInput(
            "address", f"{path} exists and is not a socket", "choose another path or move the file"
        )
    if is_listening(path):
        raise AddressInUse(path)
    with contextlib.suppress(FileNotFoundError):
        Path(path).unlink()


def listen_unix(path: str, *, mode: int = 0o600, backlog: int = 128) -> socket.socket:
    """Make a non-blocking listening socket at `path`, in place of one that a dead process left.

    :raise AddressInUse: a process listens there.
    :raise InvalidInput: the path cannot be used.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with _folder_locked(Path(path).parent):
            remove_stale_socket(path)
            # Between bind and listen connections are refused, so the wider mode of a moment lets nobody in.
            listener.bind(path)
            Path(path).chmod(mode)
            listener.listen(backlog)
    except FarpageError:
        listener.close()
        raise
    except OSError as problem:
        listener.close()
        raise InvalidInput(
            "address",
            f"cannot listen at {path}: {os.strerror(problem.errno or 0)}",
            "choose a path in a folder of yours",
        ) from problem
    return listener


def listen_tcp(address: TcpAddress, *, backlog: int = 128) -> socket.socket:
    """Make a non-blocking listening socket at a TCP port; with port 0 the kernel chooses one.

    :raise AddressInUse: a process listens there.
    :raise InvalidInput: this host has no such address.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # So that connections of an earlier process which the kernel still remembers are not in the way.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen(backlog)
        except OSError:
            listener.close()
            raise
    except OSError as problem:
        if problem.errno == errno.EADDRINUSE:
            raise AddressInUse(str(address)) from problem
        raise InvalidInput(
            "address", f"cannot listen at {address}: {problem.strerror}", "use an address of this host"
        ) from problem
    return listener


def remove_own_socket(listener: socket.socket, path: str, inode: int) -> None:
    """Close a listener and remove its file, unless another process has put its own there."""
    with contextlib.suppress(OSError):
        if os.lstat(path).st_ino == inode:
            Path(path).unlink()
    listener.close()
