# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""A client's accesses are answered, without the interpreter, where they are plain.

That is: a page that is on the device or in the RAM tier, and that no stream of accesses is near, while there is room
for it; a first touch; and a write to a clean page. All others are left to the interpreter (`farpage.pager.faults`).
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
    access_t, call, CLEAN, DIRTY, EVENTS, has_room, lane_t, MARK_HELD, MARK_MOST, MARK_READING, MOST_HELD, move, NEAR,
    now_ns, ON_DEVICE, PAGE, READING, RECENT, STREAMS, taken, ZERO,
)
from farpage.pager._order cimport Order
from farpage.pager._pageins cimport answered_one, came, copy
from farpage.pager._pageouts cimport release
from farpage.pager._readahead cimport ReadAhead
from farpage.pager._reads cimport Reads
from farpage.pager._store cimport Store


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
    cdef bint alone
    if page < 0 or page >= lane.pages:
        return False
    state = lane.state[page]
    if access.flags & UFFD_PAGEFAULT_FLAG_WP:
        return unprotect(lane, page, state)
    if access.flags & UFFD_PAGEFAULT_FLAG_MINOR:
        return False
    if state == READING:
        return (<Reads>lane.hub.reads).joined(lane, access)
    if state == ZERO:
        return made_room(lane) and zero(lane, access)
    if state != ON_DEVICE:
        return False
    alone = not of_a_stream(lane, page)
    lane.recent[lane.recent_at] = page
    lane.recent_at = (lane.recent_at + 1) % RECENT
    if not alone or not made_room(lane):
        return False
    if from_tier(lane, access):
        return True
    return lane.file >= 0 and (<Reads>lane.hub.reads).begin(lane, access)


cdef bint made_room(lane_t *lane) noexcept nogil:
    """See that there is room for a page, at the cost of one that leaves soon; tells whether there is."""
    while not has_room(lane):
        if lane.victim == lane.victim_end or lane.counts[READING] >= lane.marks[MARK_READING]:
            return False
        release(lane)
    return True


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


cdef bint from_tier(lane_t *lane, const access_t *access) noexcept nogil:
    """Answer from the RAM tier, if it has the page."""
    cdef bint write = (access.flags & UFFD_PAGEFAULT_FLAG_WRITE) != 0
    cdef int64_t page = access.page
    if not (<Store>lane.store).take_into(<uint64_t>page, lane.checksum[page], lane.hub.scratch):
        return False
    if not copy(lane, page, lane.hub.scratch, write, ON_DEVICE):
        return False
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
