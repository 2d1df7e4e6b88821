"""Runs the demo: starts the set and the guest, carries out the script's actions, gathers the result."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from farpage.demo.guests import CLIENT, DemoGuest, GuestSettings
from farpage.demo.resident import Memfd, ResidentWatch
from farpage.demo.scenario import Action, Observation, Scenario, Stage
from farpage.demo.verdict import (
    DemoResult,
    Failover,
    Fault,
    FaultKind,
    PassCounts,
    Verdict,
    find_problems,
    match_failovers,
)
from farpage.demo.view import Snapshot, View
from farpage.embedded.child import ChildEvent
from farpage.embedded.set import EmbeddedSet, SetSettings
from farpage.errors import ExitStatus, FarpageError
from farpage.hypervisor.model import ClientInfo

POLL_SECONDS = 0.05
RESIDENT_SAMPLE_SECONDS = 0.02
ASK_SECONDS = 0.25
"""Asking the hypervisor costs it and us some milliseconds, which are not to slow the guest down."""
PROGRESS_SECONDS = 120.0
"""A guest that makes no pass, in a script that does not move on, for longer than this is stuck."""

MakeGuest = Callable[[GuestSettings, Callable[[str], None]], DemoGuest]


@dataclass(frozen=True)
class DemoSettings:
    """What the demo runs with; `folder` is an empty folder for its state."""

    folder: Path
    make_guest: MakeGuest
    memory_bytes: int
    fill_bytes: int
    limit_bytes: int


class Demo:
    """One run of the demo."""

    def __init__(self, settings: DemoSettings, view: View) -> None:
        self._settings = settings
        self._view = view
        self._start_seconds = time.monotonic()
        self._set = EmbeddedSet(SetSettings(state_dir=settings.folder), self._child_event)
        self._guest = settings.make_guest(
            GuestSettings(settings.folder, settings.memory_bytes, settings.fill_bytes), self._event
        )
        self._scenario = Scenario(settings.limit_bytes)
        self._resident = ResidentWatch(settings.limit_bytes)
        self._client: ClientInfo | None = None
        self._attached = False
        self._faults: list[Fault] = []
        self._fault_passes: list[int] = []
        self._memory: Memfd | None = None
        self._restarting: asyncio.Task[None] | None = None

    async def run(self) -> DemoResult:
        """Run from start to verdict; everything that was started has ended on return, also on an error.

        :raise FarpageError: the set or the guest could not be started.
        """
        async with AsyncExitStack() as cleanup:
            cleanup.push_async_callback(self._set.stop)
            await self._set.start()
            cleanup.push_async_callback(self._guest.stop)
            await self._guest.start(self._set)
            self._attached = self._guest.paged_from_start
            sampler = asyncio.get_running_loop().create_task(self._sample_resident())
            cleanup.push_async_callback(_end, sampler)
            cleanup.push_async_callback(self._end_restart)
            problem = ""
            try:
                await self._play()
            except FarpageError as error:
                if self._guest.filled is None:
                    raise
                problem = str(error)
                self._event(problem)
            await self._ask_client()
            return self._result(problem)

    async def _play(self) -> None:
        place, since, asked = self._place(), time.monotonic(), 0.0
        while True:
            self._guest.poll()
            moved = self._place() != place
            if moved or time.monotonic() - asked > ASK_SECONDS:
                await self._ask_client()
                self._view.update(self._snapshot())
                asked = time.monotonic()
            if any(report.pages_wrong for report in self._guest.passes):
                return
            action = self._scenario.next_action(self._observe())
            if action is Action.FINISH:
                return
            if action is not None:
                await self._carry_out(action)
            if self._restarting is not None and self._restarting.done():
                self._restarting.result()
            if moved:
                place, since = self._place(), time.monotonic()
            elif time.monotonic() - since > PROGRESS_SECONDS:
                raise DemoStuck(str(self._scenario.stage), int(PROGRESS_SECONDS))
            await asyncio.sleep(POLL_SECONDS)

    def _place(self) -> tuple[Stage, int]:
        """How far script and guest have come."""
        return self._scenario.stage, len(self._guest.passes)

    def _observe(self) -> Observation:
        paths = {} if self._client is None else {path.vios: path.state for path in self._client.paths}
        return Observation(
            filled=self._guest.filled is not None,
            passes=len(self._guest.passes),
            resident_bytes=self._resident.latest_bytes if self._memory else self._settings.memory_bytes,
            paths=paths,
        )

    async def _carry_out(self, action: Action) -> None:
        match action:
            case Action.LIMIT:
                await self._limit()
            case Action.KILL:
                self._kill()
            case Action.RESTART:
                self._restart()
            case Action.HANG:
                self._hang()
            case Action.CONTINUE:
                self._continue()

    async def _limit(self) -> None:
        self._event(f"the guest may keep {self._settings.limit_bytes >> 20} MiB resident from now on")
        await self._guest.limit(self._set, self._settings.limit_bytes)
        self._attached = True
        self._memory = Memfd(await self._guest.memory_pids(self._set), self._settings.memory_bytes)

    def _kill(self) -> None:
        vios = self._scenario.killed
        assert vios is not None
        self._set.supervise_vios(vios, False)
        self._fault(FaultKind.SIGKILL, vios)

    def _restart(self) -> None:
        vios = self._scenario.killed
        assert vios is not None
        self._event(f"{vios} is started again")
        # In the background: the guest is not to be left unwatched meanwhile.
        self._restarting = asyncio.get_running_loop().create_task(self._set.start_vios(vios))

    def _hang(self) -> None:
        assert self._scenario.hung is not None
        self._fault(FaultKind.SIGSTOP, self._scenario.hung)

    def _continue(self) -> None:
        assert self._scenario.hung is not None
        self._event(f"SIGCONT to {self._scenario.hung}")
        self._set.kill_vios(self._scenario.hung, signal.SIGCONT)

    def _fault(self, kind: FaultKind, vios: str) -> None:
        at_seconds = time.monotonic()
        self._set.kill_vios(vios, signal.Signals[kind.upper()])
        self._faults.append(Fault(kind=kind, vios=vios, at_seconds=at_seconds))
        self._fault_passes.append(len(self._guest.passes))
        self._event(f"{kind.upper()} to {vios}, whose path is active")

    async def _ask_client(self) -> None:
        if not self._attached:
            return
        before = self._client
        # A region becomes a client a moment after its process has started.
        found = [client for client in await self._set.hypervisor.clients() if client.name == CLIENT]
        if not found:
            return
        self._client = found[0]
        states = {path.vios: path.state for path in before.paths} if before else {}
        for path in self._client.paths:
            if states.get(path.vios) != path.state:
                self._event(
                    f"path over {path.vios}: {path.state}" + (f" ({path.reason})" if path.reason else "")
                )

    async def _sample_resident(self) -> None:
        while True:
            if self._memory is not None:
                self._resident.sample(self._memory.resident_bytes)
            await asyncio.sleep(RESIDENT_SAMPLE_SECONDS)

    async def _end_restart(self) -> None:
        if self._restarting is not None:
            await _end(self._restarting)
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _failovers(self) -> tuple[Failover, ...]:
        seen = () if self._client is None else self._client.failovers
        gaps: list[float | None] = []
        for completed in self._fault_passes:
            known = [
                report.longest_gap_ms
                for report in self._guest.passes[completed : completed + 2]
                if report.longest_gap_ms is not None
            ]
            gaps.append(max(known, default=None))
        return match_failovers(self._faults, seen, gaps)

    def _result(self, problem: str) -> DemoResult:
        reports = self._guest.passes
        counters = None if self._client is None else self._client.counters
        passes = self._scenario.passes(len(reports))
        failovers = self._failovers()
        verified = sum(report.pages_verified for report in reports)
        wrong = sum(report.pages_wrong for report in reports)
        problems = [problem] if problem else []
        problems += find_problems(
            pages_verified=verified,
            pages_wrong=wrong,
            resident_bytes_max=self._resident.max_bytes,
            limit_bytes=self._settings.limit_bytes,
            passes=passes,
            failovers=failovers,
        )
        return DemoResult(
            guest=self._guest.kind,
            pages_total=self._guest.pages_total,
            pages_verified=verified,
            pages_wrong=wrong,
            page_ins=0 if counters is None else counters.page_in_pages,
            page_outs=0 if counters is None else counters.page_out_pages,
            limit_bytes=self._settings.limit_bytes,
            resident_bytes_max=self._resident.max_bytes,
            passes=PassCounts(before=passes.before, during=passes.during, after=passes.after),
            failovers=failovers,
            paths={} if self._client is None else {path.vios: path.state for path in self._client.paths},
            seconds=round(self._elapsed(), 1),
            verdict=Verdict.FAILED if problems else Verdict.OK,
            problems=tuple(problems),
        )

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            elapsed_seconds=self._elapsed(),
            stage=self._scenario.stage,
            passes=len(self._guest.passes),
            pages_verified=sum(report.pages_verified for report in self._guest.passes),
            pages_wrong=sum(report.pages_wrong for report in self._guest.passes),
            memory_bytes=self._settings.memory_bytes,
            limit_bytes=self._settings.limit_bytes,
            resident_bytes=self._resident.latest_bytes,
            resident_bytes_max=self._resident.max_bytes,
            client=self._client,
        )

    def _elapsed(self) -> float:
        return time.monotonic() - self._start_seconds

    def _event(self, message: str) -> None:
        self._view.event(self._elapsed(), message)

    def _child_event(self, event: ChildEvent) -> None:
        self._event(f"{event.child}: {event.message}")


@dataclass(eq=False)
class DemoStuck(FarpageError):
    """The demo waited too long for something."""

    code = "demo_stuck"
    template = "nothing has moved for {seconds} s in the stage: {stage}"
    remedy = "run with --state DIR and look into the logs there"
    exit_status = ExitStatus.FAILURE
    stage: str
    seconds: int


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
