# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The order of replacement, compiled: what `farpage.pager.replacement.PythonReplacement` does, in C's memory."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

cdef enum:
    # Those of farpage.pager.replacement
    NOWHERE = 0
    INACTIVE = 1
    ACTIVE = 2
    TICKS = 4096
    TICKS_KEPT = 65535

    SMALLEST = 1024

cdef int64_t MOST_PAGES = <int64_t>1 << 32  # the queues have four bytes for each


cdef inline uint64_t held(const Queue *queue) noexcept nogil:
    return queue.tail - queue.head


cdef bint append(Queue *queue, uint32_t page) noexcept nogil:
    """False without memory for it."""
    cdef uint64_t room = queue.mask + 1 if queue.pages != NULL else 0
    cdef uint64_t length = held(queue), first
    cdef uint32_t *larger
    if length == room:
        larger = <uint32_t *>malloc(max(room * 2, <uint64_t>SMALLEST) * sizeof(uint32_t))
        if larger == NULL:
            return False
        if length:
            first = room - (queue.head & queue.mask)
            memcpy(larger, queue.pages + (queue.head & queue.mask), first * sizeof(uint32_t))
            memcpy(larger + first, queue.pages, (room - first) * sizeof(uint32_t))
        free(queue.pages)
        queue.pages, queue.mask = larger, max(room * 2, <uint64_t>SMALLEST) - 1
        queue.head, queue.tail = 0, length
    queue.pages[queue.tail & queue.mask] = page
    queue.tail += 1
    return True


cdef inline uint32_t taken(Queue *queue) noexcept nogil:
    cdef uint32_t page = queue.pages[queue.head & queue.mask]
    queue.head += 1
    return page


cdef class Order:
    """Order of eviction of one client's pages; see `replacement.PythonReplacement`."""

    def __cinit__(self, int64_t pages):
        if not 0 <= pages <= MOST_PAGES:
            raise ValueError(f"an order of {pages} pages")
        self._pages = pages
        # Of nothing, calloc(3) may return NULL.
        self._where = <uint8_t *>calloc(max(pages, <int64_t>1), sizeof(uint8_t))
        self._left_at = <uint16_t *>calloc(max(pages, <int64_t>1), sizeof(uint16_t))
        if self._where == NULL or self._left_at == NULL:
            raise MemoryError
        self._evictions_a_tick = max(<uint64_t>pages // TICKS, <uint64_t>1)

    def __dealloc__(self):
        free(self._inactive.pages)
        free(self._active.pages)
        free(self._where)
        free(self._left_at)

    def __len__(self):
        return self.length()

    def added(self, int64_t first, int64_t count=1):
        cdef int64_t page
        self._check(first, count)
        for page in range(first, first + count):
            if self._where[page] == NOWHERE and not self.enter(page, INACTIVE):
                raise MemoryError

    def returned(self, int64_t first, int64_t count=1):
        cdef uint8_t where
        cdef int64_t page
        self._check(first, count)
        if not count:
            return
        # Those of one run left and come back together, so the first one speaks for all.
        where = self._where_to(first)
        for page in range(first, first + count):
            if self._where[page] == NOWHERE and not self.enter(page, where):
                raise MemoryError

    def victims(self, int64_t count):
        cdef int64_t page
        taken_out = []
        self.demote(max(count, <int64_t>0))
        while len(taken_out) < count and (page := self.victim()) >= 0:
            taken_out.append(page)
        return taken_out

    def evicted(self, int64_t first, int64_t count=1):
        cdef int64_t page
        cdef uint16_t now
        self._check(first, count)
        self._evictions += count
        now = self.tick()
        for page in range(first, first + count):
            self._left_at[page] = now

    cdef int _check(self, int64_t first, int64_t count) except -1:
        if first < 0 or count < 0 or first > self._pages - count:
            raise IndexError(f"{count} pages from {first} on are not within {self._pages}")
        return 0

    cdef uint64_t length(self) noexcept nogil:
        return held(&self._inactive) + held(&self._active)

    cdef uint16_t tick(self) noexcept nogil:
        return <uint16_t>(self._evictions // self._evictions_a_tick % TICKS_KEPT + 1)

    cdef uint8_t _where_to(self, int64_t page) noexcept nogil:
        cdef uint16_t left_at = self._left_at[page]
        cdef int64_t ticks
        if not left_at:
            return INACTIVE
        ticks = <int64_t>self.tick() - left_at
        if ticks < 0:
            ticks += TICKS_KEPT
        return ACTIVE if <uint64_t>ticks * self._evictions_a_tick < self.length() else INACTIVE

    cdef bint enter(self, int64_t page, uint8_t where) noexcept nogil:
        if not append(&self._active if where == ACTIVE else &self._inactive, <uint32_t>page):
            return False
        self._where[page] = where
        return True

    cdef void page_returned(self, int64_t page) noexcept nogil:
        if 0 <= page < self._pages and self._where[page] == NOWHERE:
            self.enter(page, self._where_to(page))

    cdef void page_added(self, int64_t page) noexcept nogil:
        if 0 <= page < self._pages and self._where[page] == NOWHERE:
            self.enter(page, INACTIVE)

    cdef void page_evicted(self, int64_t page) noexcept nogil:
        if 0 <= page < self._pages:
            self._evictions += 1
            self._left_at[page] = self.tick()

    cdef void demote(self, uint64_t count) noexcept nogil:
        cdef uint64_t active = held(&self._active), inactive = held(&self._inactive), wanted = 0
        cdef uint64_t share = (active + inactive) * 2 // 3
        cdef uint32_t page
        if active > share:
            wanted = active - share
        if count > inactive and count - inactive > wanted:
            wanted = count - inactive
        for _ in range(min(wanted, active)):
            page = taken(&self._active)
            if self.enter(page, INACTIVE):
                continue
            self._where[page] = NOWHERE

    cdef int64_t victim(self) noexcept nogil:
        cdef uint32_t page
        if not held(&self._inactive):
            return -1
        page = taken(&self._inactive)
        self._where[page] = NOWHERE
        return page
