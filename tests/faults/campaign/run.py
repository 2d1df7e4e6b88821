"""A campaign: a seed's faults, one after another, until the time is over; then a last look at everything."""

from __future__ import annotations

import asyncio
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from farpage.embedded.child import ChildEvent
from tests.faults.campaign.busy import ClientDied
from tests.faults.campaign.injection import INJECTIONS, Injection, possible_kinds
from tests.faults.campaign.place import Place, left_behind, new_token, running_place
from tests.faults.campaign.report import Injected, Outcome, longest_stalls
from tests.faults.campaign.schedule import Kind, Step, may_join, steps

HANG_SECONDS = 60.0
"""Nothing that the schedule does may keep an access, or the set from being whole, for so long."""
WATCH_SECONDS = 0.25
LOOK_SECONDS = 0.1
MORE_DESCRIPTORS = 16
"""Connections come and go; more of them than this above the beginning are a leak."""
THREAD_DESCRIPTORS = 4
"""What a connection has more where a thread of its own serves it; they come and go with its socket."""


@dataclass(frozen=True)
class CampaignOptions:
    """What a campaign is."""

    seed: int
    seconds: float
    path_timeout_seconds: float = 1.0
    kinds: frozenset[Kind] = frozenset(Kind)
    parent: Path = Path("/tmp")
    """Where the devices and everything else lie."""


class Hang(Exception):
    """Something has not come back in time."""


@dataclass
class Campaign:
    """A campaign that is under way."""

    place: Place
    outcome: Outcome
    events: list[ChildEvent]
    tell: Callable[[str], None]
    told_to_end: Callable[[], bool] = lambda: False
    """Asked before each fault."""
    in_force: dict[int, Injection] = field(default_factory=dict)
    _mending: list[asyncio.Task[None]] = field(default_factory=list)
    _descriptors: dict[str, Counter[str]] = field(default_factory=dict)
    _open: list[Injected] = field(default_factory=list)

    async def run(self, options: CampaignOptions) -> None:
        """Do the faults of a seed until the time is over, and wait until the set is whole.

        :raise Hang: it is not, or something else that should come back has not.
        :raise ClientDied: a client ended.
        """
        loop = asyncio.get_running_loop()
        for busy in self.place.clients.values():
            busy.go()
        await self._until_whole()
        self._descriptors = self.place.descriptors()
        end = loop.time() + options.seconds
        for step in steps(options.seed, options.kinds & possible_kinds(self.place)):
            if loop.time() >= end or self.told_to_end():
                break
            await (self._alone(step) if step.alone else self._together(step))
        await self._until_whole()

    async def _alone(self, step: Step) -> None:
        await self._until_whole()
        await asyncio.sleep(step.gap_seconds)
        injection = INJECTIONS[step.fault.kind](self.place, step.fault)
        await injection.prepare()
        await self._do(injection, alone=True)
        await self._until_whole()

    async def _together(self, step: Step) -> None:
        await asyncio.sleep(step.gap_seconds)
        # What is known of the set only helps to choose a target; it need not be whole.
        await self.place.look()
        injection = INJECTIONS[step.fault.kind](self.place, step.fault)
        async with asyncio.timeout(HANG_SECONDS):
            while not may_join(injection.occupies, [other.occupies for other in self.in_force.values()]):
                await asyncio.sleep(LOOK_SECONDS)
        self.in_force[step.fault.number] = injection
        # Whether it failed shows when the set is to be whole.
        self._mending.append(asyncio.get_running_loop().create_task(self._do(injection, alone=False)))

    async def _do(self, injection: Injection, *, alone: bool) -> None:
        fault = injection.fault
        now = asyncio.get_running_loop().time
        injected = Injected(fault.kind, injection.target, alone, fault.hold_seconds, now())
        self.outcome.faults.append(injected)
        self._open.append(injected)
        how = "alone" if alone else "together"
        self.tell(f"{fault.number:5} {fault.kind} {injection.target} for {fault.hold_seconds:.2f} s, {how}")
        injection.inject()
        await asyncio.sleep(fault.hold_seconds)
        await injection.mend()
        if injection.starts_again:
            injected.restarted_seconds = max(
                event.time_seconds
                for event in self.events
                if event.child == injection.starts_again and event.message.startswith("started")
            )
        self.in_force.pop(fault.number, None)

    async def _until_whole(self) -> None:
        await asyncio.gather(*self._mending)
        self._mending.clear()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + HANG_SECONDS
        while missing := await self.place.look():
            if loop.time() > deadline:
                raise Hang(f"the set was not whole again after {HANG_SECONDS:g} s: {missing}")
            await asyncio.sleep(LOOK_SECONDS)
        for injected in self._open:
            injected.end_seconds = loop.time()
            if injected.alone and (felt := longest_stalls(injected, self.place.findings.stalls)):
                self.tell(f"      longest stalls: {felt}")
        self._open.clear()
        self._compare_descriptors()

    def _compare_descriptors(self) -> None:
        for name, now in self.place.descriptors().items():
            before = self._descriptors.get(name, now)
            sockets = max(now["socket"] - before["socket"], 0)
            if now.total() > before.total() + MORE_DESCRIPTORS + sockets * THREAD_DESCRIPTORS:
                more = ", ".join(f"{count} {what}" for what, count in (now - before).most_common(8))
                self.outcome.leaks.append(
                    f"{name} has {now.total()} descriptors, at the beginning {before.total()}; more: {more}"
                )
                self._descriptors[name] = now

    async def watch(self) -> None:
        """Look after the clients for as long as the campaign runs.

        :raise Hang: an access waits too long.
        :raise ClientDied: a client ended.
        """
        now = asyncio.get_running_loop().time
        while True:
            for name, busy in list(self.place.clients.items()):
                if busy.died:
                    raise ClientDied(f"client {name!r} {busy.died}")
                since = busy.waiting_since_seconds
                if since is not None and now() - since > HANG_SECONDS:
                    raise Hang(f"an access of client {name!r} waits since {now() - since:.0f} s")
            await asyncio.sleep(WATCH_SECONDS)


async def run_campaign(
    options: CampaignOptions, tell: Callable[[str], None], told_to_end: Callable[[], bool] = lambda: False
) -> Outcome:
    """Run a whole campaign, hearing of each fault by `tell`; returns what it found.

    It ends before its time, as it does in time, when it is `told_to_end`.
    """
    begin = asyncio.get_running_loop().time()
    token = new_token()
    outcome = Outcome(options.seconds, options.path_timeout_seconds)
    events: list[ChildEvent] = []
    async with running_place(options.seed, options.path_timeout_seconds, events, options.parent) as place:
        campaign = Campaign(place, outcome, events, tell, told_to_end)
        try:
            await _first_to_end(campaign.run(options), campaign.watch())
            for name in list(place.clients):
                await place.finish_client(name)
        except Exception as problem:  # whatever ended it, what was found until then is told
            outcome.hangs.append(f"{type(problem).__name__}: {problem}")
            tell("".join(traceback.format_exception(problem)))
        outcome.reads, outcome.writes = place.reads, place.writes
        outcome.damaged_pages, outcome.repaired_pages = place.damaged_pages, place.repaired_pages
        outcome.stalls, outcome.wrong = place.findings.stalls, place.findings.wrong
        if told_to_end():
            outcome.seconds = asyncio.get_running_loop().time() - begin
    outcome.leaks += left_behind(token)
    return outcome


async def _first_to_end(*work: Coroutine[Any, Any, None]) -> None:
    """Run them side by side until one ends or fails, and cancel the others."""
    tasks = [asyncio.get_running_loop().create_task(one) for one in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
