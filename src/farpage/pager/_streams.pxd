# What other compiled modules may call: without objects of Python, and without its lock if the caller sees to it
# that one thread at a time uses it.

from libc.stdint cimport int64_t

cdef enum:
    # Those of farpage.pager.streams
    STREAMS = 8
    CANDIDATES = 16

# Pages to read ahead, as `streams.Ahead` tells them.
ctypedef struct ahead_t:
    int64_t first
    int64_t step
    int64_t length
    int64_t marker

ctypedef struct stream_t:
    int64_t last
    int64_t step
    int64_t next
    int64_t window
    int64_t marker
    int64_t used

ctypedef struct candidate_t:
    int64_t page
    int64_t step


cdef class Streams:
    cdef int64_t _pages
    cdef stream_t _streams[STREAMS]         # the one that was seen last is the last
    cdef int _count
    cdef candidate_t _candidates[CANDIDATES]    # the newest is the last
    cdef int _candidate_count
    cdef int64_t _cap
    cdef readonly int64_t wasted_pages

    # Take note of an access to a page that is not in memory, or of one to a marker; tells whether something is to be
    # read ahead. `most` is how many pages there is room for.
    cdef bint next_window(self, int64_t page, int64_t most, ahead_t *ahead) noexcept nogil

    # Whether an access to a page would be of no stream, nor make one.
    cdef bint is_alone(self, int64_t page) noexcept nogil

    cdef bint is_marker(self, int64_t page) noexcept nogil

    cdef int _found(self, int64_t page, int64_t *steps) noexcept nogil
    cdef int _nearby(self, int64_t page) noexcept nogil
    cdef bint _begin(self, int64_t page, int64_t step, int64_t most, ahead_t *ahead) noexcept nogil
    cdef bint _go_on(self, int index, int64_t page, int64_t steps, int64_t most, ahead_t *ahead) noexcept nogil
    cdef bint _window(self, stream_t *stream, int64_t first, int64_t most, ahead_t *ahead) noexcept nogil
    cdef void _forget(self, int index) noexcept nogil
    cdef int64_t _left(self, int64_t first, int64_t step) noexcept nogil
