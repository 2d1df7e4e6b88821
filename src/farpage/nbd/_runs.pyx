# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""`farpage.nbd.runs` as machine code, which says what everything means; the same tests hold for both."""

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_GET_SIZE
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from farpage.nbd._fastpath cimport (
    CMD_WRITE, REQUEST_BYTES, REQUEST_MAGIC, SIMPLE_BYTES, SIMPLE_MAGIC, be64toh, htobe16, htobe32, htobe64,
)
from farpage.nbd.runs import check_range

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object, int *) except? -1
    PyObject *PyDict_GetItemWithError(object, object) except? NULL


cdef inline bytes header(uint64_t cookie, uint64_t offset, uint32_t length):
    cdef bytes made = PyBytes_FromStringAndSize(NULL, REQUEST_BYTES)
    cdef char *at = PyBytes_AS_STRING(made)
    cdef uint32_t word = htobe32(REQUEST_MAGIC)
    cdef uint32_t what = htobe32(CMD_WRITE)  # the flags, which are none, and the command
    memcpy(at, &word, 4)
    memcpy(at + 4, &what, 4)
    cookie, offset, length = htobe64(cookie), htobe64(offset), htobe32(length)
    memcpy(at + 8, &cookie, 8)
    memcpy(at + 16, &offset, 8)
    memcpy(at + 24, &length, 4)
    return made


cdef Py_ssize_t bytes_of(data) except -1:
    """The bytes of what can be sent, which is contiguous."""
    cdef Py_buffer view
    cdef Py_ssize_t length
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    length = view.len
    PyBuffer_Release(&view)
    return length


def queue_runs(
    runs,
    command,
    dict in_flight not None,
    list unsent not None,
    *,
    uint64_t cookie,
    bounds,
):
    cdef int64_t size_bytes, minimum_bytes
    cdef uint32_t maximum_bytes
    cdef tuple all_runs = tuple(runs)
    cdef list segments = []
    cdef Py_ssize_t queued = 0, length
    cdef int64_t offset
    cdef uint64_t own = cookie
    cdef int overflow = 0
    cdef bint too_long = False
    if not all_runs:
        raise ValueError("there is nothing to write")
    size_bytes, minimum_bytes, maximum_bytes = bounds
    for run in all_runs:
        place, data = run
        length = bytes_of(data)
        offset = PyLong_AsLongLongAndOverflow(place, &overflow)
        if (
            overflow
            or offset < 0
            or length <= 0
            or offset > size_bytes
            or length > size_bytes - offset
            or (offset | length) & (minimum_bytes - 1)
        ):
            check_range(place, length, size_bytes, minimum_bytes)
            raise ValueError(f"{length} bytes at {place} cannot be written")
        own += 1
        queued += REQUEST_BYTES + length
        too_long = too_long or length > maximum_bytes
        if not too_long:
            segments.append(header(own, offset, <uint32_t>length))
            segments.append(data)
    if too_long:
        return 0
    command.parts = len(all_runs)
    while cookie < own:
        cookie += 1
        in_flight[cookie] = command
    unsent += segments
    return queued


def drop_sent(list unsent not None, Py_ssize_t sent):
    cdef Py_ssize_t index, length
    for index, segment in enumerate(unsent):
        length = bytes_of(segment)
        if sent < length:
            if sent:
                unsent[index] = memoryview(segment).cast("B")[sent:]
            del unsent[:index]
            return
        sent -= length
    unsent.clear()


def take_replies(
    bytearray buffer not None, Py_ssize_t position, Py_ssize_t end, dict in_flight not None, command
):
    cdef Py_ssize_t left = command.parts, others
    cdef const char *at
    cdef uint32_t magic, error
    cdef uint64_t word
    cdef PyObject *found
    if not 0 <= position <= end <= PyByteArray_GET_SIZE(buffer):
        raise ValueError("bounds that are not within the buffer")
    if left <= 0:
        raise ValueError("a command of which no part is in flight")
    try:
        # What a dictionary or a command does might shorten the buffer.
        while end - position >= SIMPLE_BYTES and end <= PyByteArray_GET_SIZE(buffer):
            at = PyByteArray_AS_STRING(buffer) + position
            memcpy(&magic, at, 4)
            memcpy(&error, at + 4, 4)
            memcpy(&word, at + 8, 8)
            if magic != htobe32(SIMPLE_MAGIC) or error:
                break
            cookie = be64toh(word)
            found = PyDict_GetItemWithError(in_flight, cookie)
            if found == NULL:
                break
            if found != <PyObject *>command:
                answered = <object>found
                others = answered.parts
                if others <= 0:
                    break
                command.parts = left
                command, left = answered, others
            del in_flight[cookie]
            position += SIMPLE_BYTES
            left -= 1
            if not left:
                return position, command
    finally:
        command.parts = left
    return position, None
