# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""`farpage.pager.streams.PythonStreams` as machine code; the same tests hold for both."""

from libc.stdint cimport int64_t
from libc.string cimport memmove

cdef enum:
    # Those of farpage.pager.streams
    LARGEST_WINDOW_PAGES = 256
    LARGEST_STRIDED_WINDOW_PAGES = 64
    LARGEST_STEP_PAGES = 64
    SMALLEST_MARKED_PAGES = 8
    SMALLEST_CAP_PAGES = 2
    SLACK_PAGES = 5
    WASTED_SHARE = 10


cdef inline int64_t pending(const stream_t *stream) noexcept nogil:
    return max((stream.next - stream.last) // stream.step - 1, <int64_t>0)


cdef inline bint are_of_one(int64_t distance, int64_t step) noexcept nogil:
    """Whether an access so far from a candidate, which may follow another one at `step`, makes a stream with it."""
    return distance == 1 or distance == -1 or (distance == step and distance)


cdef class Streams:
    """See `PythonStreams`."""

    def __cinit__(self, int64_t pages):
        self._pages = pages
        self._cap = LARGEST_WINDOW_PAGES

    @property
    def markers(self):
        """Return the pages that are to be brought in only when they are asked for."""
        cdef int index
        return {self._streams[index].marker for index in range(self._count) if self._streams[index].marker >= 0}

    def fault(self, int64_t page, int64_t most):
        """Take note of an access; return what to read ahead as `(first, step, length, marker)`, or None."""
        cdef ahead_t ahead
        if not self.next_window(page, most, &ahead):
            return None
        return ahead.first, ahead.step, ahead.length, ahead.marker

    cdef bint next_window(self, int64_t page, int64_t most, ahead_t *ahead) noexcept nogil:
        cdef int64_t steps = 0
        cdef int index = self._found(page, &steps)
        cdef candidate_t *candidate
        cdef int64_t distance = 0, step = 0
        if index >= 0:
            return self._go_on(index, page, steps, most, ahead)
        index = self._nearby(page)
        if index >= 0:
            distance, step = page - self._candidates[index].page, self._candidates[index].step
            self._candidate_count -= 1
            memmove(
                &self._candidates[index], &self._candidates[index + 1],
                (self._candidate_count - index) * sizeof(candidate_t),
            )
            if are_of_one(distance, step):
                return self._begin(page, distance, most, ahead)
        if self._candidate_count == CANDIDATES:
            self._candidate_count -= 1
            memmove(&self._candidates[0], &self._candidates[1], self._candidate_count * sizeof(candidate_t))
        candidate = &self._candidates[self._candidate_count]
        candidate.page, candidate.step = page, distance
        self._candidate_count += 1
        return False

    cdef bint is_alone(self, int64_t page) noexcept nogil:
        cdef int64_t steps = 0
        cdef int index
        if self._found(page, &steps) >= 0:
            return False
        index = self._nearby(page)
        return index < 0 or not are_of_one(page - self._candidates[index].page, self._candidates[index].step)

    cdef bint is_marker(self, int64_t page) noexcept nogil:
        cdef int index
        for index in range(self._count):
            if self._streams[index].marker == page:
                return True
        return False

    cdef int _found(self, int64_t page, int64_t *steps) noexcept nogil:
        """Return the stream that an access is of, and how far it has come; negative without one."""
        cdef stream_t *stream
        cdef int64_t distance, left
        cdef int index
        for index in range(self._count):
            stream = &self._streams[index]
            distance = page - stream.last
            if distance % stream.step:
                continue
            steps[0] = distance // stream.step
            left = pending(stream)
            if 0 < steps[0] <= left + SLACK_PAGES and (steps[0] == 1 or steps[0] > left or page == stream.marker):
                return index
        return -1

    cdef int _nearby(self, int64_t page) noexcept nogil:
        """Return the candidate that an access may follow; negative without one."""
        cdef int64_t place = page // LARGEST_STEP_PAGES, distance
        cdef int64_t places[3]
        cdef int index, at
        places[0], places[1], places[2] = place, place - 1, place + 1
        for at in range(3):
            for index in range(self._candidate_count):
                distance = page - self._candidates[index].page
                if (
                    self._candidates[index].page // LARGEST_STEP_PAGES == places[at]
                    and -LARGEST_STEP_PAGES <= distance <= LARGEST_STEP_PAGES
                ):
                    return index
        return -1

    cdef bint _begin(self, int64_t page, int64_t step, int64_t most, ahead_t *ahead) noexcept nogil:
        cdef stream_t *stream
        if self._count == STREAMS:
            self._forget(0)
        stream = &self._streams[self._count]
        self._count += 1
        stream.last, stream.step, stream.next = page, step, page + step
        stream.window, stream.marker, stream.used = 1, -1, 0
        return self._window(stream, page + step, most, ahead)

    cdef void _forget(self, int index) noexcept nogil:
        cdef int64_t left = pending(&self._streams[index])
        self.wasted_pages += left
        if left * WASTED_SHARE > self._streams[index].used:
            self._cap = max(self._cap // 2, <int64_t>SMALLEST_CAP_PAGES)
        else:
            self._cap = min(self._cap * 2, <int64_t>LARGEST_WINDOW_PAGES)
        self._count -= 1
        memmove(&self._streams[index], &self._streams[index + 1], (self._count - index) * sizeof(stream_t))

    cdef bint _go_on(self, int index, int64_t page, int64_t steps, int64_t most, ahead_t *ahead) noexcept nogil:
        """Give a stream its next window, if it has come to its marker, or beyond all that it was given."""
        cdef stream_t moved = self._streams[index]
        cdef stream_t *stream = &self._streams[self._count - 1]
        cdef int64_t left = pending(&moved)
        moved.used += min(steps, left)
        moved.last = page
        memmove(
            &self._streams[index], &self._streams[index + 1], (self._count - 1 - index) * sizeof(stream_t)
        )
        stream[0] = moved
        if steps > left:
            return self._window(stream, page + stream.step, most, ahead)
        if page == stream.marker:
            return self._window(stream, stream.next, most, ahead)
        return False

    cdef bint _window(self, stream_t *stream, int64_t first, int64_t most, ahead_t *ahead) noexcept nogil:
        cdef bint neighbours = stream.step == 1 or stream.step == -1
        cdef int64_t largest = LARGEST_WINDOW_PAGES if neighbours else LARGEST_STRIDED_WINDOW_PAGES
        cdef int64_t cap = max(self._cap, stream.used // WASTED_SHARE)
        cdef bint waits = first == stream.last + stream.step
        cdef int64_t count
        stream.window = min(min(stream.window * 2, largest), cap)
        stream.marker = -1
        count = min(min(stream.window - waits, most), self._left(first, stream.step))
        if count <= 0:
            stream.next = stream.last + stream.step
            return False
        stream.next = first + count * stream.step
        if count + waits >= SMALLEST_MARKED_PAGES:
            stream.marker = first + (count // 2 if waits else 0) * stream.step
        ahead.first, ahead.step, ahead.length, ahead.marker = first, stream.step, count, stream.marker
        return True

    cdef int64_t _left(self, int64_t first, int64_t step) noexcept nogil:
        """Return how many pages from `first` on are within the memory."""
        if step > 0:
            return (self._pages - 1 - first) // step + 1 if first < self._pages else 0
        return first // -step + 1 if first >= 0 else 0
