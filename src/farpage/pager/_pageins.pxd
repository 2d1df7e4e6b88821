# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""A page comes in: it is copied to the client, counted, and what follows from it is seen to."""

from libc.stdint cimport int64_t, uint8_t, uint64_t, uintptr_t
from posix.ioctl cimport ioctl

from farpage.kernel._abi cimport bit_length, uffdio_copy, UFFDIO_COPY, UFFDIO_COPY_MODE_WP
from farpage.pager._lanestate cimport (
    BUCKETS, call, CLEAN, DIRTY, lane_t, MARK_DEFERRED, move, PAGE, STALLS,
)
from farpage.pager._order cimport Order
from farpage.pager._pageouts cimport press

cdef enum:
    STALL_NOTED_NS = 10000000


cdef inline int copied(lane_t *lane, int64_t first, int count, const uint8_t *content, bint write) noexcept nogil:
    """Copy pages in, as far as that is possible, and wake who waits for them; returns how many."""
    cdef uffdio_copy argument
    argument.dst = lane.start + <uint64_t>first * PAGE
    argument.src = <uint64_t><uintptr_t>content
    argument.len = <uint64_t>count * PAGE
    argument.mode = 0 if write else UFFDIO_COPY_MODE_WP
    argument.copy = 0
    if ioctl(lane.uffd, UFFDIO_COPY, &argument) == 0:
        return count
    return <int>(max(argument.copy, <int64_t>0) // PAGE)


cdef inline bint copy(lane_t *lane, int64_t page, const uint8_t *content, bint write, int state) noexcept nogil:
    """Copy a page in that was in a state so far, and wake who waits for it."""
    if not copied(lane, page, 1, content, write):
        return False
    move(lane, page, state, DIRTY if write else CLEAN)
    return True


cdef inline void waited(lane_t *lane, int64_t began, int64_t ended) noexcept nogil:
    cdef int64_t ns = ended - began
    lane.buckets[min(bit_length(<uint64_t>(ns // 1000)), BUCKETS - 1)] += 1
    lane.waited_ns += ns
    lane.longest_ns = max(lane.longest_ns, ns)
    if ns > STALL_NOTED_NS and lane.stall_count < STALLS:
        lane.stalls[lane.stall_count][0] = began
        lane.stalls[lane.stall_count][1] = ended
        lane.stall_count += 1


cdef inline void follow_up(lane_t *lane, int64_t now) noexcept nogil:
    """See to what follows from pages that have come."""
    press(lane, now)
    if lane.marks[MARK_DEFERRED] or lane.stall_count == STALLS:
        call(lane)


cdef inline void answered_one(lane_t *lane, int64_t began, int64_t now) noexcept nogil:
    """Count an access that was answered, and look whether the interpreter has to see to the consequences.

    While a client is detached, which turns its lane off, its pages come in whatever the marks say.
    """
    waited(lane, began, now)
    follow_up(lane, now)


cdef inline void came(lane_t *lane, int64_t page, int64_t began, int64_t now) noexcept nogil:
    (<Order>lane.order).page_returned(page)
    answered_one(lane, began, now)
