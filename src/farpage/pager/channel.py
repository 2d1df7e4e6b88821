"""Requests, answers and events between two processes of one hypervisor, with descriptors.

A UNIX socket of type SOCK_SEQPACKET keeps messages whole and lets each carry descriptors (SCM_RIGHTS,
unix(7)). Both ends are farpage's own, so a message that cannot be read is a bug and ends the process.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import msgspec

from farpage.errors import ExitStatus, FarpageError
from farpage.log import get_logger
from farpage.message import Message, encode

log = get_logger()

MESSAGE_BYTES = 1 << 17
DESCRIPTORS = 8

Answer = TypeVar("Answer", bound=Message)


@dataclass(frozen=True)
class Handing:
    """An answer with descriptors, which stay the answerer's."""

    answer: Message
    descriptors: tuple[int, ...]


Handler: TypeAlias = Callable[[str, Any, list[int]], Awaitable[Message | Handing]]
"""`await handler(method, parameters, descriptors)`; it owns the descriptors that came."""
EventHandler: TypeAlias = Callable[[str, Any], None]


@dataclass(eq=False)
class PeerError(FarpageError):
    """The other process answered with an error."""

    template = "{message}"
    remedy = "{remedy_text}"
    remote_code: str
    message: str
    remedy_text: str
    status: int

    def __post_init__(self) -> None:
        # Both are class variables of FarpageError; here they come with the answer.
        vars(self)["code"] = self.remote_code
        vars(self)["exit_status"] = ExitStatus(self.status)


@dataclass(eq=False)
class PeerGone(FarpageError):
    """The other process ended before it answered."""

    code = "worker_gone"
    template = "the data worker ended before it answered {method!r}"
    remedy = "look into the hypervisor's log for why it ended"
    method: str


@dataclass(eq=False)
class PeerSilent(FarpageError):
    """The other process does not answer in time; it may have done what it was asked for all the same."""

    code = "worker_silent"
    template = "the data worker has not answered {method!r} for {seconds:g} s"
    remedy = "if it hangs it is replaced by itself; look into the hypervisor's log"
    exit_status = ExitStatus.UNREACHABLE
    method: str
    seconds: float


class Channel:
    """One end of the connection; for one event loop."""

    def __init__(
        self,
        endpoint: socket.socket,
        *,
        on_request: Handler | None = None,
        on_event: EventHandler | None = None,
        on_closed: Callable[[], None] | None = None,
    ) -> None:
        endpoint.setblocking(False)
        self._socket = endpoint
        self._on_request = on_request
        self._on_event = on_event
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._outgoing: deque[tuple[bytes, Sequence[int]]] = deque()
        self._calls: dict[int, tuple[str, asyncio.Future[Any]]] = {}
        self._next_call = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._loop.add_reader(endpoint, self._readable)

    @property
    def closed(self) -> bool:
        """Whether the connection has ended."""
        return self._closed

    async def call(
        self,
        method: str,
        parameters: Message,
        answer: type[Answer],
        descriptors: Sequence[int] = (),
        *,
        timeout_seconds: float | None = None,
    ) -> Answer:
        """Send a request and wait for its answer. The descriptors stay the caller's.

        :raise PeerError: the other side answered with an error.
        :raise PeerGone: it ended.
        :raise PeerSilent: it has not answered in time.
        """
        document, received = await self._ask(method, parameters, descriptors, timeout_seconds)
        _close_all(received)
        return answer.model_validate(document)

    async def take(
        self,
        method: str,
        parameters: Message,
        answer: type[Answer],
        descriptors: Sequence[int] = (),
        *,
        timeout_seconds: float | None = None,
    ) -> tuple[Answer, list[int]]:
        """As `call`, for an answer with descriptors, which are the caller's then."""
        document, received = await self._ask(method, parameters, descriptors, timeout_seconds)
        return answer.model_validate(document), received

    async def _ask(
        self,
        method: str,
        parameters: Message,
        descriptors: Sequence[int],
        timeout_seconds: float | None,
    ) -> tuple[Any, list[int]]:
        if self._closed:
            raise PeerGone(method)
        self._next_call += 1
        number = self._next_call
        future: asyncio.Future[Any] = self._loop.create_future()
        self._calls[number] = (method, future)
        own = [os.dup(descriptor) for descriptor in descriptors]
        self._send({"call": number, "method": method, "parameters": parameters}, own)
        try:
            async with asyncio.timeout(timeout_seconds):
                result: tuple[Any, list[int]] = await future
                return result
        except TimeoutError:
            assert timeout_seconds is not None
            raise PeerSilent(method, timeout_seconds) from None
        finally:
            self._calls.pop(number, None)

    def tell(self, event: str, parameters: Message) -> None:
        """Send an event, which has no answer."""
        if not self._closed:
            self._send({"event": event, "parameters": parameters}, ())

    def close(self) -> None:
        """End the connection; calls in progress raise PeerGone."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        for _, descriptors in self._outgoing:
            _close_all(descriptors)
        for method, future in self._calls.values():
            if not future.done():
                future.set_exception(PeerGone(method))
        if self._on_closed:
            self._on_closed()

    def _send(self, document: dict[str, Any], descriptors: Sequence[int]) -> None:
        self._outgoing.append((encode(document), descriptors))
        self._writable()

    def _writable(self) -> None:
        try:
            while self._outgoing:
                content, descriptors = self._outgoing[0]
                socket.send_fds(self._socket, [content], list(descriptors))
                _close_all(descriptors)
                self._outgoing.popleft()
        except BlockingIOError:
            self._loop.add_writer(self._socket, self._writable)
            return
        except OSError:
            self.close()
            return
        self._loop.remove_writer(self._socket)

    def _readable(self) -> None:
        try:
            content, descriptors, _, _ = socket.recv_fds(
                self._socket, MESSAGE_BYTES, DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            content = b""
            descriptors = []
        if not content:
            self.close()
            return
        document = msgspec.json.decode(content)
        if "event" in document:
            _close_all(descriptors)
            if self._on_event:
                self._on_event(document["event"], document["parameters"])
        elif "method" in document:
            task = self._loop.create_task(self._serve(document, list(descriptors)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._answered(document, list(descriptors))

    def _answered(self, document: dict[str, Any], descriptors: list[int]) -> None:
        _, future = self._calls.get(document["answer"], ("", None))
        if future is None or future.done():
            _close_all(descriptors)
        elif "error" in document:
            _close_all(descriptors)
            future.set_exception(PeerError(**document["error"]))
        else:
            future.set_result((document["result"], descriptors))

    async def _serve(self, request: dict[str, Any], descriptors: list[int]) -> None:
        assert self._on_request is not None
        answer: dict[str, Any] = {"answer": request["call"]}
        handed: list[int] = []
        try:
            result = await self._on_request(request["method"], request["parameters"], descriptors)
            if isinstance(result, Handing):
                handed = [os.dup(descriptor) for descriptor in result.descriptors]
                result = result.answer
            answer["result"] = result
        except FarpageError as error:
            answer["error"] = {
                "remote_code": error.code,
                "message": error.cause,
                "remedy_text": error.advice,
                "status": int(error.exit_status),
            }
        except Exception as error:  # whoever asked must not wait for ever for an answer
            log.exception("request_failed", method=request["method"])
            answer["error"] = {
                "remote_code": "unforeseen",
                "message": f"{request['method']!r} failed in an unforeseen way: {error!r}",
                "remedy_text": "look into the log of the process that was asked, and report it",
                "status": int(ExitStatus.FAILURE),
            }
        if self._closed:
            _close_all(handed)
        else:
            self._send(answer, handed)


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
