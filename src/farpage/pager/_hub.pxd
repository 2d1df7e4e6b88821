# What lanes call of their hub, with the interpreter's lock.

from libc.stdint cimport int64_t

from farpage.kernel._abi cimport epoll_event
from farpage.pager._lanestate cimport hub_t, lane_t
from farpage.pager._reads cimport Reads


cdef class Hub:
    cdef Reads _reads
    cdef hub_t _common
    cdef int _epoll
    cdef int _ring
    cdef lane_t **_lanes        # by descriptor
    cdef int64_t _lanes_size
    cdef dict _members
    cdef bint _at_work
    # See farpage.nbd.polling.
    cdef bint _worthwhile
    cdef int _score
    cdef int _pause
    cdef int _left_waits

    # Keep threads from what another one is at work on without the interpreter's lock.
    cdef int check_idle(self) except -1

    # See to a lane from now on, which is part of its owner; tell that it needs the interpreter by a call.
    cdef int enter(self, lane_t *lane, object owner, object on_attention) except -1
    cdef void leave(self, lane_t *lane)

    cdef void _glance(self) noexcept nogil
    cdef int _wait(self, epoll_event *events, double seconds, bint may_look) noexcept nogil
    cdef int _sort(self, epoll_event *events, int count, int64_t now, bint *worked) noexcept nogil
    cdef void _release_some(self) noexcept nogil
    cdef bint _prepare_some(self, bint few) noexcept nogil
    cdef void _found(self) noexcept nogil
    cdef void _missed(self) noexcept nogil
    cdef void _slept(self, int64_t waited_ns) noexcept nogil
