"""An nbdkit that can be killed, stopped and started again on the same socket."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

from tests.support.commands import condition
from tests.support.tools import listening, need


class Nbdkit:
    """One server; `plugin` is the plugin with its arguments, filters before it."""

    def __init__(self, socket: Path, *plugin: str) -> None:
        need("nbdkit")
        self.socket = socket
        self.plugin = plugin
        self._process: asyncio.subprocess.Process | None = None

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    async def start(self, *plugin: str) -> None:
        """Start it and wait until it listens; `plugin` from now on instead."""
        self.plugin = plugin or self.plugin
        self.socket.unlink(missing_ok=True)
        self._process = await asyncio.create_subprocess_exec(
            "nbdkit", "--foreground", "--unix", str(self.socket), *self.plugin
        )
        await condition(lambda: listening(self.socket))

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; after SIGSTOP wait until every thread has stopped."""
        assert self._process is not None
        self._process.send_signal(number)
        if number == signal.SIGSTOP:
            while not all(
                "\nState:\tT" in (task / "status").read_text()
                for task in Path(f"/proc/{self._process.pid}/task").iterdir()
            ):
                time.sleep(0.001)

    async def kill(self) -> None:
        """Kill it with SIGKILL."""
        if self._process is not None and self._process.returncode is None:
            self.signal(signal.SIGKILL)
            await self._process.wait()

    async def __aenter__(self) -> Nbdkit:
        await self.start()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.kill()
