# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""`farpage.nbd.directpath.DirectPath` as machine code; see `_fastpath.pyx`."""

from libc.errno cimport EINTR, errno
from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memmove, memset
from posix.mman cimport munmap

from farpage.kernel._memory cimport map_buffers
from farpage.nbd._fastpath cimport (
    CMD_READ, CMD_WRITE, DATA_BYTES, GATHERED_BYTES, GO_ON, OVER, REQUEST_BYTES, REQUEST_MAGIC, SIMPLE_BYTES,
    WAIT_DEVICE, WAIT_READ, WAIT_WRITE, FastPath, Request, htobe16, htobe32, htobe64,
)
from farpage.kernel.libc import syscall_numbers
from farpage.kernel.memory import PAGE_SIZE

cdef extern from "unistd.h" nogil:
    long syscall(long, ...)
    ssize_t read(int, void *, size_t)

cdef enum:  # directpath.py
    IN_FLIGHT_MAX = 64
    BEGUN_TOGETHER = 4
    READ_MAX_BYTES = 32 << 10
    WRITE_MAX_BYTES = 256 << 10
    WRITES_MAX = 16
    WRITTEN_TOGETHER_BYTES = 256 << 10

cdef enum:
    ALL_BEGUN = 0
    MORE = 1
    NOT_FOR_HERE = 2
    OP_READ = 22
    AIO_PWRITE = 1
    AIO_FLAG_RESFD = 1
    AIO_MAGIC = 0xa10a10a1  # AIO_RING_MAGIC, fs/aio.c
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

cdef packed struct Iocb:  # linux/aio_abi.h
    uint64_t data
    uint32_t key
    uint32_t rw_flags
    uint16_t opcode
    int16_t priority
    uint32_t descriptor
    uint64_t address
    uint64_t length
    int64_t offset
    uint64_t reserved
    uint32_t flags
    uint32_t event

cdef packed struct AioEvent:  # struct io_event
    uint64_t data
    uint64_t iocb
    int64_t result
    int64_t result2

cdef struct AioRing:  # struct aio_ring, fs/aio.c, as far as it is looked at
    uint32_t id
    uint32_t size
    uint32_t head
    uint32_t tail
    uint32_t magic


cdef class DirectPath(FastPath):
    cdef object _ring, _aio
    cdef unsigned char[::1] _queues_bytes, _commands_bytes
    cdef unsigned char *_commands
    cdef unsigned char *_cqes
    cdef unsigned char *_buffers
    cdef volatile uint32_t *_sq_tail
    cdef volatile uint32_t *_cq_head
    cdef volatile uint32_t *_cq_tail
    cdef uint32_t _sq_mask, _cq_mask
    cdef long _enter, _submit_writes, _take_writes
    cdef int _ring_descriptor, _unsubmitted, _free_count, _failed_count
    cdef bint _ending
    cdef int _free[IN_FLIGHT_MAX]
    cdef bint _busy[IN_FLIGHT_MAX]
    cdef Request _requests[IN_FLIGHT_MAX]
    cdef int _failed[IN_FLIGHT_MAX]
    # Writes
    cdef uintptr_t _context
    cdef int _event, _writes_queued, _writes_in_flight
    cdef int64_t _signals
    cdef int _writing
    cdef Py_ssize_t _writing_bytes
    cdef Iocb _iocbs[IN_FLIGHT_MAX]
    cdef Iocb *_queue[IN_FLIGHT_MAX]
    cdef AioEvent _events[IN_FLIGHT_MAX]
    cdef int _event_at, _event_end

    def __cinit__(self, int socket, buffers, storage, counters, settings, ring, writes):
        self._open = False
        self._misaligned |= PAGE_SIZE - 1
        self._in_size -= IN_FLIGHT_MAX * REQUEST_BYTES + WRITTEN_TOGETHER_BYTES
        if self._in_size < REQUEST_BYTES + READ_MAX_BYTES or self._out_size < DATA_BYTES + READ_MAX_BYTES:
            raise ValueError("the buffers are too small")
        if ring.entries < IN_FLIGHT_MAX:
            raise ValueError("the queue is too short")
        layout = ring.layout()
        self._ring, self._aio = ring, writes
        self._queues_bytes, self._commands_bytes = layout.queues, layout.commands
        self._commands = &self._commands_bytes[0]
        self._sq_tail = <volatile uint32_t *> &self._queues_bytes[<Py_ssize_t> layout.sq_tail]
        self._cq_head = <volatile uint32_t *> &self._queues_bytes[<Py_ssize_t> layout.cq_head]
        self._cq_tail = <volatile uint32_t *> &self._queues_bytes[<Py_ssize_t> layout.cq_tail]
        self._cqes = &self._queues_bytes[<Py_ssize_t> layout.cqes]
        self._sq_mask, self._cq_mask = layout.sq_mask, layout.cq_mask
        numbers = syscall_numbers()
        self._enter = numbers.io_uring_enter
        self._submit_writes, self._take_writes = numbers.io_submit, numbers.io_getevents
        self._ring_descriptor = ring.fileno()
        self.device_descriptors = (ring.fileno(),)
        self._free_count = IN_FLIGHT_MAX
        for slot in range(IN_FLIGHT_MAX):
            self._free[slot] = slot
        if writes is None:
            self.write_max_bytes = 0
        else:
            self.write_max_bytes = min(self.write_max_bytes, WRITE_MAX_BYTES)
            self._context, self._event = writes.context, writes.fileno()
            self.device_descriptors += (writes.fileno(),)
        memory = map_buffers(IN_FLIGHT_MAX * WRITE_MAX_BYTES)
        if memory == NULL:
            raise MemoryError
        self._buffers = <unsigned char *>memory
        self._open = True

    def __dealloc__(self):
        # No method is called here: there are none yet when the base could not be made. What is read into stays
        # until the process ends when nobody has waited for the end of the reads.
        if self._buffers != NULL and not self.in_flight:
            munmap(self._buffers, IN_FLIGHT_MAX * WRITE_MAX_BYTES)

    def close(self):
        if not self._open:
            return
        self._open = False
        if self.in_flight or self._turning:
            return
        self._queues_bytes = self._commands_bytes = None
        self._ring.close()
        if self._aio is not None:
            self._aio.close()
        munmap(self._buffers, IN_FLIGHT_MAX * WRITE_MAX_BYTES)
        self._buffers = NULL

    cdef int _turn(self) noexcept nogil:
        cdef bint drained = False, progress
        cdef int outcome, begun = ALL_BEGUN
        cdef Py_ssize_t before
        if self._output_end:
            outcome = self._push()
            if outcome == WAIT_WRITE and not self._stopped and not self._ending:
                return WAIT_WRITE
            self._ending = self._ending or outcome == OVER
        while True:
            progress = self._reap()
            self._ending = self._ending or self._stopped
            if not self._ending:
                if not drained and not self._is_whole():
                    before = self._input_end - self._input_start
                    outcome = self._receive()
                    # Who sends a request at a time sends none before it has the answer.
                    drained = outcome == WAIT_READ or self._input_end - self._input_start - before <= REQUEST_BYTES
                    self._ending = outcome == OVER
                begun = self._begin()
                if begun == NOT_FOR_HERE:
                    self._ending = True
            if self._unsubmitted or self._writes_queued:
                self._submit()
            if not progress or self._output_end >= GATHERED_BYTES:
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
            if begun == MORE:
                return WAIT_DEVICE
            if drained:
                return WAIT_READ

    cdef int _begin(self) noexcept nogil:
        """Queue the requests that have come."""
        cdef Request request
        cdef int slot
        while not self._ending and self._is_whole():
            if not self._request(self._input_start, &request):
                return NOT_FOR_HERE
            if request.command == CMD_READ and request.length > READ_MAX_BYTES:
                return NOT_FOR_HERE
            if request.command == CMD_WRITE and self._aio is None:
                return NOT_FOR_HERE
            if not self._free_count:
                return MORE
            if request.command == CMD_WRITE and (
                self._writing == WRITES_MAX
                or self._writing_bytes + <Py_ssize_t> request.length > WRITTEN_TOGETHER_BYTES
            ):
                return MORE
            self._free_count -= 1
            slot = self._free[self._free_count]
            self._requests[slot] = request
            self._busy[slot] = True
            self.in_flight += 1
            if request.command == CMD_WRITE:
                self._queue_write(slot)
            else:
                self._queue_read(slot)
            self._input_start += self._whole_bytes(&request)
            if self._unsubmitted == BEGUN_TOGETHER:
                self._submit()
        return ALL_BEGUN

    cdef unsigned char *_content(self, int slot) noexcept nogil:
        return self._buffers + slot * WRITE_MAX_BYTES

    cdef void _queue_read(self, int slot) noexcept nogil:
        cdef Request *request = &self._requests[slot]
        cdef uint32_t tail = self._sq_tail[0]
        cdef Sqe *command = <Sqe *> (self._commands + (tail & self._sq_mask) * SQE_BYTES)
        memset(command, 0, SQE_BYTES)
        command.opcode = OP_READ
        command.descriptor = self._file
        command.offset = self._origin + request.offset
        command.address = <uint64_t> self._content(slot)
        command.length = request.length
        command.user_data = slot
        self._sq_tail[0] = tail + 1
        self._unsubmitted += 1

    cdef void _queue_write(self, int slot) noexcept nogil:
        cdef Request *request = &self._requests[slot]
        cdef Iocb *command = &self._iocbs[slot]
        memcpy(self._content(slot), self._in + self._input_start + REQUEST_BYTES, request.length)
        memset(command, 0, sizeof(Iocb))
        command.data = slot
        command.opcode = AIO_PWRITE
        command.descriptor = self._file
        command.address = <uint64_t> self._content(slot)
        command.length = request.length
        command.offset = <int64_t> (self._origin + request.offset)
        command.flags = AIO_FLAG_RESFD
        command.event = self._event
        self._queue[self._writes_queued] = command
        self._writes_queued += 1
        self._writing += 1
        self._writing_bytes += request.length

    cdef void _submit(self) noexcept nogil:
        cdef long taken
        cdef Sqe *command
        if self._writes_queued:
            self._submit_queue()
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

    cdef void _submit_queue(self) noexcept nogil:
        """Start the writes; what is refused, and what the kernel does not take, is for the loop."""
        cdef int at = 0
        cdef long taken
        cdef bint refused = self._is_refused()
        while at < self._writes_queued and not refused:
            taken = syscall(
                self._submit_writes, <long> self._context, <long> (self._writes_queued - at), <long> &self._queue[at]
            )
            if taken > 0:
                at += <int> taken
                self._writes_in_flight += <int> taken
            elif taken == 0 or errno != EINTR:
                break
        while at < self._writes_queued:
            self._release(<int> self._queue[at].data, False)
            at += 1
        self._writes_queued = 0

    cdef bint _reap(self) noexcept nogil:
        """Answer what has ended; tells whether there was anything."""
        cdef uint32_t head = self._cq_head[0]
        cdef Cqe *completion
        cdef bint any = False
        while head != self._cq_tail[0]:
            completion = <Cqe *> (self._cqes + (head & self._cq_mask) * CQE_BYTES)
            if not self._end(completion.user_data, completion.result):
                break
            any = True
            head += 1
            self._cq_head[0] = head
        if self._signals or self._writes_in_flight:
            self._take_events()
        while self._event_at < self._event_end:
            if not self._end(self._events[self._event_at].data, self._events[self._event_at].result):
                break
            any = True
            self._event_at += 1
        return any

    cdef void _take_events(self) noexcept nogil:
        """Fetch the writes that have ended, when those that were fetched before are answered."""
        cdef volatile AioRing *ring = <volatile AioRing *> self._context
        cdef int64_t signals = 0
        cdef long zero_time[2]
        cdef long taken
        if self._signals:
            # Of writes that were answered before the eventfd told of them, so that nobody is woken for those.
            if read(self._event, &signals, 8) == 8:
                self._signals -= signals
        if self._event_at < self._event_end or (ring.magic == AIO_MAGIC and ring.head == ring.tail):
            return
        zero_time[0] = zero_time[1] = 0
        taken = syscall(
            self._take_writes, <long> self._context, <long> 0, <long> IN_FLIGHT_MAX, <long> &self._events[0],
            <long> &zero_time[0],
        )
        if taken > 0:
            self._event_at, self._event_end = 0, <int> taken
            self._writes_in_flight -= <int> taken
            self._signals += taken
            if read(self._event, &signals, 8) == 8:
                self._signals -= signals

    cdef bint _end(self, uint64_t token, int64_t result) noexcept nogil:
        """Answer a request that has ended; False when there is no room for the answer now."""
        cdef int slot
        cdef Request *request
        cdef bint write, room
        if token >= IN_FLIGHT_MAX or not self._busy[token]:
            return True  # it was not begun here
        slot = <int> token
        request = &self._requests[slot]
        write = request.command == CMD_WRITE
        room = self._room() >= (SIMPLE_BYTES if write else DATA_BYTES + <Py_ssize_t> request.length)
        if not room and not self._ending:
            return False
        room = room and result == <int64_t> request.length
        if room:
            if write:
                self._acknowledge(self._out + self._output_end, request)
                self._output_end += SIMPLE_BYTES
                self._writes += 1
                self._written_bytes += request.length
            else:
                memcpy(self._payload(request), self._content(slot), request.length)
                self._reply(request)
            self.served += 1
        self._release(slot, room)
        return True

    cdef void _release(self, int slot, bint answered) noexcept nogil:
        if self._requests[slot].command == CMD_WRITE:
            self._writing -= 1
            self._writing_bytes -= self._requests[slot].length
        self._busy[slot] = False
        self.in_flight -= 1
        if not answered:  # it keeps its place until it is given back
            self._failed[self._failed_count] = slot
            self._failed_count += 1
            self._ending = True
            return
        self._free[self._free_count] = slot
        self._free_count += 1

    cdef void _give_back(self) noexcept nogil:
        """Put the requests that were not answered before what was not begun."""
        cdef Py_ssize_t left = self._input_end - self._input_start, before = 0
        cdef unsigned char *at = self._in
        cdef Request *request
        cdef uint32_t word
        cdef uint64_t long_word
        cdef int index
        for index in range(self._failed_count):
            before += self._whole_bytes(&self._requests[self._failed[index]])
        memmove(self._in + before, self._in + self._input_start, left)
        self._input_start, self._input_end = 0, before + left
        for index in range(self._failed_count):
            request = &self._requests[self._failed[index]]
            word = htobe32(REQUEST_MAGIC)
            memcpy(at, &word, 4)
            word = htobe32(request.command)
            memcpy(at + 4, &word, 4)
            memcpy(at + 8, &request.cookie, 8)
            long_word = htobe64(request.offset)
            memcpy(at + 16, &long_word, 8)
            word = htobe32(request.length)
            memcpy(at + 24, &word, 4)
            if request.command == CMD_WRITE:
                memcpy(at + REQUEST_BYTES, self._content(self._failed[index]), request.length)
            at += self._whole_bytes(request)
            self._free[self._free_count] = self._failed[index]
            self._free_count += 1
        self._failed_count = 0
        self._ending = False
