"""The intermediate clients that this hypervisor runs itself, for moves between VIOS that it reaches both."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from farpage.address import UNIX_PATH_MAX_BYTES, TcpAddress, parse_address
from farpage.definition.model import Definition, Move
from farpage.errors import FarpageError
from farpage.log import get_logger

log = get_logger()

FIRST_PAUSE_SECONDS: Final = 0.2
LONGEST_PAUSE_SECONDS: Final = 5.0
END_SECONDS: Final = 5.0
LOG_TAIL_BYTES: Final = 2048
PARENT_VARIABLE: Final = "FARPAGE_PARENT_PID"
"""Binds its life to this process': another one of this hypervisor starts its own (`farpage.cli.main`)."""


@dataclass
class _Running:
    """One that is kept running."""

    principal: str
    task: asyncio.Task[None] | None = None
    process: asyncio.subprocess.Process | None = None
    problem: str = ""
    """Why the latest process has ended."""

    @property
    def over(self) -> bool:
        """Whether it is not started again."""
        return self.task is None or self.task.done()

    async def cancel(self) -> None:
        """End the process, and start none any more."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)


class Intermediaries:
    """Keeps one process for each move that needs one here."""

    def __init__(self, state_dir: Path, vioses: Mapping[str, str], tls: Path | None) -> None:
        """`vioses` are the control addresses that this hypervisor knows, by name."""
        self._state_dir = state_dir
        self._vioses = vioses
        self._tls = tls
        self._running: dict[str, _Running] = {}

    def can_run(self, move: Move) -> bool:
        """Tell whether this hypervisor reaches both VIOS of a move."""
        return move.source_vios in self._vioses and move.target_vios in self._vioses

    def runs(self, client: str) -> bool:
        """Tell whether one runs for a client now."""
        running = self._running.get(client)
        return running is not None and running.process is not None

    def pid(self, client: str) -> int | None:
        """Return the process that runs for a client now."""
        running = self._running.get(client)
        return running.process.pid if running and running.process else None

    def problem(self, client: str) -> str:
        """Say why the latest one for a client has ended; empty while one runs."""
        running = self._running.get(client)
        return running.problem if running else ""

    def keep(self, client: str, move: Move, definition: Definition) -> None:
        """Have one run for a client's move, started again whenever it ends, until `stop`."""
        running = self._running.get(client)
        if running is not None and running.principal == move.principal and not running.over:
            return
        if running is not None and running.task is not None:
            running.task.cancel()
        running = self._running[client] = _Running(move.principal)
        running.task = asyncio.get_running_loop().create_task(self._keep(client, move, definition, running))

    async def stop(self, client: str) -> None:
        """Keep none for a client any more; one that runs has a moment to end by itself."""
        running = self._running.pop(client, None)
        if running is None:
            return
        if running.process is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(END_SECONDS):
                    await running.process.wait()
        await running.cancel()

    async def close(self) -> None:
        """End them all."""
        running = list(self._running.values())
        self._running.clear()
        await asyncio.gather(*(one.cancel() for one in running))

    def command(self, client: str, move: Move, definition: Definition) -> str:
        """Return the command line that starts one by hand, on a host that reaches both VIOS."""
        words = ["farpage", "intermediary", "run", client]
        controls = []
        for vios in (move.target_vios, move.source_vios):
            control = self._vioses.get(vios) or definition.vioses[vios].control
            controls.append(control)
            words += ["--vios", f"{vios}={control}"]
        if any(isinstance(parse_address(control), TcpAddress) for control in controls):
            words += ["--tls", str(self._tls or "DIR")]
        target = definition.vioses[move.target_vios]
        remote = all(isinstance(parse_address(data), TcpAddress) for data in target.data)
        listen = "tcp:HOST:10810" if remote else f"unix:/run/farpage-{client}.sock"
        return shlex.join([*words, "--listen", listen])

    # Running one

    async def _keep(self, client: str, move: Move, definition: Definition, running: _Running) -> None:
        pause = FIRST_PAUSE_SECONDS
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                status = await self._run(client, move, definition, running)
            except (OSError, FarpageError) as error:
                running.problem = f"it cannot be started: {error}"
            else:
                if status == 0:
                    running.problem = ""
                    return
                running.problem = f"it ended with status {status}: {self._log_tail(client)}"
            log.warning("intermediary_ended", client=client, problem=running.problem)
            if loop.time() - began > LONGEST_PAUSE_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)

    async def _run(self, client: str, move: Move, definition: Definition, running: _Running) -> int:
        with tempfile.TemporaryDirectory(prefix="farpage-", dir=self._socket_root()) as folder:
            words = ["intermediary", "run", client]
            for vios in (move.target_vios, move.source_vios):
                words += ["--vios", f"{vios}={self._vioses[vios]}"]
            if self._tls is not None:
                words += ["--tls", str(self._tls)]
            words += ["--listen", await self._listen_address(definition, move, folder)]
            with self._log_path(client).open("ab") as output:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "farpage",
                    *words,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    env={**os.environ, PARENT_VARIABLE: str(os.getpid())},
                )
            running.process, running.problem = process, ""
            log.info("intermediary_started", client=client, pid=process.pid)
            try:
                return await process.wait()
            finally:
                running.process = None
                if process.returncode is None:
                    process.send_signal(signal.SIGKILL)
                    await process.wait()

    async def _listen_address(self, definition: Definition, move: Move, folder: str) -> str:
        """Return where the target's VIOS reaches a process here: a UNIX socket, if it is on this host."""
        for text in definition.vioses[move.target_vios].data:
            address = parse_address(text)
            if not isinstance(address, TcpAddress):
                return f"unix:{folder}/relay.sock"
        assert isinstance(address, TcpAddress)
        host, port = address.host, address.port
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, where = found[0]
        # Nothing is sent: connecting a datagram socket only chooses the local address (udp(7)).
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(where)
            return str(TcpAddress(probe.getsockname()[0], 0))

    def _socket_root(self) -> Path | None:
        """Return where the relay's socket may be; None for the system's folder of temporary files."""
        room = UNIX_PATH_MAX_BYTES - len("/farpage-xxxxxxxx/relay.sock")
        return self._state_dir if len(os.fsencode(self._state_dir)) <= room else None

    def _log_path(self, client: str) -> Path:
        return self._state_dir / f"intermediary-{client}.log"

    def _log_tail(self, client: str) -> str:
        try:
            text = self._log_path(client).read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
        except OSError:
            return ""
        return (text.strip().splitlines() or [""])[-1]
