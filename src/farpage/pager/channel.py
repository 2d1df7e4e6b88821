"""Requests, answers and events between two processes of one hypervisor, with descriptors.

A UNIX socket of type SOCK_SEQPACKET keeps messages whole and lets each carry descriptors (SCM_RIGHTS,
unix(7)). Both ends are farpage's own, so a message that cannot be read is a bug and ends the process.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from pydantic import BaseModel

from farpage.errors import ExitStatus, FarpageError

MESSAGE_BYTES = 1 << 17
DESCRIPTORS = 8

Answer = TypeVar("Answer", bound=BaseModel)
Handler: TypeAlias = Callable[[str, Any, list[int]], Awaitable[BaseModel]]
"""`await handler(method, parameters, descriptors)`; it owns the descriptors."""
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

    async def call(
        self, method: str, parameters: BaseModel, answer: type[Answer], descriptors: Sequence[int] = ()
    ) -> Answer:
        """Send a request and wait for its answer. The descriptors stay the caller's.

        :raise PeerError: the other side answered with an error.
        :raise PeerGone: it ended.
        """
        if self._closed:
            raise PeerGone(method)
        self._next_call += 1
        number = self._next_call
        future: asyncio.Future[Any] = self._loop.create_future()
        self._calls[number] = (method, future)
        own = [os.dup(descriptor) for descriptor in descriptors]
        self._send({"call": number, "method": method, "parameters": parameters.model_dump()}, own)
        try:
            return answer.model_validate(await future)
        finally:
            self._calls.pop(number, None)

    def tell(self, event: str, parameters: BaseModel) -> None:
        """Send an event, which has no answer."""
        if not self._closed:
            self._send({"event": event, "parameters": parameters.model_dump()}, ())

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
        self._outgoing.append((json.dumps(document).encode(), descriptors))
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
        document = json.loads(content)
        if "event" in document:
            _close_all(descriptors)
            if self._on_event:
                self._on_event(document["event"], document["parameters"])
        elif "method" in document:
            task = self._loop.create_task(self._serve(document, list(descriptors)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._answered(document)

    def _answered(self, document: dict[str, Any]) -> None:
        _, future = self._calls.get(document["answer"], ("", None))
        if future is None or future.done():
            return
        if "error" in document:
            future.set_exception(PeerError(**document["error"]))
        else:
            future.set_result(document["result"])

    async def _serve(self, request: dict[str, Any], descriptors: list[int]) -> None:
        assert self._on_request is not None
        answer: dict[str, Any] = {"answer": request["call"]}
        try:
            result = await self._on_request(request["method"], request["parameters"], descriptors)
            answer["result"] = result.model_dump()
        except FarpageError as error:
            answer["error"] = {
                "remote_code": error.code,
                "message": error.cause,
                "remedy_text": error.advice,
                "status": int(error.exit_status),
            }
        if not self._closed:
            self._send(answer, ())


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
