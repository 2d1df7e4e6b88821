"""A process whose region is paged and that uses its pages all the time, checking every byte; see stamper.c.

Run as `python busy_region.py LIBRARY STATE NAME CLIENT PAGES LIMIT_BYTES REDUNDANCY THREADS SEED`. It prints
`ready` when its region is attached, begins at the command `go`, and prints, besides the stamper's lines,

    progress READS WRITES WRONG OLDEST        each 0.2 s; OLDEST is the begin of the oldest access under way
    final READS WRITES WRONG                  after the command `stop`, when every page has been verified
    closed                                    when the region has been closed

It ends with its parent.
"""

from __future__ import annotations

import ctypes
import os
import select
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from farpage.attach.region import Region

PROGRESS_SECONDS = 0.2
STALL_NANOSECONDS = 5_000_000
NAP_NANOSECONDS = 4_000_000


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    library: Path
    state: Path
    name: str
    client: int
    pages: int
    limit_bytes: int
    redundancy: str
    threads: int
    seed: int

    @classmethod
    def parse(cls, words: list[str]) -> Arguments:
        """Take the words of the command line apart."""
        library, state, name, client, pages, limit_bytes, redundancy, threads, seed = words
        return cls(
            Path(library),
            Path(state),
            name,
            int(client),
            int(pages),
            int(limit_bytes),
            redundancy,
            int(threads),
            int(seed),
        )


class Stamper:
    """The threads; see stamper.c."""

    def __init__(self, arguments: Arguments) -> None:
        self._library = ctypes.CDLL(str(arguments.library))
        self._counts = (ctypes.c_uint64 * 4)()
        self._arguments = arguments

    def start(self, address: int) -> None:
        """Let the threads loose on the region at `address`."""
        wanted = self._arguments
        refused = self._library.stamper_start(
            ctypes.c_void_p(address),
            ctypes.c_uint64(wanted.pages),
            ctypes.c_int(wanted.client),
            ctypes.c_int(wanted.threads),
            ctypes.c_uint64(wanted.seed),
            ctypes.c_int(sys.stdout.fileno()),
            ctypes.c_uint64(STALL_NANOSECONDS),
            ctypes.c_uint64(NAP_NANOSECONDS),
        )
        assert not refused

    def counts(self) -> list[int]:
        """Return reads, writes, wrong pages, and the begin of the oldest access under way, or 0."""
        self._library.stamper_counts(self._counts)
        return list(self._counts)

    def finish(self) -> threading.Thread:
        """Begin to end the threads and to verify every page; it is done when the thread returned ends."""
        self._library.stamper_stop()
        finishing = threading.Thread(target=self._join_and_verify, daemon=True)
        finishing.start()
        return finishing

    def _join_and_verify(self) -> None:
        self._library.stamper_join()
        self._library.stamper_verify()


def say(word: str, numbers: list[int]) -> None:
    """Print one line with one write, since the threads print too."""
    os.write(sys.stdout.fileno(), f"{' '.join([word, *map(str, numbers)])}\n".encode())


def command_within(seconds: float) -> str | None:
    """Return the next command, "" at the end of input, None when none comes in time."""
    readable, _, _ = select.select([sys.stdin], [], [], seconds)
    return sys.stdin.readline() if readable else None


def main() -> None:
    """Use the region until told to stop."""
    arguments = Arguments.parse(sys.argv[1:])
    region = Region(
        arguments.pages * 4096,
        name=arguments.name,
        limit_bytes=arguments.limit_bytes,
        redundancy=arguments.redundancy,
        state=arguments.state,
    )
    stamper = Stamper(arguments)
    say("ready", [])
    if command_within(600) != "go\n":
        os._exit(1)
    stamper.start(region.start_address)
    while (command := command_within(PROGRESS_SECONDS)) is None:
        say("progress", stamper.counts())
    if command != "stop\n":
        os._exit(1)
    finishing = stamper.finish()
    while finishing.is_alive():
        finishing.join(PROGRESS_SECONDS)
        say("progress", stamper.counts())
    say("final", stamper.counts()[:3])
    region.close()
    say("closed", [])


if __name__ == "__main__":
    main()
