# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Reads of the volumes of a hub's clients: begun with io_uring, and when they come verified and copied in."""

import os

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memset
from posix.mman cimport munmap

from farpage.kernel._abi cimport (
    count_bits, io_uring_cqe, io_uring_sqe, IORING_OP_READ, IORING_OP_READ_FIXED, IOSQE_FIXED_FILE, load_acquire,
    lowest_bit, store_release, SYS_io_uring_enter, syscall, UFFD_PAGEFAULT_FLAG_WRITE,
)
from farpage.kernel._memory cimport map_buffers
from farpage.pager._lanestate cimport (
    access_t, call, CLEAN, DIRTY, GIVEN_BACK, lane_t, move, ON_DEVICE, PAGE, READING, RUN, RUN_SLOTS, SLOTS,
)
from farpage.pager._order cimport Order
from farpage.pager._pageins cimport came, copied, copy, follow_up, waited
from farpage.pager._pageouts cimport press
from farpage.pager._store cimport Store
from farpage.pager._streams cimport Streams

cdef enum:
    KEPT_SLOTS = 32     # for what is waited for
    SLOTS_AT = RUN_SLOTS * RUN * PAGE
    BUFFERS = SLOTS_AT + (SLOTS + 1) * PAGE
    LONGEST_LOOK_NS = 50000000
    SHORTEST_LOOK_NS = 2000000
    GAP = 8             # pages that are read in vain rather than leave a read in two
    WINDOW_SLOTS = 64   # streams.LARGEST_STRIDED_WINDOW_PAGES
    WINDOW_RUNS = 8     # for the up to 256 neighbours of a window, and those that come with who waits
    WINDOW = 256 + RUN


cdef inline uint64_t all_of(int count) noexcept nogil:
    """So many bits."""
    return <uint64_t>-1 >> (64 - count) if count else 0




cdef class Reads:
    """Those of one hub."""

    def __cinit__(self, object ring):
        """`ring`, a `farpage.kernel.io_uring.Ring`, is this one's alone."""
        cdef int index
        self._owner = ring
        self._ring = ring.fileno()
        layout = ring.layout()
        PyObject_GetBuffer(layout.queues, &self._queues, PyBUF_WRITABLE)
        PyObject_GetBuffer(layout.commands, &self._commands, PyBUF_WRITABLE)
        cdef uint8_t *queues = <uint8_t *>self._queues.buf
        self._sqes = <io_uring_sqe *>self._commands.buf
        self._sq_tail = <uint32_t *>(queues + <Py_ssize_t>layout.sq_tail)
        self._cq_head = <uint32_t *>(queues + <Py_ssize_t>layout.cq_head)
        self._cq_tail = <uint32_t *>(queues + <Py_ssize_t>layout.cq_tail)
        self._cqes = <io_uring_cqe *>(queues + <Py_ssize_t>layout.cqes)
        self._sq_mask, self._cq_mask = layout.sq_mask, layout.cq_mask
        if ring.entries < SLOTS + RUN_SLOTS:
            raise ValueError("the queue is too short")
        self._retired = []
        memory = map_buffers(BUFFERS)
        if memory == NULL:
            raise MemoryError
        self._buffers = <uint8_t *>memory
        memset(memory, 0, BUFFERS)  # all of it is there from the start, also where it cannot be registered
        self.scratch = self._slot_buffer(SLOTS)
        self._registered = ring.register_memory((<uintptr_t>memory, BUFFERS))
        memset(self._slots, 0, sizeof(self._slots))
        memset(self._runs, 0, sizeof(self._runs))
        for index in range(SLOTS):
            self._free[index] = index
        self._free_count = SLOTS
        self.look_every_ns = LONGEST_LOOK_NS

    def __dealloc__(self):
        # Reads that are in flight write to the buffers: those stay until the process ends.
        if self._buffers != NULL and not self.under_way():
            munmap(self._buffers, BUFFERS)
        PyBuffer_Release(&self._queues)
        PyBuffer_Release(&self._commands)

    cdef uint8_t *_run_buffer(self, int index) noexcept nogil:
        return self._buffers + index * RUN * PAGE

    cdef uint8_t *_slot_buffer(self, int index) noexcept nogil:
        return self._buffers + SLOTS_AT + index * PAGE

    cdef bint begin(self, lane_t *lane, const access_t *access) noexcept nogil:
        cdef int index
        cdef slot_t *slot
        # Each may have to be given back, at last, and perhaps nobody takes those that were.
        if not self._free_count or lane.back_count + lane.in_flight >= GIVEN_BACK:
            return False
        self._free_count -= 1
        index = self._free[self._free_count]
        slot = &self._slots[index]
        slot.busy = True
        slot.lane = lane
        slot.page = access.page
        slot.began = access.began
        slot.ahead = False
        slot.write = (access.flags & UFFD_PAGEFAULT_FLAG_WRITE) != 0
        self._queue(lane, access.page, 1, self._slot_buffer(index), index)
        lane.in_flight += 1
        move(lane, access.page, ON_DEVICE, READING)
        return True

    cdef bint begin_ahead(self, lane_t *lane, const access_t *access) noexcept nogil:
        if self._free_count <= KEPT_SLOTS or not self.begin(lane, access):
            return False
        (<Store>lane.store).forget_run(<uint64_t>access.page, 1)
        self._slots[self._free[self._free_count]].ahead = True
        lane.ahead += 1
        return True

    cdef run_t *begin_run(self, lane_t *lane, int64_t first, int count, uint64_t wanted) noexcept nogil:
        """Begin to read pages of which some are wanted, which nobody waits for yet; NULL where that cannot be."""
        cdef int index = 0, pages = count_bits(wanted), at
        cdef run_t *run
        if self._runs_busy == RUN_SLOTS or lane.back_count + lane.in_flight + pages > GIVEN_BACK:
            return NULL
        while self._runs[index].busy:
            index += 1
        run = &self._runs[index]
        run.lane, run.first, run.count, run.busy = lane, first, count, True
        run.wanted, run.write, run.waited = wanted, 0, 0
        self._runs_busy += 1
        self._queue(lane, first, count, self._run_buffer(index), SLOTS + index)
        for at in range(count):
            if wanted >> at & 1:
                move(lane, first + at, ON_DEVICE, READING)
                (<Store>lane.store).forget_run(<uint64_t>(first + at), 1)
        lane.in_flight += pages
        lane.ahead += pages
        return run

    cdef bint has_room_for_window(self, const lane_t *lane) noexcept nogil:
        return (
            self._free_count > KEPT_SLOTS + WINDOW_SLOTS
            and self._runs_busy + WINDOW_RUNS <= RUN_SLOTS
            and lane.back_count + lane.in_flight + WINDOW <= GIVEN_BACK
        )

    cdef int begin_near(self, lane_t *lane, const access_t *access, int count) noexcept nogil:
        cdef run_t *run
        cdef int length = 0
        count = <int>min(min(count, RUN), lane.pages - access.page)
        while length < count and lane.state[access.page + length] == ON_DEVICE:
            length += 1
        if not length:
            return 0
        run = self.begin_run(lane, access.page, length, all_of(length))
        if run == NULL:
            return 0
        run.waited = 1
        run.began[0] = access.began
        if access.flags & UFFD_PAGEFAULT_FLAG_WRITE:
            run.write = run.wanted
        lane.ahead -= 1
        return length

    cdef int begin_neighbours(self, lane_t *lane, int64_t first, int count, bint write) noexcept nogil:
        cdef run_t *run
        cdef uint64_t wanted = 0
        cdef int at, lowest, highest, begun = 0
        for at in range(count):
            if lane.state[first + at] == ON_DEVICE:
                wanted |= <uint64_t>1 << at
        while wanted:
            lowest = highest = lowest_bit(wanted)
            # Up to the first gap that is too large.
            while highest < 63 and wanted >> (highest + 1) and lowest_bit(wanted >> (highest + 1)) <= GAP:
                highest += 1 + lowest_bit(wanted >> (highest + 1))
            run = self.begin_run(
                lane, first + lowest, highest - lowest + 1, (wanted & all_of(highest + 1)) >> lowest
            )
            if run == NULL:
                break
            if write:
                run.write = run.wanted
            begun += count_bits(run.wanted)
            wanted &= ~all_of(highest + 1)
        return begun

    cdef bint joined(self, lane_t *lane, const access_t *access) noexcept nogil:
        """Let an access wait for a read that another one has begun here."""
        cdef int index
        cdef slot_t *slot
        cdef run_t *run
        cdef uint64_t bit
        for index in range(SLOTS):
            slot = &self._slots[index]
            if slot.busy and slot.lane == lane and slot.page == access.page:
                slot.write = slot.write or (access.flags & UFFD_PAGEFAULT_FLAG_WRITE) != 0
                if slot.ahead:
                    slot.ahead = False
                    slot.began = access.began
                    lane.ahead -= 1
                return True
        for index in range(RUN_SLOTS):
            run = &self._runs[index]
            if run.busy and run.lane == lane and run.first <= access.page < run.first + run.count:
                bit = <uint64_t>1 << (access.page - run.first)
                if run.wanted & bit:
                    if access.flags & UFFD_PAGEFAULT_FLAG_WRITE:
                        run.write |= bit
                    if not run.waited & bit:
                        run.waited |= bit
                        run.began[access.page - run.first] = access.began
                        lane.ahead -= 1
                    return True
        return False

    cdef void _queue(self, lane_t *lane, int64_t first, int count, uint8_t *buffer, int token) noexcept nogil:
        cdef uint32_t tail = self._sq_tail[0]
        cdef io_uring_sqe *entry = &self._sqes[tail & self._sq_mask]
        memset(entry, 0, 64)
        entry.opcode = IORING_OP_READ_FIXED if self._registered else IORING_OP_READ
        entry.flags = IOSQE_FIXED_FILE if lane.registered else 0
        entry.fd = lane.file
        entry.off = <uint64_t>(lane.origin + first * PAGE)
        entry.addr = <uint64_t><uintptr_t>buffer
        entry.len = <uint32_t>count * PAGE
        entry.user_data = <uint64_t>token
        store_release(self._sq_tail, tail + 1)
        self.unsubmitted += 1

    cdef void submit(self) noexcept nogil:
        """Start what was begun; what the kernel has no memory for is tried again."""
        cdef long done = syscall(SYS_io_uring_enter, self._ring, self.unsubmitted, 0, 0, NULL, 0)
        if done > 0:
            self.unsubmitted -= <int>done

    cdef bint complete(self, int64_t now) noexcept nogil:
        """Take what the device has answered, up to a run; tells whether there was anything."""
        cdef uint32_t head = self._cq_head[0]
        cdef io_uring_cqe *entry
        cdef uint64_t index
        cdef bint long_one = False
        if head == load_acquire(self._cq_tail):
            return False
        while head != load_acquire(self._cq_tail) and not long_one:  # accesses come between two of those
            entry = &self._cqes[head & self._cq_mask]
            index = entry.user_data
            if index < SLOTS and self._slots[index].busy:  # else it was not begun here
                self._arrived(&self._slots[index], self._slot_buffer(<int>index), entry.res, now)
                self._free[self._free_count] = <int>index
                self._free_count += 1
            elif SLOTS <= index < SLOTS + RUN_SLOTS and self._runs[index - SLOTS].busy:
                self._runs_busy -= 1
                long_one = True
                index -= SLOTS
                self._run_arrived(&self._runs[index], self._run_buffer(<int>index), entry.res, now)
            head += 1
        store_release(self._cq_head, head)
        return True

    cdef void _arrived(self, slot_t *slot, const uint8_t *content, int32_t result, int64_t now) noexcept nogil:
        cdef lane_t *lane = slot.lane
        cdef int64_t page = slot.page
        slot.busy = False
        if lane == NULL:
            return
        lane.in_flight -= 1
        if slot.ahead:
            lane.ahead -= 1
        if lane.state[page] != READING:  # it was given up meanwhile
            return
        if (
            result != PAGE
            or <uint32_t>(<Store>lane.store)._digest(content, PAGE) != lane.checksum[page]
            or not (
                (slot.ahead and self._held_back(lane, page, content))
                or copy(lane, page, content, slot.write, READING)
            )
        ):
            self._give_back(lane, page, slot.write, -1 if slot.ahead else slot.began, 0)
            return
        lane.answered += 1
        if slot.ahead:
            if lane.state[page] != ON_DEVICE:
                (<Order>lane.order).page_returned(page)
            press(lane, now)
        else:
            came(lane, page, slot.began, now)

    cdef void _run_arrived(self, run_t *run, const uint8_t *content, int32_t result, int64_t now) noexcept nogil:
        cdef lane_t *lane = run.lane
        cdef uint64_t good = 0, bit
        cdef int at, length, done
        cdef bint write
        run.busy = False
        if lane == NULL:
            return
        self._no_more_reading(run)
        for at in range(run.count):
            bit = <uint64_t>1 << at
            if not run.wanted & bit or lane.state[run.first + at] != READING:  # or it was given up meanwhile
                continue
            if (
                result >= (at + 1) * PAGE
                and <uint32_t>(<Store>lane.store)._digest(content + at * PAGE, PAGE) == lane.checksum[run.first + at]
            ):
                if not run.waited & bit and self._held_back(lane, run.first + at, content + at * PAGE):
                    lane.answered += 1
                else:
                    good |= bit
            else:
                self._give_page_back(run, at, 0)
        while good:
            at = lowest_bit(good)
            write = run.write >> at & 1
            length = 1
            while at + length < run.count and good >> (at + length) & 1 and (run.write >> (at + length) & 1) == write:
                length += 1
            done = copied(lane, run.first + at, length, content + at * PAGE, write)
            lane.answered += done
            for at in range(at, at + done):
                move(lane, run.first + at, READING, DIRTY if write else CLEAN)
                (<Order>lane.order).page_returned(run.first + at)
                good &= ~(<uint64_t>1 << at)
                if run.waited >> at & 1:
                    waited(lane, run.began[at], now)
            if done < length:
                at = lowest_bit(good)
                good &= good - 1
                self._give_page_back(run, at, 0)
        follow_up(lane, now)

    cdef bint _held_back(self, lane_t *lane, int64_t page, const uint8_t *content) noexcept nogil:
        """Hold a marker that has come, until somebody asks for it; False for any other page."""
        # While a client is detached, which turns its lane off, all pages are to come in.
        if (
            not lane.on or not (<Streams>lane.streams).is_marker(page)
            or not (<Store>lane.store).hold_page(<uint64_t>page, content)
        ):
            return False
        move(lane, page, READING, ON_DEVICE)
        return True

    cdef void look_for_late(self, int64_t now) noexcept nogil:
        cdef int index, at
        cdef slot_t *slot
        cdef run_t *run
        cdef uint64_t waited, late
        self.look_at = now + self.look_every_ns
        for index in range(SLOTS):
            slot = &self._slots[index]
            if slot.busy and slot.lane != NULL and not slot.ahead and now - slot.began > slot.lane.late_ns:
                slot.lane.in_flight -= 1
                self._give_back(slot.lane, slot.page, slot.write, slot.began, 1)
                slot.lane = NULL
        for index in range(RUN_SLOTS):
            run = &self._runs[index]
            if not run.busy or run.lane == NULL:
                continue
            waited, late = run.waited, 0
            while waited and not late:
                late = now - run.began[lowest_bit(waited)] > run.lane.late_ns
                waited &= waited - 1
            if late:
                self._no_more_reading(run)
                for at in range(run.count):
                    if run.wanted >> at & 1:
                        self._give_page_back(run, at, late)
                        late = 0  # it is one read
                run.lane = NULL

    cdef void _no_more_reading(self, run_t *run) noexcept nogil:
        run.lane.in_flight -= count_bits(run.wanted)
        run.lane.ahead -= count_bits(run.wanted & ~run.waited)

    cdef void _give_page_back(self, run_t *run, int at, uint64_t late) noexcept nogil:
        self._give_back(
            run.lane, run.first + at, run.write >> at & 1, run.began[at] if run.waited >> at & 1 else -1, late
        )

    cdef void _give_back(
        self, lane_t *lane, int64_t page, bint write, int64_t began, uint64_t late
    ) noexcept nogil:
        """Leave a read that has not come, or not as it should, to the interpreter, which repeats it."""
        cdef access_t *back = &lane.back[lane.back_count]
        lane.back_count += 1
        back.page = page
        back.flags = late << 1 | (1 if write else 0)
        back.began = began
        call(lane)

    cdef list withdraw(self, lane_t *lane):
        """Count the reads of a lane that are in flight as nobody's, and return them."""
        cdef int index, at
        cdef slot_t *slot
        cdef run_t *run
        found = []
        for index in range(SLOTS):
            slot = &self._slots[index]
            if slot.busy and slot.lane == lane:
                slot.lane = NULL
                found.append((slot.page, slot.write, -1.0 if slot.ahead else slot.began / 1e9))
        for index in range(RUN_SLOTS):
            run = &self._runs[index]
            if run.busy and run.lane == lane:
                run.lane = NULL
                for at in range(run.count):
                    if run.wanted >> at & 1:
                        began = run.began[at] / 1e9 if run.waited >> at & 1 else -1.0
                        found.append((run.first + at, bool(run.write >> at & 1), began))
        lane.in_flight = lane.ahead = 0
        return found

    cdef void look_every(self, int64_t ns):
        self.look_every_ns = max(min(self.look_every_ns, ns), <int64_t>SHORTEST_LOOK_NS)

    cdef int take_file(self, lane_t *lane, int descriptor) except -1:
        """Read this file for a lane."""
        place = self._owner.register_file(descriptor)
        lane.registered = place is not None
        lane.file = place if lane.registered else os.dup(descriptor)
        return 0

    cdef void retire(self, lane_t *lane):
        """Close the file, of which no read is begun any more, when all that were begun have been submitted."""
        self._retired.append((self._owner.unregister_file if lane.registered else os.close, lane.file))
        lane.file = -1
        if self.unsubmitted:
            self.submit()
        self.close_retired()

    cdef void close_retired(self):
        while self._retired and not self.unsubmitted:
            close, file = self._retired.pop()
            close(file)
