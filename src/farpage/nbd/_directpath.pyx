# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""`farpage.nbd.directpath.DirectPath` as machine code; see `_fastpath.pyx`."""

from libc.errno cimport EINTR, errno
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memmove, memset

from farpage.nbd._fastpath cimport (
    CMD_READ, DATA_BYTES, GATHERED_BYTES, GO_ON, OVER, REQUEST_BYTES, REQUEST_MAGIC, WAIT_DEVICE, WAIT_READ,
    WAIT_WRITE, FastPath, Request, htobe16, htobe32, htobe64,
)
from farpage.kernel.libc import syscall_numbers
from farpage.kernel.memory import PAGE_SIZE, AlignedBuffer

cdef extern from "unistd.h" nogil:
    long syscall(long, ...)

cdef enum:
    READS_MAX = 64
    BEGUN_TOGETHER = 4
    READ_MAX_BYTES = 32 << 10
    OP_READ = 22
    SQE_BYTES = 64
    CQE_BYTES = 16

cdef packed struct Sqe:  # struct io_uring_sqe, the part that reads need
    uint8_t opcode
    uint8_t flags
    uint16_t ioprio
    int32_t descriptor
    uint64_t offset
    uint64_t address
    uint32_t length
    uint32_t rw_flags
    uint64_t user_data

cdef packed struct Cqe:  # struct io_uring_cqe
    uint64_t user_data
    int32_t result
    uint32_t flags


cdef class DirectPath(FastPath):
    cdef object _ring, _memory
    cdef unsigned char[::1] _queues_bytes, _commands_bytes, _memory_bytes
    cdef unsigned char *_commands
    cdef unsigned char *_cqes
    cdef unsigned char *_buffers
    cdef volatile uint32_t *_sq_tail
    cdef volatile uint32_t *_cq_head
    cdef volatile uint32_t *_cq_tail
    cdef uint32_t _sq_mask, _cq_mask
    cdef long _enter
    cdef int _ring_descriptor, _unsubmitted, _free_count, _failed_count
    cdef bint _ending
    cdef int _free[READS_MAX]
    cdef Request _requests[READS_MAX]
    cdef Request _failed[READS_MAX]

    def __init__(self, int socket, buffers, storage, counters, settings, ring):
        settings = settings._replace(misaligned=settings.misaligned | PAGE_SIZE - 1)
        super().__init__(socket, buffers, storage, counters, settings)
        memory = AlignedBuffer(READS_MAX * READ_MAX_BYTES)
        layout = ring.layout()
        self._ring, self._memory = ring, memory
        self._queues_bytes, self._commands_bytes = layout.queues, layout.commands
        self._memory_bytes = memory.view
        self._buffers, self._commands = &self._memory_bytes[0], &self._commands_bytes[0]
        self._sq_tail = <volatile uint32_t *> &self._queues_bytes[<Py_ssize_t> layout.sq_tail]
        self._cq_head = <volatile uint32_t *> &self._queues_bytes[<Py_ssize_t> layout.cq_head]
        self._cq_tail = <volatile uint32_t *> &self._queues_bytes[<Py_ssize_t> layout.cq_tail]
        self._cqes = &self._queues_bytes[<Py_ssize_t> layout.cqes]
        self._sq_mask, self._cq_mask = layout.sq_mask, layout.cq_mask
        self._enter = syscall_numbers().io_uring_enter
        self._ring_descriptor = self.device_descriptor = ring.fileno()
        self._free_count = READS_MAX
        for slot in range(READS_MAX):
            self._free[slot] = slot
        self._in_size -= READS_MAX * REQUEST_BYTES
        self.write_max_bytes = 0

    def close(self):
        if self.in_flight:
            return
        self._queues_bytes = self._commands_bytes = self._memory_bytes = None
        self._ring.close()
        self._memory.close()

    cdef int _turn(self) noexcept nogil:
        cdef bint drained = False, progress
        cdef int outcome
        cdef Py_ssize_t before
        if self.output_end:
            outcome = self._push()
            if outcome == WAIT_WRITE and not self._stopped and not self._ending:
                return WAIT_WRITE
            self._ending = self._ending or outcome == OVER
        while True:
            progress = self._reap()
            self._ending = self._ending or self._stopped
            if not self._ending:
                if not drained and not self._is_whole():
                    before = self.input_end - self.input_start
                    outcome = self._receive()
                    # Who sends a request at a time sends none before it has the answer.
                    drained = outcome == WAIT_READ or self.input_end - self.input_start - before <= REQUEST_BYTES
                    self._ending = outcome == OVER
                if not self._begin():
                    self._ending = True
            if self._unsubmitted:
                self._submit()
            if not progress or self.output_end >= GATHERED_BYTES:
                outcome = self._push()
                if outcome == WAIT_WRITE and not self._ending:
                    return WAIT_WRITE
                self._ending = self._ending or outcome == OVER
            if progress:
                continue
            if self._ending:
                if self.in_flight:
                    return WAIT_DEVICE
                self._give_back()
                return OVER
            if not self._free_count:
                return WAIT_DEVICE
            if drained:
                return WAIT_READ

    cdef bint _begin(self) noexcept nogil:
        """Queue the reads that have come; False when the next request is not for here."""
        cdef Request request
        cdef int slot
        cdef Sqe *command
        cdef uint32_t tail
        while self._free_count and not self._ending and self.input_end - self.input_start >= REQUEST_BYTES:
            if not self._request(self.input_start, &request) or request.length > READ_MAX_BYTES:
                return False
            self.input_start += REQUEST_BYTES
            self._free_count -= 1
            slot = self._free[self._free_count]
            self._requests[slot] = request
            tail = self._sq_tail[0]
            command = <Sqe *> (self._commands + (tail & self._sq_mask) * SQE_BYTES)
            memset(command, 0, SQE_BYTES)
            command.opcode = OP_READ
            command.descriptor = self._file
            command.offset = self._origin + request.offset
            command.address = <uint64_t> (self._buffers + slot * READ_MAX_BYTES)
            command.length = request.length
            command.user_data = slot
            self._sq_tail[0] = tail + 1
            self.in_flight += 1
            self._unsubmitted += 1
            if self._unsubmitted == BEGUN_TOGETHER:
                self._submit()
        return True

    cdef void _submit(self) noexcept nogil:
        cdef long taken
        cdef Sqe *command
        while self._unsubmitted:
            taken = syscall(
                self._enter, <long> self._ring_descriptor, <long> self._unsubmitted, <long> 0, <long> 0, <long> 0,
                <long> 0,
            )
            if taken > 0:
                self._unsubmitted -= taken
            elif taken == 0 or errno != EINTR:
                break
        while self._unsubmitted:  # no memory: the loop tries
            self._sq_tail[0] = self._sq_tail[0] - 1
            command = <Sqe *> (self._commands + (self._sq_tail[0] & self._sq_mask) * SQE_BYTES)
            self._unsubmitted -= 1
            self._release(<int> command.user_data, False)

    cdef bint _reap(self) noexcept nogil:
        """Answer reads that have ended; tells whether there were any."""
        cdef uint32_t head = self._cq_head[0]
        cdef Cqe *completion
        cdef Request *request
        cdef int slot
        cdef bint room, any = False
        while head != self._cq_tail[0]:
            completion = <Cqe *> (self._cqes + (head & self._cq_mask) * CQE_BYTES)
            slot = <int> completion.user_data
            request = &self._requests[slot]
            room = self._room() >= DATA_BYTES + <Py_ssize_t> request.length
            if not room and not self._ending:
                break
            room = room and completion.result == <int32_t> request.length
            if room:
                memcpy(self._payload(request), self._buffers + slot * READ_MAX_BYTES, request.length)
                self._reply(request)
                self.served += 1
            self._release(slot, room)
            any = True
            head += 1
            self._cq_head[0] = head
        return any

    cdef void _release(self, int slot, bint answered) noexcept nogil:
        if not answered:
            self._failed[self._failed_count] = self._requests[slot]
            self._failed_count += 1
            self._ending = True
        self._free[self._free_count] = slot
        self._free_count += 1
        self.in_flight -= 1

    cdef void _give_back(self) noexcept nogil:
        """Put the requests that were not answered before what was not begun."""
        cdef unsigned char *at = self._in
        cdef Py_ssize_t left = self.input_end - self.input_start, before = self._failed_count * REQUEST_BYTES
        cdef uint32_t word
        cdef uint64_t long_word
        memmove(self._in + before, self._in + self.input_start, left)
        self.input_start, self.input_end = 0, before + left
        for index in range(self._failed_count):
            word = htobe32(REQUEST_MAGIC)
            memcpy(at, &word, 4)
            word = CMD_READ
            memcpy(at + 4, &word, 4)
            memcpy(at + 8, &self._failed[index].cookie, 8)
            long_word = htobe64(self._failed[index].offset)
            memcpy(at + 16, &long_word, 8)
            word = htobe32(self._failed[index].length)
            memcpy(at + 24, &word, 4)
            at += REQUEST_BYTES
        self._failed_count = 0
        self._ending = False
