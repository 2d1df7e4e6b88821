# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Pages leave one client's memory, without the interpreter: they are chosen, and given back or got ready to be written.

Clean ones are given back to the host, dirty ones are protected and read into a buffer, both by runs of neighbours and
while nothing else is to be done; to write what is in the buffer is left to the interpreter.
"""

from libc.errno cimport EIO, ENOENT, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport qsort
from libc.string cimport memmove
from posix.ioctl cimport ioctl
from posix.unistd cimport pread

from farpage.kernel._abi cimport (
    FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate, uffdio_writeprotect, UFFDIO_WRITEPROTECT,
    UFFDIO_WRITEPROTECT_MODE_WP,
)
from farpage.pager._lanestate cimport (
    call, call_soon, CLEAN, DIRTY, lane_t, MARK_DEFERRED, MARK_HIGH, MARK_MOST, MARK_UNWRITABLE, MARK_WRITING, move,
    now_ns, ON_DEVICE, OTHERS, PAGE, REWRITTEN, RUN, VICTIMS, WRITES_TOGETHER, WRITING, ZERO,
)
from farpage.pager._order cimport Order
from farpage.pager._store cimport Store


cdef void choose(lane_t *lane, int64_t count) noexcept nogil:
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
            offer(lane, page, lane.taste > 0)
            lane.taste -= 1
        else:
            chosen[dirty] = page
            dirty += 1
    if dirty:
        merge(lane.others, left, chosen, dirty)
        lane.other_end += dirty
        lane.hub.others_wait = True


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


cdef void offer(lane_t *lane, int64_t page, bint taste) noexcept nogil:
    """Have a clean page given back while nothing else is to be done."""
    cdef int left = lane.victim_end - lane.victim
    if lane.victim_end == VICTIMS and lane.victim:
        memmove(lane.victims, lane.victims + lane.victim, left * sizeof(int64_t))
        memmove(lane.tasted, lane.tasted + lane.victim, left * sizeof(bint))
        lane.victim, lane.victim_end = 0, left
    if lane.victim_end == VICTIMS:
        release(lane)
        lane.victim, lane.victim_end = 0, lane.victim_end - lane.victim
        memmove(lane.victims, lane.victims + VICTIMS - lane.victim_end, lane.victim_end * sizeof(int64_t))
        memmove(lane.tasted, lane.tasted + VICTIMS - lane.victim_end, lane.victim_end * sizeof(bint))
    lane.victims[lane.victim_end] = page
    lane.tasted[lane.victim_end] = taste
    lane.victim_end += 1
    lane.hub.victims += 1


cdef void release(lane_t *lane) noexcept nogil:
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
            keep(lane, page)
        lane.victim += 1
        count += 1
        page += 1
    if not count:
        lane.victim += 1
        lane.hub.victims -= 1
        (<Store>lane.store).forget_run(<uint64_t>first, 1)
        (<Order>lane.order).page_added(first)
        return
    lane.hub.victims -= count
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
        call(lane)


cdef void keep(lane_t *lane, int64_t page) noexcept nogil:
    """Put a page that is about to leave into the RAM tier, if it gets small."""
    if pread(lane.memfd, lane.hub.scratch, PAGE, lane.memfd_offset + page * PAGE) == PAGE:
        (<Store>lane.store).keep_page(<uint64_t>page, lane.hub.scratch)


cdef inline bint punched(lane_t *lane, int64_t first, int64_t count) noexcept nogil:
    return fallocate(
        lane.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, lane.memfd_offset + first * PAGE, count * PAGE
    ) == 0


cdef bint prepare_some(lane_t *lane, bint few) noexcept nogil:
    """Get pages ready to be written, unless they are `few` and need not be; tells whether anything was done."""
    cdef int count
    if lane.ready:
        return False
    count = lane.batch_at + lane.other_end - lane.other
    if not count or (lane.batch == NULL and lane.asked) or (not lane.batch_at and may_write(lane) <= 0):
        return False
    lane.hub.others_wait = True
    if few or count >= enough(lane) or lane.marks[MARK_DEFERRED]:
        if lane.batch != NULL:
            prepare(lane)
        else:
            lane.asked = True
            call_soon(lane, now_ns())
        return True
    return False


cdef inline int64_t may_write(const lane_t *lane) noexcept nogil:
    """How many more pages may be on their way to the volume."""
    return lane.marks[MARK_WRITING] - lane.counts[WRITING] - lane.counts[REWRITTEN]


cdef inline int64_t enough(const lane_t *lane) noexcept nogil:
    """How many dirty victims are worth the interpreter's while: a small part of the room that there is."""
    return max(min((lane.marks[MARK_MOST] - lane.marks[MARK_HIGH]) // 8, RUN), 1)


cdef void prepare(lane_t *lane) noexcept nogil:
    """Protect the next of the dirty victims that are neighbours, and read them."""
    cdef int64_t first, page, may = may_write(lane)
    cdef int count = 0, index
    cdef bint done
    while lane.other != lane.other_end and not is_writable(lane, lane.others[lane.other]):
        page = lane.others[lane.other]
        lane.other += 1
        if lane.state[page] == CLEAN:
            offer(lane, page, False)
        elif lane.state[page] == DIRTY:
            (<Order>lane.order).page_added(page)
    if lane.other != lane.other_end and may > 0:
        first = lane.others[lane.other]
        while (
            lane.other + count != lane.other_end and count < lane.batch_pages - lane.batch_at and count < may
            and lane.others[lane.other + count] == first + count and is_writable(lane, first + count)
        ):
            count += 1
        done = protected(lane, first, count)
        if not done and count > 1 and errno == ENOENT:
            count = 1  # they may be in two mappings, and Linux before 6.3 protects nothing across those
            done = protected(lane, first, 1)
        lane.other += count
        if not done:
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
            or is_long_enough(lane) or lane.busy_count or lane.failed
        )
    if lane.ready or (lane.zero_count and lane.marks[MARK_DEFERRED]):
        call_soon(lane, now_ns())


cdef inline bint is_long_enough(const lane_t *lane) noexcept nogil:
    """Whether more writes would keep accesses waiting for too long: of several each waits for the others anyway."""
    return lane.in_flight > 0 and lane.run_count >= WRITES_TOGETHER * lane.in_flight


cdef inline bint is_writable(const lane_t *lane, int64_t page) noexcept nogil:
    return lane.state[page] == DIRTY and page != lane.marks[MARK_UNWRITABLE]


cdef inline bint protected(lane_t *lane, int64_t first, int64_t count) noexcept nogil:
    cdef uffdio_writeprotect argument
    argument.range.start = lane.start + <uint64_t>first * PAGE
    argument.range.len = <uint64_t>count * PAGE
    argument.mode = UFFDIO_WRITEPROTECT_MODE_WP
    return ioctl(lane.uffd, UFFDIO_WRITEPROTECT, &argument) == 0


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


cdef inline bint is_zero(const uint64_t *words) noexcept nogil:
    cdef int index
    for index in range(PAGE // 8):
        if words[index]:
            return False
    return True


cdef int written(lane_t *lane, int64_t first, int count, const uint8_t *content, int taste) noexcept nogil:
    """Have pages that the volume has now given back, but those that were written to meanwhile."""
    cdef int64_t page
    for page in range(first, first + count):
        if lane.state[page] == REWRITTEN:
            move(lane, page, REWRITTEN, DIRTY)
            (<Order>lane.order).page_returned(page)
        elif lane.state[page] == WRITING:
            # First of all the table says that the volume has it: a pager that is started in the place of
            # this one could not tell a page that was given back here from one that the balloon took.
            move(lane, page, WRITING, CLEAN)
            if taste > 0:
                (<Store>lane.store).keep_page(<uint64_t>page, content + (page - first) * PAGE)
                taste -= 1
            offer(lane, page, False)
    return taste


cdef void recall(lane_t *lane) noexcept nogil:
    """Let no more pages leave: what was to be given back or written stays."""
    while lane.victim != lane.victim_end:
        (<Store>lane.store).forget_run(<uint64_t>lane.victims[lane.victim], 1)
        (<Order>lane.order).page_added(lane.victims[lane.victim])
        lane.victim += 1
        lane.hub.victims -= 1
    while lane.other != lane.other_end:
        (<Order>lane.order).page_added(lane.others[lane.other])
        lane.other += 1
    unwrite(lane)


cdef void unwrite(lane_t *lane) noexcept nogil:
    """Let nobody write what was got ready."""
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
