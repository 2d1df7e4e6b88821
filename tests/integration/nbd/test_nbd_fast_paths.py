"""The fast paths by themselves, as machine code and as their twins: what nobody should do does no harm."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from farpage.blockio import SharedFile
from farpage.errors import Unsupported
from farpage.kernel.aio import AsyncWrites
from farpage.kernel.io_uring import Ring
from farpage.kernel.memory import PAGE_SIZE, AlignedBuffer
from farpage.nbd import codec, directpath, fastpath, lane
from farpage.nbd import protocol as p
from farpage.nbd.directpath import (
    IN_FLIGHT_MAX,
    READ_MAX_BYTES,
    WRITE_MAX_BYTES,
    WRITES_MAX,
    WRITTEN_TOGETHER_BYTES,
    DirectPath,
)
from farpage.nbd.export import Counters
from farpage.nbd.fastpath import FastPath, Outcome, Settings

COMPILED = lane.FAST_PATHS
TWINS = (fastpath.FastPath, directpath.DirectPath)
INPUT_BYTES, AREA_BYTES = 520 << 10, 128 << 10
VOLUME_BYTES = 1 << 20
HEADER_BYTES = codec.REQUEST.size
REPLY_BYTES = codec.SIMPLE_REPLY.size

Paths: TypeAlias = tuple[type[FastPath], type[DirectPath]]


@pytest.fixture(
    name="paths",
    params=[
        pytest.param(
            COMPILED, id="compiled", marks=pytest.mark.skipif(COMPILED == TWINS, reason="not compiled")
        ),
        pytest.param(TWINS, id="twin"),
    ],
)
def _paths(request: pytest.FixtureRequest) -> Paths:
    found: Paths = request.param
    return found


class Made:
    """A path over a socket pair and a file; what the test does at the other end of both."""

    def __init__(self, folder: Path, paths: Paths) -> None:
        self.socket, self.other = socket.socketpair()
        for end in self.socket, self.other:
            end.setblocking(False)
        self.input, self.area = bytearray(INPUT_BYTES), bytearray(AREA_BYTES)
        file = folder / "volume"
        file.write_bytes(os.urandom(PAGE_SIZE) + bytes(VOLUME_BYTES - PAGE_SIZE))
        self.storage = SharedFile(os.open(file, os.O_RDWR), 0, False, lambda: 0, None, lambda stop: None)
        os.pread(self.storage.descriptor, VOLUME_BYTES, 0)
        self.counters = Counters()
        self.settings = Settings(False, VOLUME_BYTES, 0, INPUT_BYTES)
        self._paths = paths
        self._made: list[FastPath] = []

    def fast(self, input_: bytearray | None = None, area: bytearray | None = None) -> FastPath:
        """Make what serves from the page cache."""
        return self._ready(self._paths[0](*self._arguments(input_, area)))

    def direct(
        self,
        ring: Ring,
        input_: bytearray | None = None,
        area: bytearray | None = None,
        writes: AsyncWrites | None = None,
    ) -> DirectPath:
        """Make what goes past it; here the file is one of the page cache all the same."""
        made = self._paths[1](*self._arguments(input_, area, ring, writes))
        self._ready(made)
        return made

    def _arguments(self, input_: bytearray | None, area: bytearray | None, *more: object) -> tuple[Any, ...]:
        buffers = (self.input if input_ is None else input_, self.area if area is None else area)
        return self.socket.fileno(), buffers, self.storage, self.counters, self.settings, *more

    def _ready(self, made: FastPath) -> FastPath:
        made.read_max_bytes = AREA_BYTES // 2
        self._made.append(made)
        return made

    def ask(self, command: int, offset: int, length: int, payload: bytes = b"") -> None:
        self.other.send(codec.encode_request(command, 0, 7, offset, length) + payload)

    def forget(self) -> None:
        """Let go of what was made."""
        self._made.clear()

    def close(self) -> None:
        for made in self._made:
            made.close()
        self.socket.close()
        self.other.close()
        self.storage.close()


@pytest.fixture(name="made")
def _made(tmp_path: Path, paths: Paths) -> Iterator[Made]:
    made = Made(tmp_path, paths)
    yield made
    made.close()


@pytest.fixture(name="ring")
def _ring() -> Ring:
    try:
        return Ring(IN_FLIGHT_MAX)
    except Unsupported as error:
        pytest.skip(str(error))


BOUNDS = [
    {"input_start": -1},
    {"input_end": -1},
    {"input_end": INPUT_BYTES + 1},
    {"input_start": 2, "input_end": 1},
    {"output_start": -1, "output_end": 1},
    {"output_end": AREA_BYTES + 1},
    {"output_start": 1 << 40, "output_end": 1 << 40},
    {"output_start": 2, "output_end": 1},
]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_bounds_outside_the_buffers_are_refused(
    made: Made, ring: Ring, bounds: dict[str, int], direct: bool
) -> None:
    path = made.direct(ring) if direct else made.fast()
    for name, place in bounds.items():
        setattr(path, name, place)
    with pytest.raises(ValueError, match="not within the buffers"):
        path.turn()
    with pytest.raises(BlockingIOError):
        made.other.recv(1)


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_a_path_that_is_closed_does_nothing(made: Made, ring: Ring, direct: bool) -> None:
    path = made.direct(ring) if direct else made.fast()
    path.close()
    made.ask(p.NBD_CMD_READ, 0, PAGE_SIZE)
    with pytest.raises(ValueError, match="closed"):
        path.turn()
    path.close()
    with pytest.raises(BlockingIOError):
        made.other.recv(1)


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_a_path_that_is_stopped_waits_for_no_client_that_reads_nothing(
    made: Made, ring: Ring, direct: bool
) -> None:
    path = made.direct(ring) if direct else made.fast()
    outcome: int = Outcome.WAIT_READ
    while outcome != Outcome.WAIT_WRITE:
        made.ask(p.NBD_CMD_READ, 0, PAGE_SIZE)
        outcome = path.turn()
    path.stopped = True
    while (outcome := path.turn()) == Outcome.WAIT_DEVICE:
        pass
    assert outcome == Outcome.OVER
    assert path.output_end > path.output_start


@pytest.mark.parametrize(
    ("input_bytes", "area_bytes"), [(HEADER_BYTES - 1, AREA_BYTES), (INPUT_BYTES, 27), (0, 0)]
)
def test_buffers_that_hold_no_request_or_reply_are_refused(
    made: Made, input_bytes: int, area_bytes: int
) -> None:
    with pytest.raises(ValueError, match="too small"):
        made.fast(bytearray(input_bytes), bytearray(area_bytes))


@pytest.mark.parametrize(
    ("input_bytes", "area_bytes"),
    [
        ((IN_FLIGHT_MAX + 1) * HEADER_BYTES + WRITTEN_TOGETHER_BYTES, AREA_BYTES),
        (INPUT_BYTES, READ_MAX_BYTES + 27),
    ],
)
def test_buffers_that_cannot_take_direct_reads_are_refused(
    made: Made, ring: Ring, input_bytes: int, area_bytes: int
) -> None:
    with pytest.raises(ValueError, match="too small"):
        made.direct(ring, bytearray(input_bytes), bytearray(area_bytes))


def test_a_queue_that_is_shorter_than_the_reads_are_many_is_refused(made: Made, ring: Ring) -> None:
    with pytest.raises(ValueError, match="too short"):
        made.direct(Ring(IN_FLIGHT_MAX // 2))


def test_a_read_that_never_fits_into_the_area_is_for_the_loop(made: Made) -> None:
    path = made.fast(area=bytearray(PAGE_SIZE))
    made.ask(p.NBD_CMD_READ, 0, PAGE_SIZE)
    assert path.turn() == Outcome.OVER
    assert path.input_end - path.input_start == HEADER_BYTES


def test_a_write_is_no_direct_read(made: Made, ring: Ring) -> None:
    path = made.direct(ring)
    path.write_max_bytes = PAGE_SIZE
    made.ask(p.NBD_CMD_WRITE, 0, PAGE_SIZE, bytes(PAGE_SIZE))
    assert path.turn() == Outcome.OVER
    assert path.in_flight == 0
    assert path.input_end - path.input_start == HEADER_BYTES + PAGE_SIZE


@pytest.mark.parametrize("length", [WRITE_MAX_BYTES, WRITE_MAX_BYTES + PAGE_SIZE])
def test_direct_writes_up_to_a_length_are_carried_out(made: Made, ring: Ring, length: int) -> None:
    path = made.direct(ring, writes=AsyncWrites(IN_FLIGHT_MAX, waits=True))
    data = os.urandom(length)
    left = memoryview(codec.encode_request(p.NBD_CMD_WRITE, 0, 7, PAGE_SIZE, length) + data)
    outcome: int = Outcome.WAIT_READ
    while left and outcome != Outcome.OVER:
        left = left[made.other.send(left) :]
        outcome = path.turn()
    fits = length <= WRITE_MAX_BYTES
    assert (outcome == Outcome.OVER) is not fits
    if fits:
        assert made.other.recv(AREA_BYTES) == codec.encode_simple_reply(7)
    assert (os.pread(made.storage.descriptor, length, PAGE_SIZE) == data) is fits
    assert path.in_flight == 0


def test_more_direct_writes_than_may_be_in_flight_are_all_answered(made: Made, ring: Ring) -> None:
    path = made.direct(ring, writes=AsyncWrites(IN_FLIGHT_MAX, waits=True))
    count = 3 * WRITES_MAX // 2
    for number in range(count):
        made.ask(p.NBD_CMD_WRITE, number * PAGE_SIZE, PAGE_SIZE, bytes([number + 1]) * PAGE_SIZE)
        if number % 8 == 7:
            path.turn()
    while path.turn() != Outcome.WAIT_READ:
        pass
    assert made.other.recv(AREA_BYTES) == codec.encode_simple_reply(7) * count
    expected = b"".join(bytes([number + 1]) * PAGE_SIZE for number in range(count))
    assert os.pread(made.storage.descriptor, len(expected), 0) == expected


def test_who_has_requests_is_asked_about_what_was_received(made: Made) -> None:
    """Also when the buffer holds something else by the time that the answer is there."""

    def refusal() -> int:
        made.input[:HEADER_BYTES] = codec.encode_request(p.NBD_CMD_WRITE, 0, 7, 0, INPUT_BYTES - HEADER_BYTES)
        return 0

    before = os.pread(made.storage.descriptor, VOLUME_BYTES, 0)
    made.storage.refusal = refusal
    path = made.fast()
    made.ask(p.NBD_CMD_WRITE, 0, 16, b"x" * 16)
    path.turn()
    assert os.pread(made.storage.descriptor, VOLUME_BYTES, 0)[16:] == before[16:]


def test_writes_that_came_together_are_answered_in_groups(made: Made) -> None:
    """The other end goes on with the first of them while the rest is carried out."""
    together = fastpath.GATHERED_BYTES // PAGE_SIZE
    there: list[int] = []

    def refusal() -> int:
        with suppress(BlockingIOError):
            there.append(len(made.other.recv(AREA_BYTES)) // REPLY_BYTES)
        return 0

    made.storage.refusal = refusal
    path = made.fast()
    for number in range(2 * together):
        made.ask(p.NBD_CMD_WRITE, number * PAGE_SIZE, PAGE_SIZE, bytes([number + 1]) * PAGE_SIZE)
    assert path.turn() == Outcome.WAIT_READ
    assert there == [together]
    assert len(made.other.recv(AREA_BYTES)) == together * REPLY_BYTES
    assert made.counters.writes == 2 * together
    expected = b"".join(bytes([number + 1]) * PAGE_SIZE for number in range(2 * together))
    assert os.pread(made.storage.descriptor, len(expected), 0) == expected


class Ending(BaseException):
    """What ends a program, as far as anybody knows."""


@pytest.mark.parametrize("name", ["refusal", "over"])
def test_a_write_that_nobody_answers_for_is_not_carried_out(made: Made, name: str) -> None:
    def asked() -> int:
        raise Ending

    setattr(made.storage, name, asked)
    path = made.fast()
    made.ask(p.NBD_CMD_WRITE, 0, 16, b"x" * 16)
    with suppress(Ending):
        assert path.turn() == Outcome.OVER
    assert os.pread(made.storage.descriptor, 16, 0) != b"x" * 16


def test_completions_of_other_reads_are_no_answers(made: Made, ring: Ring, paths: Paths) -> None:
    if paths == TWINS:
        pytest.skip("it has no array of them")
    path = made.direct(ring)
    with AlignedBuffer(PAGE_SIZE) as buffer:
        for token in (0, IN_FLIGHT_MAX, 1 << 40):
            ring.read(made.storage.descriptor, buffer.address, PAGE_SIZE, 0, token)
        ring.submit()
        assert path.turn() == Outcome.WAIT_READ
    ring.in_flight = 0
    assert path.in_flight == 0
    with pytest.raises(BlockingIOError):
        made.other.recv(1)


def test_memory_that_is_read_into_stays_when_nobody_waits_for_the_reads(
    made: Made, ring: Ring, paths: Paths
) -> None:
    reader, writer = os.pipe()
    volume, made.storage.descriptor = made.storage.descriptor, reader
    path = made.direct(ring)
    made.ask(p.NBD_CMD_READ, 0, PAGE_SIZE)
    path.turn()
    assert path.in_flight == 1
    gc.collect()
    before = _mapped_bytes()
    path.close()
    made.forget()
    del path
    gc.collect()
    assert _mapped_bytes() > before - IN_FLIGHT_MAX * WRITE_MAX_BYTES
    os.close(writer)
    os.close(reader)
    made.storage.descriptor = volume


def _mapped_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE_SIZE


@pytest.mark.skipif(COMPILED == TWINS, reason="not compiled")
class TestCompiled:
    """What is not so in Python, which has no memory to go astray in."""

    @pytest.fixture(name="made")
    def _made(self, tmp_path: Path) -> Iterator[Made]:
        made = Made(tmp_path, COMPILED)
        yield made
        made.close()

    def test_a_path_is_made_once(self, made: Made, ring: Ring) -> None:
        path = made.direct(ring)
        path.__init__()  # type: ignore[misc]
        assert path.turn() == Outcome.WAIT_READ
        for kind in COMPILED:
            with pytest.raises(TypeError):
                kind.__new__(kind)

    @pytest.mark.parametrize(
        "act",
        [
            lambda path: setattr(path, "input_end", 1 << 40),
            lambda path: setattr(path, "output_start", 0),
            lambda path: path.turn(),
        ],
        ids=["input", "output", "turn"],
    )
    def test_nobody_moves_bounds_during_a_turn(self, made: Made, act: Callable[[FastPath], object]) -> None:
        refused: list[BaseException] = []

        def refusal() -> int:
            try:
                act(path)
            except RuntimeError as error:
                refused.append(error)
            return 0

        made.storage.refusal = refusal
        path = made.fast()
        made.ask(p.NBD_CMD_WRITE, 0, 16, b"x" * 16)
        assert path.turn() == Outcome.WAIT_READ
        assert [str(error) for error in refused] == ["the connection is being served"]
        assert len(made.other.recv(100)) == REPLY_BYTES

    def test_nobody_moves_bounds_while_reads_are_in_flight(self, made: Made, ring: Ring) -> None:
        reader, writer = os.pipe()
        volume, made.storage.descriptor = made.storage.descriptor, reader
        path = made.direct(ring)
        made.ask(p.NBD_CMD_READ, 0, PAGE_SIZE)
        path.turn()
        with pytest.raises(RuntimeError, match="being served"):
            path.input_end = INPUT_BYTES
        os.write(writer, bytes(PAGE_SIZE))
        while path.in_flight:
            path.turn()
        path.input_start = path.input_end = 0
        os.close(writer)
        os.close(reader)
        made.storage.descriptor = volume
