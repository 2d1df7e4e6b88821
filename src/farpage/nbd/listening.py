"""Sockets of a server: those that listen, and those that were accepted."""

from __future__ import annotations

import errno
import socket
import stat
import struct
from pathlib import Path
from typing import Final

from farpage.address import Address, TcpAddress, UnixAddress
from farpage.nbd.export import Peer
from farpage.nbd.outgoing import UNIX_SEND_BYTES

BACKLOG: Final = 128
_UCRED: Final = struct.Struct("=iII")


def listen(address: Address) -> socket.socket:
    """Listen at an address; a UNIX socket's file that nobody listens on any more is replaced.

    :raise OSError: somebody does, or the address cannot be had.
    """
    if isinstance(address, UnixAddress):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        place: str | tuple[str, int] = address.path
    else:
        family, _, _, _, (host, port, *_) = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place = (str(host), int(port))
    try:
        if isinstance(address, UnixAddress):
            _remove_stale(address.path)
        listener.bind(place)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _remove_stale(path: str) -> None:
    """Remove a socket's file if nobody listens on it.

    :raise OSError: if somebody does.
    """
    try:
        if not stat.S_ISSOCK(Path(path).stat().st_mode):
            return  # bind reports it
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink(missing_ok=True)
            return
        except BlockingIOError:  # a full backlog: somebody is there
            pass
    raise OSError(errno.EADDRINUSE, "another server listens there")


def prepare(sock: socket.socket) -> Peer:
    """Make an accepted socket fit for use and say who is there.

    :raise OSError: if the client is gone already.
    """
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_SEND_BYTES)
        pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        name = sock.getpeername()
        return Peer(f"unix:{name if isinstance(name, str) else ''}", pid=pid, uid=uid)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    host, port, *_ = sock.getpeername()
    return Peer(str(TcpAddress(host, port)))
