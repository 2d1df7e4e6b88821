from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from farpage.device.spans import SpanGate

Change = tuple[int, int, bool]


class Watch:
    """Begins changes at a gate and remembers which are under way."""

    def __init__(self) -> None:
        self.gate = SpanGate()
        self.running: dict[int, Change] = {}
        self.begun: list[Change] = []

    def enter(self, start: int, end: int, *, exclusive: bool = False) -> None:
        change = (start, end, exclusive)

        def run(token: int) -> None:
            self.running[token] = change
            self.begun.append(change)

        self.gate.enter(start, end, run, exclusive=exclusive)

    def leave(self, token: int) -> None:
        del self.running[token]
        self.gate.leave(token)


def conflict(one: Change, other: Change) -> bool:
    return one[0] < other[1] and other[0] < one[1] and (one[2] or other[2])


def test_ordinary_changes_of_the_same_blocks_share_them() -> None:
    watch = Watch()
    watch.enter(0, 8)
    watch.enter(4, 12)
    assert len(watch.running) == 2


def test_an_exclusive_change_waits_for_those_under_way_and_keeps_others_out() -> None:
    watch = Watch()
    watch.enter(0, 8)
    watch.enter(4, 5, exclusive=True)
    watch.enter(4, 5)
    watch.enter(100, 108)
    assert watch.begun == [(0, 8, False), (100, 108, False)]
    watch.leave(next(iter(watch.running)))
    assert watch.begun[-1] == (4, 5, True)
    watch.leave(next(token for token, change in watch.running.items() if change[2]))
    assert watch.begun[-1] == (4, 5, False)


def test_whoever_shares_all_spans_gives_way_to_an_exclusive_change() -> None:
    watch = Watch()
    asked: list[str] = []
    leave = watch.gate.share(lambda: asked.append("give way"))
    assert leave is not None
    watch.enter(0, 8)
    assert asked == []
    watch.enter(100, 101, exclusive=True)
    assert asked == ["give way"]
    assert watch.gate.share(lambda: None) is None
    leave()
    assert watch.begun[-1] == (100, 101, True)
    watch.leave(next(token for token, change in watch.running.items() if change[2]))
    assert watch.gate.share(lambda: None) is not None


@given(
    st.lists(
        st.tuples(st.integers(0, 20), st.integers(1, 6), st.booleans())
        | st.integers(0, 50),  # the end of one that is under way
        max_size=60,
    )
)
def test_conflicting_changes_never_overlap_and_begin_in_order(
    script: list[tuple[int, int, bool] | int],
) -> None:
    watch = Watch()
    arrived: list[Change] = []
    for step in script:
        if isinstance(step, tuple):
            start, length, exclusive = step
            arrived.append((start, start + length, exclusive))
            watch.enter(start, start + length, exclusive=exclusive)
        elif watch.running:
            watch.leave(sorted(watch.running)[step % len(watch.running)])
        running = list(watch.running.values())
        assert not any(
            conflict(one, other) for index, one in enumerate(running) for other in running[index + 1 :]
        )
    while watch.running:
        watch.leave(min(watch.running))
    assert sorted(watch.begun) == sorted(arrived)
    for one in set(arrived):
        for other in set(arrived):
            if conflict(one, other) and arrived.count(one) == arrived.count(other) == 1:
                assert (arrived.index(one) < arrived.index(other)) == (
                    watch.begun.index(one) < watch.begun.index(other)
                )
