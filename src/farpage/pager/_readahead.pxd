# What other compiled modules may call: without objects of Python, and without its lock if the caller sees to it
# that one thread at a time uses it.

from libc.stdint cimport int64_t

cdef enum:
    STREAMS_FOLLOWED = 8  # farpage.pager.readahead.STREAMS


cdef struct followed_t:
    int64_t last
    int64_t next
    int64_t window


cdef class ReadAhead:
    cdef followed_t _streams[STREAMS_FOLLOWED]
    cdef int _count
    cdef int64_t _largest
    cdef bint _gaps

    # Return how many pages from `page` on to bring in, at least one, and remember it.
    cdef int64_t next_window(self, int64_t page) noexcept nogil

    cdef void _drop(self, int index) noexcept nogil
    cdef void _append(self, followed_t stream) noexcept nogil
