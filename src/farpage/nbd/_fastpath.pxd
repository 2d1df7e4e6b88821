from libc.stdint cimport uint16_t, uint32_t, uint64_t

cdef extern from "endian.h" nogil:
    uint16_t be16toh(uint16_t)
    uint32_t be32toh(uint32_t)
    uint64_t be64toh(uint64_t)
    uint16_t htobe16(uint16_t)
    uint32_t htobe32(uint32_t)
    uint64_t htobe64(uint64_t)

cdef extern from "sys/types.h" nogil:
    ctypedef long off_t
    ctypedef long ssize_t

cdef enum:
    REQUEST_BYTES = 28
    REQUEST_MAGIC = 0x25609513
    SIMPLE_MAGIC = 0x67446698
    STRUCTURED_MAGIC = 0x668E33EF
    CMD_READ = 0
    CMD_WRITE = 1
    REPLY_FLAG_DONE = 1
    REPLY_TYPE_OFFSET_DATA = 1
    SIMPLE_BYTES = 16
    DATA_BYTES = 28

cdef enum:  # fastpath.Outcome
    WAIT_READ = 0
    WAIT_WRITE = 1
    OVER = 2
    WAIT_DEVICE = 3
    GO_ON = 4
    FULL = 5

cdef enum:
    TURN_COST_MAX = 64
    COST_SHIFT = 14
    GATHERED_BYTES = 32 << 10
    MOVED_MAX_BYTES = 8 << 10

cdef struct Request:
    uint16_t command
    uint64_t cookie
    uint64_t offset
    uint32_t length


cdef class FastPath:
    cdef object _input, _area, _refusal, _over, _counters
    cdef unsigned char[::1] _input_bytes, _area_bytes
    cdef unsigned char *_in
    cdef unsigned char *_out
    cdef Py_ssize_t _in_size    # what is received into, not more than the buffer has
    cdef Py_ssize_t _in_whole_size, _out_size
    cdef int _socket, _file
    cdef uint64_t _origin, _size, _misaligned
    cdef bint _structured
    cdef volatile bint _stopped
    cdef bint _open, _turning
    cdef long _cost
    cdef long _reads, _read_bytes, _writes, _written_bytes
    cdef Py_ssize_t _input_start, _input_end, _output_start, _output_end
    cdef public Py_ssize_t read_max_bytes, write_max_bytes
    cdef public long served
    cdef readonly long reads_served
    cdef readonly int in_flight
    cdef readonly tuple device_descriptors

    cdef int _check_idle(self) except -1
    cdef int _turn(self) noexcept nogil
    cdef int _receive(self) noexcept nogil
    cdef int _request(self, Py_ssize_t at, Request *request) noexcept nogil
    cdef Py_ssize_t _whole_bytes(self, Request *request) noexcept nogil
    cdef bint _is_whole(self) noexcept nogil
    cdef int _carry_out(self) noexcept nogil
    cdef Py_ssize_t _room(self) noexcept nogil
    cdef unsigned char *_payload(self, Request *request) noexcept nogil
    cdef void _reply(self, Request *request) noexcept nogil
    cdef bint _read(self, Request *request) noexcept nogil
    cdef bint _write(self, Request *request) noexcept nogil
    cdef void _acknowledge(self, unsigned char *reply, Request *request) noexcept nogil
    cdef bint _is_refused(self) noexcept with gil
    cdef bint _is_over(self) noexcept with gil
    cdef int _push(self) noexcept nogil
    cdef void _count(self) noexcept with gil
