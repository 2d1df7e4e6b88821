"""io_uring against real files and pipes."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from farpage.errors import Unsupported
from farpage.kernel.io_uring import FILES, Ring
from farpage.kernel.memory import AlignedBuffer


@pytest.fixture
def ring() -> Iterator[Ring]:
    try:
        ring = Ring(8)
    except Unsupported as error:
        pytest.skip(str(error))
    yield ring
    if ring.in_flight:
        ring.cancel_all()
    while ring.in_flight:
        ring.wait()
        ring.completions()
    ring.close()


@pytest.fixture
def pages(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "pages"
    path.write_bytes(b"".join(bytes((page,)) * 4096 for page in range(16)))
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def take(ring: Ring, count: int) -> dict[int, int]:
    """Wait for `count` completions ; returns the results by token."""
    poll = select.poll()
    poll.register(ring.fileno(), select.POLLIN)
    found: dict[int, int] = {}
    while len(found) < count:
        assert poll.poll(10_000), "no completion"
        found.update(ring.completions())
    return found


def test_reads_of_one_submission_each_fill_their_buffer(ring: Ring, pages: int) -> None:
    with AlignedBuffer(8 * 4096) as buffer:
        for page in range(8):
            assert ring.read(pages, buffer.address + page * 4096, 4096, (15 - page) * 4096, page)
        ring.submit()
        assert take(ring, 8) == dict.fromkeys(range(8), 4096)
        assert [buffer.view[page * 4096] for page in range(8)] == [15 - page for page in range(8)]


def test_the_queues_wrap_around(ring: Ring, pages: int) -> None:
    with AlignedBuffer(4096) as buffer:
        for turn in range(100):
            assert ring.read(pages, buffer.address, 4096, turn % 16 * 4096, turn)
            ring.submit()
            assert take(ring, 1) == {turn: 4096}
            assert buffer.view[0] == turn % 16


def test_more_reads_than_entries_are_turned_away(ring: Ring, pages: int) -> None:
    with AlignedBuffer(4096) as buffer:
        for token in range(ring.entries):
            assert ring.read(pages, buffer.address, 4096, 0, token)
        assert not ring.read(pages, buffer.address, 4096, 0, 99)
        ring.submit()
        take(ring, ring.entries)
        assert ring.read(pages, buffer.address, 4096, 0, 100)
        ring.submit()
        assert take(ring, 1) == {100: 4096}


def test_a_read_beyond_the_end_is_short_and_of_a_closed_file_fails(ring: Ring, pages: int) -> None:
    with AlignedBuffer(8192) as buffer:
        ring.read(pages, buffer.address, 8192, 15 * 4096, 1)
        ring.read(99_999, buffer.address, 4096, 0, 2)
        ring.submit()
        assert take(ring, 2) == {1: 4096, 2: -errno.EBADF}


def test_a_registered_file_is_read_into_registered_memory(ring: Ring, pages: int) -> None:
    with AlignedBuffer(4 * 4096) as buffer:
        half = 2 * 4096
        assert ring.register_memory((buffer.address, half), (buffer.address + half, half))
        place = ring.register_file(pages)
        assert place is not None
        ring.read(place, buffer.address, 4096, 3 * 4096, 1, registered_file=True, area=0)
        ring.read(place, buffer.address + half, half, 5 * 4096, 2, registered_file=True, area=1)
        ring.submit()
        assert take(ring, 2) == {1: 4096, 2: 8192}
        assert [buffer.view[page * 4096] for page in range(4)] == [3, 0, 5, 6]
        ring.read(pages, buffer.address, 4096, 7 * 4096, 3)  # in the place of one that was registered
        ring.submit()
        assert take(ring, 1) == {3: 4096}
        assert buffer.view[0] == 7


def test_a_registered_file_is_read_after_its_descriptor_is_closed_until_it_is_let_go(
    ring: Ring, pages: int
) -> None:
    descriptor = os.dup(pages)
    place = ring.register_file(descriptor)
    assert place is not None
    os.close(descriptor)
    with AlignedBuffer(4096) as buffer:
        ring.read(place, buffer.address, 4096, 9 * 4096, 1, registered_file=True)
        ring.submit()
        assert take(ring, 1) == {1: 4096}
        assert buffer.view[0] == 9
        ring.unregister_file(place)
        ring.read(place, buffer.address, 4096, 0, 2, registered_file=True)
        ring.submit()
        assert take(ring, 1) == {2: -errno.EBADF}


def test_a_ring_takes_so_many_files_and_another_one_when_one_is_let_go(ring: Ring, pages: int) -> None:
    places = [ring.register_file(pages) for _ in range(FILES)]
    assert sorted(place for place in places if place is not None) == list(range(FILES))
    assert ring.register_file(pages) is None
    ring.unregister_file(5)
    assert ring.register_file(pages) == 5


def test_a_file_that_is_none_is_not_registered(ring: Ring, pages: int) -> None:
    assert ring.register_file(99_999) is None
    assert ring.register_file(pages) is not None


def test_what_hangs_is_cancelled(ring: Ring) -> None:
    silent, writer = os.pipe()
    with AlignedBuffer(4096) as buffer:
        ring.read(silent, buffer.address, 4096, 0, 7)
        ring.submit()
        assert ring.completions() == []
        with pytest.raises(ValueError, match="1 commands"):
            ring.close()
        ring.cancel_all()
        assert take(ring, 1) == {7: -errno.ECANCELED}
    os.close(silent)
    os.close(writer)
