"""VIOS processes for tests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from farpage.address import UnixAddress
from farpage.api.client import ControlClient
from farpage.nbd.client import Connection
from farpage.vios.model import DeviceInfo, VolumeCreate, VolumeInfo, VolumeOpen

START = """
import asyncio, sys
from farpage.vios.daemon import run
from farpage.vios.settings import ViosSettings
asyncio.run(run(ViosSettings.model_validate_json(sys.argv[1])))
"""

START_SECONDS = 60.0


class ViosProcess:
    """One VIOS: its state stays in `folder` from one start to the next."""

    def __init__(self, folder: Path, name: str, devices: Sequence[str] = ()) -> None:
        self.folder = folder
        self.name = name
        self.devices = tuple(devices)
        self.log_path = folder / f"{name}.log"
        self.control = f"unix:{folder}/{name}.c"
        self.data = UnixAddress(f"{folder}/{name}.d")
        self.extra_data: tuple[str, ...] = ()
        self.change: dict[str, object] = {}
        """Settings to start it with in place of the usual ones."""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it is ready."""
        self.launch()
        self.until_ready()

    def until_ready(self) -> None:
        """Wait until it is ready."""
        deadline = time.monotonic() + START_SECONDS
        while not self._accepts():
            assert self._process is not None
            if self._process.poll() is not None:
                raise AssertionError(f"the VIOS ended with {self._process.returncode}: {self.log()}")
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.01)

    def launch(self) -> None:
        """Start it without waiting."""
        settings = {
            "name": self.name,
            "state_dir": str(self.folder / self.name),
            "control": [self.control],
            "data": [str(self.data), *self.extra_data],
            "devices": list(self.devices),
            **self.change,
        }
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "error", "-c", START, json.dumps(settings)], stderr=log, stdout=log
            )

    def wait(self) -> int:
        """Wait for its end and return its exit status."""
        assert self._process is not None
        return self._process.wait(START_SECONDS)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; after SIGSTOP wait until every thread has stopped."""
        assert self._process is not None
        self._process.send_signal(number)
        if number == signal.SIGSTOP:
            while not all(
                "\nState:\tT" in (task / "status").read_text()
                for task in Path(f"/proc/{self.pid}/task").iterdir()
            ):
                time.sleep(0.001)

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        self.signal(signal.SIGKILL)
        self.wait()

    def stop(self) -> int:
        """End it with SIGTERM and return its exit status."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def close(self) -> None:
        """Let no process stay behind."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def _accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(self.control.removeprefix("unix:")) == 0

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[ControlClient]:
        async with ControlClient(self.control, who=f"VIOS {self.name}") as client:
            yield client

    async def device(self) -> DeviceInfo:
        """Return its first device."""
        async with self.client() as client:
            return (await client.get("/v1/devices", tuple[DeviceInfo, ...]))[0]

    async def create(self, volume: str, size_bytes: int = 1 << 20) -> VolumeInfo:
        """Make a volume on its first device."""
        wanted = VolumeCreate(name=volume, device=(await self.device()).id, size_bytes=size_bytes)
        async with self.client() as client:
            return await client.post("/v1/volumes", wanted, VolumeInfo)

    async def volume(self, name: str) -> VolumeInfo:
        async with self.client() as client:
            return await client.get(f"/v1/volumes/{name}", VolumeInfo)

    async def claim(self, volume: str, epoch: int) -> VolumeInfo:
        async with self.client() as client:
            return await client.post(f"/v1/volumes/{volume}/open", VolumeOpen(epoch=epoch), VolumeInfo)

    async def connect(self, export: str, **options: Any) -> Connection:
        return await Connection.open(self.data, export, **options)


@contextlib.contextmanager
def vios_processes(folder: Path, *names: str, devices: Sequence[str]) -> Iterator[tuple[ViosProcess, ...]]:
    """Run VIOS that reach the same devices."""
    processes = tuple(ViosProcess(folder, name, devices) for name in names)
    try:
        for process in processes:
            process.launch()
        for process in processes:
            process.until_ready()
        yield processes
    finally:
        for process in processes:
            process.close()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that no event tells."""
    while not condition():
        await asyncio.sleep(0.001)
