# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""One client's short way, as the interpreter sees it: what it has the lane do, and what it takes from it.

What the hub does by itself are the plain cases alone: a page that is on the device or in the RAM tier, while there is
room for it, and what is read ahead of a stream; a write to a clean page; and, while nothing else is to be done, to give
clean pages back and to get dirty ones ready to be written. `farpage.pager.faults` and `eviction` do all that
where this was not built.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memset

from farpage.kernel._abi cimport lowest_bit, UFFD_PAGEFAULT_FLAG_WRITE
from farpage.pager._hub cimport Hub
from farpage.pager._lanestate cimport (
    access_t, BUCKETS, lane_t, MARKS, now_ns, ON_DEVICE, PAGE, RUN, STATE_COUNT, taken,
)
from farpage.pager._order cimport Order
from farpage.pager._pageouts cimport choose, recall, release, unwrite, written
from farpage.pager._readahead cimport ReadAhead
from farpage.pager._reads cimport Reads
from farpage.pager._store cimport Store
from farpage.pager._streams cimport Streams


cdef class Lane:
    """One client's. Once it is closed its methods do nothing."""

    cdef lane_t _lane
    cdef Hub _hub
    cdef Reads _reads
    cdef object _kept
    cdef Py_buffer _lent
    cdef bint _open

    def __cinit__(
        self, Hub hub not None, int uffd, uint64_t start, int memfd, int64_t memfd_offset,
        uint8_t[::1] state not None, uint32_t[::1] checksum not None, int64_t[::1] counts not None,
        const int64_t[::1] marks not None, Store store not None, Order order not None, Streams streams not None,
        ReadAhead zero_ahead not None, ReadAhead write_ahead not None, object on_attention
    ):
        if (
            marks.shape[0] < MARKS or counts.shape[0] < STATE_COUNT or checksum.shape[0] != state.shape[0]
            or order._pages != state.shape[0] or streams._pages != state.shape[0]
        ):
            raise ValueError("the arrays do not fit")
        memset(&self._lane, 0, sizeof(lane_t))
        self._lane.uffd, self._lane.file, self._lane.start = uffd, -1, start
        self._lane.memfd, self._lane.memfd_offset = memfd, memfd_offset
        self._lane.pages = state.shape[0]
        self._lane.state, self._lane.checksum = &state[0], &checksum[0]
        self._lane.counts, self._lane.marks = &counts[0], &marks[0]
        # What the pointers point to.
        self._kept = (state, checksum, counts, marks, store, order, streams, zero_ahead, write_ahead)
        self._lane.store, self._lane.order, self._lane.streams = <void *>store, <void *>order, <void *>streams
        self._lane.zero_ahead, self._lane.write_ahead = <void *>zero_ahead, <void *>write_ahead
        self._hub, self._reads = hub, hub._reads
        hub.enter(&self._lane, self, on_attention)
        self._open = True

    cdef bint _may(self) except -1:
        """Whether there is anything to touch."""
        self._hub.check_idle()
        return self._open

    @property
    def in_flight(self):
        """Reads that accesses wait for."""
        return self._lane.in_flight - self._lane.ahead

    def turn(self, bint on):
        """Answer events from now on, or leave all to the interpreter."""
        if self._may():
            self._lane.on = on

    def use(self, int descriptor, int64_t origin, double late_seconds):
        """Read the volume, which begins at `origin` of a file, by itself; a negative `descriptor`: no more."""
        if not self._may():
            return
        if self._lane.file >= 0:
            self._reads.retire(&self._lane)
        if descriptor >= 0:
            self._reads.take_file(&self._lane, descriptor)
            self._lane.origin, self._lane.late_ns = origin, <int64_t>(late_seconds * 1e9)
            self._reads.look_every(self._lane.late_ns // 4)

    @property
    def offered(self):
        """Pages that are to be given back and have not been yet."""
        return self._lane.victim_end - self._lane.victim

    @property
    def chosen(self):
        """Dirty victims that are not being got ready yet."""
        return self._lane.other_end - self._lane.other

    def evict(self, int count, int taste):
        """Choose victims: clean ones are given back and others got ready while nothing else is to be done.

        So many as `taste` says of those that are given back are offered to the RAM tier before. A choice may be
        of fewer victims than asked for.
        """
        if self._may():
            self._lane.taste = taste
            choose(&self._lane, count)

    def give_back(self, int64_t pages):
        """Give back so many of the pages that are to be, or all, now."""
        cdef lane_t *lane = &self._lane
        cdef int64_t least
        if not self._may():
            return
        least = taken(lane) - pages
        while lane.victim != lane.victim_end and taken(lane) > least:
            release(lane)

    def look(self):
        """Take note that the marks are others: more may leave now."""
        if self._may():
            self._lane.hub.others_wait = True

    @property
    def wants_buffer(self):
        """Whether there are dirty victims, and nowhere to read them to."""
        return self._open and self._lane.batch == NULL and self._lane.other != self._lane.other_end

    @property
    def is_ready(self):
        """Whether there are dirty victims in the buffer, for `take`."""
        return self._lane.ready

    def lend(self, buffer):
        """Have dirty victims read into a buffer, until `take` or `recall`.

        :raise ValueError: there is one already, or it holds no page, or is not aligned.
        """
        cdef lane_t *lane = &self._lane
        if not self._may():
            return
        if lane.batch != NULL:
            raise ValueError("there is a buffer")
        PyObject_GetBuffer(buffer, &self._lent, PyBUF_WRITABLE)
        if self._lent.len < PAGE or <uintptr_t>self._lent.buf % sizeof(uint64_t):
            PyBuffer_Release(&self._lent)
            raise ValueError("the buffer holds no page, or is not aligned")
        lane.batch = <uint8_t *>self._lent.buf
        lane.batch_pages = <int>min(self._lent.len // PAGE, RUN)
        lane.asked = False
        self._lane.hub.others_wait = True

    def give_up_buffer(self):
        """Have the buffer back where nothing is in it; tells whether it is back."""
        if self._lane.batch != NULL and not self._lane.batch_at and not self._lane.ready:
            self._take_back()
            return True
        return False

    def take(self):
        """Take what is to be written, and the buffer back.

        Returns `(runs, busy)`: `(first, count, place in the buffer, in pages)` of what was read, rising, and the
        pages that cannot be protected now.

        :raise OSError: the client's memory cannot be read.
        """
        cdef lane_t *lane = &self._lane
        cdef int index, failed = lane.failed
        if not self._may() or not lane.ready:
            return [], []
        runs = [] if failed else [(lane.runs[index][0], lane.runs[index][1], lane.runs[index][2]) for index in range(lane.run_count)]
        busy = [] if failed else [lane.busy[index] for index in range(lane.busy_count)]
        if failed:
            unwrite(lane)
        self._take_back()
        if failed:
            raise OSError(failed, "the client's memory cannot be read")
        return runs, busy

    cdef void _take_back(self):
        cdef lane_t *lane = &self._lane
        if lane.batch != NULL:
            PyBuffer_Release(&self._lent)
        lane.batch = NULL
        lane.batch_at = lane.run_count = lane.busy_count = lane.failed = 0
        lane.ready = lane.asked = False

    def checksums(self, content):
        """Return the checksum of each whole page of some content."""
        cdef Py_buffer view
        cdef uint32_t found[RUN]
        cdef Py_ssize_t at = 0, pages
        cdef int count, index
        checksums = []
        if not self._may():
            return checksums
        PyObject_GetBuffer(content, &view, PyBUF_SIMPLE)
        try:
            pages = view.len // PAGE
            while at < pages and self._open:
                count = <int>min(pages - at, <Py_ssize_t>RUN)
                for index in range(count):
                    found[index] = <uint32_t>(<Store>self._lane.store)._digest(
                        <const uint8_t *>view.buf + (at + index) * PAGE, PAGE
                    )
                checksums += [found[index] for index in range(count)]
                at += count
        finally:
            PyBuffer_Release(&view)
        return checksums

    def acknowledged(self, list runs not None, buffer, int taste):
        """Have the pages of `take`'s runs given back, but those that were written to meanwhile.

        The first `taste` of them, as they were written, are offered to the RAM tier.

        :raise IndexError: a page is not the client's, or not in the buffer.
        """
        cdef Py_buffer view
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
        try:
            self._acknowledged(runs, <const uint8_t *>view.buf, view.len // PAGE, taste)
        finally:
            PyBuffer_Release(&view)

    cdef int _acknowledged(self, list runs, const uint8_t *buffer, int64_t buffer_pages, int taste) except -1:
        cdef lane_t *lane = &self._lane
        cdef int64_t first
        cdef int count, at
        for first, count, at in runs:
            if not self._may():
                return 0
            if count < 0 or not 0 <= first <= lane.pages - count or not 0 <= at <= buffer_pages - count:
                raise IndexError(f"{count} pages from {first} on, {at} pages into {buffer_pages}")
            taste = written(lane, first, count, buffer + at * PAGE, taste)
        lane.hub.others_wait = True  # more may be on their way now
        return 0

    def recall(self):
        """Let no more pages leave: what was to be given back or written stays, and the buffer is free."""
        if self._may():
            self._recall()

    cdef void _recall(self):
        recall(&self._lane)
        self._take_back()

    @property
    def taste(self):
        """How many of the next victims are offered to the RAM tier."""
        return self._lane.taste

    @taste.setter
    def taste(self, int64_t pages):
        self._lane.taste = pages

    def left(self):
        """Take the accesses that are for the interpreter, as `(page, flags, began)`, in seconds."""
        cdef int index
        accesses = [
            (self._lane.left[index].page, self._lane.left[index].flags, self._lane.left[index].began / 1e9)
            for index in range(self._lane.left_count)
        ]
        self._lane.left_count = 0
        return accesses

    def back(self):
        """Take the reads that have to be repeated, as `(page, write, late, began)`, negative where nobody waits."""
        cdef int index
        reads = [
            (
                self._lane.back[index].page, bool(self._lane.back[index].flags & 1),
                bool(self._lane.back[index].flags >> 1), self._lane.back[index].began / 1e9,
            )
            for index in range(self._lane.back_count)
        ]
        self._lane.back_count = 0
        return reads

    def counted(self):
        """Take what has happened since the last time.

        That is `(faults, pages read, pages from the RAM tier, pages filled with zeros, clean pages given back, zero
        ones given back, pages read ahead by itself, buckets of waits, seconds waited, the longest of them, stalls)`.
        """
        cdef int index
        cdef lane_t *lane = &self._lane
        counted = (
            lane.faults, lane.answered, lane.from_tier, lane.zeroed, lane.given_back, lane.zero_count, lane.read_ahead,
            [lane.buckets[index] for index in range(BUCKETS)],
            lane.waited_ns / 1e9, lane.longest_ns / 1e9,
            [(lane.stalls[index][0] / 1e9, lane.stalls[index][1] / 1e9) for index in range(lane.stall_count)],
        )
        lane.faults = lane.answered = lane.from_tier = lane.zeroed = lane.given_back = lane.zero_count = 0
        lane.read_ahead = lane.waited_ns = lane.longest_ns = lane.stall_count = 0
        memset(lane.buckets, 0, sizeof(lane.buckets))
        return counted

    def fetch(self, pages not None, bint write):
        """Read those of some pages that are on the device, though nobody waits for them.

        Returns how many that are, and those for which no read can be begun here.
        """
        cdef access_t access
        cdef int64_t page
        cdef int begun = 0
        left = []
        if not self._may():
            return 0, left
        access.began = now_ns()
        access.flags = UFFD_PAGEFAULT_FLAG_WRITE if write else 0
        for page in pages:
            if not 0 <= page < self._lane.pages or self._lane.state[page] != ON_DEVICE:
                continue
            access.page = page
            if not self._lane.on or self._lane.file < 0 or not self._reads.begin_ahead(&self._lane, &access):
                left.append(page)
                continue
            begun += 1
        if begun:
            self._reads.submit()
        return begun, left

    def fetch_near(self, int64_t page, int count, bint write, double began):
        """Read up to `count` pages, from one on that somebody waits for since `began`, in seconds.

        They end at the first that is not on the device. Returns how many that are, 0 when no read can be begun here.
        """
        cdef access_t access
        cdef int begun
        if not self._may() or not self._lane.on or self._lane.file < 0 or not 0 <= page < self._lane.pages:
            return 0
        access.page, access.began = page, <int64_t>(began * 1e9)
        access.flags = UFFD_PAGEFAULT_FLAG_WRITE if write else 0
        begun = self._reads.begin_near(&self._lane, &access, count)
        if begun:
            self._reads.submit()
        return begun

    def fetch_run(self, int64_t first, int count, bint write):
        """Read those of a run of at most 64 pages that are on the device, though nobody waits for them.

        Returns how many that are, and those for which no read can be begun here, as runs `(first, count)`.

        :raise IndexError: the run is too long, or not the client's.
        """
        cdef lane_t *lane = &self._lane
        cdef uint64_t wanted = 0
        cdef int at, lowest, highest, begun = 0
        left = []
        if not self._may():
            return 0, left
        if not 0 <= count <= RUN or not 0 <= first <= lane.pages - count:
            raise IndexError(f"{count} pages from {first} on")
        if lane.on and lane.file >= 0:
            begun = self._reads.begin_neighbours(lane, first, count, write)
        if begun:
            self._reads.submit()
        for at in range(count):
            if lane.state[first + at] == ON_DEVICE:
                wanted |= <uint64_t>1 << at
        while wanted:
            lowest = lowest_bit(wanted)
            highest = lowest + lowest_bit(~(wanted >> lowest)) if ~(wanted >> lowest) else 64
            left.append((first + lowest, highest - lowest))
            wanted = wanted >> highest << highest if highest < 64 else 0
        return begun, left

    def join(self, int64_t page, bint write):
        """Let an access wait for a read of the lane's that is in flight; False when there is none of its page."""
        cdef access_t access
        access.page, access.began = page, now_ns()
        access.flags = UFFD_PAGEFAULT_FLAG_WRITE if write else 0
        return self._reads.joined(&self._lane, &access)

    def withdraw(self):
        """Give up the reads in flight; returns them as `(page, write, began)`, negative where nobody waits."""
        return self._reads.withdraw(&self._lane) if self._may() else []

    def close(self):
        """Touch nothing of the client any more."""
        if not self._may():
            return
        self._open = self._lane.on = False
        self._reads.withdraw(&self._lane)
        self._recall()
        self._hub.leave(&self._lane)
        if self._lane.file >= 0:
            self._reads.retire(&self._lane)
        self._lane.store = self._lane.order = self._lane.streams = NULL
        self._lane.zero_ahead = self._lane.write_ahead = NULL
        self._lane.state = NULL
        self._lane.checksum = NULL
        self._lane.counts = NULL
        self._lane.marks = NULL
        self._kept = None
