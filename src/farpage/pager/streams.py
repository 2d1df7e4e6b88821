"""Which pages to read ahead of whom: streams of accesses with a constant step, rising or falling. No I/O.

Two faults on neighbours, or three with the same distance, make a stream. It is given windows of pages, each
twice as large as the one before while they are used. In each window of some size one page is a *marker*: it
is read with the others, but the client must still ask for it. That it does shows that the window is used, and
is the moment to read the next one, which so arrives while the client is busy with this one.

What a stream was given and did not come to counts as wasted when the stream is forgotten. Those that waste
more than a tenth of what they used make the windows of later ones smaller, until those have used ten times as
much; those that do not make them larger again.

`_streams.pyx` is the same as machine code and is used where it was built.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from farpage.pager.compiled import COMPILED

LARGEST_WINDOW_PAGES: Final = 256
"""Of neighbours, which are read and copied together."""
LARGEST_STRIDED_WINDOW_PAGES: Final = 64
"""Of pages further apart, each of which takes a command of its own."""
LARGEST_PIECE_PAGES: Final = 64
"""Of neighbours, that are read with one command: the first ones should not wait for the last."""
LARGEST_STEP_PAGES: Final = 64
SMALLEST_MARKED_PAGES: Final = 8
"""Windows from this size on have a marker."""
SMALLEST_CAP_PAGES: Final = 2
SLACK_PAGES: Final = 5
"""So far behind its window's end a stream may be seen next: pages in between may be in memory."""
STREAMS: Final = 8
CANDIDATES: Final = 16
WASTED_SHARE: Final = 10
"""A stream that wastes more than one page of so many that it used wastes too much."""


class Ahead(NamedTuple):
    """Pages to read ahead: `length` of them, from `first` on in steps of `step`, which may be negative.

    `marker` is the marker among them, negative without one.
    """

    first: int
    step: int
    length: int
    marker: int = -1

    def pages(self) -> range:
        """Return the pages in the order in which they are expected."""
        return range(self.first, self.first + self.length * self.step, self.step)


class _Candidate(NamedTuple):
    """A fault, and how far from the one before it was that may belong to it; 0 when there is none."""

    page: int
    step: int


@dataclass(slots=True, eq=False)
class _Stream:
    """`last` is the page that it has come to, `next` the first that it was not given."""

    last: int
    step: int
    next: int
    window: int = 1
    marker: int = -1
    used: int = 0

    @property
    def pending(self) -> int:
        """Pages that it was given and has not come to."""
        return max((self.next - self.last) // self.step - 1, 0)


class Streams(Protocol):
    """The streams of one client."""

    @property
    def markers(self) -> Set[int]:
        """Pages that are to be brought in only when they are asked for."""

    @property
    def wasted_pages(self) -> int:
        """Pages read ahead for streams that were forgotten before they came to them."""

    def fault(self, page: int, most: int) -> tuple[int, int, int, int] | None:
        """Take note of an access to a page that is not in memory; return what to read ahead, if anything.

        That is what `Ahead` has. `most` is how many pages there is room for. A fault on a marker counts, too.
        """


def new_streams(pages: int) -> Streams:
    """Return those of a memory of so many pages: the compiled ones if that is possible here."""
    return COMPILED.streams(pages) if COMPILED else PythonStreams(pages)


class PythonStreams:
    """They without a compiler."""

    def __init__(self, pages: int) -> None:
        self._pages = pages
        self._streams: list[_Stream] = []
        self._candidates: dict[int, _Candidate] = {}
        """By page // LARGEST_STEP_PAGES, the newest last."""
        self._cap = LARGEST_WINDOW_PAGES
        self._wasted = 0

    @property
    def markers(self) -> Set[int]:
        """See `Streams`."""
        return {stream.marker for stream in self._streams if stream.marker >= 0}

    @property
    def wasted_pages(self) -> int:
        """See `Streams`."""
        return self._wasted

    def fault(self, page: int, most: int) -> Ahead | None:
        """See `Streams`."""
        for stream in self._streams:
            step = stream.step
            steps, rest = divmod(page - stream.last, step)
            if rest or not 0 < steps <= stream.pending + SLACK_PAGES:
                continue
            # One amid the window is not of the stream, which has there what it was given.
            if steps == 1 or steps > stream.pending or page == stream.marker:
                return self._go_on(stream, page, steps, most)
        return self._compare(page, most)

    def _compare(self, page: int, most: int) -> Ahead | None:
        """Look for a fault nearby, and begin a stream with it if both are of one."""
        step, of_a_stream = self._take_nearby(page)
        if of_a_stream:
            return self._begin(page, step, most)
        if len(self._candidates) >= CANDIDATES:
            del self._candidates[next(iter(self._candidates))]
        self._candidates[page // LARGEST_STEP_PAGES] = _Candidate(page, step)
        return None

    def _take_nearby(self, page: int) -> tuple[int, bool]:
        """Take out the candidate that an access may follow; returns the distance, 0 without one, and whether
        both make a stream."""
        place = page // LARGEST_STEP_PAGES
        for near in (place, place - 1, place + 1):
            candidate = self._candidates.get(near)
            if candidate is None:
                continue
            distance = page - candidate.page
            if -LARGEST_STEP_PAGES <= distance <= LARGEST_STEP_PAGES:
                del self._candidates[near]
                return distance, distance in (1, -1) or (distance == candidate.step and distance != 0)
        return 0, False

    def _begin(self, page: int, step: int, most: int) -> Ahead | None:
        if len(self._streams) >= STREAMS:
            self._forget(self._streams[0])
        stream = _Stream(page, step, page + step)
        self._streams.append(stream)
        return self._window(stream, page + step, most)

    def _forget(self, stream: _Stream) -> None:
        self._streams.remove(stream)
        self._wasted += stream.pending
        if stream.pending * WASTED_SHARE > stream.used:
            self._cap = max(self._cap // 2, SMALLEST_CAP_PAGES)
        else:
            self._cap = min(self._cap * 2, LARGEST_WINDOW_PAGES)

    def _go_on(self, stream: _Stream, page: int, steps: int, most: int) -> Ahead | None:
        """Give a stream its next window, if it has come to its marker, or beyond all that it was given."""
        beyond = steps > stream.pending
        stream.used += min(steps, stream.pending)
        stream.last = page
        if self._streams[-1] is not stream:
            self._streams.remove(stream)
            self._streams.append(stream)
        if beyond:
            return self._window(stream, page + stream.step, most)
        if page == stream.marker:
            return self._window(stream, stream.next, most)
        return None

    def _window(self, stream: _Stream, first: int, most: int) -> Ahead | None:
        neighbours = stream.step in (1, -1)
        largest = LARGEST_WINDOW_PAGES if neighbours else LARGEST_STRIDED_WINDOW_PAGES
        cap = max(self._cap, stream.used // WASTED_SHARE)
        stream.window = min(stream.window * 2, largest, cap)
        stream.marker = -1
        waits = first == stream.last + stream.step
        # The page that is waited for is the first of its window.
        count = min(stream.window - waits, most, self._left(first, stream.step))
        if count <= 0:
            stream.next = stream.last + stream.step
            return None
        stream.next = first + count * stream.step
        if count + waits >= SMALLEST_MARKED_PAGES:
            # Of what is read for one that waits, half is used up before the next window is asked for.
            stream.marker = first + (count // 2 if waits else 0) * stream.step
        return Ahead(first, stream.step, count, stream.marker)

    def _left(self, first: int, step: int) -> int:
        """Return how many pages from `first` on are within the memory."""
        return (self._pages - 1 - first) // step + 1 if step > 0 else first // -step + 1


def pieces(ahead: Ahead) -> Iterator[tuple[int, int]]:
    """Return `(first, count)` ranges of neighbours, in the order in which they are expected."""
    step, count = ahead.step, ahead.length
    if step not in (1, -1):
        for page in ahead.pages():
            yield page, 1
        return
    for done in range(0, count, LARGEST_PIECE_PAGES):
        length = min(count - done, LARGEST_PIECE_PAGES)
        first = ahead.first + done if step > 0 else ahead.first - done - length + 1
        yield first, length
