"""QEMU's machine protocol, as much as farpage needs: commands one at a time over a UNIX socket, and events.

See docs/interop/qmp-spec.rst of QEMU: one JSON document a line; a greeting, `qmp_capabilities`, then
commands, with events in between. A QMP socket serves one connection at a time.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Self

from farpage.errors import ExitStatus, FarpageError

LINE_BYTES: Final = 1 << 20
"""Longest line that is accepted."""


@dataclass(eq=False)
class QmpFailed(FarpageError):
    """QEMU did not accept a command, or went away."""

    code = "qmp_failed"
    template = "QMP command {command!r} at {socket} failed: {cause_text}"
    exit_status = ExitStatus.UNREACHABLE
    remedy = "check that QEMU runs with '-qmp unix:{socket},server=on,wait=off' and that nobody else uses it"
    socket: str
    command: str
    cause_text: str


class Qmp:
    """One connection; for one event loop and one command at a time."""

    def __init__(self, socket: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.on_event: Callable[[str], None] = lambda name: None
        """Called with the name of each event, such as RESUME."""
        self.ended = asyncio.Event()
        """Set when QEMU has closed the connection."""
        self._socket = socket
        self._reader = reader
        self._writer = writer
        self._answer: asyncio.Future[Any] | None = None
        self._command = ""
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, socket: str, timeout_seconds: float) -> Self:
        """Connect and agree on the protocol.

        :raise QmpFailed: when nobody answers in time, as when another connection is open.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                reader, writer = await asyncio.open_unix_connection(socket, limit=LINE_BYTES)
                connection = cls(socket, reader, writer)
                try:
                    await connection._begin()
                except BaseException:
                    await connection.close()
                    raise
        except TimeoutError as error:
            raise QmpFailed(socket, "qmp_capabilities", f"no answer within {timeout_seconds:g} s") from error
        except (OSError, ValueError) as error:
            raise QmpFailed(socket, "qmp_capabilities", str(error)) from error
        return connection

    async def _begin(self) -> None:
        if not await self._reader.readline():
            raise ConnectionError("QEMU closed the connection")
        self._reading = asyncio.get_running_loop().create_task(self._read())
        await self.execute("qmp_capabilities")

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run one command and return its `return` value; waits for it.

        :raise QmpFailed: when QEMU refuses it or is gone.
        """
        if self.ended.is_set():
            raise QmpFailed(self._socket, command, "QEMU closed the connection")
        self._command = command
        self._answer = asyncio.get_running_loop().create_future()
        self._writer.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        try:
            return await self._answer
        finally:
            self._answer = None

    async def _read(self) -> None:
        problem = "QEMU closed the connection"
        try:
            while line := await self._reader.readline():
                self._take(json.loads(line))
        except (OSError, ValueError) as error:
            problem = str(error)
        self.ended.set()
        if self._answer and not self._answer.done():
            self._answer.set_exception(QmpFailed(self._socket, self._command, problem))

    def _take(self, document: dict[str, Any]) -> None:
        if "event" in document:
            self.on_event(document["event"])
        elif self._answer and not self._answer.done():
            if "error" in document:
                cause = document["error"]["desc"]
                self._answer.set_exception(QmpFailed(self._socket, self._command, cause))
            else:
                self._answer.set_result(document.get("return"))

    async def close(self) -> None:
        """End the connection."""
        if self._reading:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        self.ended.set()
        self._writer.close()


async def execute(socket: str, command: str, *, timeout_seconds: float = 60.0, **arguments: Any) -> Any:
    """Connect, run one command and return its `return` value.

    :raise QmpFailed: when QEMU refuses it, does not answer in time or is gone.
    """
    connection = await Qmp.connect(socket, timeout_seconds)
    try:
        async with asyncio.timeout(timeout_seconds):
            return await connection.execute(command, **arguments)
    except TimeoutError as error:
        raise QmpFailed(socket, command, f"no answer within {timeout_seconds:g} s") from error
    finally:
        await connection.close()
