"""`Region`: memory of this process that a hypervisor pages.

It is a `mmap.mmap`, because that has what Python 3.11 lets no class of its own have: the buffer protocol,
with a count of the buffers in use, so that `close` is refused (BufferError) instead of pulling memory away
from an array. Slices, `len`, `find`, `read` and `write` come with it.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import socket
import warnings
import weakref
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from farpage.address import UNIX_PATH_MAX_BYTES, UnixAddress, parse_address
from farpage.attach.messages import (
    HEADER,
    AnyMessage,
    AttachReply,
    AttachRequest,
    CloseReply,
    CloseRequest,
    ErrorDocument,
    decode,
    decode_length,
    encode,
)
from farpage.definition.model import PAGE_BYTES, Redundancy
from farpage.errors import ExitStatus, FarpageError, InvalidInput, Unreachable
from farpage.kernel.memory import address_of, create_memfd, reserve_addresses
from farpage.kernel.userfaultfd import Userfaultfd

STATE_VARIABLE = "FARPAGE_STATE"
REPLY_TIMEOUT_SECONDS = 600.0
"""How long the hypervisor may take to answer; it may have to create a volume, and to write all of it."""

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""The hypervisor relies on the memfd's size."""

_open_regions: weakref.WeakSet[Region] = weakref.WeakSet()
_unconfirmed: list[Region] = []
"""Closed without the hypervisor's word: their addresses must not be used again."""


@dataclass(eq=False)
class RegionRefused(FarpageError):
    """The hypervisor said no; code, message and remedy are its own."""

    code = "region_refused"
    template = "{message}"
    remedy = "{hint}"
    exit_status = ExitStatus.FAILURE
    error_code: str
    message: str
    hint: str


class Region(mmap.mmap):
    """Zeroed memory of this process, paged out through I/O servers above `limit_bytes`.

    Use it as a buffer: `numpy.frombuffer(region, dtype)`. It must not be used after `close`, which `with`
    calls at its end. In a forked child any access is a SIGSEGV, since the child's copy would read zeros
    where pages are out. When the hypervisor goes away, accesses to pages that are out wait for it, and go
    on when it is back, as if nothing had happened.
    """

    name: str
    """The client's name at the hypervisor."""

    def __new__(
        cls,
        size_bytes: int,
        *,
        name: str | None = None,
        limit_bytes: int | None = None,
        redundancy: str = "path",
        state: str | os.PathLike[str] | None = None,
        hypervisor: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Map `size_bytes`, rounded up to whole pages, and have it paged.

        :param name: of the client; chosen by the hypervisor when None.
        :param limit_bytes: how much may be in RAM; the hypervisor's default when None.
        :param redundancy: `none`, `path` or `mirror`.
        :param state: state folder of `farpage up`; $FARPAGE_STATE when None.
        :param hypervisor: path of the hypervisor's attach socket, instead of `state`.
        :raise InvalidInput: naming the argument that is wrong.
        :raise Unreachable: when no hypervisor answers there.
        :raise RegionRefused: when it does not want the region.
        :raise Unsupported: when this process may not use userfaultfd.
        """
        path = _attach_path(state, hypervisor)
        size_bytes = _rounded(size_bytes)
        with ExitStack() as undo:
            memfd = create_memfd(f"farpage:{name or 'region'}", size_bytes, sealable=True)
            undo.callback(os.close, memfd)
            fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, SEALS)
            region = super().__new__(cls, memfd, size_bytes, mmap.MAP_SHARED)
            undo.callback(mmap.mmap.close, region)
            region.madvise(mmap.MADV_DONTFORK)
            uffd = undo.enter_context(Userfaultfd.create())
            uffd.handshake()
            request = _request(name, size_bytes, address_of(region), limit_bytes, redundancy)
            request = request.model_copy(update={"uffd_number": uffd.fileno()})
            lifeline = undo.enter_context(_connect(path))
            reply = _attach(lifeline, path, request, uffd.fileno(), memfd)
            # From here on the hypervisor has it: only `close` undoes that.
            undo.pop_all()
        os.close(memfd)
        region.name = reply
        region._address = request.start_address
        region._path = path
        region._uffd = uffd
        region._lifeline = lifeline
        region._attached = True
        _open_regions.add(region)
        return region

    _address: int
    _path: str
    _uffd: Userfaultfd
    _lifeline: socket.socket
    _attached: bool

    @property
    def start_address(self) -> int:
        """Address of the first byte."""
        return self._address

    def close(self) -> None:
        """Detach and unmap; the contents are gone. Further calls do nothing.

        Without a hypervisor at the moment the region is taken off its paging here, and its addresses stay
        reserved for the life of the process.

        :raise BufferError: while arrays or memoryviews of it are in use; nothing has changed then.
        :raise Unreachable: or RegionRefused, when the hypervisor does not confirm: the region is
            unusable, but stays mapped for the life of the process.
        """
        if not self._attached:
            return
        # Resizing to the same size changes nothing and, as closing, is refused while buffers are in use.
        # To unmap first would be wrong: another region could get the addresses while the pager still
        # fills pages there.
        super().resize(len(self))
        self._attached = False
        _open_regions.discard(self)
        with self._uffd, self._lifeline:
            try:
                confirmed = _confirm_close(self._lifeline, self._path, self.name)
            except FarpageError:
                _unconfirmed.append(self)
                raise
            if not confirmed:
                # There may be a data worker that pages this region still, and will until it is told.
                with suppress(OSError):
                    self._uffd.unregister(self._address, len(self))
        address, length = self._address, len(self)
        super().close()
        if not confirmed:
            with suppress(OSError):
                reserve_addresses(address, length)

    def resize(self, newsize: int) -> None:
        """Refuse: a region keeps its size.

        :raise InvalidInput: always.
        """
        raise InvalidInput(
            "newsize", f"a region of {len(self)} bytes cannot become {newsize}", "make a new region"
        )

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_attached", False):
            warnings.warn(f"region {self.name!r} was not closed", ResourceWarning, stacklevel=1, source=self)
            with suppress(FarpageError):
                self.close()

    def _abandon_in_child(self) -> None:
        # MADV_DONTFORK left nothing at these addresses. Reserved, they cannot become those of another
        # mapping, which reads of the region would see and its deallocation would unmap.
        reserve_addresses(self._address, len(self))
        self._attached = False
        self._uffd.close()
        self._lifeline.close()


def _abandon_regions_in_child() -> None:
    for region in list(_open_regions):
        region._abandon_in_child()
    _open_regions.clear()


os.register_at_fork(after_in_child=_abandon_regions_in_child)


def _attach_path(state: str | os.PathLike[str] | None, hypervisor: str | os.PathLike[str] | None) -> str:
    if hypervisor is not None:
        path = os.fspath(hypervisor)
    else:
        folder = state if state is not None else os.environ.get(STATE_VARIABLE)
        if not folder:
            raise InvalidInput(
                "hypervisor",
                "no hypervisor is named",
                f"pass hypervisor=SOCKET or state=FOLDER, or set {STATE_VARIABLE}; "
                "'farpage up --state FOLDER' starts one",
            )
        path = _attach_socket(Path(folder).expanduser().absolute())
    if len(os.fsencode(path)) > UNIX_PATH_MAX_BYTES:
        raise InvalidInput(
            "hypervisor", f"{path!r} is too long for a UNIX socket", "use a folder with a shorter path"
        )
    return path


def _attach_socket(state: Path) -> str:
    """Return where the set in a state folder takes regions: as its `set.json` says, else where one has it."""
    try:
        attach = json.loads((state / "set.json").read_bytes())["hypervisor"]["attach"]
        address = parse_address(attach, field="attach")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, InvalidInput):
        address = None
    return address.path if isinstance(address, UnixAddress) else str(state / "hypervisor" / "attach.sock")


def _rounded(size_bytes: int) -> int:
    if size_bytes <= 0:
        raise InvalidInput("size_bytes", f"{size_bytes} is not positive", "ask for at least one byte")
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


def _request(
    name: str | None, size_bytes: int, start_address: int, limit_bytes: int | None, redundancy: str
) -> AttachRequest:
    try:
        return AttachRequest(
            name=name,
            size_bytes=size_bytes,
            start_address=start_address,
            limit_bytes=limit_bytes,
            redundancy=Redundancy(redundancy),
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise InvalidInput(str(first["loc"][0]), first["msg"], "see help(farpage.Region)") from error
    except ValueError as error:
        choices = ", ".join(Redundancy)
        raise InvalidInput(
            "redundancy", f"{redundancy!r} is not a redundancy", f"choose one of: {choices}"
        ) from error


def _connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(REPLY_TIMEOUT_SECONDS)
        connection.connect(path)
    except OSError as error:
        connection.close()
        raise _unreachable(path, error) from error
    return connection


def _attach(connection: socket.socket, path: str, request: AttachRequest, uffd: int, memfd: int) -> str:
    frame = encode(request)
    try:
        # The descriptors go with the first byte; a frame is far smaller than a socket's buffer.
        # Not even an empty rest may be sent then: it fails when the hypervisor has answered and hung up.
        sent = socket.send_fds(connection, [frame], [uffd, memfd])
        if sent < len(frame):
            connection.sendall(frame[sent:])
        reply = _receive(connection, AttachReply)
    except (OSError, EOFError) as error:
        raise _unreachable(path, error) from error
    if not reply.ok or reply.name is None:
        raise _refused(reply.error)
    return reply.name


def _confirm_close(lifeline: socket.socket, path: str, name: str) -> bool:
    """Ask to be detached and wait until it is so; False when there is no hypervisor at the moment."""
    try:
        return _ask_to_close(lifeline, path, CloseRequest(request="close"))
    except (ConnectionError, EOFError):
        pass
    # It has ended. One that was started in its place knows the region by its name.
    try:
        with _connect(path) as connection:
            return _ask_to_close(connection, path, CloseRequest(request="close", name=name))
    except (ConnectionError, EOFError, Unreachable):
        return False


def _ask_to_close(connection: socket.socket, path: str, request: CloseRequest) -> bool:
    try:
        connection.sendall(encode(request))
        reply = _receive(connection, CloseReply)
    except ConnectionError:
        raise
    except OSError as error:
        raise _unreachable(path, error) from error
    if not reply.ok:
        raise _refused(reply.error)
    return True


def _receive(connection: socket.socket, kind: type[AnyMessage]) -> AnyMessage:
    length = decode_length(_receive_exactly(connection, HEADER.size))
    return decode(kind, _receive_exactly(connection, length))


def _receive_exactly(connection: socket.socket, length: int) -> bytes:
    received = b""
    while len(received) < length:
        part = connection.recv(length - len(received))
        if not part:
            raise EOFError("the connection was closed")
        received += part
    return received


def _refused(error: ErrorDocument | None) -> RegionRefused:
    if error is None:
        return RegionRefused("unknown", "the hypervisor refused without a reason", "see its log")
    return RegionRefused(error.code, error.message, error.remedy)


def _unreachable(path: str, error: Exception) -> Unreachable:
    cause = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return Unreachable(
        "the hypervisor", f"unix:{path}", cause, "start one with 'farpage up' or 'farpage hypervisor run'"
    )
