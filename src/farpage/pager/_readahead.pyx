# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""`farpage.pager.readahead.PythonReadAhead` as machine code; the same tests hold for both."""

from libc.stdint cimport int64_t
from libc.string cimport memmove


cdef class ReadAhead:
    """See `PythonReadAhead`."""

    def __cinit__(self, int64_t largest_window_pages, *, bint gaps):
        self._largest = largest_window_pages
        self._gaps = gaps

    def window(self, int64_t page):
        """Return how many pages from `page` on to bring in, at least one, and remember it."""
        return self.next_window(page)

    cdef int64_t next_window(self, int64_t page) noexcept nogil:
        cdef int index
        cdef int64_t reach
        cdef followed_t stream
        for index in range(self._count):
            stream = self._streams[index]
            reach = stream.next + stream.window if self._gaps else stream.next
            if stream.last < page <= reach:
                stream.window = min(stream.window * 2, self._largest)
                stream.last, stream.next = page, page + stream.window
                self._drop(index)
                self._append(stream)
                return stream.window
        if self._count == STREAMS_FOLLOWED:
            self._drop(0)
        stream.last, stream.next, stream.window = page, page + 1, 1
        self._append(stream)
        return 1

    cdef void _drop(self, int index) noexcept nogil:
        self._count -= 1
        memmove(&self._streams[index], &self._streams[index + 1], (self._count - index) * sizeof(followed_t))

    cdef void _append(self, followed_t stream) noexcept nogil:
        self._streams[self._count] = stream
        self._count += 1
