"""A QMP server without a VM behind it: states, `stop`, `cont` and events as QEMU has them, one connection."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any, Self


class QemuStandIn:
    """Listens at a socket; `status` is the run state, `commands` what was asked for."""

    def __init__(self, socket: str) -> None:
        self.socket = socket
        self.status = "running"
        self.commands: list[str] = []
        self.refused: set[str] = set()
        self.hung = asyncio.Event()
        self.hung.set()
        """Cleared, commands wait: the main loop waits for a page."""
        self.connected = asyncio.Event()
        self._one = asyncio.Lock()
        self._writer: asyncio.StreamWriter | None = None
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._serve, self.socket)
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.end()

    async def end(self) -> None:
        """End, as QEMU does when it is killed."""
        assert self._server is not None
        self._server.close()
        if self._writer:
            self._writer.close()
        await asyncio.sleep(0)

    def run_by_hand(self, command: str) -> None:
        """Do what an operator does over another monitor."""
        self._do(command)

    def _do(self, command: str) -> None:
        if command == "stop" and self.status == "running":
            self.status = "paused"
            self._event("STOP")
        elif command == "cont" and self.status != "running":
            self.status = "running"
            self._event("RESUME")

    def _event(self, name: str) -> None:
        if self._writer:
            self._send({"event": name, "timestamp": {"seconds": 1, "microseconds": 0}})

    def _send(self, document: dict[str, Any]) -> None:
        assert self._writer is not None
        self._writer.write(json.dumps(document).encode() + b"\r\n")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with self._one:
            self._writer = writer
            self._send({"QMP": {"version": {}, "capabilities": ["oob"]}})
            self.connected.set()
            with suppress(ConnectionError):
                while line := await reader.readline():
                    await self.hung.wait()
                    self._answer(json.loads(line)["execute"])
            self._writer = None
            self.connected.clear()
            writer.close()

    def _answer(self, command: str) -> None:
        if command != "qmp_capabilities":
            self.commands.append(command)
        if command in self.refused:
            self._send({"error": {"class": "GenericError", "desc": f"{command} is refused"}})
            return
        self._do(command)
        result = {"status": self.status, "running": self.status == "running"}
        self._send({"return": result if command == "query-status" else {}})
