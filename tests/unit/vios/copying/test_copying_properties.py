"""Random interleavings of a client, fills with old contents, losses of the relay and of the VIOS."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.simulated_loop import SimulatedLoop
from tests.unit.vios.copying.model import PAGE, PAGES, Change, CopyRig

spans = st.tuples(st.integers(0, PAGES - 1), st.integers(1, 4)).map(
    lambda span: range(span[0], min(PAGES, span[0] + span[1]))
)
picks = st.integers(0, 1000)
rarely = st.integers(0, 4).map(lambda number: number == 4)


class CopyingMachine(RuleBasedStateMachine):
    """Every read returns the newest acknowledged change of its page, or one in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = SimulatedLoop()
        self.changes: list[Change] = []
        self.under_way: list[Change] = []
        self.buffers: list[tuple[int, bytes]] = []
        """What the intermediate client has read and not filled yet."""
        self.instant = 0
        self.values = 0
        self.problems: list[str] = []
        self.tasks: list[asyncio.Task[bool]] = []
        self.connection = 0
        """Nobody hears any more of what was asked over an earlier one."""

    def run(self, step: Callable[[], None]) -> None:
        async def main() -> None:
            step()
            await self.rig.settle()

        self.loop.run_until_complete(main())

    def now(self) -> int:
        self.instant += 1
        return self.instant

    @initialize(seed=picks)
    def begin(self, seed: int) -> None:
        async def make() -> CopyRig:
            return CopyRig()

        self.rig = self.loop.run_until_complete(make())
        self.random = random.Random(seed)
        for page in range(PAGES):
            value = self.random.choice([0, 200 + page])
            self.rig.old.content[page * PAGE : (page + 1) * PAGE] = bytes([value]) * PAGE
            self.changes.append(Change(range(page, page + 1), value, 0, 0))
        self.rig.new.hold = True

    # The client

    @rule(pages=spans, zero=st.booleans())
    def write(self, pages: range, zero: bool) -> None:
        self.values = self.values % 190 + 1
        value = 0 if zero else self.values
        change = Change(pages, value, self.now(), None, memoryview(bytes([value]) * (PAGE * len(pages))))
        self.changes.append(change)
        self.under_way.append(change)
        self.run(lambda: self.start(change))

    def start(self, change: Change) -> None:
        connection = self.connection

        def done(error: int) -> None:
            if not error and connection == self.connection:
                change.ended = self.now()
                self.under_way.remove(change)

        offset, length = change.pages.start * PAGE, len(change.pages) * PAGE
        if change.value:
            self.rig.volume.write(offset, change.data, done)
        else:
            self.rig.volume.zero(offset, length, done)

    @rule(pages=spans)
    def read(self, pages: range) -> None:
        self.run(lambda: self.start_read(pages))

    def start_read(self, pages: range) -> None:
        began, connection = self.now(), self.connection

        def done(error: int, payload: memoryview | None) -> None:
            if error or payload is None or connection != self.connection:
                return
            ended = self.now()
            for place, page in enumerate(pages):
                content = bytes(payload[place * PAGE : (place + 1) * PAGE])
                self.check(page, content, began, ended)

        self.rig.volume.read(pages.start * PAGE, len(pages) * PAGE, done)

    def check(self, page: int, content: bytes, began: int, ended: int) -> None:
        of_page = [change for change in self.changes if page in change.pages]
        replaced = max((c.began for c in of_page if c.ended is not None and c.ended < began), default=0)
        may = {c.value for c in of_page if c.began <= ended and (c.ended is None or c.ended >= replaced)}
        if content[0] not in may or content != content[:1] * PAGE:
            self.problems.append(f"page {page} is {content[0]}, not one of {sorted(may)}")

    # The intermediate client

    @rule(pages=spans)
    def intermediary_reads(self, pages: range) -> None:
        start, end = pages.start * PAGE, pages.stop * PAGE
        self.buffers.append((start, bytes(self.rig.old.content[start:end])))

    @precondition(lambda self: self.buffers)
    @rule(pick=picks)
    def intermediary_fills(self, pick: int) -> None:
        offset, content = self.buffers.pop(pick % len(self.buffers))
        self.run(lambda: self.rig.fills.write(offset, memoryview(content), lambda _error: None))

    @rule(pages=spans)
    def intermediary_fills_holes(self, pages: range) -> None:
        start, end = pages.start * PAGE, pages.stop * PAGE
        if not any(self.rig.old.content[start:end]) and not self.under_way:
            self.run(lambda: self.rig.fills.zero(start, end - start, lambda _error: None))

    # What finishes

    @precondition(lambda self: self.rig.new.held)
    @rule(pick=picks)
    def new_device_finishes(self, pick: int) -> None:
        self.run(lambda: self.rig.new.release(pick % len(self.rig.new.held)))

    @precondition(lambda self: self.rig.link is not None and self.rig.link.commands)
    @rule(pick=picks)
    def old_device_finishes(self, pick: int) -> None:
        link = self.rig.link
        assert link is not None
        self.run(lambda: link.answer(pick))

    @rule()
    def everything_finishes(self) -> None:
        def finish() -> None:
            self.rig.new.release_all()
            while self.rig.link is not None and self.rig.link.commands:
                self.rig.link.answer(0)
            self.rig.new.release_all()

        self.run(finish)

    @rule()
    def presence_is_stored(self) -> None:
        async def begin() -> None:
            self.tasks.append(self.loop.create_task(self.rig.copy.store()))
            await self.rig.settle()

        self.loop.run_until_complete(begin())

    # What goes wrong

    @rule(rarely=rarely)
    def relay_is_lost(self, rarely: bool) -> None:
        if not rarely:
            return
        self.run(lambda: self.rig.lose_relay(lambda: self.random.random() < 0.5))

    @rule()
    def relay_is_back(self) -> None:
        async def back() -> None:
            self.rig.reachable = True
            await asyncio.sleep(2.0)

        self.loop.run_until_complete(back())

    @rule(rarely=rarely)
    def owner_comes_back(self, rarely: bool) -> None:
        """The owner's connection is cut, and what was in flight repeated on a new one."""
        if not rarely:
            return

        async def reconnect() -> None:
            self.connection += 1
            old = self.rig.volume
            old.give_up()
            await self.rig.settle()
            # Nobody is let in before the commands at the device are finished.
            self.rig.new.hold = False
            self.rig.new.release_all()
            await self.rig.settle()
            self.rig.new.release_all()
            self.rig.new.hold = True
            await self.rig.relay_closed(old)
            self.rig.open()
            for change in self.under_way:
                self.start(change)
            await self.rig.settle()

        self.loop.run_until_complete(reconnect())

    @rule(rarely=rarely)
    def vios_is_killed(self, rarely: bool) -> None:
        """Its system calls are carried out or not; its memory is gone, and so are its connections."""
        if not rarely:
            return

        async def restart() -> None:
            self.connection += 1
            for task in self.tasks:
                task.cancel()
            self.tasks.clear()
            for step in self.rig.kill():
                if self.random.random() < 0.5:
                    step()
            self.buffers.clear()  # the fill connection was lost
            self.rig.start()
            for change in self.under_way:
                self.start(change)
            await self.rig.settle()

        self.loop.run_until_complete(restart())

    @invariant()
    def no_read_was_wrong(self) -> None:
        assert not self.problems, self.problems

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        try:
            self.loop.run_until_complete(self.finish())
        finally:
            self.loop.run_until_complete(self.cancel_all())
            self.loop.close()

    async def cancel_all(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def finish(self) -> None:
        """Finish everything, copy the rest, and compare both devices with each other and the history."""
        rig = self.rig
        await rig.quiesce()
        assert not self.under_way, "a change hangs"
        rig.new.hold = False
        for page in range(PAGES):
            self.start_read(range(page, page + 1))
        await rig.quiesce()
        content = bytes(rig.old.content)
        errors: list[int] = []
        rig.fills.write(0, memoryview(content), errors.append)
        await rig.quiesce()
        assert errors == [0]
        assert rig.copy.presence.complete
        assert bytes(rig.new.content) == bytes(rig.old.content)
        began = self.now()
        for page in range(PAGES):
            self.check(page, bytes(rig.new.content[page * PAGE : (page + 1) * PAGE]), began, self.now())
        rig.copy.finished = True
        rig.relay.drop()
        written = rig.write(3, 199)
        assert written == [0]
        assert rig.read(3) == [[199]]
        assert not self.problems, self.problems
        await rig.volume.close()
        await rig.copy.close()


TestCopying = CopyingMachine.TestCase
TestCopying.settings = settings(
    max_examples=int(os.environ.get("COPYING_EXAMPLES", "20")), stateful_step_count=50, deadline=None
)
