# What other compiled modules may call: without objects of Python, and without its lock if the caller sees to it
# that one thread at a time uses an order.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef struct Queue:
    uint32_t *pages         # a ring of `mask` + 1 places
    uint64_t mask
    uint64_t head
    uint64_t tail


cdef class Order:
    cdef Queue _inactive
    cdef Queue _active
    # No memoryviews: those would bring twenty thousand lines of C to each module that calls this one.
    cdef uint8_t *_where
    cdef uint16_t *_left_at
    cdef uint64_t _evictions
    cdef uint64_t _evictions_a_tick
    cdef int64_t _pages

    # A page that is not of the order's makes no difference to these three.
    # Take note of a page that came back from the volume.
    cdef void page_returned(self, int64_t page) noexcept nogil

    # Take note of one that a write, or what else may be, keeps in memory.
    cdef void page_added(self, int64_t page) noexcept nogil

    # Take note of one that left memory for the volume.
    cdef void page_evicted(self, int64_t page) noexcept nogil

    # Move to the inactive queue what so many victims need, or what the active one has too many.
    cdef void demote(self, uint64_t count) noexcept nogil

    # Take the next victim out of the inactive queue; -1 when there is none.
    cdef int64_t victim(self) noexcept nogil

    cdef int _check(self, int64_t first, int64_t count) except -1
    cdef uint64_t length(self) noexcept nogil
    cdef uint16_t tick(self) noexcept nogil
    cdef uint8_t _where_to(self, int64_t page) noexcept nogil
    cdef bint enter(self, int64_t page, uint8_t where) noexcept nogil
