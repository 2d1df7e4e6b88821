# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""`farpage.nbd.fastpath.FastPath` as machine code: system calls and what is between them without the interpreter's lock.

Its twin in Python says what everything means; the same tests hold for both.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.string cimport memcpy, memmove

cdef extern from "sys/socket.h" nogil:
    ssize_t recv(int, void *, size_t, int)
    ssize_t send(int, const void *, size_t, int)
    enum:
        MSG_DONTWAIT
        MSG_NOSIGNAL

cdef extern from "sys/uio.h" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t preadv2(int, const iovec *, int, off_t, int)
    enum:
        RWF_NOWAIT

cdef extern from "unistd.h" nogil:
    ssize_t pwrite(int, const void *, size_t, off_t)


cdef class FastPath:
    def __cinit__(self, int socket, buffers, storage, counters, settings, *_):
        input_, area = buffers
        self._input, self._area = input_, area
        self._input_bytes, self._area_bytes = input_, area
        self._in, self._out = &self._input_bytes[0], &self._area_bytes[0]
        self._in_whole_size = self._in_size = len(input_)
        self._out_size = len(area)
        if self._in_size < REQUEST_BYTES or self._out_size < DATA_BYTES:
            raise ValueError("the buffers are too small")
        self._socket, self._file = socket, storage.descriptor
        self._origin, self._size, self._misaligned = storage.origin_bytes, settings.size_bytes, settings.misaligned
        self._structured = settings.structured_replies
        self._refusal, self._over, self._counters = storage.refusal, storage.over, counters
        self.write_max_bytes = (
            min(settings.write_max_bytes, self._in_size - REQUEST_BYTES) if storage.refusal is not None else 0
        )
        self.device_descriptors = ()
        self._open = True

    def close(self):
        self._open = False

    @property
    def stopped(self):
        return bool(self._stopped)

    @stopped.setter
    def stopped(self, bint stopped):
        self._stopped = stopped

    @property
    def input_start(self):
        return self._input_start

    @input_start.setter
    def input_start(self, Py_ssize_t place):
        self._check_idle()
        self._input_start = place

    @property
    def input_end(self):
        return self._input_end

    @input_end.setter
    def input_end(self, Py_ssize_t place):
        self._check_idle()
        self._input_end = place

    @property
    def output_start(self):
        return self._output_start

    @output_start.setter
    def output_start(self, Py_ssize_t place):
        self._check_idle()
        self._output_start = place

    @property
    def output_end(self):
        return self._output_end

    @output_end.setter
    def output_end(self, Py_ssize_t place):
        self._check_idle()
        self._output_end = place

    cdef int _check_idle(self) except -1:
        """Keep who shares the buffers from moving bounds that somebody goes by."""
        if self._turning or self.in_flight:
            raise RuntimeError("the connection is being served")
        return 0

    def turn(self):
        cdef int outcome
        if not self._open:
            raise ValueError("a path that is closed")
        if self._turning:
            raise RuntimeError("the connection is being served")
        if (
            not 0 <= self._input_start <= self._input_end <= self._in_whole_size
            or not 0 <= self._output_start <= self._output_end <= self._out_size
        ):
            raise ValueError("bounds that are not within the buffers")
        self._turning = True
        with nogil:
            outcome = self._turn()
        self._turning = False
        return outcome

    cdef int _turn(self) noexcept nogil:
        cdef int outcome, received
        cdef bint alone
        cdef long served_before = self.served
        self._cost = 0
        if self._output_end:
            outcome = self._push()
            if outcome != GO_ON and (outcome == OVER or not self._stopped):
                return outcome
        while not self._stopped:
            if not self._is_whole():
                received = self._receive()
                if received != GO_ON:
                    outcome = self._push()
                    return received if outcome == GO_ON else outcome
            outcome = self._carry_out()
            if outcome == OVER:
                break
            alone = self.served - served_before < 2 and self._input_start == self._input_end
            if alone or outcome == FULL or self._cost >= TURN_COST_MAX:
                outcome = self._push()
                if outcome != GO_ON or alone:
                    return WAIT_READ if outcome == GO_ON else outcome
                self._cost = 0
        outcome = self._push()
        return OVER

    cdef int _receive(self) noexcept nogil:
        """Receive behind what is there; WAIT_READ when nothing has come, OVER when nothing will."""
        cdef Py_ssize_t left = self._input_end - self._input_start
        cdef ssize_t received
        if left <= MOVED_MAX_BYTES or self._input_end >= self._in_size:
            memmove(self._in, self._in + self._input_start, left)
            self._input_start, self._input_end = 0, left
        if self._input_end >= self._in_size:
            return OVER
        while True:
            received = recv(self._socket, self._in + self._input_end, self._in_size - self._input_end, MSG_DONTWAIT)
            if received > 0:
                self._input_end += received
                return GO_ON
            if received == 0 or errno != EINTR:
                return WAIT_READ if received < 0 and errno == EAGAIN else OVER

    cdef int _request(self, Py_ssize_t at, Request *request) noexcept nogil:
        """Read the header at `at`; tells whether the request is one that is served here."""
        cdef uint32_t word
        cdef uint16_t half
        cdef uint64_t long_word
        memcpy(&word, self._in + at, 4)
        if be32toh(word) != REQUEST_MAGIC:
            return False
        memcpy(&half, self._in + at + 4, 2)
        if half:
            return False
        memcpy(&half, self._in + at + 6, 2)
        request.command = be16toh(half)
        memcpy(&request.cookie, self._in + at + 8, 8)
        memcpy(&long_word, self._in + at + 16, 8)
        request.offset = be64toh(long_word)
        memcpy(&word, self._in + at + 24, 4)
        request.length = be32toh(word)
        if request.command == CMD_READ:
            if <Py_ssize_t> request.length > self.read_max_bytes:
                return False
        elif request.command != CMD_WRITE or <Py_ssize_t> request.length > self.write_max_bytes:
            return False
        return (
            request.length != 0
            and request.offset <= self._size
            and request.length <= self._size - request.offset
            and not (request.offset | request.length) & self._misaligned
        )

    cdef Py_ssize_t _whole_bytes(self, Request *request) noexcept nogil:
        return REQUEST_BYTES + (<Py_ssize_t> request.length if request.command == CMD_WRITE else 0)

    cdef bint _is_whole(self) noexcept nogil:
        cdef Request request
        if self._input_end - self._input_start < REQUEST_BYTES:
            return False
        if not self._request(self._input_start, &request):
            return True
        return self._input_end - self._input_start >= self._whole_bytes(&request)

    cdef int _carry_out(self) noexcept nogil:
        cdef Request request
        cdef Py_ssize_t at = self._input_start, end = self._input_end
        cdef long cost = self._cost
        cdef bint writes = False
        while end - at >= REQUEST_BYTES and cost < TURN_COST_MAX and self._request(at, &request):
            if end - at < self._whole_bytes(&request):
                break
            writes = writes or request.command == CMD_WRITE
            cost += 1 + (request.length >> COST_SHIFT)
            at += self._whole_bytes(&request)
        if writes and self._is_refused():
            return OVER
        end = at
        while self._input_start < end:
            if self._stopped:
                return OVER
            # The buffer is its owner's, too, who might have written to it while it was asked.
            if not self._request(self._input_start, &request) or end - self._input_start < self._whole_bytes(&request):
                return OVER
            if request.command == CMD_READ:
                if self._room() < DATA_BYTES + <Py_ssize_t> request.length:
                    return FULL if self._output_end else OVER
                if not self._read(&request):
                    return OVER
            else:
                if self._room() < SIMPLE_BYTES:
                    return FULL if self._output_end else OVER
                if not self._write(&request):
                    return OVER
            self._input_start += self._whole_bytes(&request)
            self.served += 1
            self._cost += 1 + (request.length >> COST_SHIFT)
            if self._output_end + self._written_bytes >= GATHERED_BYTES:
                return FULL
        if self._cost < TURN_COST_MAX and self._is_whole():
            return OVER  # what is next is not for here
        return GO_ON

    cdef Py_ssize_t _room(self) noexcept nogil:
        return self._out_size - self._output_end

    cdef unsigned char *_payload(self, Request *request) noexcept nogil:
        """Where the payload of the next reply is to be."""
        return self._out + self._output_end + (DATA_BYTES if self._structured else SIMPLE_BYTES)

    cdef bint _read(self, Request *request) noexcept nogil:
        cdef iovec vector
        vector.iov_base = self._payload(request)
        vector.iov_len = request.length
        if preadv2(self._file, &vector, 1, self._origin + request.offset, RWF_NOWAIT) != <ssize_t> request.length:
            return False
        self._reply(request)
        return True

    cdef void _reply(self, Request *request) noexcept nogil:
        """Put the header before a payload that is in its place."""
        cdef unsigned char *reply = self._out + self._output_end
        cdef uint32_t word
        cdef uint16_t half
        cdef uint64_t long_word
        self._output_end = self._payload(request) - self._out + request.length
        if self._structured:
            word = htobe32(STRUCTURED_MAGIC)
            memcpy(reply, &word, 4)
            half = htobe16(REPLY_FLAG_DONE)
            memcpy(reply + 4, &half, 2)
            half = htobe16(REPLY_TYPE_OFFSET_DATA)
            memcpy(reply + 6, &half, 2)
            memcpy(reply + 8, &request.cookie, 8)
            word = htobe32(request.length + 8)
            memcpy(reply + 16, &word, 4)
            long_word = htobe64(request.offset)
            memcpy(reply + 20, &long_word, 8)
        else:
            self._acknowledge(reply, request)
        self._reads += 1
        self.reads_served += 1
        self._read_bytes += request.length

    cdef bint _write(self, Request *request) noexcept nogil:
        cdef unsigned char *data = self._in + self._input_start + REQUEST_BYTES
        cdef Py_ssize_t done = 0
        cdef ssize_t written
        if self._over is not None and self._is_over():
            return False
        while done < <Py_ssize_t> request.length:
            written = pwrite(self._file, data + done, request.length - done, self._origin + request.offset + done)
            if written <= 0:
                if written < 0 and errno == EINTR:
                    continue
                return False
            done += written
        self._acknowledge(self._out + self._output_end, request)
        self._output_end += SIMPLE_BYTES
        self._writes += 1
        self._written_bytes += request.length
        return True

    cdef void _acknowledge(self, unsigned char *reply, Request *request) noexcept nogil:
        cdef uint32_t word = htobe32(SIMPLE_MAGIC)
        memcpy(reply, &word, 4)
        word = 0
        memcpy(reply + 4, &word, 4)
        memcpy(reply + 8, &request.cookie, 8)

    cdef bint _is_refused(self) noexcept with gil:
        try:
            return self._refusal() != 0
        except BaseException:
            return True  # it is asked again, and the answer reported, where that can be done

    cdef bint _is_over(self) noexcept with gil:
        try:
            return self._over()
        except BaseException:
            return True

    cdef int _push(self) noexcept nogil:
        cdef ssize_t sent
        if self._reads or self._writes:
            self._count()
        while self._output_start < self._output_end:
            sent = send(
                self._socket,
                self._out + self._output_start,
                self._output_end - self._output_start,
                MSG_DONTWAIT | MSG_NOSIGNAL,
            )
            if sent < 0:
                if errno == EINTR:
                    continue
                return WAIT_WRITE if errno == EAGAIN else OVER
            self._output_start += sent
        self._output_start = self._output_end = 0
        return GO_ON

    cdef void _count(self) noexcept with gil:
        counters = self._counters
        counters.reads += self._reads
        counters.read_bytes += self._read_bytes
        counters.writes += self._writes
        counters.written_bytes += self._written_bytes
        self._reads = self._read_bytes = self._writes = self._written_bytes = 0
