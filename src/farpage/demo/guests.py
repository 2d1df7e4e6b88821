"""The guests that the demo can page, behind one face."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from farpage.address import UnixAddress, parse_address
from farpage.demo.reports import FillReport, PassReport
from farpage.demo.stamps import PAGE_BYTES
from farpage.embedded.child import describe_exit
from farpage.embedded.parent import PARENT_VARIABLE
from farpage.embedded.set import EmbeddedSet
from farpage.errors import FarpageError
from farpage.hypervisor.model import PoolSet

CLIENT = "guest"
"""Name of the demo's client."""

STOP_SECONDS = 10.0


@dataclass(eq=False)
class GuestDied(FarpageError):
    """The guest ended before the demo did."""

    code = "guest_died"
    template = "the guest {how}"
    remedy = "look into {log}"
    how: str
    log: str


@dataclass(frozen=True)
class GuestSettings:
    """How much memory the guest has and how much of it it fills; `folder` holds its log."""

    folder: Path
    memory_bytes: int
    fill_bytes: int


class DemoGuest(ABC):
    """A guest at work; `passes` grows while it checks its memory."""

    kind: str
    paged_from_start: bool
    """Whether it is a client of the hypervisor as soon as it runs."""

    def __init__(self, settings: GuestSettings, tell: Callable[[str], None]) -> None:
        self.settings = settings
        self.filled: FillReport | None = None
        self.passes: list[PassReport] = []
        self._tell = tell

    @property
    def pages_total(self) -> int:
        """Pages that it fills and checks."""
        return self.filled.pages if self.filled else self.settings.fill_bytes // PAGE_BYTES

    @abstractmethod
    async def start(self, embedded: EmbeddedSet) -> None:
        """Start it; it fills its memory and begins to check it."""

    @abstractmethod
    async def limit(self, embedded: EmbeddedSet, limit_bytes: int) -> None:
        """Have its memory paged, with no more than this resident."""

    @abstractmethod
    async def memory_pids(self, embedded: EmbeddedSet) -> list[int]:
        """Return the processes that hold its memory open."""

    @abstractmethod
    def poll(self) -> None:
        """Take in what it has reported.

        :raise GuestDied: it has ended.
        """

    @abstractmethod
    async def stop(self) -> None:
        """End it; safe to call twice, and before `start`."""

    def _heard(self, report: FillReport | PassReport) -> None:
        if isinstance(report, FillReport):
            self.filled = report
            self._tell(f"the guest filled {report.pages} pages in {report.seconds:.1f} s")
        else:
            self.passes.append(report)
            self._tell(
                f"pass {len(self.passes)}: {report.pages_verified} pages verified, "
                f"{report.pages_wrong} wrong, {report.seconds:.1f} s"
            )


class RegionGuest(DemoGuest):
    """A process with a `farpage.Region`: `farpage.demo.region_guest`."""

    kind = "none"
    paged_from_start = True

    def __init__(self, settings: GuestSettings, tell: Callable[[str], None]) -> None:
        super().__init__(settings, tell)
        self._log = settings.folder / "guest.log"
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None

    async def start(self, embedded: EmbeddedSet) -> None:
        """Start the process."""
        address = parse_address(embedded.document.hypervisor.attach)
        assert isinstance(address, UnixAddress)
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "farpage.demo.region_guest", "--attach", address.path),
                *("--name", CLIENT, "--memory", str(self.settings.memory_bytes)),
                *("--fill", str(self.settings.fill_bytes)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                env={**os.environ, PARENT_VARIABLE: str(os.getpid())},
            )
        self._reader = asyncio.get_running_loop().create_task(self._read())
        self._tell(
            f"a process with a Region of {self.settings.memory_bytes >> 20} MiB runs, pid {self._process.pid}"
        )

    async def limit(self, embedded: EmbeddedSet, limit_bytes: int) -> None:
        """Lower the limit of the region, which has been a client from its start."""
        await embedded.hypervisor.set_pool(PoolSet(client=CLIENT, limit_bytes=limit_bytes))

    async def memory_pids(self, embedded: EmbeddedSet) -> list[int]:
        """Return the hypervisor's workers: a region's own process keeps only the mapping."""
        return [worker.pid for worker in (await embedded.hypervisor.info()).workers]

    def poll(self) -> None:
        """Check that the process runs; its reports are read as they come."""
        if self._process is not None and self._process.returncode is not None:
            raise GuestDied(describe_exit(self._process.returncode), str(self._log))

    async def stop(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
            except TimeoutError:
                process.kill()
                await process.wait()
        if self._reader is not None:
            await self._reader

    async def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            for kind in (PassReport, FillReport):
                with contextlib.suppress(ValidationError):
                    self._heard(kind.model_validate_json(line))
                    break
