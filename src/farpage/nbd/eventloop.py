"""asyncio's event loop with a short cut for readers whose work leaves nothing behind for the loop.

A turn of asyncio's loop costs about as much as answering a page's read. `DataPlaneLoop` is the same loop
over a selector that calls *direct* readers itself, while it waits: as long as they schedule nothing on the
loop, and nothing else is ready or due, it goes on waiting without a turn of the loop. What they want done
once after all of them, they leave with `defer`; what nobody waits for, with `later`, so that it is done while
a disk is at work and not while a client waits. Everything else works as ever:

    with asyncio.Runner(loop_factory=DataPlaneLoop) as runner:
        runner.run(main())

That is sound because the loop asks its selector to wait (a timeout other than 0) only when no callback is
ready, and for no longer than until its next timer.
"""

from __future__ import annotations

import asyncio
import math
import select
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextvars import Context
from time import perf_counter
from typing import Any, Final, Protocol, TypeAlias, TypeVar, TypeVarTuple

from farpage.nbd.polling import POLL_SECONDS, Polling

DirectReader: TypeAlias = Callable[[], object]
"""Called when the descriptor is readable."""


Readable: TypeAlias = socket.socket | int
"""A socket, or a descriptor of another kind."""
Arguments = TypeVarTuple("Arguments")
LATER_SECONDS: Final = 0.001
"""When no event comes, what was left for later is done after this."""
_EVENTS_MAX: Final = 64
"""Descriptors that one wait tells of; epoll turns to the others the next time."""


class Waiter(Protocol):
    """Waits in the place of epoll, and sees to some events by itself meanwhile."""

    def poll(self, seconds: float, may_look: bool, /) -> list[tuple[int, int]]:
        """Return `(descriptor, events)` of what happens within that time, negative for ever.

        With `may_look` the first moment of it may be polled.
        """

    def glance(self) -> None:
        """See to those events now, without waiting: what is done between two waits takes long."""

    def fileno(self) -> int:
        """Return the descriptor under which `poll` tells that `attend` is to be called."""

    def attend(self) -> None:
        """Have done what it could not do by itself."""


SomeWaiter = TypeVar("SomeWaiter", bound=Waiter)


class DirectSelector(selectors.BaseSelector):
    """An epoll selector that calls direct readers from within `select`."""

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        """Prepare; `failed` is told what a direct reader raised."""
        self._failed = failed
        self._epoll = select.epoll()
        self._keys: dict[int, selectors.SelectorKey] = {}
        self._direct: dict[int, DirectReader] = {}
        self._masks: dict[int, int] = {}
        self._polling = Polling()
        self._waiter: Waiter | None = None
        self.disturbed = False
        """Whether anything was scheduled on the loop since it began to wait."""
        self.dispatching = False
        """Whether direct readers are being called."""
        self.deferred: deque[Callable[[], object]] = deque()
        """Called after the direct readers that are being called."""
        self.later: list[Callable[[], object]] = []
        """Called after the events that come next."""

    def wait_with(self, make: Callable[[int], SomeWaiter | None]) -> SomeWaiter | None:
        """Have what `make` makes for the epoll descriptor wait from now on, if it makes anything."""
        waiter = make(self._epoll.fileno())
        if waiter is not None:
            self._waiter = waiter
            self.set_direct(waiter.fileno(), waiter.attend)
        return waiter

    def set_direct(self, descriptor: int, reader: DirectReader | None) -> None:
        """Have `reader` called while the descriptor is readable; None takes it back."""
        if reader is None:
            self._direct.pop(descriptor, None)
        else:
            self._direct[descriptor] = reader
        self._watch(descriptor)

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Watch a file object (see `selectors.BaseSelector`).

        :raise KeyError: it is registered already.
        """
        descriptor = _descriptor(fileobj)
        if descriptor in self._keys:
            raise KeyError(f"{fileobj!r} is already registered")
        key = self._keys[descriptor] = selectors.SelectorKey(fileobj, descriptor, events, data)
        self._watch(descriptor)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """Stop watching a file object.

        :raise KeyError: it is not registered.
        """
        key = self._keys.pop(_descriptor(fileobj))
        self._watch(key.fd)
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Change what a file object is watched for.

        :raise KeyError: it is not registered.
        """
        descriptor = _descriptor(fileobj)
        old = self._keys[descriptor]
        key = self._keys[descriptor] = selectors.SelectorKey(old.fileobj, descriptor, events, data)
        self._watch(descriptor)
        return key

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        """Return a file object's key.

        :raise KeyError: it is not registered.
        """
        return self._keys[_descriptor(fileobj)]

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """Return the keys by descriptor."""
        return self._keys

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait, and serve direct readers meanwhile; `timeout` in seconds, None for ever."""
        self.disturbed = False
        may_stay = timeout is None or timeout > 0  # else callbacks are ready
        deadline = time.monotonic() + timeout if timeout is not None and timeout > 0 else None
        while True:
            # Rounded up to the milliseconds of epoll_wait(2), so that no wait ends before its timer is due.
            wait = -1.0 if timeout is None else math.ceil(max(timeout, 0) * 1000) / 1000
            left, self.later = self.later, []
            shortened = bool(left) and not 0 <= wait <= LATER_SECONDS
            events = self._wait(LATER_SECONDS if shortened else wait, may_poll=may_stay)
            self.dispatching = True
            ready = self._call_readers(events)
            self._call_deferred(left)
            self.dispatching = False
            if ready or not (events or shortened) or self.disturbed or not may_stay:
                if events:
                    self._glance()
                return ready
            if deadline is not None:
                timeout = deadline - time.monotonic()
                if timeout <= 0:
                    return ready

    def _call_readers(self, events: list[tuple[int, int]]) -> list[tuple[selectors.SelectorKey, int]]:
        """Call direct readers; returns what happened to others."""
        ready: list[tuple[selectors.SelectorKey, int]] = []
        direct = self._direct
        for number, (descriptor, event) in enumerate(events):
            if number:
                self._glance()
            reader = direct.get(descriptor)
            if reader is not None and event & ~select.EPOLLOUT:
                try:
                    reader()
                except Exception as failure:
                    self._failed(failure)
                if event == select.EPOLLIN:
                    continue  # a direct reader is the only one of its descriptor
            key = self._keys.get(descriptor)
            if key is not None:
                happened = (selectors.EVENT_READ if event & ~select.EPOLLOUT else 0) | (
                    selectors.EVENT_WRITE if event & ~select.EPOLLIN else 0
                )
                if happened & key.events:
                    ready.append((key, happened & key.events))
        return ready

    def _call_deferred(self, left: list[Callable[[], object]]) -> None:
        """Call what readers have deferred, and what was left for later before."""
        deferred = self.deferred
        deferred.extend(left)
        while deferred:
            self._glance()
            try:
                deferred.popleft()()
            except Exception as failure:
                self._failed(failure)

    def _glance(self) -> None:
        """Have accesses answered that have come meanwhile."""
        if self._waiter is not None:
            self._waiter.glance()

    def _wait(self, seconds: float, *, may_poll: bool) -> list[tuple[int, int]]:
        """Return what happens within that time, negative for ever; the first moment of it may be polled."""
        if self._waiter is not None:
            return self._waiter.poll(seconds, may_poll)
        poll, polling = self._epoll.poll, self._polling
        if may_poll and polling.worthwhile:
            end = perf_counter() + POLL_SECONDS
            while perf_counter() < end:
                if events := poll(0, _EVENTS_MAX):
                    polling.found()
                    return events
            polling.missed()
        began = perf_counter()
        events = poll(seconds, _EVENTS_MAX)
        polling.slept(perf_counter() - began)
        return events

    def close(self) -> None:
        """Let go of the epoll descriptor."""
        self._keys.clear()
        self._direct.clear()
        self._masks.clear()
        self._epoll.close()

    def _watch(self, descriptor: int) -> None:
        """Tell epoll what a descriptor is watched for now."""
        key = self._keys.get(descriptor)
        events = key.events if key is not None else 0
        mask = select.EPOLLIN if descriptor in self._direct or events & selectors.EVENT_READ else 0
        if events & selectors.EVENT_WRITE:
            mask |= select.EPOLLOUT
        old = self._masks.pop(descriptor, 0)
        if mask:
            self._masks[descriptor] = mask
        if mask == old:
            return
        if not old:
            self._epoll.register(descriptor, mask)
        elif mask:
            self._epoll.modify(descriptor, mask)
        else:
            self._epoll.unregister(descriptor)


class DataPlaneLoop(asyncio.SelectorEventLoop):
    """asyncio's selector event loop with direct readers."""

    def __init__(self) -> None:
        self._direct_selector = DirectSelector(self._direct_failed)
        super().__init__(self._direct_selector)

    def call_soon(
        self, callback: Callable[[*Arguments], object], *args: *Arguments, context: Context | None = None
    ) -> asyncio.Handle:
        """Schedule a callback, as ever."""
        self._direct_selector.disturbed = True
        return super().call_soon(callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*Arguments], object],
        *args: *Arguments,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Schedule a callback for later, as ever."""
        self._direct_selector.disturbed = True
        return super().call_at(when, callback, *args, context=context)

    def wait_with(self, make: Callable[[int], SomeWaiter | None]) -> SomeWaiter | None:
        """Have what `make` makes for the epoll descriptor wait for events from now on, if anything."""
        return self._direct_selector.wait_with(make)

    def add_direct_reader(self, readable: Readable, reader: DirectReader) -> None:
        """Have `reader` called while the descriptor is readable, outside of any task."""
        self._direct_selector.set_direct(_descriptor(readable), reader)

    def remove_direct_reader(self, readable: Readable) -> None:
        """Take a direct reader back; before the descriptor is closed."""
        self._direct_selector.set_direct(_descriptor(readable), None)

    def defer(self, callback: Callable[[], object]) -> None:
        """Have `callback` called after the direct readers that are being called; else in the next turn."""
        if self._direct_selector.dispatching:
            self._direct_selector.deferred.append(callback)
        else:
            self.call_soon(callback)

    def later(self, callback: Callable[[], object]) -> None:
        """Have `callback` called after the events that come next, or after LATER_SECONDS when none come."""
        self._direct_selector.later.append(callback)

    def _direct_failed(self, failure: Exception) -> None:
        self.call_exception_handler({"message": "a direct reader raised", "exception": failure})


def wait_with(loop: asyncio.AbstractEventLoop, make: Callable[[int], SomeWaiter | None]) -> SomeWaiter | None:
    """Have what `make` makes wait for events, where the loop can do that; see `DataPlaneLoop.wait_with`."""
    return loop.wait_with(make) if isinstance(loop, DataPlaneLoop) else None


def add_reader(loop: asyncio.AbstractEventLoop, readable: Readable, reader: DirectReader) -> None:
    """Add a direct reader where the loop has them, else an ordinary one."""
    if isinstance(loop, DataPlaneLoop):
        loop.add_direct_reader(readable, reader)
    else:
        loop.add_reader(readable, reader)


def remove_reader(loop: asyncio.AbstractEventLoop, readable: Readable) -> None:
    """Take back what `add_reader` added."""
    if isinstance(loop, DataPlaneLoop):
        loop.remove_direct_reader(readable)
    else:
        loop.remove_reader(readable)


def defer(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    """Have `callback` called once what is ready now has been seen to, or in the next turn of the loop."""
    if isinstance(loop, DataPlaneLoop):
        loop.defer(callback)
    else:
        loop.call_soon(callback)


def later(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    """Have `callback`, which nobody waits for, called soon; at once where the loop has no later."""
    if isinstance(loop, DataPlaneLoop):
        loop.later(callback)
    else:
        callback()


def _descriptor(fileobj: Any) -> int:
    return fileobj if isinstance(fileobj, int) else int(fileobj.fileno())
