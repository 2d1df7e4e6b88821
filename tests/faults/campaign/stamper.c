/*
 * Threads that use the pages of a memory at random, alone and in runs, and know what each of them must hold, as a shared
 * library for a process that has such a memory.
 *
 * Every word of a page is derived from the client, the page, its version and the word's place, and can be
 * taken apart again: a page of zeros, an older version, another page, another client's, one of two halves and a damaged
 * one are told apart. Version 0 is zeros. Each page belongs to one thread, which alone knows its version.
 *
 * Lines on the report descriptor, times in nanoseconds of CLOCK_MONOTONIC:
 *     stall THREAD PAGE r|w BEGIN END
 *     wrong THREAD PAGE KIND EXPECTED_VERSION FIRST_WRONG_WORD FOUND
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { WORDS = 512, MOST_THREADS = 8, PAGES_OF_ONE_THREAD = 8, LONGEST_RUN = 32 };
static const uint64_t STEPS[] = {1, 1, (uint64_t)-1, 7};
enum { MOST_CLIENTS = 0xFFFF, MOST_PAGES = 0x3FFFF, MOST_VERSIONS = 0x3FFFFF };

static const uint64_t STEP = 0xD1342543DE82EF95u;
static const uint64_t MARK = 0x5AULL << 56; /* no stamp is zero */

struct worker {
    pthread_t thread;
    int number;
    uint64_t random;
    uint64_t reads, writes, wrong; /* pages; read by others, hence atomic */
    uint64_t waiting_since;        /* begin of the access that is under way; 0: none */
};

static struct worker workers[MOST_THREADS];
static uint64_t (*memory)[WORDS];
static uint32_t *versions;
static uint64_t pages, client, stall_nanoseconds, nap_nanoseconds;
static int threads, report_descriptor, stopping;

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static uint64_t next_random(struct worker *self)
{
    self->random ^= self->random << 13;
    self->random ^= self->random >> 7;
    self->random ^= self->random << 17;
    return self->random;
}

/* 8 bits mark, 16 bits client, 18 bits page, 22 bits version. */
static uint64_t stamp(uint64_t page, uint32_t version)
{
    return MARK | (client & MOST_CLIENTS) << 40 | (page & MOST_PAGES) << 22 | (version & MOST_VERSIONS);
}

static uint64_t word_of(uint64_t page, uint32_t version, int place)
{
    return version ? stamp(page, version) + (uint64_t)place * STEP : 0;
}

static const char *kind_of(uint64_t page, uint32_t version, const uint64_t *found)
{
    uint64_t first = found[0], last = found[WORDS - 1] - (WORDS - 1) * STEP;
    int zeros = 1, same = 1;
    for (int place = 0; place < WORDS; place++) {
        zeros &= found[place] == 0;
        same &= found[place] == first + (uint64_t)place * STEP;
    }
    if (zeros)
        return "zeros";
    if (!same)
        return first >> 56 == 0x5A && last >> 56 == 0x5A && first != last ? "torn" : "damaged";
    if (first >> 56 != 0x5A)
        return "damaged";
    if ((first >> 40 & MOST_CLIENTS) != (client & MOST_CLIENTS))
        return "foreign_client";
    if ((first >> 22 & MOST_PAGES) != (page & MOST_PAGES))
        return "foreign_page";
    return (first & MOST_VERSIONS) < version ? "old" : "newer";
}

static int is_right(uint64_t page)
{
    const volatile uint64_t *words = memory[page];
    uint64_t difference = 0, expected = word_of(page, versions[page], 0), step = versions[page] ? STEP : 0;
    for (int place = 0; place < WORDS; place++, expected += step)
        difference |= words[place] ^ expected;
    return difference == 0;
}

static void tell_wrong(struct worker *self, uint64_t page)
{
    uint64_t found[WORDS];
    int place = 0;
    memcpy(found, memory[page], sizeof found);
    while (place < WORDS - 1 && found[place] == word_of(page, versions[page], place))
        place++;
    dprintf(report_descriptor, "wrong %d %lu %s %u %d %016lx\n", self->number, page,
            kind_of(page, versions[page], found), versions[page], place, found[place]);
    __atomic_add_fetch(&self->wrong, 1, __ATOMIC_RELAXED);
}

static void write_next(uint64_t page)
{
    volatile uint64_t *words = memory[page];
    uint32_t version = ++versions[page];
    uint64_t word = word_of(page, version, 0);
    for (int place = 0; place < WORDS; place++, word += STEP)
        words[place] = word;
}

static void use(struct worker *self, uint64_t page, int verifies, int writes)
{
    uint64_t begin = now(), end;
    __atomic_store_n(&self->waiting_since, begin, __ATOMIC_RELAXED);
    int right = !verifies || is_right(page);
    if (!right)
        tell_wrong(self, page);
    if (writes || !right) /* a wrong page is told of once */
        write_next(page);
    end = now();
    __atomic_store_n(&self->waiting_since, 0, __ATOMIC_RELAXED);
    if (verifies)
        __atomic_add_fetch(&self->reads, 1, __ATOMIC_RELAXED);
    if (writes)
        __atomic_add_fetch(&self->writes, 1, __ATOMIC_RELAXED);
    if (end - begin >= stall_nanoseconds)
        dprintf(report_descriptor, "stall %d %lu %c %lu %lu\n", self->number, page, verifies ? 'r' : 'w', begin, end);
}

static int owns(const struct worker *self, uint64_t page)
{
    return (int)(page / PAGES_OF_ONE_THREAD % (uint64_t)threads) == self->number;
}

static void *work(void *argument)
{
    struct worker *self = argument;
    struct timespec nap = {.tv_nsec = (long)nap_nanoseconds};
    while (!__atomic_load_n(&stopping, __ATOMIC_ACQUIRE)) {
        uint64_t dice = next_random(self), first = (dice >> 8) % pages;
        uint64_t length = dice & 1 ? 1 : 1 + (dice >> 1) % LONGEST_RUN;
        int verifies = dice >> 40 & 3 ? 1 : 0; /* one run of four is written without having been read */
        int writes = !verifies || (dice >> 42 & 1);
        uint64_t step = STEPS[dice >> 43 & 3]; /* below the first page the number gets large */
        for (uint64_t page = first; length-- && page < pages; page += step)
            if (owns(self, page) && !__atomic_load_n(&stopping, __ATOMIC_RELAXED))
                use(self, page, verifies, writes);
        nanosleep(&nap, NULL);
    }
    return NULL;
}

/* Start `count` threads on `page_count` pages at `address`; returns 0, or -1 without having started any. */
int stamper_start(void *address, uint64_t page_count, int client_number, int count, uint64_t seed, int descriptor,
                  uint64_t stall_ns, uint64_t nap_ns)
{
    if (!page_count || page_count > MOST_PAGES || count < 1 || count > MOST_THREADS || nap_ns >= 1000000000u)
        return -1;
    memory = address;
    pages = page_count;
    client = (uint64_t)client_number;
    threads = count;
    report_descriptor = descriptor;
    stall_nanoseconds = stall_ns;
    nap_nanoseconds = nap_ns;
    versions = calloc(pages, sizeof *versions);
    if (!versions)
        return -1;
    for (int number = 0; number < threads; number++) {
        workers[number].number = number;
        workers[number].random = (seed + 1) * 0x9E3779B97F4A7C15u + (uint64_t)number * STEP;
        if (pthread_create(&workers[number].thread, NULL, work, &workers[number]))
            abort();
    }
    return 0;
}

/* Put reads, writes and wrong pages so far into `counts`, and the begin of the oldest access under way, or 0. */
void stamper_counts(uint64_t counts[4])
{
    memset(counts, 0, 4 * sizeof *counts);
    for (int number = 0; number < threads; number++) {
        counts[0] += __atomic_load_n(&workers[number].reads, __ATOMIC_RELAXED);
        counts[1] += __atomic_load_n(&workers[number].writes, __ATOMIC_RELAXED);
        counts[2] += __atomic_load_n(&workers[number].wrong, __ATOMIC_RELAXED);
        uint64_t since = __atomic_load_n(&workers[number].waiting_since, __ATOMIC_RELAXED);
        if (since && (!counts[3] || since < counts[3]))
            counts[3] = since;
    }
}

/* Ask the threads to end, after the access that each is in. */
void stamper_stop(void)
{
    __atomic_store_n(&stopping, 1, __ATOMIC_RELEASE);
}

/* Wait for the threads. */
void stamper_join(void)
{
    for (int number = 0; number < threads; number++)
        pthread_join(workers[number].thread, NULL);
}

/* Verify every page, after the threads have ended. */
void stamper_verify(void)
{
    for (uint64_t page = 0; page < pages; page++)
        use(&workers[page / PAGES_OF_ONE_THREAD % (uint64_t)threads], page, 1, 0);
}
