"""A bound on request bodies, so that no client can fill a daemon's memory."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 16 << 20
"""A definition of some ten thousand clients."""


WHOLE_BODY = "farpage.whole_body"
"""Where `body_of` finds the way around the bound."""


async def body_of(request: Request, max_bytes: int) -> bytearray:
    """Read a request's body, whose bound only its handler knows.

    :raise HTTPException: 413, when it is longer.
    """
    content = bytearray()
    length = 0
    more = True
    while more:
        message = await request.scope[WHOLE_BODY]()
        if message["type"] == "http.disconnect":
            raise HTTPException(400, "the body ended early")
        part = message.get("body", b"")
        length += len(part)
        if length <= max_bytes:
            content += part
        more = message.get("more_body", False)
    if length > max_bytes:
        raise HTTPException(413, f"the body is longer than {max_bytes} bytes")
    return content


class BodyLimit:
    """ASGI middleware: a body beyond `max_bytes` is answered with 413.

    The rest of such a body is read and dropped: closing at once would reset the connection
    before the client has read the answer.
    """

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a bounded `receive`; a handler that bounds its body has the whole one."""
        scope[WHOLE_BODY] = receive
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            while message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received <= self._max_bytes:
                    break
                if not message.get("more_body", False):
                    raise HTTPException(413, f"the body is longer than {self._max_bytes} bytes")
                message = await receive()
            return message

        await self._app(scope, bounded if scope["type"] == "http" else receive, send)
