"""The contenders of `bench.paging`: each pages one toucher's memory under one limit on one disk."""

from __future__ import annotations

import asyncio
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench._hostswap import (
    HIGHEST_PRIORITY,
    MemoryCgroup,
    memory_cgroup,
    page_cluster,
    pages_read_by,
    pages_swapped_in,
    swapping_on,
    zram_swapping_on,
)
from bench._toucher import MemoryKind, Phase, PhaseReport, Toucher, WrongPages
from farpage.device.spec import Allocate, DirectorySpec
from farpage.embedded.control import HypervisorControl
from farpage.embedded.set import EmbeddedSet, SetSettings
from farpage.hypervisor.model import ClientAttach
from farpage.hypervisor.workercpus import ANY, CLIENTS
from farpage.kernel.affinity import confine
from farpage.pager.compiled import WITHOUT_VARIABLE
from farpage.pager.limit import DEFAULT_TIER_PERCENT

CLIENT: Final = "touched"
FOLLOW_SECONDS: Final = 10.0
FOLLOW_POLL_SECONDS: Final = 0.05
COMPRESSED_TO: Final = 2
"""How many bytes of a phase that is compressible one byte of zram holds."""


@dataclass(frozen=True)
class Work:
    """What every contender is given alike; `folder` is on the disk that they share."""

    folder: Path
    program: Path
    memory_bytes: int
    limit_bytes: int
    seconds: float
    phases: tuple[Phase, ...]
    ram_tier_percent: int = DEFAULT_TIER_PERCENT
    cpu: int | None = None
    """The only one that the toucher runs on; None for any."""


@dataclass(frozen=True)
class Measured:
    """One phase of one contender; `page_ins` are pages brought in from a device, those read ahead included.

    `wasted` are pages that were read ahead in vain, where the contender knows.
    """

    phase: Phase
    report: PhaseReport
    page_ins: int
    wasted: int = 0


class Pager(ABC):
    """A contender: `ready`, then a toucher is started and given to `take`, and ended before `ready` ends."""

    name: str
    kind: MemoryKind

    @abstractmethod
    def ready(self, work: Work) -> AbstractAsyncContextManager[None]:
        """Set everything up that pages, and take it down again."""

    @abstractmethod
    async def take(self, toucher: Toucher, work: Work) -> None:
        """Page this toucher from now on."""

    @abstractmethod
    async def page_ins(self) -> int:
        """Return a count of pages brought in; only differences mean something."""

    async def wasted(self) -> int:
        """Return a count of pages that were read ahead in vain."""
        return 0


class Limited(Pager):
    """A contender of the kernel's own: the toucher is in a memory cgroup with the limit."""

    _cgroup: MemoryCgroup | None = None

    async def take(self, toucher: Toucher, work: Work) -> None:
        """Put the toucher into the cgroup."""
        assert self._cgroup is not None
        self._cgroup.add(toucher.pid)


class HostSwap(Limited):
    """The host's swap file `path`, with a page cluster of 2**exponent pages."""

    kind = MemoryKind.ANONYMOUS

    def __init__(self, path: Path, cluster_exponent: int) -> None:
        self.name = f"swap-{cluster_exponent}"
        self._path = path
        self._cluster_exponent = cluster_exponent

    @asynccontextmanager
    async def ready(self, work: Work) -> AsyncIterator[None]:
        """Switch the swap file on, and make a cgroup with the limit."""
        with ExitStack() as undo:
            undo.enter_context(page_cluster(self._cluster_exponent))
            undo.enter_context(swapping_on(self._path))
            self._cgroup = undo.enter_context(memory_cgroup(work.limit_bytes))
            yield

    async def page_ins(self) -> int:
        """Return what the kernel counts for the whole host."""
        return pages_swapped_in()


class Zram(HostSwap):
    """A share of the limit for zram with LZ4, and the swap file for what that does not hold.

    The limit is what the process and zram's compressed pages may have together, as a limit of farpage is for
    resident pages and the RAM tier; so both have the same budget, and divide it in the same way.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, 0)
        self.name = "zram"

    @asynccontextmanager
    async def ready(self, work: Work) -> AsyncIterator[None]:
        """Switch zram on, and the swap file below it."""
        share_bytes = work.limit_bytes * work.ram_tier_percent // 100
        with ExitStack() as undo:
            undo.enter_context(page_cluster(0))
            undo.enter_context(zram_swapping_on(share_bytes * COMPRESSED_TO))
            undo.enter_context(swapping_on(self._path, HIGHEST_PRIORITY - 1))
            self._cgroup = undo.enter_context(memory_cgroup(work.limit_bytes - share_bytes))
            yield


class MappedFile(Limited):
    """A file that the program maps MAP_SHARED, under a memory cgroup's limit: the page cache is the pager.

    Where the program says which way it touches its memory, with MADV_RANDOM, the kernel reads nothing ahead.
    """

    def __init__(self, kind: MemoryKind) -> None:
        self.kind = kind
        self.name = kind.value
        self._toucher: Toucher | None = None

    @asynccontextmanager
    async def ready(self, work: Work) -> AsyncIterator[None]:
        """Make a cgroup with the limit; the file is the program's own, and ends with it."""
        with memory_cgroup(work.limit_bytes) as self._cgroup:
            yield

    async def take(self, toucher: Toucher, work: Work) -> None:
        """Put the toucher into the cgroup, and remember whose page-ins count."""
        await super().take(toucher, work)
        self._toucher = toucher

    async def page_ins(self) -> int:
        """Return what the kernel counts as read from storage for the process (proc_pid_io(5))."""
        assert self._toucher is not None
        return pages_read_by(self._toucher.pid)


class Farpage(Pager):
    """A set of two VIOSes with a common device in a folder; the toucher is attached while it runs.

    The volume has all of its blocks from the start, or is `sparse`.
    """

    name = "farpage"
    kind = MemoryKind.SHARED
    access = ""
    """How the device's storage is read and written, as the VIOSes say."""

    def __init__(self, *, sparse: bool = False) -> None:
        self._allocate = Allocate.SPARSE if sparse else Allocate.FULL
        self._set: EmbeddedSet | None = None

    @property
    def hypervisor(self) -> HypervisorControl:
        """The hypervisor of the set that runs."""
        assert self._set is not None
        return self._set.hypervisor

    @asynccontextmanager
    async def ready(self, work: Work) -> AsyncIterator[None]:
        """Start the set."""
        async with self.running(work):
            yield

    @asynccontextmanager
    async def running(self, work: Work, devices: tuple[str, ...] = ()) -> AsyncIterator[None]:
        """Run a set with these devices, by default a common one."""
        folder = work.folder / "set"
        settings = SetSettings(
            state_dir=folder,
            devices=devices or (str(DirectorySpec(str(folder / "device"), allocate=self._allocate)),),
            ram_tier_percent=work.ram_tier_percent,
            worker_cpus=ANY if work.cpu is None else CLIENTS,
        )
        embedded = EmbeddedSet(settings)
        try:
            await embedded.start()
            self._set = embedded
            vios = next(iter(embedded.vioses.values()))
            self.access = ", ".join(device.access for device in await vios.devices())
            yield
        finally:
            self._set = None
            await embedded.stop()
            shutil.rmtree(folder, ignore_errors=True)

    async def take(self, toucher: Toucher, work: Work) -> None:
        """Attach the toucher, as `farpage client attach --pid` does."""
        assert self._set is not None
        await self._set.hypervisor.attach(CLIENT, ClientAttach(pid=toucher.pid, limit_bytes=work.limit_bytes))
        if work.cpu is not None:
            await self._until_worker_on(str(work.cpu))

    async def _until_worker_on(self, cpus: str) -> None:
        """Wait until the worker has followed the toucher."""
        async with asyncio.timeout(FOLLOW_SECONDS):
            while await self._worker_cpus() != [cpus]:  # noqa: ASYNC110
                await asyncio.sleep(FOLLOW_POLL_SECONDS)

    async def _worker_cpus(self) -> list[str]:
        info = await self.hypervisor.info()
        return [worker.cpus for worker in info.workers if worker.clients]

    async def page_ins(self) -> int:
        """Return what the client's worker counts."""
        assert self._set is not None
        return (await self._set.hypervisor.client(CLIENT)).counters.page_in_pages

    async def wasted(self) -> int:
        """Return what the client's worker counts."""
        assert self._set is not None
        return (await self._set.hypervisor.client(CLIENT)).counters.read_ahead_wasted_pages


class FarpageInPython(Farpage):
    """The same without compiled loops."""

    name = "in Python"

    @asynccontextmanager
    async def ready(self, work: Work) -> AsyncIterator[None]:
        """Start the set without them."""
        before = os.environ.get(WITHOUT_VARIABLE)
        os.environ[WITHOUT_VARIABLE] = "1"
        try:
            async with super().ready(work):
                yield
        finally:
            if before is None:
                del os.environ[WITHOUT_VARIABLE]
            else:
                os.environ[WITHOUT_VARIABLE] = before


async def measure(pager: Pager, work: Work, seed: int) -> list[Measured]:
    """Run all phases once under one contender.

    :raise WrongPages: it gave back something else than was written.
    """
    measured = []
    async with (
        pager.ready(work),
        await Toucher.start(work.program, pager.kind, work.memory_bytes, seed, work.folder) as toucher,
    ):
        if work.cpu is not None:
            confine(toucher.pid, frozenset([work.cpu]))  # its threads, which it has yet to start, inherit it
        await pager.take(toucher, work)
        for phase in work.phases:
            if phase.warmed:
                await toucher.run(phase, work.seconds)
            before, wasted_before = await pager.page_ins(), await pager.wasted()
            report = await toucher.run(phase, work.seconds)
            if report.wrong_pages:
                raise WrongPages(pager.name, report.wrong_pages, phase.name)
            page_ins, wasted = await pager.page_ins() - before, await pager.wasted() - wasted_before
            measured.append(Measured(phase, report, page_ins, wasted))
    return measured
