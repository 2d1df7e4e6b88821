"""Live migration of a guest between two hypervisors: its pages left on the device, beside QEMU's pre-copy.

    python -m bench.migrate [--memory 256M] [--fill 160M] [--limit 64M] [--shrink 16M] [--dir DIR] [--json]

The same guest - Linux under QEMU (TCG), which fills memory, checks and rewrites it all the time - is migrated
to another QEMU process of the host, in five ways:

- `pre-copy`: QEMU's own, without farpage, while the guest runs;
- `copied`: the same of a guest that is stopped for it, so that each page goes through the stream once;
- `copied, paged`: the same of a guest that farpage pages to `--limit` at both ends: the stream reads every
  page that is out back in, and the other end pages it out again;
- `handed over`: QEMU leaves shared memory out of its stream (`x-ignore-shared`); one hypervisor releases the
  guest's pages where they are, on the device, and the other one adopts them;
- `handed over, shrunk`: the same, with the limit lowered to `--shrink` two seconds before, while it runs.

Under TCG a guest that runs does not always survive QEMU's pre-copy: then no page is verified after it. It is
given `thread=single`, with which that is rarer.

The exit status is 0, or 1 when a guest found a wrong page.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from bench._command import carry_out
from bench._machine import describe_disk, describe_machine, describe_placement
from bench._published import BenchResult, Panel, Summary, add_options
from bench._rounds import Spread
from farpage.definition.model import PAGE_BYTES
from farpage.embedded.control import HypervisorControl
from farpage.embedded.layout import StateLayout
from farpage.embedded.set import EmbeddedSet, SetSettings
from farpage.errors import FarpageError
from farpage.guest import migration
from farpage.guest.image import GuestImage, build_image
from farpage.guest.qemu import GuestOptions, QemuGuest
from farpage.guest.reports import PassDone
from farpage.hypervisor.model import ClientAdopt, ClientAttach, ClientInfo, ClientRelease, PoolSet
from farpage.terminal.sizes import parse_size

MIB: Final = 1 << 20
TIMEOUT_SECONDS: Final = 120.0
SHRINK_SECONDS: Final = 2.0
CLIENT: Final = "guest"
PASSES_BEFORE: Final = 1
PASSES_AFTER: Final = 2
SIZES: Final = ("memory", "fill", "limit", "shrink")
PRE_COPY: Final = "pre-copy"
COPIED_PAGED: Final = "copied, paged"
WAYS: Final = (PRE_COPY, "copied", COPIED_PAGED, "handed over", "handed over, shrunk")
SURVIVAL_SECONDS: Final = 20.0


Ends = tuple[QemuGuest, QemuGuest]
"""Source and destination."""


class Row(BaseModel):
    """One migration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    way: str
    downtime_ms: float
    """From the guest's stop at the source to its start at the destination, by the host's clock."""
    stream_bytes: int
    """Through QEMU's migration stream."""
    page_out_bytes: int
    """To the device, from the beginning of the migration until the guest runs again; both hypervisors."""
    page_in_pages: int
    """From the device, in the same time."""
    page_ins_stopped: int
    """Of these, while the guest stood."""
    handover_bytes: int
    """Length of the page table."""
    resident_bytes: int
    """At the destination when the guest begins to run there."""
    pages_verified: int
    """By the guest, after the migration."""
    pages_wrong: int


class MigrateResult(BenchResult):
    """Everything that a run found."""

    machine: str
    disk: str
    placement: str
    memory_bytes: int
    fill_bytes: int
    limit_bytes: int
    rows: tuple[Row, ...]

    @property
    def status(self) -> int:
        """1 where a guest found a wrong page."""
        return 1 if any(row.pages_wrong for row in self.rows) else 0

    def as_text(self) -> str:
        """Return a table in Markdown."""
        lines = [
            f"{self.machine}; {self.disk}; {self.placement}; guest of {self.memory_bytes // MIB} MiB with "
            f"{self.fill_bytes // MIB} MiB in use, paged to {self.limit_bytes // MIB} MiB",
            "",
            "| migration | downtime, ms | stream, MiB | page-outs, MiB | page-ins | while it stood | "
            "page table, KiB | resident after, MiB | pages verified after | wrong |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {row.way} | {row.downtime_ms:.0f} | {row.stream_bytes / MIB:.1f} | "
            f"{row.page_out_bytes / MIB:.1f} | {row.page_in_pages} | {row.page_ins_stopped} | "
            f"{row.handover_bytes / 1024:.0f} | {row.resident_bytes / MIB:.0f} | {row.pages_verified} | "
            f"{row.pages_wrong} |"
            for row in self.rows
        ]
        return "\n".join(lines)

    def summary(self) -> Summary:
        """Return what is published."""
        context = {
            "machine": self.machine,
            "placement": self.placement,
            "disk": self.disk,
            "guest": f"{self.memory_bytes // MIB} MiB, {self.fill_bytes // MIB} MiB in use, "
            f"paged to {self.limit_bytes // MIB} MiB",
        }
        panels = (
            Panel("downtime", "ms", {row.way: Spread.of([row.downtime_ms]) for row in self.rows}),
            Panel(
                "stream",
                "MiB",
                {row.way: Spread.of([row.stream_bytes / MIB]) for row in self.rows},
                decimals=1,
            ),
        )
        return Summary("migrate", "Migrating a guest", context, panels)


@dataclass(frozen=True)
class Work:
    """What all migrations have in common."""

    image: GuestImage
    options: GuestOptions
    limit_bytes: int
    shrink_bytes: int


@dataclass(frozen=True)
class Hosts:
    """Two hypervisors on the same two VIOSes."""

    source: HypervisorControl
    destination: HypervisorControl
    handovers: tuple[Path, ...]
    """Where the VIOSes keep page tables."""


@asynccontextmanager
async def two_hosts(folder: Path) -> AsyncIterator[Hosts]:
    """Run a set, and another hypervisor on its VIOSes."""
    embedded = EmbeddedSet(SetSettings(state_dir=folder / "set", workers=1))
    await embedded.start()
    try:
        layout = StateLayout.at(folder / "other")
        layout.create_root()
        document = layout.describe(()).model_copy(update={"vioses": embedded.document.vioses})
        layout.create(document)
        arguments = [sys.executable, "-m", "farpage", "hypervisor", "run", "other", "--workers", "1"]
        arguments += ["--dir", str(layout.hypervisor_dir)]
        for name, vios in embedded.document.vioses.items():
            arguments += ["--vios", f"{name}={vios.control}"]
        with (folder / "other.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(*arguments, stdout=log, stderr=log)
        try:
            async with HypervisorControl(document.hypervisor.control) as control:
                await _until_answers(control)
                folders = tuple(embedded.layout.vios_dir(vios) / "handovers" for vios in embedded.vioses)
                yield Hosts(embedded.hypervisor, control, folders)
        finally:
            process.terminate()
            await process.wait()
    finally:
        await embedded.stop()


async def _until_answers(control: HypervisorControl) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while True:
            try:
                await control.info()
            except FarpageError:
                await asyncio.sleep(0.05)
            else:
                return


class _Meter:
    """Page-ins and page-outs of both hypervisors since the beginning."""

    def __init__(self, *clients: tuple[HypervisorControl, str]) -> None:
        self._clients = clients
        self._last: dict[int, ClientInfo] = {}
        self._first = (0, 0)

    async def begin(self) -> None:
        """Count from here on."""
        self._first = await self._sum()

    async def read(self) -> tuple[int, int]:
        """Return pages in and pages out since `begin`."""
        now = await self._sum()
        return now[0] - self._first[0], now[1] - self._first[1]

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Look again and again: a client that is released takes its counts with it."""

        async def watch() -> None:
            while True:
                await self._sum()
                await asyncio.sleep(0.005)

        task = asyncio.get_running_loop().create_task(watch())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _sum(self) -> tuple[int, int]:
        for number, (control, client) in enumerate(self._clients):
            try:
                info = await control.client(client)
            except FarpageError:
                continue
            if info.attachment != "none":  # what was counted before the end of an attachment stays
                self._last[number] = info
        counters = [info.counters for info in self._last.values()]
        return sum(c.page_in_pages for c in counters), sum(c.page_out_pages for c in counters)


async def _verified(guest: QemuGuest, passes: int) -> tuple[int, int]:
    """Wait for so many passes that the guest has still to report; return pages verified, and wrong ones."""
    known = len([report for report in guest.reports if isinstance(report, PassDone)])
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while True:
            done = [report for report in guest.reports if isinstance(report, PassDone)][known:]
            if len(done) >= passes:
                return sum(one.pages for one in done), sum(one.wrong for one in done)
            await asyncio.sleep(0.05)


async def migrate(way: str, work: Work, hosts: Hosts) -> Row:
    """Boot a guest and migrate it one way.

    :raise FarpageError: something of it does not work.
    """
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fpm-", dir="/tmp")))
        ends = []
        for name, incoming in (("source", False), ("destination", True)):
            (folder / name).mkdir()
            options = replace(work.options, incoming=incoming, single_threaded=way == PRE_COPY)
            ends.append(await stack.enter_async_context(QemuGuest(work.image, options, folder / name)))
        source, destination = ends
        await source.wait_for(lambda found: isinstance(found, PassDone), TIMEOUT_SECONDS)
        if way not in (PRE_COPY, "copied"):
            await hosts.source.attach(CLIENT, ClientAttach(pid=source.pid, limit_bytes=work.limit_bytes))
        await _verified(source, PASSES_BEFORE)
        if way == COPIED_PAGED:
            wanted = ClientAttach(pid=destination.pid, limit_bytes=work.limit_bytes)
            await hosts.destination.attach(f"{CLIENT}-copy", wanted)
        if not way.startswith("handed over"):
            return await _pre_copied(way, (source, destination), hosts, folder)
        return await _handed_over(way, (source, destination), hosts, work, folder)


async def _pre_copied(way: str, ends: Ends, hosts: Hosts, folder: Path) -> Row:
    source, destination = ends
    meter = _Meter((hosts.source, CLIENT), (hosts.destination, f"{CLIENT}-copy"))
    await meter.begin()
    began_seconds = time.monotonic()
    if way != PRE_COPY:
        await source.qmp("stop")
    moved = await migration.pre_copy(
        source, destination, str(folder / "stream"), TIMEOUT_SECONDS, resume=way != PRE_COPY
    )
    stopped_seconds = time.monotonic() - began_seconds
    page_ins, page_outs = await meter.read()
    resident_bytes = 0
    if way == COPIED_PAGED:
        resident_bytes = (await hosts.destination.client(f"{CLIENT}-copy")).resident_bytes
    verified = wrong = 0
    try:
        async with asyncio.timeout(SURVIVAL_SECONDS if way == PRE_COPY else TIMEOUT_SECONDS):
            verified, wrong = await _verified(destination, PASSES_AFTER)
    except TimeoutError:
        print(f"{way}: the guest has not survived it", file=sys.stderr, flush=True)
    return Row(
        way=way,
        downtime_ms=(moved.downtime_seconds if way == PRE_COPY else stopped_seconds) * 1e3,
        stream_bytes=moved.stream_bytes,
        page_out_bytes=page_outs * PAGE_BYTES,
        page_in_pages=page_ins,
        page_ins_stopped=page_ins,
        handover_bytes=0,
        resident_bytes=resident_bytes,
        pages_verified=verified,
        pages_wrong=wrong,
    )


async def _handed_over(way: str, ends: Ends, hosts: Hosts, work: Work, folder: Path) -> Row:
    source, destination = ends
    for guest in (source, destination):
        await migration.capabilities(guest, migration.IGNORE_SHARED)
    meter = _Meter((hosts.source, CLIENT), (hosts.destination, CLIENT))
    await meter.begin()
    if way.endswith("shrunk"):
        await hosts.source.set_pool(PoolSet(client=CLIENT, limit_bytes=work.shrink_bytes))
        await asyncio.sleep(SHRINK_SECONDS)
    devices = folder / "devices"
    began_seconds = time.monotonic()
    await migration.save_devices(source, str(devices), TIMEOUT_SECONDS)
    ins_before, _ = await meter.read()
    async with meter.watching():
        await hosts.source.release(CLIENT, ClientRelease(qmp=source.qmp_socket))
    await hosts.destination.adopt(CLIENT, ClientAdopt())
    handover_bytes = max(path.stat().st_size for kept in hosts.handovers for path in kept.iterdir())
    await hosts.destination.attach(CLIENT, ClientAttach(pid=destination.pid, limit_bytes=work.limit_bytes))
    await migration.load_devices(destination, str(devices), TIMEOUT_SECONDS)
    downtime_seconds = time.monotonic() - began_seconds
    page_ins, page_outs = await meter.read()
    info = await hosts.destination.client(CLIENT)
    verified, wrong = await _verified(destination, PASSES_AFTER)
    return Row(
        way=way,
        downtime_ms=downtime_seconds * 1e3,
        stream_bytes=devices.stat().st_size,
        page_out_bytes=page_outs * PAGE_BYTES,
        page_in_pages=page_ins,
        page_ins_stopped=page_ins - ins_before,
        handover_bytes=handover_bytes,
        resident_bytes=info.resident_bytes,
        pages_verified=verified,
        pages_wrong=wrong,
    )


async def run(work: Work, disk: Path) -> MigrateResult:
    """Migrate in every way, each between hypervisors of its own.

    :raise FarpageError: something of it does not work.
    """
    rows = []
    for way in WAYS:
        print(way, file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="fpb-", dir=disk) as name:
            async with two_hosts(Path(name)) as hosts:
                rows.append(await migrate(way, work, hosts))
    return MigrateResult(
        machine=describe_machine(),
        disk=describe_disk(disk),
        placement=describe_placement(),
        memory_bytes=work.options.memory_mib * MIB,
        fill_bytes=work.options.fill_mib * MIB,
        limit_bytes=work.limit_bytes,
        rows=tuple(rows),
    )


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.migrate", description=str(__doc__).split("\n")[0])
    parser.add_argument("--memory", default="256M", metavar="SIZE", help="the guest's memory (%(default)s)")
    parser.add_argument("--fill", default="160M", metavar="SIZE", help="what it uses of it (%(default)s)")
    parser.add_argument("--limit", default="64M", metavar="SIZE", help="most of it resident (%(default)s)")
    parser.add_argument("--shrink", default="16M", metavar="SIZE", help="the limit lowered (%(default)s)")
    parser.add_argument("--dir", default=Path("/var/tmp"), type=Path, help="folder on the disk (%(default)s)")
    add_options(parser)
    options = parser.parse_args()

    def begin() -> Coroutine[Any, Any, MigrateResult]:
        sizes = {name: parse_size(getattr(options, name), field=f"--{name}") for name in SIZES}
        work = Work(
            image=build_image(),
            options=GuestOptions(memory_mib=sizes["memory"] // MIB, fill_mib=sizes["fill"] // MIB),
            limit_bytes=sizes["limit"],
            shrink_bytes=sizes["shrink"],
        )
        return run(work, options.dir)

    return carry_out(options, begin)


if __name__ == "__main__":
    sys.exit(main())
