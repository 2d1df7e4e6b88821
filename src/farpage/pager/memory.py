"""A client's memory by page number: what the pager does to it, over userfaultfd and the memfd."""

from __future__ import annotations

import errno
import os
from typing import Final

from farpage.attach.memory import ClientMemory
from farpage.kernel.memory import punch_hole, resident_ranges
from farpage.pager.table import PAGE_BYTES

TRY_LATER: Final = (errno.EAGAIN, errno.ENOMEM, errno.ENOSPC)
"""The client's mappings are changing, or the host has no page to give at the moment."""


class ClientGone(Exception):
    """The client's memory no longer exists: the process exited or unmapped it."""


class CannotPoison(Exception):
    """The kernel cannot make accesses to a page fail: UFFDIO_POISON is of Linux 6.6."""


class PagedMemory:
    """Registered memory of `pages` pages. Every method raises ClientGone when the client has exited.

    The client may have changed a part of it (madvise(2), mprotect(2)), which is a mapping of its own then.
    The kernel fills no range across two, and says ENOENT as where there is none (mm/userfaultfd.c,
    mfill_atomic); before Linux 6.3 it protects none. So a range that is refused is tried by the page.
    """

    def __init__(self, client: ClientMemory) -> None:
        self._client: Final = client
        self._uffd: Final = client.uffd
        self._memfd: Final = client.memfd
        self._start: Final = client.start_address
        self._offset: Final = client.memfd_offset_bytes
        self.pages: Final = client.length_bytes // PAGE_BYTES

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when there are faults."""
        return self._uffd.fileno()

    @property
    def start_address(self) -> int:
        """Where page 0 is in the client's memory."""
        return self._start

    @property
    def memfd(self) -> tuple[int, int]:
        """The memfd's descriptor, and where in it page 0 is."""
        return self._memfd, self._offset

    def read_faults(self) -> list[tuple[int, int]]:
        """Return the faults that wait, up to 64, as `(flags, page)`."""
        try:
            events = self._uffd.read_events()
        except OSError as error:
            raise ClientGone(str(error)) from error
        start = self._start
        return [(flags, (address - start) // PAGE_BYTES) for _, flags, address in events]

    def copy_in(self, first: int, source_address: int, count: int, *, protect: bool) -> int:
        """Fill up to `count` missing pages and wake who waits; returns the pages done, 0 for "try later".

        :raise FileExistsError: when the first page is present.
        """
        address, length = self._start + first * PAGE_BYTES, count * PAGE_BYTES
        result = self._uffd.copy(address, source_address, length, write_protect=protect)
        if result == length:
            return count
        if result == -errno.ENOENT and count > 1:
            return self.copy_in(first, source_address, 1, protect=protect)
        return self._pages_done(result)

    def zero_in(self, first: int, count: int) -> int:
        """Fill up to `count` missing pages with zeros; as `copy_in`."""
        result = self._uffd.zeropage(self._start + first * PAGE_BYTES, count * PAGE_BYTES)
        if result == -errno.ENOENT and count > 1:
            return self.zero_in(first, 1)
        return self._pages_done(result)

    def map_in(self, page: int, *, protect: bool) -> int:
        """Map a page that is in the memfd but not in the client's page table; as `copy_in`.

        :raise FileNotFoundError: it is not in the memfd (any more).
        """
        address = self._start + page * PAGE_BYTES
        result = self._uffd.continue_(address, PAGE_BYTES, write_protect=protect)
        if result == -errno.EFAULT:  # mm/userfaultfd.c, mfill_atomic_pte_continue
            raise FileNotFoundError(errno.ENOENT, "the page is not in the memfd")
        return self._pages_done(result)

    def poison(self, page: int) -> int:
        """Make accesses to a missing page fail for good; as `copy_in`.

        :raise CannotPoison: the kernel is too old for that.
        """
        address = self._start + page * PAGE_BYTES
        result = self._uffd.poison(address, PAGE_BYTES)
        if result == -errno.EEXIST:
            # The mark of write protection stays when a page leaves memory, and UFFDIO_POISON replaces
            # nothing, not even a mark (mm/userfaultfd.c, mfill_atomic_pte_poison).
            self.unprotect(page, 1)
            result = self._uffd.poison(address, PAGE_BYTES)
        if result == -errno.EINVAL:
            raise CannotPoison
        return self._pages_done(result)

    def _pages_done(self, result: int) -> int:
        if result > 0:
            return result // PAGE_BYTES
        if -result in TRY_LATER:
            return 0
        if result == -errno.EEXIST:
            raise FileExistsError(errno.EEXIST, "the page is present")
        raise self._failure(result)

    def protect(self, first: int, count: int) -> bool:
        """Write-protect pages; False for "try later"."""
        return self._protect(first, count, True)

    def unprotect(self, first: int, count: int) -> bool:
        """Let writes through again and wake who waits for that; False for "try later"."""
        return self._protect(first, count, False)

    def _protect(self, first: int, count: int, on: bool) -> bool:
        result = self._uffd.write_protect(self._start + first * PAGE_BYTES, count * PAGE_BYTES, on)
        if result == -errno.ENOENT and count > 1:
            return all(self._protect(page, 1, on) for page in range(first, first + count))
        return self._settled(result)

    def wake(self, first: int, count: int) -> None:
        """Let accesses that wait in the range try again."""
        self._settled(self._uffd.wake(self._start + first * PAGE_BYTES, count * PAGE_BYTES))

    def _settled(self, result: int) -> bool:
        if -result in TRY_LATER:
            return False
        if result < 0:
            raise self._failure(result)
        return True

    @staticmethod
    def _failure(result: int) -> Exception:
        """Tell a client that is gone (ESRCH; ENOENT and EINVAL: range unmapped) from a real failure."""
        if result in (-errno.ESRCH, -errno.ENOENT, -errno.EINVAL, -errno.EBADF):
            return ClientGone(os.strerror(-result))
        return OSError(-result, os.strerror(-result))

    def read_out(self, first: int, into: memoryview) -> None:
        """Read whole pages through the memfd; never through a mapping, which would fill holes."""
        offset = self._offset + first * PAGE_BYTES
        done = 0
        while done < len(into):
            count = os.preadv(self._memfd, [into[done:]], offset + done)
            if count == 0:
                raise OSError(errno.EIO, "the client's memfd is shorter than its memory")
            done += count

    def release(self, first: int, count: int) -> None:
        """Give pages back to the host; the next access to one is a fault."""
        punch_hole(self._memfd, self._offset + first * PAGE_BYTES, count * PAGE_BYTES)

    def present_runs(self) -> list[tuple[int, int]]:
        """Return `(first, count)` of the runs of pages that the memfd holds."""
        return [
            ((offset - self._offset) // PAGE_BYTES, length // PAGE_BYTES)
            for offset, length in resident_ranges(self._memfd, self._offset, self.pages * PAGE_BYTES)
        ]

    def unregister(self) -> None:
        """Stop reporting faults. Missing pages read as zeros from now on.

        :raise OSError: when the client is gone.
        """
        self._client.unregister()

    def close(self) -> None:
        """Close this process's descriptors of the client."""
        self._client.close_descriptors()
