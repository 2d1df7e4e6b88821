# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The RAM tier's store, compiled: what `farpage.pager.store.PythonStore` does, in C's memory.

A content is one block of malloc(3) with what belongs to it: its links in the order of age and in its bucket.
The hash table grows and shrinks by one bucket at a time (linear hashing: Litwin, VLDB 1980), so that no access
waits for a table to be made anew, and lies in segments, so that none is ever copied.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy, memmove

cdef extern from "malloc.h" nogil:
    size_t malloc_usable_size(void *block)

cdef enum:
    # Those of farpage.pager.table, compression and store
    PAGE = 4096
    WORD = 8
    WORDS = 512
    MOST = 3072
    FAILURES = 8

    ACCELERATION = 1
    MARGIN = 64         # LZ4 gives up somewhat before what it writes to is full
    BLOCK_HEADER = 8    # what malloc(3) takes beside what can be used
    SEGMENT = 512       # buckets


cdef inline uint64_t hashed(uint64_t page) noexcept nogil:
    cdef uint64_t product = page * <uint64_t>0x9E3779B97F4A7C15
    return product ^ (product >> 32)


cdef inline uint64_t cost(Entry *entry) noexcept nogil:
    return malloc_usable_size(entry) + BLOCK_HEADER


cdef inline bint repeats_a_word(const void *content) noexcept nogil:
    # Wherever it lies: who keeps a content may have it at any address.
    return memcmp(content, <const char *>content + WORD, PAGE - WORD) == 0


cdef class Store:
    """Pages made small, at most `most_bytes` of them with all that they take; see `store.PythonStore`."""

    ENTRY_BYTES = 56

    def __cinit__(self, uint64_t most_bytes, uintptr_t compress, uintptr_t decompress, uintptr_t digest):
        """Make it with the addresses of LZ4_compress_fast, LZ4_decompress_safe and XXH3_64bits."""
        if not (compress and decompress and digest):
            raise ValueError("a store without functions")
        self._most_bytes = most_bytes
        self._compress = <Compress>compress
        self._decompress = <Decompress>decompress
        self._digest = <Digest>digest

    def __dealloc__(self):
        self._clear()
        free(self._segments)
        free(self._held_contents)

    def __len__(self):
        return self._count

    def __contains__(self, uint64_t page):
        return self.has(page)

    def keep(self, uint64_t first, content):
        cdef Py_buffer view
        cdef Py_ssize_t offset
        cdef int kept = 0
        PyObject_GetBuffer(content, &view, PyBUF_SIMPLE)
        for offset in range(0, view.len - PAGE + 1, PAGE):
            if self.keep_page(first + offset // PAGE, <const char *>view.buf + offset):
                kept += 1
            elif self.failures >= FAILURES:
                break
        PyBuffer_Release(&view)
        return kept

    def hold(self, uint64_t page, content):
        cdef Py_buffer view
        PyObject_GetBuffer(content, &view, PyBUF_SIMPLE)
        try:
            if view.len != PAGE:
                raise ValueError(f"a page of {view.len} bytes")
            if not self.hold_page(page, view.buf):
                raise MemoryError
        finally:
            PyBuffer_Release(&view)

    def take(self, uint64_t page, uint32_t checksum):
        cdef int place = self._place_of(page)
        cdef Entry *entry
        if place >= 0:
            return self._checked(self._let_go(place), checksum)
        entry = self._unlink(page)
        if entry is NULL:
            return None
        try:
            content = self._content(entry, checksum)
        finally:
            free(entry)
        if content is not None:
            self.given += 1
        return content

    def look(self, uint64_t page, uint32_t checksum):
        cdef int place = self._place_of(page)
        cdef Entry *entry
        if place >= 0:
            return self._checked(self._held_contents + self._held_at[place] * PAGE, checksum)
        entry = self._find(page)
        return None if entry is NULL else self._content(entry, checksum)

    def forget(self, uint64_t first, uint64_t count=1):
        self.forget_run(first, count)

    def resize(self, uint64_t most_bytes):
        self._most_bytes = most_bytes
        self._trim()

    def clear(self):
        self._clear()

    cdef bytes _content(self, const Entry *entry, uint32_t checksum):
        content = PyBytes_FromStringAndSize(NULL, PAGE)
        return content if self._opened(entry, checksum, PyBytes_AS_STRING(content)) else None

    cdef bytes _checked(self, const uint8_t *content, uint32_t checksum):
        if <uint32_t>self._digest(content, PAGE) != checksum:
            return None
        return PyBytes_FromStringAndSize(<const char *>content, PAGE)

    cdef bint has(self, uint64_t page) noexcept nogil:
        return self._place_of(page) >= 0 or self._find(page) is not NULL

    cdef int take_into(self, uint64_t page, uint32_t checksum, void *page_buffer) noexcept nogil:
        cdef int place = self._place_of(page)
        cdef Entry *entry
        cdef bint good
        if place >= 0:
            memcpy(page_buffer, self._let_go(place), PAGE)
            return <uint32_t>self._digest(page_buffer, PAGE) == checksum
        entry = self._unlink(page)
        if entry is NULL:
            return 0
        good = self._opened(entry, checksum, page_buffer)
        free(entry)
        if good:
            self.given += 1
        return good

    cdef int keep_page(self, uint64_t page, const void *content) noexcept nogil:
        cdef char packed[MOST + MARGIN]
        cdef int size
        cdef bint entered
        self.forget_run(page, 1)
        # The first words settle nearly all pages that do not repeat one.
        if repeats_a_word(content):
            entered = self._enter(page, content, WORD)
        else:
            size = self._compress(<const char *>content, packed, PAGE, MOST + MARGIN, ACCELERATION)
            if not 0 < size <= MOST:
                self.failures += 1
                return 0
            entered = self._enter(page, packed, size)
        self.failures = 0
        if not entered:
            return 0
        self.kept += 1
        self._trim()
        return 1

    cdef bint hold_page(self, uint64_t page, const void *content) noexcept nogil:
        cdef int place = 0
        cdef uint8_t at
        if self._held_contents is NULL:
            self._held_contents = <uint8_t *>malloc(MOST_HELD * PAGE)
            if self._held_contents is NULL:
                return False
            for place in range(MOST_HELD):
                self._held_at[place] = place
        self.forget_run(page, 1)
        if self.held == MOST_HELD:
            self._let_go(0)
        at = self._held_at[self.held]
        self._held_pages[self.held] = page
        memcpy(self._held_contents + at * PAGE, content, PAGE)
        self.held += 1
        return True

    cdef int _place_of(self, uint64_t page) noexcept nogil:
        """Return where among those that are held as they are a page is; negative when it is not."""
        cdef int place
        for place in range(<int>self.held):
            if self._held_pages[place] == page:
                return place
        return -1

    cdef const uint8_t *_let_go(self, int place) noexcept nogil:
        """Hold one no more; its content stays where it is until the next one comes."""
        cdef uint8_t at = self._held_at[place]
        self.held -= 1
        memmove(&self._held_pages[place], &self._held_pages[place + 1], (self.held - place) * sizeof(uint64_t))
        memmove(&self._held_at[place], &self._held_at[place + 1], self.held - place)
        self._held_at[self.held] = at
        return self._held_contents + at * PAGE

    cdef void forget_run(self, uint64_t first, uint64_t count) noexcept nogil:
        cdef Entry *entry
        cdef Entry *newer
        cdef uint64_t offset
        cdef int place
        for place in range(<int>self.held - 1, -1, -1):
            if self._held_pages[place] >= first and self._held_pages[place] - first < count:
                self._let_go(place)
        if count > self._count:  # which may be more than anybody could wait for
            entry = self._oldest
            while entry is not NULL:
                newer = entry.newer
                if entry.page >= first and entry.page - first < count:
                    free(self._unlink(entry.page))
                entry = newer
            return
        for offset in range(count):
            if not self._count or (first + offset) >> 32:
                return
            free(self._unlink(first + offset))

    cdef bint _opened(self, const Entry *entry, uint32_t checksum, void *page_buffer) noexcept nogil:
        cdef size_t i
        if entry.size == WORD:
            for i in range(WORDS):
                (<uint64_t *>page_buffer)[i] = entry.content[0]
        elif self._decompress(<const char *>entry.content, <char *>page_buffer, entry.size, PAGE) != PAGE:
            return False
        return <uint32_t>self._digest(page_buffer, PAGE) == checksum

    cdef bint _enter(self, uint64_t page, const void *content, uint32_t size) noexcept nogil:
        """Make an entry, the newest; False without memory for it."""
        cdef Entry *entry
        cdef Entry **bucket
        if page >> 32:  # four bytes a page do, as in the order of replacement
            return False
        if self._count >= self._buckets and not self._grow() and not self._buckets:
            return False
        entry = <Entry *>malloc(sizeof(Entry) - sizeof(entry.content) + size)
        if entry is NULL:
            return False
        entry.page = <uint32_t>page
        entry.size = size
        memcpy(entry.content, content, size)
        bucket = self._bucket_of(page)
        entry.beside = bucket[0]
        bucket[0] = entry
        entry.older = self._newest
        entry.newer = NULL
        if self._newest is NULL:
            self._oldest = entry
        else:
            self._newest.newer = entry
        self._newest = entry
        self._count += 1
        self.stored_bytes += size
        self.taken_bytes += cost(entry)
        return True

    cdef Entry *_unlink(self, uint64_t page) noexcept nogil:
        """Take an entry out of everything; NULL when it is not here. Whoever calls frees it."""
        cdef Entry **link
        cdef Entry *entry
        if not self._count:
            return NULL
        link = self._bucket_of(page)
        while link[0] is not NULL and link[0].page != page:
            link = &link[0].beside
        entry = link[0]
        if entry is NULL:
            return NULL
        link[0] = entry.beside
        if entry.older is NULL:
            self._oldest = entry.newer
        else:
            entry.older.newer = entry.newer
        if entry.newer is NULL:
            self._newest = entry.older
        else:
            entry.newer.older = entry.older
        self._count -= 1
        self.stored_bytes -= entry.size
        self.taken_bytes -= cost(entry)
        while self._count * 2 < self._buckets:
            self._shrink()
        return entry

    cdef Entry *_find(self, uint64_t page) noexcept nogil:
        cdef Entry *entry
        if not self._count:
            return NULL
        entry = self._bucket_of(page)[0]
        while entry is not NULL and entry.page != page:
            entry = entry.beside
        return entry

    cdef void _trim(self) noexcept nogil:
        while self.taken_bytes > self._most_bytes and self._oldest is not NULL:
            free(self._unlink(self._oldest.page))
            self.dropped += 1

    cdef void _clear(self) noexcept nogil:
        self.held = 0
        while self._oldest is not NULL:
            free(self._unlink(self._oldest.page))

    # The hash table: `_buckets` of them, `_low` the largest power of two that is not above that

    cdef Entry **_bucket_at(self, uint64_t index) noexcept nogil:
        return &self._segments[index // SEGMENT][index % SEGMENT]

    cdef Entry **_bucket_of(self, uint64_t page) noexcept nogil:
        cdef uint64_t wide = hashed(page)
        cdef uint64_t index = wide & (2 * self._low - 1)
        return self._bucket_at(index if index < self._buckets else wide & (self._low - 1))

    cdef bint _grow(self) noexcept nogil:
        """Add a bucket, which takes its entries from one of the others; False without memory for it."""
        cdef uint64_t added = self._buckets
        cdef uint64_t room
        cdef void *got
        cdef Entry **link
        cdef Entry **new
        cdef Entry *entry
        if added % SEGMENT == 0:
            if added // SEGMENT == self._segments_room:
                room = 2 * self._segments_room + 1
                got = realloc(self._segments, room * sizeof(Entry **))
                if got is NULL:
                    return False
                self._segments = <Entry ***>got
                self._segments_room = room
            got = malloc(SEGMENT * sizeof(Entry *))
            if got is NULL:
                return False
            self._segments[added // SEGMENT] = <Entry **>got
        new = self._bucket_at(added)
        new[0] = NULL
        self._buckets += 1
        self.taken_bytes += sizeof(Entry *)
        if added == 0:
            self._low = 1
            return True
        link = self._bucket_at(added - self._low)
        while link[0] is not NULL:
            entry = link[0]
            if hashed(entry.page) & (2 * self._low - 1) == added:
                link[0] = entry.beside
                entry.beside = new[0]
                new[0] = entry
            else:
                link = &entry.beside
        if self._buckets == 2 * self._low:
            self._low = self._buckets
        return True

    cdef void _shrink(self) noexcept nogil:
        """Give the entries of the last bucket to the one that they came from."""
        cdef uint64_t last = self._buckets - 1
        cdef Entry **link
        if last:
            if self._low > last:
                self._low //= 2
            link = self._bucket_at(last - self._low)
            while link[0] is not NULL:
                link = &link[0].beside
            link[0] = self._bucket_at(last)[0]
        if last % SEGMENT == 0:
            free(self._segments[last // SEGMENT])
        self._buckets = last
        self.taken_bytes -= sizeof(Entry *)
