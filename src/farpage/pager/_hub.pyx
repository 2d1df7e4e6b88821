# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Waits for the events of a worker's loop in the place of `select.epoll.poll`, and while it waits does what is plain.

What it can answer by itself it answers without the interpreter's lock; what it cannot it leaves to the interpreter,
as its caller's event. While nothing else is to be done, it has pages leave.
"""

from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free

from farpage.kernel._abi cimport epoll_event, epoll_wait, EPOLLIN, relax
from farpage.pager._accesses cimport answer
from farpage.pager._lanestate cimport EVENTS, lane_t, now_ns
from farpage.pager._pageouts cimport prepare_some, press, release
from farpage.pager._reads cimport Reads

cdef enum:
    RUNS_A_POLL = 2
    POLL_NS = 100000
    SOON_NS = 20000
    LEAST_PAUSE = 2
    LONGEST_PAUSE = 4096
    MOST_SCORE = 4


cdef class Hub:
    """Waits for the events of one thread's loop, and answers those of its lanes."""

    def __cinit__(self, int epoll, object ring):
        """`ring`, a `farpage.kernel.io_uring.Ring`, is this one's alone."""
        self._epoll = epoll
        self._ring = ring.fileno()
        self._reads = Reads(ring)
        self._common.reads, self._common.scratch = <void *>self._reads, self._reads.scratch
        self._members = {}
        self._pause = LEAST_PAUSE

    def __dealloc__(self):
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

    cdef int enter(self, lane_t *lane, object owner, object on_attention) except -1:
        cdef int64_t fd = lane.uffd
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
        lane.hub = &self._common
        self._lanes[fd] = lane
        self._members[fd] = owner, on_attention
        return 0

    cdef void leave(self, lane_t *lane):
        self._lanes[lane.uffd] = NULL
        del self._members[lane.uffd]

    def attend(self):
        """Have the lanes that need the interpreter tell so."""
        cdef lane_t *lane
        self._common.attention = self._common.calls_wait = False
        for fd, member in list(self._members.items()):
            if self._members.get(fd) is not member:  # it has left meanwhile
                continue
            lane = self._lanes[<int>fd]
            if lane.attention:
                lane.attention = False
                try:
                    member[1]()
                except BaseException:
                    self._common.attention = True  # the others are told with the next poll
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
        self._reads.close_retired()
        found = [(events[index].data.fd, events[index].events) for index in range(count)]
        if self._common.attention:
            found.append((self._ring, EPOLLIN))
        return found

    def glance(self):
        """Answer what has come, without waiting, amid work of the interpreter."""
        self.check_idle()
        self._at_work = True
        with nogil:
            self._glance()
        self._at_work = False

    # Called without it

    cdef void _glance(self) noexcept nogil:
        """Answer accesses that have come; epoll tells of everything else again."""
        cdef epoll_event events[EVENTS]
        cdef int64_t now = now_ns()
        cdef bint worked = self._reads.complete(now)
        cdef int count = epoll_wait(self._epoll, events, EVENTS, 0)
        self._sort(events, count, now, &worked)
        if self._reads.unsubmitted:
            self._reads.submit()

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
                self._common.attention or self._common.calls_wait or looking
                or self._common.victims or self._common.others_wait or (deadline >= 0 and wait <= 0)
            ):
                timeout = 0
            else:
                timeout = -1 if wait < 0 else <int>((wait + 999999) // 1000000)
                if self._reads.unsubmitted and (timeout < 0 or timeout > 1):
                    timeout = 1
                if self._reads.under_way() and (timeout < 0 or timeout > self._reads.look_every_ns // 1000000):
                    timeout = <int>(self._reads.look_every_ns // 1000000)
            began = now
            count = epoll_wait(self._epoll, events, EVENTS, timeout)
            if count < 0:
                return 0  # a signal, which the interpreter wants to know of
            now = now_ns()
            if timeout != 0:
                self._slept(now - began)
            worked = self._reads.complete(now)
            count = self._sort(events, count, now, &worked)
            if self._reads.unsubmitted:
                self._reads.submit()
            if self._reads.under_way() and now >= self._reads.look_at:
                self._reads.look_for_late(now)
            if self._common.calls_wait and (self._reads.under_way() or not looking or now - looked_since > SOON_NS):
                self._common.calls_wait, self._common.attention = False, True
            if count or self._common.attention:
                if looking:
                    self._found()
                # A busy interpreter leaves no time in which nothing else is to be done.
                for _ in range(RUNS_A_POLL):
                    if self._common.victims:
                        self._release_some()
                if self._common.others_wait:
                    self._prepare_some(False)
                return count
            if worked:
                now = now_ns()
                if looking:
                    self._found()
                looking = may_look and self._worthwhile
                looked_since = now
            elif self._common.victims:
                self._release_some()
                now = now_ns()
            elif self._common.others_wait and self._prepare_some(not looking):
                now = now_ns()
            elif looking:
                relax()
            if deadline >= 0 and now >= deadline:
                return 0

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
            answer(lane, now)
            worked[0] = True
        return left

    cdef void _release_some(self) noexcept nogil:
        """Give pages of the first lane that has any to give back to the host."""
        cdef int64_t fd
        for fd in range(self._lanes_size):
            if self._lanes[fd] != NULL and self._lanes[fd].victim != self._lanes[fd].victim_end:
                release(self._lanes[fd])
                if self._lanes[fd].victim == self._lanes[fd].victim_end:
                    press(self._lanes[fd], now_ns())
                return
        self._common.victims = 0

    cdef bint _prepare_some(self, bint few) noexcept nogil:
        """Get pages of the first lane that has any ready to be written, unless they are `few` and need not be."""
        cdef int64_t fd
        self._common.others_wait = False
        for fd in range(self._lanes_size):
            if self._lanes[fd] != NULL and prepare_some(self._lanes[fd], few):
                return True
        return False

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
