# What other compiled modules may call: without the interpreter's lock, if the caller sees to it that one thread at a
# time is at work on the lanes of a hub.

from libc.stdint cimport int64_t

from farpage.pager._lanestate cimport lane_t

# Read a batch of events and answer, or begin to answer, those that are plain.
cdef void answer(lane_t *lane, int64_t now) noexcept nogil
