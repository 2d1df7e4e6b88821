from __future__ import annotations

import msgspec

from farpage.message import encode
from farpage.nbd.export import Counters
from farpage.vios.figures import CopyFigures, Figures, merged

COPY = CopyFigures(
    volume="v",
    present_bytes=1,
    total_bytes=2,
    relay_connected=True,
    waiting_commands=3,
    relayed_reads=4,
    kept_pages=5,
    filled_pages=6,
)


def test_figures_of_several_processes_are_added_up() -> None:
    one = Figures(counters={"a": Counters(reads=1, in_flight=2)}, connections={"x": 1}, refused=1, fenced=2)
    other = Figures(
        counters={"a": Counters(reads=10), "b": Counters(writes=5)},
        connections={"x": 2, "y": 1},
        refused=3,
        copies=[COPY],
    )
    total = merged((one, other))
    assert total.counters == {"a": Counters(reads=11, in_flight=2), "b": Counters(writes=5)}
    assert (total.connections, total.open_exports) == ({"x": 3, "y": 1}, 4)
    assert (total.refused, total.fenced, total.copies) == (4, 2, [COPY])


def test_what_a_process_has_counted_outlives_it_and_what_it_had_open_does_not() -> None:
    figures = Figures(
        counters={"a": Counters(reads=1, in_flight=2)}, connections={"x": 1}, refused=1, copies=[COPY]
    )
    assert figures.past == Figures(counters={"a": Counters(reads=1)}, refused=1)


def test_figures_come_through_as_they_are() -> None:
    figures = Figures(counters={"a": Counters(reads=1)}, connections={"x": 1}, copies=[COPY])
    assert msgspec.json.decode(encode(figures), type=Figures) == figures
