# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# What other compiled modules may call: without the interpreter's lock, if the caller sees to it that one thread at a
# time is at work on the lanes of a hub.

from libc.stdint cimport int64_t, uint8_t

from farpage.pager._lanestate cimport call_soon, lane_t, MARK_HIGH, MARK_LOW, staying

cdef enum:
    CHOSEN_TOGETHER = 64
    LONGEST_ALONE_NS = 100000000

# Take victims out of the order: have clean ones given back, and keep the others for the interpreter.
cdef void choose(lane_t *lane, int64_t count) noexcept nogil

# Give the next victims back: as many as are neighbours, unless somebody has written to them.
cdef void release(lane_t *lane) noexcept nogil

# Get dirty victims ready to be written, unless they are `few` and need not be; tells whether anything was done.
cdef bint prepare_some(lane_t *lane, bint few) noexcept nogil

# Let nobody write what was got ready.
cdef void unwrite(lane_t *lane) noexcept nogil

# Have pages that the volume has now given back, but those that were written to meanwhile. The first `taste` of them
# are offered to the RAM tier, with the `content` that was written; returns how many that leaves of `taste`.
cdef int written(lane_t *lane, int64_t first, int count, const uint8_t *content, int taste) noexcept nogil

# Let no more pages leave: what was to be given back or written stays.
cdef void recall(lane_t *lane) noexcept nogil


cdef inline void press(lane_t *lane, int64_t now) noexcept nogil:
    """Have pages leave when there are too many, and the interpreter see to those that it has to."""
    if not lane.on or staying(lane) <= lane.marks[MARK_HIGH]:
        return
    choose(lane, min(staying(lane) - lane.marks[MARK_LOW], CHOSEN_TOGETHER))
    if now - lane.called_at > LONGEST_ALONE_NS:  # the marks follow the client's pace
        call_soon(lane, now)
