/*
 * A process whose memory is paged, the same for every contender: it touches pages, takes the time of each
 * touch, and checks what it finds.
 *
 *   touch anonymous|shared|file|file-random MEMORY_MIB SEED
 *
 * `anonymous` is private memory without huge pages, which host swap pages; `shared` is a memfd, which farpage
 * pages; `file` is a file without a name in the working directory, with all of its blocks, mapped MAP_SHARED, and
 * `file-random` the same with MADV_RANDOM, for which the kernel reads nothing ahead. Everything but that memory is
 * allocated and locked before the first answer, so a memory cgroup that the process is moved into after it is
 * charged for the memory alone.
 *
 * Commands on stdin, each answered by one line of JSON on stdout:
 *
 *   populate                                              write every page for the first time, in order
 *   populate compressible                                 the same with pages that LZ4 makes half as large
 *   run sequential WRITE_PERCENT THREADS SECONDS          one sweep, the threads side by side
 *   run strided WRITE_PERCENT THREADS SECONDS             every 7th page, then every 7th from the next one on,
 *                                                         and so on, until the time is over
 *   run random WRITE_PERCENT THREADS SECONDS              pages drawn uniformly, until the time is over
 *   run zipf WRITE_PERCENT THREADS SECONDS                pages drawn with Zipf's law of exponent 0.99
 *   trace FILE                                            from the next phase on, append every wait to a file;
 *                                                         not answered
 *
 * A wait in that file is two 64-bit numbers: when it ended, by CLOCK_MONOTONIC, and how long it took, in
 * nanoseconds; those of one thread are in their order.
 *
 * It ends at the end of stdin. A phase also ends when a thread has taken CAPACITY times.
 *
 * A touch is one load or store of a page's first word. Before each, mincore(2) tells whether the page is in
 * memory (mapped, or in the swap cache or page cache), so that touches that had to wait for a page
 * are told from the others without a threshold on their latency. After each, the whole page is compared with
 * what it must hold: its number and version at both ends, in between words that depend on the number, which are
 * incompressible, or the same in every other half kibibyte. Neither is part of a latency; both are part of the touches per second, equally for everybody.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define PAGE_BYTES 4096
#define WORDS (PAGE_BYTES / sizeof(uint64_t))
#define THREADS_MAX 16
#define CAPACITY (1u << 19)
#define WRONG_SHOWN_MAX 5

#define STRIDE 7
#define PRIME 2654435761u
#define EXPONENT 0.99

enum pattern { POPULATE, SEQUENTIAL, STRIDED, RANDOM, ZIPF };
static const char *const names[] = {"populate", "sequential", "strided", "random", "zipf"};

/* A thread's times in nanoseconds: of touches that waited for a page from the front, of others from the back. */
struct worker {
    uint64_t random_state;
    uint64_t wrong_pages;
    uint32_t *times;
    uint64_t *ends; /* of the waits, where they are traced */
    uint32_t waited, present;
    unsigned number;
    pthread_t thread;
};

static struct {
    enum pattern pattern;
    const char *name;
    unsigned threads, write_percent;
    uint64_t end_ns;
} phase;

static struct worker workers[THREADS_MAX];
static uint64_t (*memory)[WORDS];
static size_t pages;
static uint32_t *versions; /* of every page; a page belongs to one thread in a phase, so nothing races */
static uint32_t *merged;
static uint64_t seed;
static bool compressible, scattered;
static struct { size_t ranks; double zeta, power, eta; } zipf;
static FILE *trace;
static volatile uint64_t sink;

static void fail(const char *what)
{
    fprintf(stderr, "touch: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* The finalizer of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators). */
static inline uint64_t mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static uint64_t next_random(struct worker *worker)
{
    return mix(worker->random_state += 0x9e3779b97f4a7c15u);
}

/* Both ends of a page. Never zero, so that a page of zeros is found to be wrong. */
static inline uint64_t stamp(size_t page, uint32_t version)
{
    return ((uint64_t)page + 1) << 32 | version;
}

static inline uint64_t filler(size_t page, size_t word)
{
    if (compressible && word & 64)
        word = 0;
    uint64_t x = (page * WORDS + word + 1) * 0x9e3779b97f4a7c15u;
    return (x ^ (x >> 32)) * 0xbf58476d1ce4e5b9u;
}

static void fill(size_t page)
{
    for (size_t word = 1; word < WORDS - 1; word++)
        memory[page][word] = filler(page, word);
    memory[page][WORDS - 1] = stamp(page, 0);
}

static void check(struct worker *worker, size_t page, uint64_t first)
{
    uint64_t expected = stamp(page, versions[page]);
    uint64_t difference = (first ^ expected) | (memory[page][WORDS - 1] ^ expected);
    for (size_t word = 1; word < WORDS - 1; word++)
        difference |= memory[page][word] ^ filler(page, word);
    if (!difference)
        return;
    if (worker->wrong_pages++ < WRONG_SHOWN_MAX)
        fprintf(stderr, "touch: page %zu is wrong: begins with %#llx, ends with %#llx, both must be %#llx\n", page,
                (unsigned long long)first, (unsigned long long)memory[page][WORDS - 1], (unsigned long long)expected);
}

static bool in_memory(size_t page)
{
    unsigned char resident;
    if (mincore(memory[page], PAGE_BYTES, &resident))
        fail("mincore");
    return resident & 1;
}

/* Takes one touch's time; returns the time of its end. */
static uint64_t touch(struct worker *worker, size_t page, bool write)
{
    volatile uint64_t *word = memory[page];
    uint64_t expected = stamp(page, versions[page]), found = expected, began, ended;
    bool waits = !in_memory(page);
    if (write) {
        began = now_ns();
        *word = expected + (phase.pattern != POPULATE);
        ended = now_ns();
    } else {
        began = now_ns();
        found = *word;
        ended = now_ns();
    }
    uint32_t taken = ended - began < UINT32_MAX ? (uint32_t)(ended - began) : UINT32_MAX;
    if (waits && worker->ends)
        worker->ends[worker->waited] = ended;
    if (waits)
        worker->times[worker->waited++] = taken;
    else
        worker->times[CAPACITY - ++worker->present] = taken;
    if (phase.pattern == POPULATE) {
        fill(page);
        return ended;
    }
    check(worker, page, found);
    if (write) {
        versions[page]++;
        memory[page][WORDS - 1] = stamp(page, versions[page]);
    }
    return ended;
}

/* Zipf's law over `ranks`: Gray et al., Quickly generating billion-record synthetic databases (SIGMOD 1994). */
static void prepare_zipf(size_t ranks)
{
    if (zipf.ranks == ranks)
        return;
    zipf.ranks = ranks;
    zipf.zeta = 0;
    for (size_t rank = 1; rank <= ranks; rank++)
        zipf.zeta += pow((double)rank, -EXPONENT);
    zipf.power = 1 / (1 - EXPONENT);
    zipf.eta = (1 - pow(2.0 / (double)ranks, 1 - EXPONENT)) / (1 - (1 + pow(0.5, EXPONENT)) / zipf.zeta);
}

/* Ranks are spread over the memory: neighbours in rank are none in memory. */
static size_t zipf_index(uint64_t random)
{
    double u = (double)(random >> 11) * 0x1p-53, uz = u * zipf.zeta;
    size_t rank = 0;
    if (uz >= 1)
        rank = uz < 1 + pow(0.5, EXPONENT) ? 1 : (size_t)((double)zipf.ranks * pow(zipf.eta * u - zipf.eta + 1, zipf.power));
    return rank % zipf.ranks * PRIME % zipf.ranks;
}

static void *work(void *argument)
{
    struct worker *worker = argument;
    size_t share = pages / phase.threads;
    size_t first = share * worker->number;
    size_t end = worker->number + 1 == phase.threads ? pages : first + share;
    size_t lap = share / STRIDE;
    uint64_t now = 0;
    for (size_t step = 0; worker->waited + worker->present < CAPACITY && now < phase.end_ns; step++) {
        uint64_t random = next_random(worker);
        bool write = phase.pattern == POPULATE || random % 100 < phase.write_percent;
        size_t page = first + step;
        if (phase.pattern == POPULATE && scattered && step < pages)
            page = step * PRIME % pages; /* every page once */
        if (phase.pattern == RANDOM)
            page = (random >> 16) % share * phase.threads + worker->number;
        else if (phase.pattern == ZIPF)
            page = zipf_index(next_random(worker)) * phase.threads + worker->number;
        else if (phase.pattern == STRIDED)
            page = first + (step % lap * STRIDE + step / lap % STRIDE);
        else if (page == end)
            break;
        now = touch(worker, page, write);
    }
    return NULL;
}

static int compare(const void *left, const void *right)
{
    uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;
    return (a > b) - (a < b);
}

static void print_times(const char *name, size_t count)
{
    qsort(merged, count, sizeof *merged, compare);
    double sum = 0;
    for (size_t i = 0; i < count; i++)
        sum += merged[i];
    printf(", \"%s\": {\"count\": %zu", name, count);
    if (count)
        printf(", \"mean_us\": %.2f, \"p50_us\": %.2f, \"p99_us\": %.2f, \"p999_us\": %.2f, \"longest_us\": %.2f",
               sum / count / 1e3, merged[count / 2] / 1e3, merged[count * 99 / 100] / 1e3,
               merged[count * 999 / 1000] / 1e3, merged[count - 1] / 1e3);
    printf("}");
}

static void print_phase(double seconds, long major_faults)
{
    size_t waited = 0, present = 0;
    uint64_t wrong = 0;
    for (unsigned i = 0; i < phase.threads; i++)
        wrong += workers[i].wrong_pages;
    printf("{\"phase\": \"%s\", \"write_percent\": %u, \"threads\": %u, \"seconds\": %.6f, \"wrong_pages\": %llu, "
           "\"major_faults\": %ld",
           phase.name, phase.write_percent, phase.threads, seconds, (unsigned long long)wrong, major_faults);
    for (unsigned i = 0; i < phase.threads; i++) {
        memcpy(merged + waited, workers[i].times, workers[i].waited * sizeof *merged);
        waited += workers[i].waited;
    }
    print_times("waited", waited);
    for (unsigned i = 0; i < phase.threads; i++) {
        memcpy(merged + present, workers[i].times + CAPACITY - workers[i].present,
               workers[i].present * sizeof *merged);
        present += workers[i].present;
    }
    print_times("present", present);
    for (unsigned i = 0; i < phase.threads; i++) {
        memcpy(merged + present, workers[i].times, workers[i].waited * sizeof *merged);
        present += workers[i].waited;
    }
    print_times("all", present);
    printf("}\n");
    fflush(stdout);
}

static void *allocate(size_t bytes)
{
    void *got = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (got == MAP_FAILED)
        fail("mmap");
    return got;
}

static void begin_trace(const char *path)
{
    trace = fopen(path, "a");
    if (!trace)
        fail(path);
    for (unsigned i = 0; i < THREADS_MAX; i++)
        workers[i].ends = allocate(CAPACITY * sizeof *workers[i].ends);
}

static void write_trace(const struct worker *worker)
{
    for (uint32_t i = 0; i < worker->waited; i++) {
        uint64_t wait[2] = {worker->ends[i], worker->times[i]};
        if (fwrite(wait, sizeof wait, 1, trace) != 1)
            fail("the trace");
    }
}

static void run_phase(double seconds)
{
    struct rusage before, after;
    getrusage(RUSAGE_SELF, &before);
    uint64_t began = now_ns();
    phase.end_ns = began + (uint64_t)(seconds * 1e9);
    for (unsigned i = 0; i < phase.threads; i++) {
        workers[i].wrong_pages = workers[i].waited = workers[i].present = 0;
        workers[i].random_state = mix(++seed);
        errno = pthread_create(&workers[i].thread, NULL, work, &workers[i]);
        if (errno)
            fail("pthread_create");
    }
    for (unsigned i = 0; i < phase.threads; i++)
        pthread_join(workers[i].thread, NULL);
    double taken = (double)(now_ns() - began) / 1e9;
    getrusage(RUSAGE_SELF, &after);
    for (unsigned i = 0; trace && i < phase.threads; i++)
        write_trace(&workers[i]);
    if (trace && fflush(trace))
        fail("the trace");
    print_phase(taken, after.ru_majflt - before.ru_majflt);
}

static void obey(const char *line)
{
    char pattern[16], path[256];
    double seconds;
    if (sscanf(line, "trace %255s", path) == 1) {
        begin_trace(path);
        return;
    }
    phase.name = "populate";
    phase.pattern = POPULATE;
    phase.threads = 1;
    phase.write_percent = 100;
    if (!strncmp(line, "populate", strlen("populate"))) {
        compressible = !strcmp(line, "populate compressible\n");
        scattered = !strcmp(line, "populate scattered\n");
        run_phase(3600);
        return;
    }
    bool read = sscanf(line, "run %15s %u %u %lf", pattern, &phase.write_percent, &phase.threads, &seconds) == 4;
    for (phase.pattern = ZIPF; phase.pattern > SEQUENTIAL && strcmp(pattern, names[phase.pattern]);)
        phase.pattern--;
    phase.name = names[phase.pattern];
    if (!read || strcmp(pattern, phase.name) || phase.threads < 1 || phase.threads > THREADS_MAX) {
        fprintf(stderr, "touch: not a command: %s", line);
        exit(2);
    }
    if (phase.pattern == ZIPF)
        prepare_zipf(pages / phase.threads);
    run_phase(seconds);
}

enum kind { ANONYMOUS, SHARED, MAPPED, MAPPED_RANDOM, KINDS };
static const char *const kinds[] = {"anonymous", "shared", "file", "file-random"};

static enum kind kind_of(const char *name)
{
    enum kind kind = ANONYMOUS;
    while (kind < KINDS && strcmp(name, kinds[kind]))
        kind++;
    return kind;
}

static void map_memory(enum kind kind)
{
    int descriptor = -1;
    if (kind == SHARED) {
        descriptor = memfd_create("touched", MFD_CLOEXEC);
        if (descriptor < 0 || ftruncate(descriptor, (off_t)(pages * PAGE_BYTES)))
            fail("memfd_create");
    } else if (kind != ANONYMOUS) {
        descriptor = open(".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
        if (descriptor < 0)
            fail("a file without a name in the working directory");
        errno = posix_fallocate(descriptor, 0, (off_t)(pages * PAGE_BYTES));
        if (errno)
            fail("posix_fallocate");
    }
    int flags = kind == ANONYMOUS ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
    memory = mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE, flags, descriptor, 0);
    if (memory == MAP_FAILED)
        fail("mmap");
    madvise(memory, pages * PAGE_BYTES, MADV_NOHUGEPAGE);
    if (kind == MAPPED_RANDOM && madvise(memory, pages * PAGE_BYTES, MADV_RANDOM))
        fail("MADV_RANDOM");
}

int main(int count, char **arguments)
{
    size_t mebibytes = count == 4 ? strtoul(arguments[2], NULL, 10) : 0;
    enum kind kind = mebibytes ? kind_of(arguments[1]) : KINDS;
    if (kind == KINDS) {
        fprintf(stderr, "usage: touch anonymous|shared|file|file-random MEMORY_MIB SEED\n");
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    seed = strtoull(arguments[3], NULL, 10) << 32;
    pages = mebibytes * (1048576 / PAGE_BYTES);
    versions = allocate(pages * sizeof *versions);
    merged = allocate(THREADS_MAX * (size_t)CAPACITY * sizeof *merged);
    for (unsigned i = 0; i < THREADS_MAX; i++) {
        workers[i].number = i;
        workers[i].times = allocate(CAPACITY * sizeof *workers[i].times);
    }
    if (mlockall(MCL_CURRENT))
        fprintf(stderr, "touch: mlockall: %s: the latencies' own memory may be paged\n", strerror(errno));
    map_memory(kind);
    printf("{\"pid\": %d, \"pages\": %zu}\n", getpid(), pages);
    fflush(stdout);
    char line[512];
    while (fgets(line, sizeof line, stdin))
        obey(line);
    return 0;
}
