"""A bound on request bodies, so that no client can fill a daemon's memory."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 16 << 20
"""A definition of some ten thousand clients."""


class BodyLimit:
    """ASGI middleware: a body beyond `max_bytes` is answered with 413.

    The rest of such a body is read and dropped: closing at once would reset the connection
    before the client has read the answer.
    """

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a bounded `receive`."""
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
