# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Page-ins without the interpreter: events -> lookup -> submit, and completions -> verify -> copy -> mark.

`Hub.poll` waits for events in the place of `select.epoll.poll`. What it can answer by itself it answers while
it waits, without the interpreter's lock; what it cannot it leaves to the interpreter, as its caller's event.
What it does itself are the plainest cases alone: a page that is on the device or in the RAM tier, and that no
stream of accesses is near, while there is room for it; a write to a clean page; and, while nothing else is to
be done, to give clean pages back and to get dirty ones ready to be written. `farpage.pager.faults` and `eviction` do all that where this was not built.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EAGAIN, EINTR, EIO, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, qsort
from libc.string cimport memmove, memset
from posix.ioctl cimport ioctl
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_POPULATE, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport close, pread, read

import os

from farpage.kernel._abi cimport (
    bit_length, count_bits, epoll_event, epoll_wait, EPOLLIN, FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate,
    io_uring_cqe, io_uring_sqe, IORING_OP_READ, load_acquire, lowest_bit, relax, store_release, SYS_io_uring_enter,
    syscall, uffd_msg, UFFD_PAGEFAULT_FLAG_MINOR, UFFD_PAGEFAULT_FLAG_WP, UFFD_PAGEFAULT_FLAG_WRITE,
    uffdio_copy, UFFDIO_COPY, UFFDIO_COPY_MODE_WP, uffdio_writeprotect, UFFDIO_WRITEPROTECT,
    UFFDIO_WRITEPROTECT_MODE_WP, uffdio_zeropage, UFFDIO_ZEROPAGE,
)
from farpage.pager._order cimport Order
from farpage.pager._readahead cimport ReadAhead
from farpage.pager._store cimport Store

cdef enum:
    PAGE = 4096
    # farpage.pager.states
    ZERO = 0
    CLEAN = 1
    DIRTY = 2
    WRITING = 3
    REWRITTEN = 4
    READING = 5
    ON_DEVICE = 6
    STATE_COUNT = 8
    # farpage.pager.lane.Marks
    MARK_MOST = 0
    MARK_READING = 1
    MARK_HIGH = 2
    MARK_DEFERRED = 3
    MARK_LOW = 4
    MARK_WRITING = 5
    MARK_UNWRITABLE = 6
    MARK_HELD = 7
    MOST_HELD = 16
    MARKS = MARK_HELD + 1 + MOST_HELD
    # farpage.pager.streams: how near a fault may be to an older one, and how many are remembered
    NEAR = 64
    RECENT = 16
    STREAMS = 8
    EVENTS = 64
    SLOTS = 256
    KEPT_SLOTS = 32     # for what is waited for
    BUCKETS = 26
    STALLS = 64
    VICTIMS = 512
    OTHERS = 512
    CHOSEN_TOGETHER = 64
    RUNS_A_POLL = 2
    RUN = 64
    RUN_SLOTS = 32      # for reads of neighbours
    GAP = 8             # pages that are read in vain rather than leave a read in two
    GIVEN_BACK = SLOTS + RUN_SLOTS * RUN

cdef enum:
    POLL_NS = 100000
    SOON_NS = 20000
    LEAST_PAUSE = 2
    LONGEST_PAUSE = 4096
    MOST_SCORE = 4
    STALL_NOTED_NS = 10000000
    LONGEST_LOOK_NS = 50000000
    LONGEST_ALONE_NS = 100000000
    SHORTEST_LOOK_NS = 2000000

ctypedef struct access_t:
    int64_t page
    uint64_t flags
    int64_t began

ctypedef struct lane_t:
    int uffd
    int memfd
    int file
    bint on
    bint attention
    int in_flight
    int ahead
    int64_t origin
    int64_t late_ns
    uint64_t start
    int64_t memfd_offset
    int64_t pages
    uint8_t *state
    uint32_t *checksum
    int64_t *counts
    const int64_t *marks
    const int64_t *reach
    void *store
    void *order
    void *zero_ahead
    void *write_ahead
    int64_t recent[RECENT]
    int recent_at
    int left_count
    int back_count
    int stall_count
    int victim
    int victim_end
    int64_t victims[VICTIMS]
    bint tasted[VICTIMS]
    int other
    int other_end
    int64_t others[OTHERS]
    uint8_t *batch      # where dirty pages are read to; NULL: nowhere
    int batch_pages
    int batch_at
    int run_count
    int64_t runs[RUN][3]
    int busy_count
    int64_t busy[RUN]
    int failed
    bint ready
    bint asked
    int64_t zero_count
    int64_t taste
    int64_t called_at
    access_t left[EVENTS]
    access_t back[GIVEN_BACK]
    int64_t passed[RECENT]
    int64_t stalls[STALLS][2]
    int64_t faults
    int64_t answered
    int64_t from_tier
    int64_t given_back
    int64_t zeroed
    int64_t passed_count
    int64_t buckets[BUCKETS]
    int64_t waited_ns
    int64_t longest_ns

ctypedef struct run_t:
    lane_t *lane
    int64_t first
    int count
    bint busy
    # A bit for each page: those that are READING because of this, are to be written to, are waited for.
    uint64_t wanted
    uint64_t write
    uint64_t waited
    int64_t began[RUN]

ctypedef struct slot_t:
    lane_t *lane
    int64_t page
    int64_t began
    bint write
    bint ahead          # nobody waits for it yet
    bint busy


cdef inline int64_t now_ns() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return time.tv_sec * <int64_t>1000000000 + time.tv_nsec


cdef inline int64_t taken(const lane_t *lane) noexcept nogil:
    cdef int64_t *counts = lane.counts
    return (
        counts[CLEAN] + counts[DIRTY] + counts[WRITING] + counts[REWRITTEN] + counts[READING]
        + lane.marks[MARK_HELD] + <int64_t>(((<Store>lane.store).taken_bytes + PAGE - 1) // PAGE)
    )


cdef inline int64_t staying(const lane_t *lane) noexcept nogil:
    """Pages that take room and are not about to leave."""
    return taken(lane) - (lane.victim_end - lane.victim) - (lane.other_end - lane.other) - lane.counts[WRITING]


cdef inline bint has_room(const lane_t *lane) noexcept nogil:
    return taken(lane) < lane.marks[MARK_MOST] and lane.counts[READING] < lane.marks[MARK_READING]


cdef inline void move(lane_t *lane, int64_t page, int old, int new) noexcept nogil:
    lane.counts[old] -= 1
    lane.counts[new] += 1
    lane.state[page] = <uint8_t>new


cdef inline bint punched(lane_t *lane, int64_t first, int64_t count) noexcept nogil:
    return fallocate(
        lane.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, lane.memfd_offset + first * PAGE, count * PAGE
    ) == 0


cdef inline bint protected(lane_t *lane, int64_t first, int64_t count) noexcept nogil:
    cdef uffdio_writeprotect argument
    argument.range.start = lane.start + <uint64_t>first * PAGE
    argument.range.len = <uint64_t>count * PAGE
    argument.mode = UFFDIO_WRITEPROTECT_MODE_WP
    return ioctl(lane.uffd, UFFDIO_WRITEPROTECT, &argument) == 0


cdef inline bint is_zero(const uint64_t *words) noexcept nogil:
    cdef int index
    for index in range(PAGE // 8):
        if words[index]:
            return False
    return True


cdef bint of_a_stream(lane_t *lane, int64_t page) noexcept nogil:
    """Tell whether there is more to an access than one that stands alone: for `Streams`, or the RAM tier."""
    cdef int64_t distance, step, index, other, at
    for index in range(RECENT):
        distance = page - lane.recent[index]
        if not -NEAR <= distance <= NEAR or not distance:
            continue
        if distance == 1 or distance == -1:
            return True
        for other in range(RECENT):
            if lane.recent[index] - lane.recent[other] == distance:
                return True
    for index in range(min(lane.marks[MARK_HELD], MOST_HELD)):
        if lane.marks[MARK_HELD + 1 + index] == page:
            return True
    for index in range(min(lane.reach[0], STREAMS)):
        at = 1 + index * 3
        step = lane.reach[at + 1]
        distance = page - lane.reach[at]
        if step < 0:
            step, distance = -step, -distance
        if step != 0 and distance % step == 0 and 0 < distance // step <= lane.reach[at + 2]:
            return True
    return False


cdef class Hub:
    """Waits for the events of one thread's loop, and answers those of its lanes."""

    cdef int _epoll
    cdef int _ring
    cdef uint32_t *_sq_tail
    cdef uint32_t _sq_mask
    cdef io_uring_sqe *_sqes
    cdef uint32_t *_cq_head
    cdef uint32_t *_cq_tail
    cdef uint32_t _cq_mask
    cdef io_uring_cqe *_cqes
    cdef uint8_t *_buffers
    cdef uint8_t *_scratch
    cdef slot_t _slots[SLOTS]
    cdef int _free[SLOTS]
    cdef int _free_count
    cdef run_t _runs[RUN_SLOTS]
    cdef uint8_t *_run_buffers
    cdef int _runs_busy
    cdef int _unsubmitted
    cdef int64_t _look_at
    cdef int64_t _look_every_ns
    cdef bint _attention
    cdef bint _calls_wait
    cdef int _victims
    cdef bint _others_wait
    cdef lane_t **_lanes
    cdef int64_t _lanes_size
    cdef object _owner
    cdef object _rings
    cdef list _members
    cdef list _retired
    cdef bint _at_work
    # See farpage.nbd.polling.
    cdef bint _worthwhile
    cdef int _score
    cdef int _pause
    cdef int _left_waits

    def __cinit__(self, int epoll, object ring):
        """`ring`, a `farpage.kernel.io_uring.Ring`, is this one's alone."""
        cdef int index
        self._epoll = epoll
        self._owner = ring
        self._ring = ring.fileno()
        layout = ring.layout()
        cdef uint8_t[::1] queues = layout.queues
        cdef uint8_t[::1] commands = layout.commands
        self._rings = (queues, commands)
        self._sqes = <io_uring_sqe *>&commands[0]
        self._sq_tail = <uint32_t *>&queues[<Py_ssize_t>layout.sq_tail]
        self._cq_head = <uint32_t *>&queues[<Py_ssize_t>layout.cq_head]
        self._cq_tail = <uint32_t *>&queues[<Py_ssize_t>layout.cq_tail]
        self._cqes = <io_uring_cqe *>&queues[<Py_ssize_t>layout.cqes]
        self._sq_mask, self._cq_mask = layout.sq_mask, layout.cq_mask
        if ring.entries < SLOTS + RUN_SLOTS:
            raise ValueError("the queue is too short")
        self._members, self._retired = [], []
        memory = mmap(NULL, (SLOTS + 1) * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0)
        if memory == MAP_FAILED:
            raise MemoryError
        self._buffers = <uint8_t *>memory
        self._scratch = self._buffers + SLOTS * PAGE
        memory = mmap(NULL, RUN_SLOTS * RUN * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if memory == MAP_FAILED:
            raise MemoryError
        self._run_buffers = <uint8_t *>memory
        memset(self._slots, 0, sizeof(self._slots))
        memset(self._runs, 0, sizeof(self._runs))
        for index in range(SLOTS):
            self._free[index] = index
        self._free_count = SLOTS
        self._pause = LEAST_PAUSE
        self._look_every_ns = LONGEST_LOOK_NS

    def __dealloc__(self):
        # Reads that are in flight write to the buffers: those stay until the process ends.
        if self._buffers != NULL and self._free_count == SLOTS:
            munmap(self._buffers, (SLOTS + 1) * PAGE)
        if self._run_buffers != NULL and not self._runs_busy:
            munmap(self._run_buffers, RUN_SLOTS * RUN * PAGE)
        free(self._lanes)

    def fileno(self):
        """Return the descriptor under which `poll` tells that `attend` is to be called."""
        return self._ring

    # Called with the interpreter's lock

    cdef int check_idle(self) except -1:
        """Keep threads from what another one is at work on without the interpreter's lock."""
        if self._at_work:
            raise RuntimeError("another thread is at work on this hub's lanes")
        return 0

    cdef int enter(self, Lane lane) except -1:
        cdef int64_t fd = lane._lane.uffd
        cdef lane_t **larger
        cdef int64_t index, size
        self.check_idle()
        if fd < 0:
            raise ValueError(f"{fd} is no descriptor")
        if fd >= self._lanes_size:
            size = (fd | 63) + 1
            larger = <lane_t **>calloc(size, sizeof(lane_t *))
            if larger == NULL:
                raise MemoryError
            for index in range(self._lanes_size):
                larger[index] = self._lanes[index]
            free(self._lanes)
            self._lanes, self._lanes_size = larger, size
        if self._lanes[fd] != NULL:
            raise ValueError(f"descriptor {fd} has a lane")
        self._lanes[fd] = &lane._lane
        self._members.append(lane)
        return 0

    cdef void retire(self, int file):
        """Close a file that no read is begun of any more: when all that were begun have been submitted."""
        self._retired.append(file)
        if self._unsubmitted:
            self._submit()
        self._close_retired()

    cdef void _close_retired(self):
        while self._retired and not self._unsubmitted:
            close(self._retired.pop())

    cdef void look_every(self, int64_t ns):
        self._look_every_ns = max(min(self._look_every_ns, ns), <int64_t>SHORTEST_LOOK_NS)

    cdef void leave(self, Lane lane):
        self._lanes[lane._lane.uffd] = NULL
        self._members.remove(lane)

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

    def attend(self):
        """Have the lanes that need the interpreter tell so."""
        cdef Lane lane
        self._attention = self._calls_wait = False
        for lane in list(self._members):
            if lane._lane.attention and lane._on_attention is not None:
                lane._lane.attention = False
                try:
                    lane._on_attention()
                except BaseException:
                    self._attention = True  # the others are told with the next poll
                    raise

    def poll(self, double seconds, bint may_look):
        """Wait as `select.epoll.poll` does, negative for ever; returns `(descriptor, events)` of at most 64.

        With `may_look` the first moment is not slept through where events come fast.
        """
        cdef epoll_event events[EVENTS]
        cdef int count, index
        self.check_idle()
        self._at_work = True
        with nogil:
            count = self._wait(events, seconds, may_look)
        self._at_work = False
        self._close_retired()
        found = [(events[index].data.fd, events[index].events) for index in range(count)]
        if self._attention:
            found.append((self._ring, EPOLLIN))
        return found

    # Called without it

    cdef int _wait(self, epoll_event *events, double seconds, bint may_look) noexcept nogil:
        """Answer what can be answered until there is something for the interpreter, or the time is over."""
        cdef int64_t now = now_ns()
        cdef int64_t deadline = -1 if seconds < 0 else now + <int64_t>(seconds * 1e9)
        cdef int64_t looked_since, began, wait
        cdef bint looking, worked
        cdef int count, timeout
        looking = may_look and self._worthwhile
        looked_since = now
        while True:
            wait = -1 if deadline < 0 else deadline - now
            if looking and now - looked_since >= POLL_NS:
                looking = False
                self._missed()
            if (
                self._attention or self._calls_wait or looking or self._victims or self._others_wait
                or (deadline >= 0 and wait <= 0)
            ):
                timeout = 0
            else:
                timeout = -1 if wait < 0 else <int>((wait + 999999) // 1000000)
                if self._unsubmitted and (timeout < 0 or timeout > 1):
                    timeout = 1
                if self._reads() and (timeout < 0 or timeout > self._look_every_ns // 1000000):
                    timeout = <int>(self._look_every_ns // 1000000)
            began = now
            count = epoll_wait(self._epoll, events, EVENTS, timeout)
            if count < 0:
                return 0  # a signal, which the interpreter wants to know of
            now = now_ns()
            if timeout != 0:
                self._slept(now - began)
            worked = self._complete(now)
            count = self._sort(events, count, now, &worked)
            if self._unsubmitted:
                self._submit()
            if self._reads() and now >= self._look_at:
                self._look_for_late(now)
            if self._calls_wait and (self._reads() or not looking or now - looked_since > SOON_NS):
                self._calls_wait, self._attention = False, True
            if count or self._attention:
                if looking:
                    self._found()
                # A busy interpreter leaves no time in which nothing else is to be done.
                for _ in range(RUNS_A_POLL):
                    if self._victims:
                        self._release_some()
                if self._others_wait:
                    self._prepare_some(False)
                return count
            if worked:
                now = now_ns()
                if looking:
                    self._found()
                looking = may_look and self._worthwhile
                looked_since = now
            elif self._victims:
                self._release_some()
                now = now_ns()
            elif self._others_wait and self._prepare_some(not looking):
                now = now_ns()
            elif looking:
                relax()
            if deadline >= 0 and now >= deadline:
                return 0

    cdef inline bint _reads(self) noexcept nogil:
        """Whether a device is at work."""
        return self._free_count < SLOTS or self._runs_busy

    cdef int _sort(self, epoll_event *events, int count, int64_t now, bint *worked) noexcept nogil:
        """See to the events of lanes; returns how many are left for the interpreter, which come first."""
        cdef int index, fd, left = 0
        cdef lane_t *lane
        for index in range(count):
            fd = events[index].data.fd
            if fd == self._ring:
                continue
            lane = self._lanes[fd] if 0 <= fd < self._lanes_size else NULL
            if lane == NULL or not lane.on or events[index].events != EPOLLIN:
                events[left] = events[index]
                left += 1
                continue
            self._answer(lane, now)
            worked[0] = True
        return left

    cdef void _answer(self, lane_t *lane, int64_t now) noexcept nogil:
        """Read a batch of events and answer, or begin to answer, those that are plain."""
        cdef uffd_msg messages[EVENTS]
        cdef ssize_t size
        cdef int index
        cdef access_t access
        cdef access_t *left
        if lane.left_count:  # the interpreter has not seen the last ones yet
            self._call(lane)
            return
        size = read(lane.uffd, messages, sizeof(messages))
        if size <= 0:
            if errno != EAGAIN and errno != EINTR:
                lane.on = False  # the client is gone: the interpreter finds out for itself
                self._call(lane)
            return
        for index in range(size // <ssize_t>sizeof(uffd_msg)):
            access.flags = messages[index].arg.pagefault.flags
            access.page = <int64_t>((messages[index].arg.pagefault.address - lane.start) // PAGE)
            access.began = now
            lane.faults += 1
            if not self._answered(lane, &access):
                left = &lane.left[lane.left_count]
                left[0] = access
                lane.left_count += 1
        if lane.left_count:
            self._call(lane)

    cdef void _release_some(self) noexcept nogil:
        """Give pages of the first lane that has any to give back to the host."""
        cdef int64_t fd
        for fd in range(self._lanes_size):
            if self._lanes[fd] != NULL and self._lanes[fd].victim != self._lanes[fd].victim_end:
                self._release(self._lanes[fd])
                if self._lanes[fd].victim == self._lanes[fd].victim_end:
                    self._press(self._lanes[fd], now_ns())
                return
        self._victims = 0

    cdef void _release(self, lane_t *lane) noexcept nogil:
        """Give the next victims back: as many as are neighbours, unless somebody has written to them."""
        cdef int64_t first = lane.victims[lane.victim], page = first
        cdef int count = 0
        while (
            lane.victim != lane.victim_end
            and count < RUN
            and lane.victims[lane.victim] == page
            and lane.state[page] == CLEAN
        ):
            if lane.tasted[lane.victim]:
                self._keep(lane, page)
            lane.victim += 1
            count += 1
            page += 1
        if not count:
            lane.victim += 1
            self._victims -= 1
            (<Store>lane.store).forget_run(<uint64_t>first, 1)
            (<Order>lane.order).page_added(first)
            return
        self._victims -= count
        if not punched(lane, first, count):
            for page in range(first, first + count):
                (<Store>lane.store).forget_run(page, 1)
                (<Order>lane.order).page_added(page)
            return
        for page in range(first, first + count):
            move(lane, page, CLEAN, ON_DEVICE)
            (<Order>lane.order).page_evicted(page)
        lane.given_back += count
        if lane.marks[MARK_DEFERRED]:
            self._call(lane)

    cdef void _choose(self, lane_t *lane, int64_t count) noexcept nogil:
        """Take victims out of the order: have clean ones given back, and keep the others for the interpreter."""
        cdef int64_t chosen[VICTIMS]
        cdef int64_t page
        cdef int index, found = 0, dirty = 0
        cdef int left = lane.other_end - lane.other
        count = min(count, VICTIMS - (lane.victim_end - lane.victim), OTHERS - left)
        if count <= 0:
            return
        if lane.other:
            memmove(lane.others, lane.others + lane.other, left * sizeof(int64_t))
            lane.other, lane.other_end = 0, left
        (<Order>lane.order).demote(<uint64_t>count)
        while found < count:
            page = (<Order>lane.order).victim()
            if page < 0:
                break
            chosen[found] = page
            found += 1
        qsort(chosen, found, sizeof(int64_t), &rising)
        for index in range(found):
            page = chosen[index]
            if lane.state[page] == CLEAN:
                self._offer(lane, page, lane.taste > 0)
                lane.taste -= 1
            else:
                chosen[dirty] = page
                dirty += 1
        if dirty:
            merge(lane.others, left, chosen, dirty)
            lane.other_end += dirty
            self._others_wait = True

    cdef void _offer(self, lane_t *lane, int64_t page, bint taste) noexcept nogil:
        """Have a clean page given back while nothing else is to be done."""
        cdef int left = lane.victim_end - lane.victim
        if lane.victim_end == VICTIMS and lane.victim:
            memmove(lane.victims, lane.victims + lane.victim, left * sizeof(int64_t))
            memmove(lane.tasted, lane.tasted + lane.victim, left * sizeof(bint))
            lane.victim, lane.victim_end = 0, left
        if lane.victim_end == VICTIMS:
            self._release(lane)
            lane.victim, lane.victim_end = 0, lane.victim_end - lane.victim
            memmove(lane.victims, lane.victims + VICTIMS - lane.victim_end, lane.victim_end * sizeof(int64_t))
            memmove(lane.tasted, lane.tasted + VICTIMS - lane.victim_end, lane.victim_end * sizeof(bint))
        lane.victims[lane.victim_end] = page
        lane.tasted[lane.victim_end] = taste
        lane.victim_end += 1
        self._victims += 1

    cdef bint _prepare_some(self, bint few) noexcept nogil:
        """Get pages of the first lane that has any ready to be written, unless they are `few` and need not be."""
        cdef int64_t fd
        cdef lane_t *lane
        cdef int count
        self._others_wait = False
        for fd in range(self._lanes_size):
            lane = self._lanes[fd]
            if lane == NULL or lane.ready:
                continue
            count = lane.batch_at + lane.other_end - lane.other
            if not count or (lane.batch == NULL and lane.asked) or (not lane.batch_at and may_write(lane) <= 0):
                continue
            self._others_wait = True
            if few or count >= enough(lane) or lane.marks[MARK_DEFERRED]:
                if lane.batch != NULL:
                    self._prepare(lane)
                else:
                    lane.asked = True
                    self._call_soon(lane, now_ns())
                return True
        return False

    cdef void _prepare(self, lane_t *lane) noexcept nogil:
        """Protect the next of the dirty victims that are neighbours, and read them."""
        cdef int64_t first, page, may = may_write(lane)
        cdef int count = 0, index
        while lane.other != lane.other_end and not is_writable(lane, lane.others[lane.other]):
            page = lane.others[lane.other]
            lane.other += 1
            if lane.state[page] == CLEAN:
                self._offer(lane, page, False)
            elif lane.state[page] == DIRTY:
                (<Order>lane.order).page_added(page)
        if lane.other != lane.other_end and may > 0:
            first = lane.others[lane.other]
            while (
                lane.other + count != lane.other_end and count < lane.batch_pages - lane.batch_at and count < may
                and lane.others[lane.other + count] == first + count and is_writable(lane, first + count)
            ):
                count += 1
            lane.other += count
            if not protected(lane, first, count):
                for index in range(count):
                    lane.busy[index] = first + index
                lane.busy_count = count
            elif pread(
                lane.memfd, lane.batch + lane.batch_at * PAGE, count * PAGE, lane.memfd_offset + first * PAGE
            ) != count * PAGE:
                lane.failed = errno or EIO
                for page in range(first, first + count):
                    (<Order>lane.order).page_added(page)
            else:
                sealed(lane, first, count)
        if lane.batch_at or lane.busy_count or lane.failed:
            lane.ready = (
                lane.other == lane.other_end or lane.batch_at == lane.batch_pages or may_write(lane) <= 0
                or lane.busy_count or lane.failed
            )
        if lane.ready or (lane.zero_count and lane.marks[MARK_DEFERRED]):
            self._call_soon(lane, now_ns())

    cdef void _keep(self, lane_t *lane, int64_t page) noexcept nogil:
        """Put a page that is about to leave into the RAM tier, if it gets small."""
        if pread(lane.memfd, self._scratch, PAGE, lane.memfd_offset + page * PAGE) == PAGE:
            (<Store>lane.store).keep_page(<uint64_t>page, self._scratch)

    cdef void _call(self, lane_t *lane) noexcept nogil:
        lane.attention = True
        lane.called_at = now_ns()
        self._attention = True

    cdef void _call_soon(self, lane_t *lane, int64_t now) noexcept nogil:
        """Call the interpreter while a device is at work, or when no access comes: the client is to ask soon."""
        lane.attention = True
        lane.called_at = now
        self._calls_wait = True

    cdef bint _answered(self, lane_t *lane, access_t *access) noexcept nogil:
        cdef int64_t page = access.page
        cdef uint8_t state
        cdef bint alone
        if page < 0 or page >= lane.pages:
            return False
        state = lane.state[page]
        if access.flags & UFFD_PAGEFAULT_FLAG_WP:
            return self._unprotect(lane, page, state)
        if access.flags & UFFD_PAGEFAULT_FLAG_MINOR:
            return False
        if state == READING:
            return self._joined(lane, access)
        if state == ZERO:
            return self._made_room(lane) and self._zero(lane, access)
        if state != ON_DEVICE:
            return False
        alone = not of_a_stream(lane, page)
        lane.recent[lane.recent_at] = page
        lane.recent_at = (lane.recent_at + 1) % RECENT
        if not alone or not self._made_room(lane):
            return False
        if self._from_tier(lane, access):
            return True
        return lane.file >= 0 and self._begin(lane, access)

    cdef bint _made_room(self, lane_t *lane) noexcept nogil:
        """See that there is room for a page, at the cost of one that leaves soon; tells whether there is."""
        while not has_room(lane):
            if lane.victim == lane.victim_end or lane.counts[READING] >= lane.marks[MARK_READING]:
                return False
            self._release(lane)
        return True

    cdef bint _zero(self, lane_t *lane, const access_t *access) noexcept nogil:
        """Answer a first touch, and ahead of a sequential writer those that follow."""
        cdef uffdio_zeropage argument
        cdef int64_t page, count = 0, done
        cdef int64_t most = (<ReadAhead>lane.zero_ahead).next_window(access.page)
        while lane.marks[MARK_MOST] - taken(lane) < most and lane.victim != lane.victim_end:
            self._release(lane)
        most = min(min(most, lane.marks[MARK_MOST] - taken(lane)), lane.pages - access.page)
        while count < most and lane.state[access.page + count] == ZERO:
            count += 1
        argument.range.start = lane.start + <uint64_t>access.page * PAGE
        argument.range.len = <uint64_t>count * PAGE
        argument.mode = 0
        argument.zeropage = 0
        if ioctl(lane.uffd, UFFDIO_ZEROPAGE, &argument) == 0:
            done = count
        else:  # those before one that is in memory already, and the like
            done = max(argument.zeropage, <int64_t>0) // PAGE
        if not done:
            return False
        for page in range(access.page, access.page + done):
            move(lane, page, ZERO, DIRTY)
            (<Order>lane.order).page_added(page)
        lane.zeroed += done
        self._answered_one(lane, access.began, now_ns())
        return True

    cdef bint _from_tier(self, lane_t *lane, const access_t *access) noexcept nogil:
        """Answer from the RAM tier, if it has the page."""
        cdef bint write = (access.flags & UFFD_PAGEFAULT_FLAG_WRITE) != 0
        cdef int64_t page = access.page
        if not (<Store>lane.store).take_into(<uint64_t>page, lane.checksum[page], self._scratch):
            return False
        if not self._copy(lane, page, self._scratch, write, ON_DEVICE):
            return False
        lane.from_tier += 1
        self._came(lane, page, access.began, now_ns())
        return True

    cdef bint _unprotect(self, lane_t *lane, int64_t page, uint8_t state) noexcept nogil:
        """Let a write to a clean page through, and ahead of a sequential writer those to the next ones."""
        cdef uffdio_writeprotect argument
        cdef int64_t most, count = 0
        if state != CLEAN:
            return False
        most = min((<ReadAhead>lane.write_ahead).next_window(page), lane.pages - page)
        while count < most and lane.state[page + count] == CLEAN:
            move(lane, page + count, CLEAN, DIRTY)
            count += 1
        argument.range.start = lane.start + <uint64_t>page * PAGE
        argument.range.len = <uint64_t>count * PAGE
        argument.mode = 0
        return ioctl(lane.uffd, UFFDIO_WRITEPROTECT, &argument) == 0

    cdef bint _joined(self, lane_t *lane, const access_t *access) noexcept nogil:
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

    cdef bint _begin(self, lane_t *lane, const access_t *access) noexcept nogil:
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
        self._queue(lane, access.page, 1, self._buffers + index * PAGE, index)
        lane.in_flight += 1
        move(lane, access.page, ON_DEVICE, READING)
        return True

    cdef run_t *_begin_run(self, lane_t *lane, int64_t first, int count, uint64_t wanted) noexcept nogil:
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
        self._queue(lane, first, count, self._run_buffers + index * RUN * PAGE, SLOTS + index)
        for at in range(count):
            if wanted >> at & 1:
                move(lane, first + at, ON_DEVICE, READING)
                (<Store>lane.store).forget_run(<uint64_t>(first + at), 1)
        lane.in_flight += pages
        lane.ahead += pages
        return run

    cdef void _queue(self, lane_t *lane, int64_t first, int count, uint8_t *buffer, int token) noexcept nogil:
        cdef uint32_t tail = self._sq_tail[0]
        cdef io_uring_sqe *entry = &self._sqes[tail & self._sq_mask]
        memset(entry, 0, 64)
        entry.opcode = IORING_OP_READ
        entry.fd = lane.file
        entry.off = <uint64_t>(lane.origin + first * PAGE)
        entry.addr = <uint64_t><uintptr_t>buffer
        entry.len = <uint32_t>count * PAGE
        entry.user_data = <uint64_t>token
        store_release(self._sq_tail, tail + 1)
        self._unsubmitted += 1

    cdef void _submit(self) noexcept nogil:
        """Start what was begun; what the kernel has no memory for is tried again."""
        cdef long done = syscall(SYS_io_uring_enter, self._ring, self._unsubmitted, 0, 0, NULL, 0)
        if done > 0:
            self._unsubmitted -= <int>done

    cdef bint _complete(self, int64_t now) noexcept nogil:
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
                self._arrived(&self._slots[index], self._buffers + index * PAGE, entry.res, now)
                self._free[self._free_count] = <int>index
                self._free_count += 1
            elif SLOTS <= index < SLOTS + RUN_SLOTS and self._runs[index - SLOTS].busy:
                self._runs_busy -= 1
                long_one = True
                self._run_arrived(
                    &self._runs[index - SLOTS], self._run_buffers + (index - SLOTS) * RUN * PAGE, entry.res, now
                )
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
            or not self._copy(lane, page, content, slot.write, READING)
        ):
            self._give_back(lane, page, slot.write, -1 if slot.ahead else slot.began, 0)
            return
        lane.answered += 1
        if slot.ahead:
            (<Order>lane.order).page_returned(page)
            self._press(lane, now)
        else:
            self._came(lane, page, slot.began, now)

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
                good |= bit
            else:
                self._give_page_back(run, at, 0)
        while good:
            at = lowest_bit(good)
            write = run.write >> at & 1
            length = 1
            while at + length < run.count and good >> (at + length) & 1 and (run.write >> (at + length) & 1) == write:
                length += 1
            done = self._copied(lane, run.first + at, length, content + at * PAGE, write)
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
        self._follow_up(lane, now)

    cdef void _no_more_reading(self, run_t *run) noexcept nogil:
        run.lane.in_flight -= count_bits(run.wanted)
        run.lane.ahead -= count_bits(run.wanted & ~run.waited)

    cdef void _give_page_back(self, run_t *run, int at, uint64_t late) noexcept nogil:
        self._give_back(
            run.lane, run.first + at, run.write >> at & 1, run.began[at] if run.waited >> at & 1 else -1, late
        )

    cdef void _came(self, lane_t *lane, int64_t page, int64_t began, int64_t now) noexcept nogil:
        (<Order>lane.order).page_returned(page)
        lane.passed[lane.passed_count % RECENT] = page
        lane.passed_count += 1
        self._answered_one(lane, began, now)

    cdef void _answered_one(self, lane_t *lane, int64_t began, int64_t now) noexcept nogil:
        """Count an access that was answered, and look whether the interpreter has to see to the consequences.

        While a client is detached, which turns its lane off, its pages come in whatever the marks say.
        """
        waited(lane, began, now)
        self._follow_up(lane, now)

    cdef void _follow_up(self, lane_t *lane, int64_t now) noexcept nogil:
        """See to what follows from pages that have come."""
        self._press(lane, now)
        if lane.marks[MARK_DEFERRED] or lane.stall_count == STALLS:
            self._call(lane)

    cdef void _press(self, lane_t *lane, int64_t now) noexcept nogil:
        """Have pages leave when there are too many, and the interpreter see to those that it has to."""
        if not lane.on or staying(lane) <= lane.marks[MARK_HIGH]:
            return
        self._choose(lane, min(staying(lane) - lane.marks[MARK_LOW], CHOSEN_TOGETHER))
        if now - lane.called_at > LONGEST_ALONE_NS:  # the marks follow the client's pace
            self._call_soon(lane, now)

    cdef bint _copy(self, lane_t *lane, int64_t page, const uint8_t *content, bint write, int state) noexcept nogil:
        """Copy a page in that was in a state so far, and wake who waits for it."""
        if not self._copied(lane, page, 1, content, write):
            return False
        move(lane, page, state, DIRTY if write else CLEAN)
        return True

    cdef int _copied(self, lane_t *lane, int64_t first, int count, const uint8_t *content, bint write) noexcept nogil:
        """Copy pages in, as far as that is possible, and wake who waits for them; returns how many."""
        cdef uffdio_copy argument
        argument.dst = lane.start + <uint64_t>first * PAGE
        argument.src = <uint64_t><uintptr_t>content
        argument.len = <uint64_t>count * PAGE
        argument.mode = 0 if write else UFFDIO_COPY_MODE_WP
        argument.copy = 0
        if ioctl(lane.uffd, UFFDIO_COPY, &argument) == 0:
            return count
        return <int>(max(argument.copy, <int64_t>0) // PAGE)

    cdef void _give_back(
        self, lane_t *lane, int64_t page, bint write, int64_t began, uint64_t late
    ) noexcept nogil:
        """Leave a read that has not come, or not as it should, to the interpreter, which repeats it."""
        cdef access_t *back = &lane.back[lane.back_count]
        lane.back_count += 1
        back.page = page
        back.flags = late << 1 | (1 if write else 0)
        back.began = began
        self._call(lane)

    cdef void _look_for_late(self, int64_t now) noexcept nogil:
        cdef int index, at
        cdef slot_t *slot
        cdef run_t *run
        cdef uint64_t waited, late
        self._look_at = now + self._look_every_ns
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

    cdef void _found(self) noexcept nogil:
        self._pause = max(self._pause // 2, LEAST_PAUSE)

    cdef void _missed(self) noexcept nogil:
        self._worthwhile = False
        self._left_waits = self._pause
        self._pause = min(self._pause * 2, LONGEST_PAUSE)

    cdef void _slept(self, int64_t waited_ns) noexcept nogil:
        if waited_ns >= POLL_NS:
            self._score = max(self._score - 2, -MOST_SCORE)
        elif self._score < MOST_SCORE:
            self._score += 1
        if self._left_waits:
            self._left_waits -= 1
        else:
            self._worthwhile = self._score > 0


cdef inline int64_t may_write(const lane_t *lane) noexcept nogil:
    """How many more pages may be on their way to the volume."""
    return lane.marks[MARK_WRITING] - lane.counts[WRITING] - lane.counts[REWRITTEN]


cdef inline int64_t enough(const lane_t *lane) noexcept nogil:
    """How many dirty victims are worth the interpreter's while: a small part of the room that there is."""
    return max(min((lane.marks[MARK_MOST] - lane.marks[MARK_HIGH]) // 8, RUN), 1)


cdef inline bint is_writable(const lane_t *lane, int64_t page) noexcept nogil:
    return lane.state[page] == DIRTY and page != lane.marks[MARK_UNWRITABLE]


cdef void sealed(lane_t *lane, int64_t first, int count) noexcept nogil:
    """Tell pages that were read into the batch, and are about to be written, from zero ones, which are given back."""
    cdef const uint8_t *content
    cdef int64_t page
    cdef int at
    cdef bint goes_on = False
    for page in range(first, first + count):
        at = lane.batch_at
        lane.batch_at += 1
        content = lane.batch + at * PAGE
        if is_zero(<const uint64_t *>content) and punched(lane, page, 1):
            move(lane, page, DIRTY, ZERO)
            lane.zero_count += 1
            goes_on = False
            continue
        lane.checksum[page] = <uint32_t>(<Store>lane.store)._digest(content, PAGE)
        move(lane, page, DIRTY, WRITING)
        if goes_on:
            lane.runs[lane.run_count - 1][1] += 1
        else:
            lane.runs[lane.run_count][0], lane.runs[lane.run_count][1], lane.runs[lane.run_count][2] = page, 1, at
            lane.run_count += 1
            goes_on = True


cdef int rising(const void *left, const void *right) noexcept nogil:
    cdef int64_t first = (<const int64_t *>left)[0], second = (<const int64_t *>right)[0]
    return -1 if first < second else 1 if first > second else 0


cdef void merge(int64_t *pages, int count, const int64_t *more, int more_count) noexcept nogil:
    """Put rising pages among others that rise."""
    cdef int at = count + more_count
    while more_count:
        at -= 1
        if count and pages[count - 1] > more[more_count - 1]:
            count -= 1
            pages[at] = pages[count]
        else:
            more_count -= 1
            pages[at] = more[more_count]


cdef void waited(lane_t *lane, int64_t began, int64_t ended) noexcept nogil:
    cdef int64_t ns = ended - began
    lane.buckets[min(bit_length(<uint64_t>(ns // 1000)), BUCKETS - 1)] += 1
    lane.waited_ns += ns
    lane.longest_ns = max(lane.longest_ns, ns)
    if ns > STALL_NOTED_NS and lane.stall_count < STALLS:
        lane.stalls[lane.stall_count][0] = began
        lane.stalls[lane.stall_count][1] = ended
        lane.stall_count += 1


cdef inline uint64_t all_of(int count) noexcept nogil:
    """So many bits."""
    return <uint64_t>-1 >> (64 - count) if count else 0


cdef class Lane:
    """One client's. Once it is closed its methods do nothing."""

    cdef lane_t _lane
    cdef Hub _hub
    cdef object _on_attention
    cdef object _kept
    cdef Py_buffer _lent
    cdef bint _open

    def __cinit__(
        self, Hub hub not None, int uffd, uint64_t start, int memfd, int64_t memfd_offset,
        uint8_t[::1] state not None, uint32_t[::1] checksum not None, int64_t[::1] counts not None,
        const int64_t[::1] marks not None, const int64_t[::1] reach not None, Store store not None,
        Order order not None, ReadAhead zero_ahead not None, ReadAhead write_ahead not None, object on_attention
    ):
        cdef int index
        if (
            marks.shape[0] < MARKS or reach.shape[0] < 1 + 3 * STREAMS or counts.shape[0] < STATE_COUNT
            or checksum.shape[0] != state.shape[0] or order._pages != state.shape[0]
        ):
            raise ValueError("the arrays do not fit")
        memset(&self._lane, 0, sizeof(lane_t))
        self._lane.uffd, self._lane.file, self._lane.start = uffd, -1, start
        self._lane.memfd, self._lane.memfd_offset = memfd, memfd_offset
        self._lane.pages = state.shape[0]
        self._lane.state, self._lane.checksum = &state[0], &checksum[0]
        self._lane.counts, self._lane.marks, self._lane.reach = &counts[0], &marks[0], &reach[0]
        for index in range(RECENT):
            self._lane.recent[index] = -2 * NEAR
        # What the pointers point to.
        self._kept = (state, checksum, counts, marks, reach, store, order, zero_ahead, write_ahead)
        self._lane.store, self._lane.order = <void *>store, <void *>order
        self._lane.zero_ahead, self._lane.write_ahead = <void *>zero_ahead, <void *>write_ahead
        self._on_attention = on_attention
        self._hub = hub
        hub.enter(self)
        self._open = True

    cdef bint _may(self) except -1:
        """Whether there is anything to touch."""
        self._hub.check_idle()
        return self._open

    @property
    def in_flight(self):
        """Reads that accesses wait for."""
        return self._lane.in_flight - self._lane.ahead

    def turn(self, bint on):
        """Answer events from now on, or leave all to the interpreter."""
        if self._may():
            self._lane.on = on

    def use(self, int descriptor, int64_t origin, double late_seconds):
        """Read the volume, which begins at `origin` of a file, by itself; a negative `descriptor`: no more."""
        if not self._may():
            return
        if self._lane.file >= 0:
            self._hub.retire(self._lane.file)
            self._lane.file = -1
        if descriptor >= 0:
            self._lane.file = os.dup(descriptor)
            self._lane.origin, self._lane.late_ns = origin, <int64_t>(late_seconds * 1e9)
            self._hub.look_every(self._lane.late_ns // 4)

    @property
    def offered(self):
        """Pages that are to be given back and have not been yet."""
        return self._lane.victim_end - self._lane.victim

    @property
    def chosen(self):
        """Dirty victims that are not being got ready yet."""
        return self._lane.other_end - self._lane.other

    def evict(self, int count, int taste):
        """Choose victims: clean ones are given back and others got ready while nothing else is to be done.

        So many as `taste` says of those that are given back are offered to the RAM tier before. A choice may be
        of fewer victims than asked for.
        """
        if self._may():
            self._lane.taste = taste
            self._hub._choose(&self._lane, count)

    def give_back(self, int64_t pages):
        """Give back so many of the pages that are to be, or all, now."""
        cdef lane_t *lane = &self._lane
        cdef int64_t least
        if not self._may():
            return
        least = taken(lane) - pages
        while lane.victim != lane.victim_end and taken(lane) > least:
            self._hub._release(lane)

    def look(self):
        """Take note that the marks are others: more may leave now."""
        if self._may():
            self._hub._others_wait = True

    @property
    def wants_buffer(self):
        """Whether there are dirty victims, and nowhere to read them to."""
        return self._open and self._lane.batch == NULL and self._lane.other != self._lane.other_end

    @property
    def is_ready(self):
        """Whether there are dirty victims in the buffer, for `take`."""
        return self._lane.ready

    def lend(self, buffer):
        """Have dirty victims read into a buffer, until `take` or `recall`.

        :raise ValueError: there is one already, or it holds no page, or is not aligned.
        """
        cdef lane_t *lane = &self._lane
        if not self._may():
            return
        if lane.batch != NULL:
            raise ValueError("there is a buffer")
        PyObject_GetBuffer(buffer, &self._lent, PyBUF_WRITABLE)
        if self._lent.len < PAGE or <uintptr_t>self._lent.buf % sizeof(uint64_t):
            PyBuffer_Release(&self._lent)
            raise ValueError("the buffer holds no page, or is not aligned")
        lane.batch = <uint8_t *>self._lent.buf
        lane.batch_pages = <int>min(self._lent.len // PAGE, RUN)
        lane.asked = False
        self._hub._others_wait = True

    def give_up_buffer(self):
        """Have the buffer back where nothing is in it; tells whether it is back."""
        if self._lane.batch != NULL and not self._lane.batch_at and not self._lane.ready:
            self._take_back()
            return True
        return False

    def take(self):
        """Take what is to be written, and the buffer back.

        Returns `(runs, busy)`: `(first, count, place in the buffer, in pages)` of what was read, rising, and the
        pages that cannot be protected now.

        :raise OSError: the client's memory cannot be read.
        """
        cdef lane_t *lane = &self._lane
        cdef int index, failed = lane.failed
        if not self._may() or not lane.ready:
            return [], []
        runs = [] if failed else [(lane.runs[index][0], lane.runs[index][1], lane.runs[index][2]) for index in range(lane.run_count)]
        busy = [] if failed else [lane.busy[index] for index in range(lane.busy_count)]
        if failed:
            self._unwrite()
        self._take_back()
        if failed:
            raise OSError(failed, "the client's memory cannot be read")
        return runs, busy

    cdef void _unwrite(self) noexcept:
        """Let nobody write what was got ready."""
        cdef lane_t *lane = &self._lane
        cdef int64_t page
        cdef int index
        for index in range(lane.run_count):
            for page in range(lane.runs[index][0], lane.runs[index][0] + lane.runs[index][1]):
                if lane.state[page] == WRITING:
                    move(lane, page, WRITING, DIRTY)
                    (<Order>lane.order).page_added(page)
                elif lane.state[page] == REWRITTEN:
                    move(lane, page, REWRITTEN, DIRTY)
                    (<Order>lane.order).page_returned(page)
        for index in range(lane.busy_count):
            (<Order>lane.order).page_added(lane.busy[index])

    cdef void _take_back(self):
        cdef lane_t *lane = &self._lane
        if lane.batch != NULL:
            PyBuffer_Release(&self._lent)
        lane.batch = NULL
        lane.batch_at = lane.run_count = lane.busy_count = lane.failed = 0
        lane.ready = lane.asked = False

    def checksums(self, content):
        """Return the checksum of each whole page of some content."""
        cdef Py_buffer view
        cdef uint32_t found[RUN]
        cdef Py_ssize_t at = 0, pages
        cdef int count, index
        checksums = []
        if not self._may():
            return checksums
        PyObject_GetBuffer(content, &view, PyBUF_SIMPLE)
        try:
            pages = view.len // PAGE
            while at < pages and self._open:
                count = <int>min(pages - at, <Py_ssize_t>RUN)
                for index in range(count):
                    found[index] = <uint32_t>(<Store>self._lane.store)._digest(
                        <const uint8_t *>view.buf + (at + index) * PAGE, PAGE
                    )
                checksums += [found[index] for index in range(count)]
                at += count
        finally:
            PyBuffer_Release(&view)
        return checksums

    def acknowledged(self, list runs not None, buffer, int taste):
        """Have the pages of `take`'s runs given back, but those that were written to meanwhile.

        The first `taste` of them, as they were written, are offered to the RAM tier.

        :raise IndexError: a page is not the client's, or not in the buffer.
        """
        cdef Py_buffer view
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
        try:
            self._acknowledged(runs, <const uint8_t *>view.buf, view.len // PAGE, taste)
        finally:
            PyBuffer_Release(&view)

    cdef int _acknowledged(self, list runs, const uint8_t *buffer, int64_t buffer_pages, int taste) except -1:
        cdef lane_t *lane = &self._lane
        cdef int64_t first, page
        cdef int count, at, index
        for first, count, at in runs:
            if not self._may():
                return 0
            if count < 0 or not 0 <= first <= lane.pages - count or not 0 <= at <= buffer_pages - count:
                raise IndexError(f"{count} pages from {first} on, {at} pages into {buffer_pages}")
            for index in range(count):
                page = first + index
                if lane.state[page] == REWRITTEN:
                    move(lane, page, REWRITTEN, DIRTY)
                    (<Order>lane.order).page_returned(page)
                elif lane.state[page] == WRITING:
                    # First of all the table says that the volume has it: a pager that is started in the place of
                    # this one could not tell a page that was given back here from one that the balloon took.
                    move(lane, page, WRITING, CLEAN)
                    if taste > 0:
                        (<Store>lane.store).keep_page(<uint64_t>page, buffer + (at + index) * PAGE)
                        taste -= 1
                    self._hub._offer(lane, page, False)
        self._hub._others_wait = True  # more may be on their way now
        return 0

    def recall(self):
        """Let no more pages leave: what was to be given back or written stays, and the buffer is free."""
        if self._may():
            self._recall()

    cdef void _recall(self):
        cdef lane_t *lane = &self._lane
        while lane.victim != lane.victim_end:
            (<Store>lane.store).forget_run(<uint64_t>lane.victims[lane.victim], 1)
            (<Order>lane.order).page_added(lane.victims[lane.victim])
            lane.victim += 1
            self._hub._victims -= 1
        while lane.other != lane.other_end:
            (<Order>lane.order).page_added(lane.others[lane.other])
            lane.other += 1
        self._unwrite()
        self._take_back()

    @property
    def taste(self):
        """How many of the next victims are offered to the RAM tier."""
        return self._lane.taste

    @taste.setter
    def taste(self, int64_t pages):
        self._lane.taste = pages

    def left(self):
        """Take the accesses that are for the interpreter, as `(page, flags, began)`, in seconds."""
        cdef int index
        accesses = [
            (self._lane.left[index].page, self._lane.left[index].flags, self._lane.left[index].began / 1e9)
            for index in range(self._lane.left_count)
        ]
        self._lane.left_count = 0
        return accesses

    def back(self):
        """Take the reads that have to be repeated, as `(page, write, late, began)`, negative where nobody waits."""
        cdef int index
        reads = [
            (
                self._lane.back[index].page, bool(self._lane.back[index].flags & 1),
                bool(self._lane.back[index].flags >> 1), self._lane.back[index].began / 1e9,
            )
            for index in range(self._lane.back_count)
        ]
        self._lane.back_count = 0
        return reads

    def passed(self):
        """Take the last pages that came in past the interpreter, the oldest first."""
        cdef int64_t index, count = self._lane.passed_count
        pages = [self._lane.passed[index % RECENT] for index in range(max(count - RECENT, 0), count)]
        self._lane.passed_count = 0
        return pages

    def counted(self):
        """Take what has happened since the last time.

        That is `(faults, pages read, pages from the RAM tier, pages filled with zeros, clean pages given back, zero
        ones given back, buckets of waits, seconds waited, the longest of them, stalls)`.
        """
        cdef int index
        cdef lane_t *lane = &self._lane
        counted = (
            lane.faults, lane.answered, lane.from_tier, lane.zeroed, lane.given_back, lane.zero_count,
            [lane.buckets[index] for index in range(BUCKETS)],
            lane.waited_ns / 1e9, lane.longest_ns / 1e9,
            [(lane.stalls[index][0] / 1e9, lane.stalls[index][1] / 1e9) for index in range(lane.stall_count)],
        )
        lane.faults = lane.answered = lane.from_tier = lane.zeroed = lane.given_back = lane.zero_count = 0
        lane.waited_ns = lane.longest_ns = lane.stall_count = 0
        memset(lane.buckets, 0, sizeof(lane.buckets))
        return counted

    def fetch(self, pages not None, bint write):
        """Read those of some pages that are on the device, though nobody waits for them.

        Returns how many that are, and those for which no read can be begun here.
        """
        cdef access_t access
        cdef int64_t page
        cdef int index, begun = 0
        left = []
        if not self._may():
            return 0, left
        access.began = now_ns()
        access.flags = UFFD_PAGEFAULT_FLAG_WRITE if write else 0
        for page in pages:
            if not 0 <= page < self._lane.pages or self._lane.state[page] != ON_DEVICE:
                continue
            access.page = page
            if (
                not self._lane.on or self._lane.file < 0 or self._hub._free_count <= KEPT_SLOTS
                or not self._hub._begin(&self._lane, &access)
            ):
                left.append(page)
                continue
            (<Store>self._lane.store).forget_run(<uint64_t>page, 1)
            index = self._hub._free[self._hub._free_count]
            self._hub._slots[index].ahead = True
            self._lane.ahead += 1
            begun += 1
        if begun:
            self._hub._submit()
        return begun, left

    def fetch_near(self, int64_t page, int count, bint write, double began):
        """Read up to `count` pages, from one on that somebody waits for since `began`, in seconds.

        They end at the first that is not on the device. Returns how many that are, 0 when no read can be begun here.
        """
        cdef lane_t *lane = &self._lane
        cdef run_t *run
        cdef int length = 0
        if not self._may() or not lane.on or lane.file < 0:
            return 0
        count = min(count, <int>RUN)
        while (
            length < count and 0 <= page + length < lane.pages and lane.state[page + length] == ON_DEVICE
        ):
            length += 1
        if not length:
            return 0
        run = self._hub._begin_run(lane, page, length, all_of(length))
        if run == NULL:
            return 0
        run.waited = 1
        run.began[0] = <int64_t>(began * 1e9)
        if write:
            run.write = run.wanted
        lane.ahead -= 1
        self._hub._submit()
        return length

    def fetch_run(self, int64_t first, int count, bint write):
        """Read those of a run of at most 64 pages that are on the device, though nobody waits for them.

        Returns how many that are, and those for which no read can be begun here, as runs `(first, count)`.

        :raise IndexError: the run is too long, or not the client's.
        """
        cdef lane_t *lane = &self._lane
        cdef run_t *run
        cdef uint64_t wanted = 0
        cdef int at, lowest, highest, begun = 0
        left = []
        if not self._may():
            return 0, left
        if not 0 <= count <= RUN or not 0 <= first <= lane.pages - count:
            raise IndexError(f"{count} pages from {first} on")
        for at in range(count):
            if lane.state[first + at] == ON_DEVICE:
                wanted |= <uint64_t>1 << at
        while wanted:
            lowest = highest = lowest_bit(wanted)
            # Up to the first gap that is too large.
            while highest < 63 and wanted >> (highest + 1) and lowest_bit(wanted >> (highest + 1)) <= GAP:
                highest += 1 + lowest_bit(wanted >> (highest + 1))
            run = NULL
            if lane.on and lane.file >= 0:
                run = self._hub._begin_run(
                    lane, first + lowest, highest - lowest + 1, (wanted & all_of(highest + 1)) >> lowest
                )
            if run == NULL:
                break
            if write:
                run.write = run.wanted
            begun += count_bits(run.wanted)
            wanted &= ~all_of(highest + 1)
        if begun:
            self._hub._submit()
        while wanted:
            lowest = lowest_bit(wanted)
            highest = lowest + lowest_bit(~(wanted >> lowest)) if ~(wanted >> lowest) else 64
            left.append((first + lowest, highest - lowest))
            wanted &= ~all_of(highest)
        return begun, left

    def join(self, int64_t page, bint write):
        """Let an access wait for a read of the lane's that is in flight; False when there is none of its page."""
        cdef access_t access
        access.page, access.began = page, now_ns()
        access.flags = UFFD_PAGEFAULT_FLAG_WRITE if write else 0
        return self._hub._joined(&self._lane, &access)

    def withdraw(self):
        """Give up the reads in flight; returns them as `(page, write, began)`, negative where nobody waits."""
        return self._hub.withdraw(&self._lane) if self._may() else []

    def close(self):
        """Touch nothing of the client any more."""
        if not self._may():
            return
        self._open = self._lane.on = False
        self._hub.withdraw(&self._lane)
        self._recall()
        self._hub.leave(self)
        if self._lane.file >= 0:
            self._hub.retire(self._lane.file)
            self._lane.file = -1
        self._lane.store = self._lane.order = self._lane.zero_ahead = self._lane.write_ahead = NULL
        self._lane.state = NULL
        self._lane.checksum = NULL
        self._lane.counts = NULL
        self._lane.marks = self._lane.reach = NULL
        self._kept = self._on_attention = None
