"""Many short WRITEs as one: queued together, and their replies taken together.

`_runs.pyx` is the same as machine code and is used where it was built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from farpage.blockio import Run
from farpage.nbd import codec
from farpage.nbd import protocol as p
from farpage.nbd.inflight import Command

_REQUEST_BYTES: Final = codec.REQUEST.size
_SIMPLE_BYTES: Final = codec.SIMPLE_REPLY.size


class Bounds(NamedTuple):
    """What a WRITE has to keep to: the export's size, its blocks, the longest that the server takes."""

    size_bytes: int
    minimum_bytes: int
    maximum_bytes: int


def check_range(offset: int, length: int, size_bytes: int, minimum_bytes: int) -> None:
    """Check what a command is for.

    :raise ValueError: it is outside of the export, or not in its blocks.
    """
    if offset < 0 or length <= 0 or offset + length > size_bytes:
        raise ValueError(f"{length} bytes at {offset} are outside of the export's {size_bytes} bytes")
    if (offset | length) & (minimum_bytes - 1):
        raise ValueError(f"{length} bytes at {offset} are not in blocks of {minimum_bytes}")


def queue_runs(
    runs: Sequence[Run],
    command: Command,
    in_flight: dict[int, Command],
    unsent: list[bytes | memoryview],
    *,
    cookie: int,
    bounds: Bounds,
) -> int:
    """Put a WRITE for each run into `unsent`, all parts of `command`, with the cookies after `cookie`.

    Return how many bytes those are; 0, and nothing was done, if a run is too long for one command.

    :raise ValueError: there are no runs, or one is out of range; nothing was done.
    :raise BufferError: a run's bytes are not one after the other; nothing was done.
    """
    if not runs:
        raise ValueError("there is nothing to write")
    size_bytes, minimum_bytes, maximum_bytes = bounds
    segments: list[bytes | memoryview] = []
    encode, magic, write = codec.REQUEST.pack, p.NBD_REQUEST_MAGIC, p.NBD_CMD_WRITE
    queued, too_long, own = 0, False, cookie
    for offset, data in runs:
        length = data.nbytes
        if not data.c_contiguous:
            raise BufferError("what is to be written is not contiguous")
        if (
            offset < 0
            or length <= 0
            or offset + length > size_bytes
            or (offset | length) & (minimum_bytes - 1)
        ):
            check_range(offset, length, size_bytes, minimum_bytes)
        own += 1
        queued += _REQUEST_BYTES + length
        too_long = too_long or length > maximum_bytes
        if not too_long:
            segments.append(encode(magic, 0, write, own, offset, length))
            segments.append(data)
    if too_long:
        return 0
    command.parts = own - cookie
    for part in range(cookie + 1, own + 1):
        in_flight[part] = command
    unsent += segments
    return queued


def drop_sent(unsent: list[bytes | memoryview], sent: int) -> None:
    """Drop the first `sent` bytes, which are all there are at most."""
    for index, segment in enumerate(unsent):
        length = memoryview(segment).nbytes
        if sent < length:
            if sent:
                unsent[index] = memoryview(segment).cast("B")[sent:]
            del unsent[:index]
            return
        sent -= length
    unsent.clear()


def take_replies(
    buffer: bytearray, position: int, end: int, in_flight: dict[int, Command], command: Command
) -> tuple[int, Command | None]:
    """Take the simple replies without errors from `position` on that answer parts, of `command` first.

    Return where the first is that is not of that kind, or not whole before `end`. Ends behind the last part
    of a command, too, and returns that.

    :raise ValueError: the bounds are not within the buffer, or `command` has no parts left.
    """
    if not 0 <= position <= end <= len(buffer):
        raise ValueError("bounds that are not within the buffer")
    if command.parts <= 0:
        raise ValueError("a command of which no part is in flight")
    stop = end - (end - position) % _SIMPLE_BYTES
    for magic, error, cookie in codec.SIMPLE_REPLY.iter_unpack(memoryview(buffer)[position:stop]):
        if magic != p.NBD_SIMPLE_REPLY_MAGIC or error:
            break
        answered = in_flight.get(cookie)
        if answered is not command:
            if answered is None or answered.parts <= 0:
                break
            command = answered
        del in_flight[cookie]
        position += _SIMPLE_BYTES
        command.parts -= 1
        if not command.parts:
            return position, command
    return position, None
