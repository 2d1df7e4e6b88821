# What compiled loops use of the kernel's headers: userfaultfd(2), io_uring(7), epoll(7), fallocate(2); and of gcc's
# built-in functions. Structures have only the fields that are used.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<linux/userfaultfd.h>" nogil:
    cdef struct _pagefault:
        uint64_t flags
        uint64_t address
    cdef union _argument:
        _pagefault pagefault
    cdef struct uffd_msg:
        uint8_t event
        _argument arg
    cdef struct uffdio_range:
        uint64_t start
        uint64_t len
    cdef struct uffdio_copy:
        uint64_t dst
        uint64_t src
        uint64_t len
        uint64_t mode
        int64_t copy
    cdef struct uffdio_zeropage:
        uffdio_range range
        uint64_t mode
        int64_t zeropage
    cdef struct uffdio_writeprotect:
        uffdio_range range
        uint64_t mode
    unsigned long UFFDIO_COPY, UFFDIO_WRITEPROTECT, UFFDIO_ZEROPAGE
    uint64_t UFFDIO_COPY_MODE_WP, UFFDIO_WRITEPROTECT_MODE_WP
    uint64_t UFFD_PAGEFAULT_FLAG_WRITE, UFFD_PAGEFAULT_FLAG_WP, UFFD_PAGEFAULT_FLAG_MINOR

cdef extern from "<linux/io_uring.h>" nogil:
    cdef struct io_uring_sqe:
        uint8_t opcode
        uint8_t flags
        int32_t fd
        uint64_t off
        uint64_t addr
        uint32_t len
        uint64_t user_data
        uint16_t buf_index
    cdef struct io_uring_cqe:
        uint64_t user_data
        int32_t res
        uint32_t flags
    uint8_t IORING_OP_READ, IORING_OP_READ_FIXED, IOSQE_FIXED_FILE

cdef extern from "<sys/epoll.h>" nogil:
    cdef union epoll_data_t:
        int fd
    cdef struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_wait(int epfd, epoll_event *events, int maxevents, int timeout)
    uint32_t EPOLLIN

cdef extern from "<fcntl.h>" nogil:
    int fallocate(int fd, int mode, int64_t offset, int64_t length)

cdef extern from "<linux/falloc.h>" nogil:
    int FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_io_uring_enter

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)

cdef extern from *:
    """
    #define load_acquire(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define store_release(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define bit_length(v) ((v) ? 64 - __builtin_clzll(v) : 0)
    #define lowest_bit(v) __builtin_ctzll(v)
    #define count_bits(v) __builtin_popcountll(v)
    #define relax() __builtin_ia32_pause()
    """
    uint32_t load_acquire(uint32_t *p) nogil
    void store_release(uint32_t *p, uint32_t v) nogil
    int bit_length(uint64_t v) nogil
    int lowest_bit(uint64_t v) nogil
    int count_bits(uint64_t v) nogil
    void relax() nogil
