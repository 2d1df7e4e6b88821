# What other compiled modules may call: without objects of Python, and without its lock where nothing else is said, if
# the caller sees to it that one thread at a time is at work on the lanes of a hub.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from farpage.kernel._abi cimport io_uring_cqe, io_uring_sqe
from farpage.pager._lanestate cimport access_t, lane_t, RUN, RUN_SLOTS, SLOTS

ctypedef struct run_t:
    lane_t *lane
    int64_t first
    int count
    bint busy
    # A bit for each page: those that are READING because of this, are to be written to, are waited for.
    uint64_t wanted
    uint64_t write
    uint64_t waited
    int64_t began[RUN]

ctypedef struct slot_t:
    lane_t *lane
    int64_t page
    int64_t began
    bint write
    bint ahead          # nobody waits for it yet
    bint busy


cdef class Reads:
    cdef int _ring
    cdef uint32_t *_sq_tail
    cdef uint32_t _sq_mask
    cdef io_uring_sqe *_sqes
    cdef uint32_t *_cq_head
    cdef uint32_t *_cq_tail
    cdef uint32_t _cq_mask
    cdef io_uring_cqe *_cqes
    cdef uint8_t *_buffers      # those of runs, behind them those of slots
    cdef bint _registered       # with the ring
    cdef uint8_t *scratch       # a page, for whoever is at work
    cdef slot_t _slots[SLOTS]
    cdef int _free[SLOTS]
    cdef int _free_count
    cdef run_t _runs[RUN_SLOTS]
    cdef int _runs_busy
    cdef int unsubmitted
    cdef int64_t look_at        # when to look for late ones
    cdef int64_t look_every_ns
    cdef object _owner
    cdef Py_buffer _queues
    cdef Py_buffer _commands
    cdef list _retired

    # Whether a device is at work.
    cdef inline bint under_way(self) noexcept nogil:
        return self._free_count < SLOTS or self._runs_busy

    # Begin to read a page that is on the device, for an access; False where that cannot be.
    cdef bint begin(self, lane_t *lane, const access_t *access) noexcept nogil

    # The same, though nobody waits for it yet: False also where few are left for what is waited for.
    cdef bint begin_ahead(self, lane_t *lane, const access_t *access) noexcept nogil

    # Begin to read pages of which some are wanted, which nobody waits for yet; NULL where that cannot be.
    cdef run_t *begin_run(self, lane_t *lane, int64_t first, int count, uint64_t wanted) noexcept nogil

    # Whether all of a window can be read, and the page that is waited for.
    cdef bint has_room_for_window(self, const lane_t *lane) noexcept nogil

    # Begin to read those of a range of pages, from one on that an access waits for, that are on the device, up to the
    # first that is not; returns how many, 0 where that cannot be.
    cdef int begin_near(self, lane_t *lane, const access_t *access, int count) noexcept nogil

    # Begin to read those of at most 64 neighbours that are on the device, though nobody waits for them yet, with few
    # reads; returns how many. Those for which that cannot be stay as they are.
    cdef int begin_neighbours(self, lane_t *lane, int64_t first, int count, bint write) noexcept nogil

    # Let an access wait for a read that another one has begun here.
    cdef bint joined(self, lane_t *lane, const access_t *access) noexcept nogil

    # Start what was begun; what the kernel has no memory for is tried again.
    cdef void submit(self) noexcept nogil

    # Take what the device has answered, up to a run; tells whether there was anything.
    cdef bint complete(self, int64_t now) noexcept nogil

    # Give up the reads that have not come in time.
    cdef void look_for_late(self, int64_t now) noexcept nogil

    # With the interpreter's lock: count the reads of a lane that are in flight as nobody's, and return them.
    cdef list withdraw(self, lane_t *lane)

    # With it: look for late ones so often, at least.
    cdef void look_every(self, int64_t ns)

    # With it: read this file for a lane.
    cdef int take_file(self, lane_t *lane, int descriptor) except -1

    # With it: close the file, of which no read is begun any more, when all that were begun have been submitted.
    cdef void retire(self, lane_t *lane)
    cdef void close_retired(self)

    cdef uint8_t *_run_buffer(self, int index) noexcept nogil
    cdef uint8_t *_slot_buffer(self, int index) noexcept nogil
    cdef void _queue(self, lane_t *lane, int64_t first, int count, uint8_t *buffer, int token) noexcept nogil
    cdef void _arrived(self, slot_t *slot, const uint8_t *content, int32_t result, int64_t now) noexcept nogil
    cdef void _run_arrived(self, run_t *run, const uint8_t *content, int32_t result, int64_t now) noexcept nogil
    cdef bint _held_back(self, lane_t *lane, int64_t page, const uint8_t *content) noexcept nogil
    cdef void _no_more_reading(self, run_t *run) noexcept nogil
    cdef void _give_page_back(self, run_t *run, int at, uint64_t late) noexcept nogil
    cdef void _give_back(
        self, lane_t *lane, int64_t page, bint write, int64_t began, uint64_t late
    ) noexcept nogil
