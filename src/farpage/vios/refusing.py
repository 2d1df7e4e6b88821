"""An export's commands, all of them refused: what can do some of them says so itself."""

from __future__ import annotations

import errno

from farpage.blockio import Done, ExtentsDone, ReadDone


class RefusingCommands:
    """The commands of a `BlockIO` that can do none."""

    def read_now(self, offset: int, into: memoryview) -> bool:
        """Nothing is at hand."""
        return False

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        """Refuse."""
        done(errno.ENOTSUP, None)

    def write(self, offset: int, data: memoryview, done: Done, *, fua: bool = False) -> None:
        """Refuse: it is read-only."""
        done(errno.EPERM)

    def zero(
        self,
        offset: int,
        length: int,
        done: Done,
        *,
        punch: bool = True,
        fast: bool = False,
        fua: bool = False,
    ) -> None:
        """Refuse."""
        done(errno.ENOTSUP)

    def trim(self, offset: int, length: int, done: Done, *, fua: bool = False) -> None:
        """Refuse."""
        done(errno.ENOTSUP)

    def cache(self, offset: int, length: int, done: Done) -> None:
        """Refuse."""
        done(errno.ENOTSUP)

    def flush(self, done: Done) -> None:
        """Refuse."""
        done(errno.ENOTSUP)

    def extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        """Refuse."""
        done(errno.ENOTSUP, None)
