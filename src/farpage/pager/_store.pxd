# What other compiled modules may call: without objects of Python, and without its lock if the caller sees to it
# that one thread at a time uses a store.

from libc.stdint cimport uint8_t, uint32_t, uint64_t

ctypedef int (*Compress)(const char *, char *, int, int, int) noexcept nogil
ctypedef int (*Decompress)(const char *, char *, int, int) noexcept nogil
ctypedef uint64_t (*Digest)(const void *, size_t) noexcept nogil


cdef struct Entry:
    Entry *beside       # the next one of its bucket
    Entry *older
    Entry *newer
    uint32_t page
    uint32_t size       # bytes of its content
    uint64_t content[1] # which begins here


cdef enum:
    MOST_HELD = 16      # farpage.pager.store.MOST_HELD


cdef class Store:
    cdef Compress _compress
    cdef Decompress _decompress
    cdef Digest _digest
    cdef uint64_t _most_bytes
    cdef Entry *_oldest
    cdef Entry *_newest
    cdef uint64_t _count
    cdef Entry ***_segments
    cdef uint64_t _segments_room
    cdef uint64_t _buckets
    cdef uint64_t _low
    cdef uint64_t _held_pages[MOST_HELD]    # the oldest first
    cdef uint8_t _held_at[MOST_HELD]        # where the content of each is
    cdef uint8_t *_held_contents
    cdef readonly uint64_t held
    cdef readonly uint64_t stored_bytes
    cdef readonly uint64_t taken_bytes
    cdef readonly uint64_t failures
    cdef readonly uint64_t kept
    cdef readonly uint64_t given
    cdef readonly uint64_t dropped

    # Whether it holds a page.
    cdef bint has(self, uint64_t page) noexcept nogil

    # Give a page and hold it no more: 1 when `page_buffer`, a page long, has it; 0 when it is not here, or was not
    # what has this checksum: then the buffer may have been written to.
    cdef int take_into(self, uint64_t page, uint32_t checksum, void *page_buffer) noexcept nogil

    # Take a page in when it gets small, in the place of an older content: 1 when it did. `content`, a page long,
    # is read meanwhile and not afterwards.
    cdef int keep_page(self, uint64_t page, const void *content) noexcept nogil

    # Take a page in as it is; False without memory for it.
    cdef bint hold_page(self, uint64_t page, const void *content) noexcept nogil

    # Drop those of a range of pages that are here.
    cdef void forget_run(self, uint64_t first, uint64_t count) noexcept nogil

    cdef Entry **_bucket_at(self, uint64_t index) noexcept nogil
    cdef Entry **_bucket_of(self, uint64_t page) noexcept nogil
    cdef Entry *_find(self, uint64_t page) noexcept nogil
    cdef Entry *_unlink(self, uint64_t page) noexcept nogil
    cdef bytes _checked(self, const uint8_t *content, uint32_t checksum)
    cdef bytes _content(self, const Entry *entry, uint32_t checksum)
    cdef bint _opened(self, const Entry *entry, uint32_t checksum, void *page_buffer) noexcept nogil
    cdef bint _enter(self, uint64_t page, const void *content, uint32_t size) noexcept nogil
    cdef int _place_of(self, uint64_t page) noexcept nogil
    cdef const uint8_t *_let_go(self, int place) noexcept nogil
    cdef void _trim(self) noexcept nogil
    cdef void _clear(self) noexcept nogil
    cdef bint _grow(self) noexcept nogil
    cdef void _shrink(self) noexcept nogil
