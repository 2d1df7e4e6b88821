from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from farpage.errors import Unsupported
from farpage.kernel.memory import PAGE_SIZE, AlignedBuffer, address_of, create_memfd, punch_hole
from farpage.kernel.userfaultfd import (
    FLAG_MINOR,
    FLAG_WP,
    FLAG_WRITE,
    OPTIONAL_FEATURES,
    REQUIRED_FEATURES,
    Event,
    Feature,
    Mode,
    Userfaultfd,
    wait_readable,
)

PAGES = 256


@dataclass
class Paged:
    """Registered memory of this process; accesses are made by threads without the interpreter lock."""

    uffd: Userfaultfd
    memfd: int
    start: int
    mapping: mmap.mmap
    source: AlignedBuffer

    def address(self, page: int) -> int:
        return self.start + page * PAGE_SIZE

    def copy(self, page: int, content: bytes, pages: int = 1, *, write_protect: bool = False) -> int:
        self.source.view[: PAGE_SIZE * pages] = content.ljust(PAGE_SIZE, b"\0") * pages
        return self.uffd.copy(
            self.address(page), self.source.address, PAGE_SIZE * pages, write_protect=write_protect
        )

    def fault(self) -> tuple[int, int]:
        """Wait for the one fault that is to come and return its page and flags."""
        assert wait_readable(self.uffd, 5)
        ((event, flags, address),) = self.uffd.read_events()
        assert event == Event.PAGEFAULT
        return (address - self.start) // PAGE_SIZE, flags


class Access(threading.Thread):
    """A read or write of a page by the kernel on behalf of a system call, which holds no interpreter lock."""

    def __init__(self, operation: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._operation = operation
        self.result: object = None
        self.start()

    def run(self) -> None:
        self.result = self._operation()

    def finish(self) -> object:
        self.join(5)
        assert not self.is_alive(), "the access still waits"
        return self.result


@pytest.fixture
def paged() -> Iterator[Paged]:
    memfd = create_memfd("test", PAGES * PAGE_SIZE)
    mapping = mmap.mmap(memfd, PAGES * PAGE_SIZE)
    with Userfaultfd.create() as uffd, AlignedBuffer(64 * PAGE_SIZE, populate=True) as source:
        uffd.handshake()
        start = address_of(mapping)
        uffd.register(start, PAGES * PAGE_SIZE, Mode.MISSING | Mode.WP | Mode.MINOR)
        yield Paged(uffd, memfd, start, mapping, source)
    mapping.close()
    os.close(memfd)


@pytest.fixture
def read_page(paged: Paged) -> Iterator[Callable[[int], Access]]:
    """Start reads of pages: write(2) of their first bytes into a pipe, and back."""
    reader, writer = os.pipe()
    view = memoryview(paged.mapping)

    def read(page: int) -> Access:
        def operation() -> bytes:
            os.write(writer, view[page * PAGE_SIZE : page * PAGE_SIZE + 4])
            return os.read(reader, 4)

        return Access(operation)

    yield read
    view.release()
    os.close(reader)
    os.close(writer)


@pytest.fixture
def write_page(paged: Paged) -> Iterator[Callable[[int, bytes], Access]]:
    """Start writes of bytes at the start of pages, by preadv(2)."""
    source = os.memfd_create("written")
    view = memoryview(paged.mapping)

    def write(page: int, content: bytes) -> Access:
        os.pwrite(source, content, 0)
        target = view[page * PAGE_SIZE : page * PAGE_SIZE + len(content)]
        return Access(lambda: os.preadv(source, [target], 0))

    yield write
    view.release()
    os.close(source)


ReadPage = Callable[[int], Access]
WritePage = Callable[[int, bytes], Access]


def test_the_handshake_grants_what_was_asked_and_can_be_repeated() -> None:
    with Userfaultfd.create() as uffd:
        assert not uffd.state.initialized
        granted = uffd.handshake()
        assert granted & REQUIRED_FEATURES == REQUIRED_FEATURES
        assert not granted & ~(REQUIRED_FEATURES | OPTIONAL_FEATURES)
        assert uffd.state.features == granted
        assert uffd.handshake() == granted


def test_a_feature_that_the_kernel_lacks_is_dropped_when_optional_and_named_when_required() -> None:
    unknown = Feature(1 << 60)
    with Userfaultfd.create() as uffd, pytest.raises(Unsupported, match="0x1000000000000000"):
        uffd.handshake(required=REQUIRED_FEATURES | unknown)
    with Userfaultfd.create() as uffd:
        assert uffd.handshake(optional=unknown) == REQUIRED_FEATURES


def test_a_missing_page_waits_for_its_copy(paged: Paged, read_page: ReadPage) -> None:
    access = read_page(3)
    assert paged.fault() == (3, 0)
    assert paged.uffd.state.total_faults == 1
    assert paged.copy(3, b"page") == PAGE_SIZE
    assert access.finish() == b"page"


def test_a_write_to_a_missing_page_says_so(paged: Paged, write_page: WritePage) -> None:
    access = write_page(4, b"new!")
    page, flags = paged.fault()
    assert (page, flags & FLAG_WRITE) == (4, FLAG_WRITE)
    paged.copy(4, b"old page")
    assert access.finish() == 4
    assert os.pread(paged.memfd, 8, 4 * PAGE_SIZE) == b"new!page"


def test_a_copy_onto_a_present_page_is_eexist(paged: Paged) -> None:
    assert paged.copy(0, b"a") == PAGE_SIZE
    assert paged.copy(0, b"b") == -errno.EEXIST
    assert os.pread(paged.memfd, 1, 0) == b"a"


def test_a_copy_over_a_present_page_in_the_middle_returns_the_bytes_before_it(paged: Paged) -> None:
    paged.copy(2, b"there")
    assert paged.copy(0, b"many", 8) == 2 * PAGE_SIZE
    assert os.pread(paged.memfd, 5, 2 * PAGE_SIZE) == b"there"


def test_a_copy_outside_of_the_registered_range_is_enoent(paged: Paged) -> None:
    address = paged.source.address
    assert paged.uffd.copy(address, address, PAGE_SIZE) == -errno.ENOENT


def test_a_copy_from_an_unmapped_address_is_efault(paged: Paged) -> None:
    assert paged.uffd.copy(paged.start, PAGE_SIZE, PAGE_SIZE) == -errno.EFAULT


def test_unaligned_arguments_are_einval(paged: Paged) -> None:
    assert paged.uffd.copy(paged.start + 1, paged.source.address, PAGE_SIZE) == -errno.EINVAL
    assert paged.uffd.wake(paged.start, 1) == -errno.EINVAL
    assert paged.uffd.write_protect(paged.start + 1, PAGE_SIZE, True) == -errno.EINVAL


def test_a_page_copied_write_protected_reports_its_first_write(
    paged: Paged, read_page: ReadPage, write_page: WritePage
) -> None:
    paged.copy(5, b"clean", write_protect=True)
    assert read_page(5).finish() == b"clea"
    access = write_page(5, b"D")
    page, flags = paged.fault()
    assert (page, flags & FLAG_WP) == (5, FLAG_WP)
    assert paged.uffd.write_protect(paged.address(5), PAGE_SIZE, False) == 0
    assert access.finish() == 1
    assert os.pread(paged.memfd, 5, 5 * PAGE_SIZE) == b"Dlean"


def test_unprotecting_without_waking_leaves_the_writer_until_it_is_woken(
    paged: Paged, write_page: WritePage
) -> None:
    paged.copy(6, b"clean", write_protect=True)
    access = write_page(6, b"D")
    paged.fault()
    paged.uffd.write_protect(paged.address(6), PAGE_SIZE, False, wake=False)
    assert paged.uffd.state.total_faults == 1
    paged.uffd.wake(paged.address(6), PAGE_SIZE)
    assert access.finish() == 1


def test_a_protected_page_that_is_punched_out_is_missing_on_the_next_access(
    paged: Paged, read_page: ReadPage
) -> None:
    paged.copy(7, b"first")
    paged.uffd.write_protect(paged.address(7), PAGE_SIZE, True)
    punch_hole(paged.memfd, 7 * PAGE_SIZE, PAGE_SIZE)
    access = read_page(7)
    page, flags = paged.fault()
    assert (page, flags & (FLAG_WP | FLAG_MINOR)) == (7, 0)
    paged.copy(7, b"again")
    assert access.finish() == b"agai"


def test_a_page_that_is_in_the_file_but_not_mapped_is_minor_and_continued(
    paged: Paged, read_page: ReadPage
) -> None:
    os.pwrite(paged.memfd, b"file", 8 * PAGE_SIZE)
    access = read_page(8)
    page, flags = paged.fault()
    assert (page, flags & FLAG_MINOR) == (8, FLAG_MINOR)
    assert paged.uffd.continue_(paged.address(8), PAGE_SIZE) == PAGE_SIZE
    assert access.finish() == b"file"


def test_continuing_a_hole_is_efault(paged: Paged) -> None:
    assert paged.uffd.continue_(paged.address(9), PAGE_SIZE) == -errno.EFAULT


def test_zeropage_fills_a_range_and_wakes(paged: Paged, read_page: ReadPage) -> None:
    access = read_page(11)
    paged.fault()
    assert paged.uffd.zeropage(paged.address(10), 4 * PAGE_SIZE) == 4 * PAGE_SIZE
    assert access.finish() == b"\0\0\0\0"
    assert paged.uffd.zeropage(paged.address(10), PAGE_SIZE) == -errno.EEXIST


def test_a_poisoned_page_fails_its_access_with_an_error(paged: Paged, read_page: ReadPage) -> None:
    if not paged.uffd.state.features & Feature.POISON:
        pytest.skip("this kernel has no UFFDIO_POISON")
    assert paged.uffd.poison(paged.address(12), PAGE_SIZE) == PAGE_SIZE

    def read() -> int | None:
        reader, writer = os.pipe()
        view = memoryview(paged.mapping)
        try:
            os.write(writer, view[12 * PAGE_SIZE : 12 * PAGE_SIZE + 4])
        except OSError as error:
            return error.errno
        finally:
            view.release()
            os.close(reader)
            os.close(writer)
        return None

    assert Access(read).finish() == errno.EFAULT


def test_sixty_four_events_come_with_one_read(paged: Paged) -> None:
    view = memoryview(paged.mapping)
    # A file for each, since writers of one wait for each other.
    sinks = [os.memfd_create("sink") for _ in range(70)]

    def write_first_byte(page: int, sink: int) -> Access:
        return Access(lambda: os.write(sink, view[page * PAGE_SIZE : page * PAGE_SIZE + 1]))

    threads = [write_first_byte(page, sink) for page, sink in enumerate(sinks)]
    while paged.uffd.state.pending_faults < 70:
        os.sched_yield()
    pages = {(address - paged.start) // PAGE_SIZE for _, _, address in paged.uffd.read_events()}
    assert len(pages) == 64
    pages |= {(address - paged.start) // PAGE_SIZE for _, _, address in paged.uffd.read_events()}
    assert pages == set(range(70))
    assert not paged.uffd.read_events()
    paged.copy(0, b"x", 64)
    paged.copy(64, b"x", 6)
    for thread in threads:
        thread.finish()
    view.release()
    for sink in sinks:
        os.close(sink)


def test_a_second_registration_is_ebusy(paged: Paged) -> None:
    with Userfaultfd.create() as other:
        other.handshake()
        with pytest.raises(OSError) as caught:
            other.register(paged.start, PAGE_SIZE, Mode.MISSING)
    assert caught.value.errno == errno.EBUSY


def test_unregistering_wakes_who_waits(paged: Paged, read_page: ReadPage) -> None:
    access = read_page(13)
    paged.fault()
    paged.uffd.unregister(paged.start, PAGES * PAGE_SIZE)
    assert access.finish() == b"\0\0\0\0"


def test_the_device_is_used_where_the_system_call_is_not_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EPERM, "not permitted")

    monkeypatch.setattr("farpage.kernel.userfaultfd.syscall", refuse)
    if not os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
        with pytest.raises(Unsupported, match=r"vm\.unprivileged_userfaultfd"):
            Userfaultfd.create()
        return
    with Userfaultfd.create() as uffd:
        assert uffd.handshake() & REQUIRED_FEATURES


@pytest.mark.parametrize("advice", [mmap.MADV_DONTNEED, mmap.MADV_REMOVE])
def test_a_remove_event_does_not_tell_pages_that_go_from_pages_that_stay(advice: int) -> None:
    """Why farpage asks for no EVENT_REMOVE: MADV_DONTNEED loses no shared memory, and is told too."""
    memfd = create_memfd("removed", 4 * PAGE_SIZE)
    mapping = mmap.mmap(memfd, 4 * PAGE_SIZE)
    start = address_of(mapping)
    mapping[:4] = b"kept"
    libc = ctypes.CDLL(None, use_errno=True)
    with Userfaultfd.create() as uffd:
        uffd.handshake(REQUIRED_FEATURES | Feature.EVENT_REMOVE)
        uffd.register(start, 4 * PAGE_SIZE, Mode.MISSING | Mode.WP | Mode.MINOR)
        remover = Access(lambda: libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(PAGE_SIZE), advice))
        assert wait_readable(uffd, 5)
        # Until the event is read, who removes waits, and so does everything else.
        assert uffd.write_protect(start, 4 * PAGE_SIZE, True) == -errno.EAGAIN
        ((event, removed, _),) = uffd.read_events()
        assert (event, removed - start) == (Event.REMOVE, 0)
        assert remover.finish() == 0
        assert os.pread(memfd, 4, 0) == (b"kept" if advice == mmap.MADV_DONTNEED else bytes(4))
        uffd.unregister(start, 4 * PAGE_SIZE)
    os.close(memfd)


def test_a_hole_that_is_punched_through_the_descriptor_raises_no_event() -> None:
    """As QEMU's balloon does it: EVENT_REMOVE would not tell of it either."""
    memfd = create_memfd("punched", 4 * PAGE_SIZE)
    mapping = mmap.mmap(memfd, 4 * PAGE_SIZE)
    start = address_of(mapping)
    mapping[:4] = b"gone"
    with Userfaultfd.create() as uffd:
        uffd.handshake(REQUIRED_FEATURES | Feature.EVENT_REMOVE)
        uffd.register(start, 4 * PAGE_SIZE, Mode.MISSING | Mode.WP | Mode.MINOR)
        punch_hole(memfd, 0, PAGE_SIZE)
        assert not uffd.read_events()
        uffd.unregister(start, 4 * PAGE_SIZE)
    os.close(memfd)
