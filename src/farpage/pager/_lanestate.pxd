# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""What is known of one client's lane, as the compiled steps of its short way share it: plain C."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from farpage.pager._store cimport Store

cdef enum:
    PAGE = 4096
    # farpage.pager.states
    ZERO = 0
    CLEAN = 1
    DIRTY = 2
    WRITING = 3
    REWRITTEN = 4
    READING = 5
    ON_DEVICE = 6
    STATE_COUNT = 8
    # farpage.pager.lane.Marks
    MARK_MOST = 0
    MARK_READING = 1
    MARK_HIGH = 2
    MARK_DEFERRED = 3
    MARK_LOW = 4
    MARK_WRITING = 5
    MARK_UNWRITABLE = 6
    MARK_AHEAD = 7
    MARKS = 8
    # farpage.pager.faults
    LITTLE_ROOM = 512
    NEAR = 8
    EVENTS = 64
    SLOTS = 256
    BUCKETS = 26
    STALLS = 64
    VICTIMS = 512
    OTHERS = 512
    RUN = 64
    RUN_SLOTS = 32      # for reads of neighbours
    WRITES_TOGETHER = 16    # for each page that is being read; eviction.py, SLICE_RUNS
    GIVEN_BACK = SLOTS + RUN_SLOTS * RUN

ctypedef struct access_t:
    int64_t page
    uint64_t flags
    int64_t began

# What the lanes of a hub have in common: what they want of it, and what they have of it.
ctypedef struct hub_t:
    bint attention
    bint calls_wait
    int victims         # of all of them
    bint others_wait
    void *reads         # a Reads
    uint8_t *scratch    # a page, for whoever is at work

ctypedef struct lane_t:
    hub_t *hub
    int uffd
    int memfd
    int file            # a descriptor, or the place among those that the ring has; -1 is none
    bint registered     # which of them
    bint on
    bint attention
    int in_flight
    int ahead
    int64_t origin
    int64_t late_ns
    uint64_t start
    int64_t memfd_offset
    int64_t pages
    uint8_t *state
    uint32_t *checksum
    int64_t *counts
    const int64_t *marks
    void *store
    void *order
    void *streams
    void *zero_ahead
    void *write_ahead
    int left_count
    int back_count
    int stall_count
    int victim
    int victim_end
    int64_t victims[VICTIMS]
    bint tasted[VICTIMS]
    int other
    int other_end
    int64_t others[OTHERS]
    uint8_t *batch      # where dirty pages are read to; NULL: nowhere
    int batch_pages
    int batch_at
    int run_count
    int64_t runs[RUN][3]
    int busy_count
    int64_t busy[RUN]
    int failed
    bint ready
    bint asked
    int64_t zero_count
    int64_t taste
    int64_t called_at
    access_t left[EVENTS]
    access_t back[GIVEN_BACK]
    int64_t stalls[STALLS][2]
    int64_t faults
    int64_t answered
    int64_t from_tier
    int64_t given_back
    int64_t zeroed
    int64_t read_ahead
    int64_t buckets[BUCKETS]
    int64_t waited_ns
    int64_t longest_ns


cdef inline int64_t now_ns() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return time.tv_sec * <int64_t>1000000000 + time.tv_nsec


cdef inline int64_t taken(const lane_t *lane) noexcept nogil:
    cdef int64_t *counts = lane.counts
    return (
        counts[CLEAN] + counts[DIRTY] + counts[WRITING] + counts[REWRITTEN] + counts[READING]
        + <int64_t>((<Store>lane.store).held + ((<Store>lane.store).taken_bytes + PAGE - 1) // PAGE)
    )


cdef inline int64_t staying(const lane_t *lane) noexcept nogil:
    """Pages that take room and are not about to leave."""
    return taken(lane) - (lane.victim_end - lane.victim) - (lane.other_end - lane.other) - lane.counts[WRITING]


cdef inline int64_t room(const lane_t *lane) noexcept nogil:
    """Pages that may still be brought in."""
    return min(lane.marks[MARK_MOST] - taken(lane), lane.marks[MARK_READING] - lane.counts[READING])


cdef inline void move(lane_t *lane, int64_t page, int old, int new) noexcept nogil:
    lane.counts[old] -= 1
    lane.counts[new] += 1
    lane.state[page] = <uint8_t>new


cdef inline void call(lane_t *lane) noexcept nogil:
    lane.attention = True
    lane.called_at = now_ns()
    lane.hub.attention = True


cdef inline void call_soon(lane_t *lane, int64_t now) noexcept nogil:
    """Call the interpreter while a device is at work, or when no access comes: the client is to ask soon."""
    lane.attention = True
    lane.called_at = now
    lane.hub.calls_wait = True
