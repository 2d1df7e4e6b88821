# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""A client's accesses are answered, without the interpreter, where they are plain.

That is: a page that is on the device or in the RAM tier, while there is room for it, and what is read ahead of the
stream of accesses that it is of; a first touch; and a write to a clean page. All others are left to the interpreter
(`farpage.pager.faults`).
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint64_t
from posix.ioctl cimport ioctl
from posix.unistd cimport read

from farpage.kernel._abi cimport (
    uffd_msg, UFFD_PAGEFAULT_FLAG_MINOR, UFFD_PAGEFAULT_FLAG_WP, UFFD_PAGEFAULT_FLAG_WRITE, uffdio_writeprotect,
    UFFDIO_WRITEPROTECT, uffdio_zeropage, UFFDIO_ZEROPAGE,
)
from farpage.pager._lanestate cimport (
    access_t, call, CLEAN, DIRTY, EVENTS, lane_t, LITTLE_ROOM, MARK_AHEAD, MARK_MOST, MARK_READING, move, NEAR, now_ns,
    ON_DEVICE, PAGE, READING, room, RUN, taken, ZERO,
)
from farpage.pager._order cimport Order
from farpage.pager._pageins cimport answered_one, came, copy
from farpage.pager._pageouts cimport press, release
from farpage.pager._readahead cimport ReadAhead
from farpage.pager._reads cimport Reads
from farpage.pager._store cimport Store
from farpage.pager._streams cimport ahead_t, Streams


cdef void answer(lane_t *lane, int64_t now) noexcept nogil:
    """Read a batch of events and answer, or begin to answer, those that are plain."""
    cdef uffd_msg messages[EVENTS]
    cdef ssize_t size
    cdef int index
    cdef access_t access
    cdef access_t *left
    if lane.left_count:  # the interpreter has not seen the last ones yet
        call(lane)
        return
    size = read(lane.uffd, messages, sizeof(messages))
    if size <= 0:
        if errno != EAGAIN and errno != EINTR:
            lane.on = False  # the client is gone: the interpreter finds out for itself
            call(lane)
        return
    for index in range(size // <ssize_t>sizeof(uffd_msg)):
        access.flags = messages[index].arg.pagefault.flags
        access.page = <int64_t>((messages[index].arg.pagefault.address - lane.start) // PAGE)
        access.began = now
        lane.faults += 1
        if not answered(lane, &access):
            left = &lane.left[lane.left_count]
            left[0] = access
            lane.left_count += 1
    if lane.left_count:
        call(lane)


cdef bint answered(lane_t *lane, access_t *access) noexcept nogil:
    cdef int64_t page = access.page
    cdef uint8_t state
    if page < 0 or page >= lane.pages:
        return False
    state = lane.state[page]
    if access.flags & UFFD_PAGEFAULT_FLAG_WP:
        return unprotect(lane, page, state)
    if access.flags & UFFD_PAGEFAULT_FLAG_MINOR:
        return False
    if state == READING:
        return joined(lane, access)
    if state == ZERO:
        return made_room(lane, 1) and zero(lane, access)
    if state != ON_DEVICE:
        return False
    if (<Streams>lane.streams).is_alone(page):
        return made_room(lane, 1) and brought_in(lane, access)
    # A window needs a file to read it from, and more room.
    if lane.file < 0 or not (<Reads>lane.hub.reads).has_room_for_window(lane) or not made_room(lane, LITTLE_ROOM):
        return False
    return brought_in(lane, access)


cdef bint made_room(lane_t *lane, int64_t pages) noexcept nogil:
    """See that there is room for so many pages, at the cost of those that leave soon; tells whether there is for one."""
    while room(lane) < pages and lane.victim != lane.victim_end and lane.counts[READING] < lane.marks[MARK_READING]:
        release(lane)
    return room(lane) > 0


cdef bint joined(lane_t *lane, const access_t *access) noexcept nogil:
    """Let an access wait for a read that is in flight; one to a marker is when the next window is read."""
    cdef ahead_t ahead
    cdef bint marker = (<Streams>lane.streams).is_marker(access.page)
    if not (<Reads>lane.hub.reads).joined(lane, access):
        return False
    if marker and lane.file >= 0 and (<Streams>lane.streams).next_window(access.page, may_read_ahead(lane), &ahead):
        read_ahead(lane, &ahead, (access.flags & UFFD_PAGEFAULT_FLAG_WRITE) != 0)
    return True


cdef bint brought_in(lane_t *lane, const access_t *access) noexcept nogil:
    """Answer from the RAM tier or begin to read a page, and what its stream is given next."""
    cdef ahead_t ahead
    cdef bint write = (access.flags & UFFD_PAGEFAULT_FLAG_WRITE) != 0, marker, follows
    cdef int near
    if lane.file < 0 and not (<Store>lane.store).has(<uint64_t>access.page):
        return False
    marker = (<Streams>lane.streams).is_marker(access.page)
    follows = (<Streams>lane.streams).next_window(access.page, may_read_ahead(lane), &ahead)
    if from_tier(lane, access, marker):
        pass
    elif lane.file < 0:
        return False
    elif follows and ahead.step == 1 and ahead.first == access.page + 1:
        # The page that is waited for comes with a few others, not at the end of the whole window.
        near = (<Reads>lane.hub.reads).begin_near(lane, access, <int>min(ahead.length + 1, NEAR))
        if not near:
            return False
        lane.read_ahead += near - 1
    elif not (<Reads>lane.hub.reads).begin(lane, access):
        return False
    if follows:
        read_ahead(lane, &ahead, write)
    return True


cdef inline int64_t may_read_ahead(const lane_t *lane) noexcept nogil:
    return min(room(lane) // 2, lane.marks[MARK_AHEAD])


cdef void read_ahead(lane_t *lane, const ahead_t *ahead, bint write) noexcept nogil:
    """Begin to read what is on the device of a window; what cannot be is read when it is asked for."""
    cdef access_t access
    cdef int64_t done = 0, first
    cdef int length
    if ahead.step == 1 or ahead.step == -1:
        while done < ahead.length:
            length = <int>min(ahead.length - done, RUN)  # the first ones do not wait for the last
            first = ahead.first + done if ahead.step > 0 else ahead.first - done - length + 1
            lane.read_ahead += (<Reads>lane.hub.reads).begin_neighbours(lane, first, length, write)
            done += length
    else:
        access.began, access.flags = 0, UFFD_PAGEFAULT_FLAG_WRITE if write else 0
        for done in range(ahead.length):
            access.page = ahead.first + done * ahead.step
            if lane.state[access.page] == ON_DEVICE:
                lane.read_ahead += (<Reads>lane.hub.reads).begin_ahead(lane, &access)
    press(lane, now_ns())


cdef bint zero(lane_t *lane, const access_t *access) noexcept nogil:
    """Answer a first touch, and ahead of a sequential writer those that follow."""
    cdef uffdio_zeropage argument
    cdef int64_t page, count = 0, done
    cdef int64_t most = (<ReadAhead>lane.zero_ahead).next_window(access.page)
    while lane.marks[MARK_MOST] - taken(lane) < most and lane.victim != lane.victim_end:
        release(lane)
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
    answered_one(lane, access.began, now_ns())
    return True


cdef bint from_tier(lane_t *lane, const access_t *access, bint marker) noexcept nogil:
    """Answer from the RAM tier, if it has the page; a marker was counted when it was read."""
    cdef bint write = (access.flags & UFFD_PAGEFAULT_FLAG_WRITE) != 0
    cdef int64_t page = access.page
    if not (<Store>lane.store).take_into(<uint64_t>page, lane.checksum[page], lane.hub.scratch):
        return False
    # A client that is woken may write, and then this process be killed, before the table says that it has the page:
    # of one that is being read, a pager that is started in the place of this one keeps what is in memory.
    move(lane, page, ON_DEVICE, READING)
    if not copy(lane, page, lane.hub.scratch, write, READING):
        move(lane, page, READING, ON_DEVICE)
        return False
    if not marker:
        lane.from_tier += 1
    came(lane, page, access.began, now_ns())
    return True


cdef bint unprotect(lane_t *lane, int64_t page, uint8_t state) noexcept nogil:
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
