# Memory that devices read and write directly, for compiled loops; `memory.py` has it for Python.

from libc.stdint cimport uint8_t, uintptr_t
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

cdef extern from "<sys/mman.h>" nogil:
    int MADV_HUGEPAGE
    int madvise(void *address, size_t length, int advice)

cdef enum:
    HUGE_PAGE = 2 << 20


cdef inline void *map_buffers(size_t size) noexcept nogil:
    """Map zeroed memory in huge pages, where the kernel has them; NULL where it has no memory. munmap(2) ends it.

    What is contiguous in memory is one segment for a device, and one page to pin.
    """
    cdef uint8_t *memory = <uint8_t *>mmap(
        NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0
    )
    cdef size_t before
    if memory == <uint8_t *>MAP_FAILED:
        return NULL
    before = -<uintptr_t>memory & (HUGE_PAGE - 1)
    if before:
        munmap(memory, before)
    munmap(memory + before + size, HUGE_PAGE - before)
    madvise(memory + before, size, MADV_HUGEPAGE)
    return memory + before
