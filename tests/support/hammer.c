/*
 * A process of several threads that use the pages of a shared memfd at random and notice every lost, old or
 * foreign byte. `hammer PAGES THREADS [nap]`; with "nap" the threads leave the processor to others most of the time.
 *
 * Word 0 of a page counts the touches of all threads, word 1 + t those of thread t, the others hold what
 * was written there first. Each thread keeps its own tally beside the memory.
 *
 * Prints "ready". Answers each line on standard input: "check" stops all threads, compares every byte, prints
 * "touches N wrong N" and lets them go on; "quit" does the same and ends.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { WORDS = 512, MOST_THREADS = 16, TOUCHES_A_TURN = 64 };

static uint64_t (*memory)[WORDS];
static uint64_t *tallies; /* of thread t and page p at t * pages + p */
static size_t pages;
static int threads;
static int naps;
static uint64_t wrong;
static pthread_mutex_t turns[MOST_THREADS];

static uint64_t constant(size_t page, int word)
{
    return (page + 1) * 0x9E3779B97F4A7C15u + (uint64_t)word * 0xC2B2AE3D27D4EB4Fu;
}

static void touch(int thread, size_t page, int word)
{
    uint64_t *content = memory[page];
    uint64_t *tally = &tallies[(size_t)thread * pages + page];
    if (content[1 + thread] != *tally || content[word] != constant(page, word))
        __atomic_add_fetch(&wrong, 1, __ATOMIC_RELAXED);
    content[1 + thread] = ++*tally;
    __atomic_add_fetch(&content[0], 1, __ATOMIC_RELAXED);
}

static void *hammer(void *number)
{
    int thread = (int)(intptr_t)number;
    uint64_t random = 88172645463325252u + (uint64_t)thread;
    struct timespec nap = {.tv_nsec = 2000000};
    for (;;) {
        pthread_mutex_lock(&turns[thread]);
        for (int i = 0; i < TOUCHES_A_TURN; i++) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            touch(thread, random % pages, 1 + MOST_THREADS + (int)((random >> 32) % (WORDS - 1 - MOST_THREADS)));
        }
        pthread_mutex_unlock(&turns[thread]);
        if (naps)
            nanosleep(&nap, NULL);
        else
            sched_yield();
    }
    return NULL;
}

static uint64_t check_page(size_t page)
{
    const uint64_t *content = memory[page];
    uint64_t touches = 0;
    int good = 1;
    for (int thread = 0; thread < threads; thread++) {
        uint64_t tally = tallies[(size_t)thread * pages + page];
        good &= content[1 + thread] == tally;
        touches += tally;
    }
    good &= content[0] == touches;
    for (int word = 1 + MOST_THREADS; word < WORDS; word++)
        good &= content[word] == constant(page, word);
    wrong += !good;
    return touches;
}

static void check(void)
{
    uint64_t touches = 0;
    for (int thread = 0; thread < threads; thread++)
        pthread_mutex_lock(&turns[thread]);
    for (size_t page = 0; page < pages; page++)
        touches += check_page(page);
    printf("touches %lu wrong %lu\n", touches, wrong);
    fflush(stdout);
    for (int thread = 0; thread < threads; thread++)
        pthread_mutex_unlock(&turns[thread]);
}

int main(int count, char **arguments)
{
    if (count < 3)
        return 2;
    pages = strtoul(arguments[1], NULL, 10);
    threads = atoi(arguments[2]);
    naps = count > 3 && !strcmp(arguments[3], "nap");
    if (!pages || threads < 1 || threads > MOST_THREADS)
        return 2;
    int file = memfd_create("ram", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, (off_t)(pages * sizeof *memory)))
        return 2;
    memory = mmap(NULL, pages * sizeof *memory, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    tallies = calloc((size_t)threads * pages, sizeof *tallies);
    if (memory == MAP_FAILED || !tallies)
        return 2;
    for (size_t page = 0; page < pages; page++)
        for (int word = 1 + MOST_THREADS; word < WORDS; word++)
            memory[page][word] = constant(page, word);
    for (int thread = 0; thread < threads; thread++) {
        pthread_t unused;
        pthread_mutex_init(&turns[thread], NULL);
        if (pthread_create(&unused, NULL, hammer, (void *)(intptr_t)thread))
            return 2;
    }
    printf("ready\n");
    fflush(stdout);
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        check();
        if (!strcmp(line, "quit\n"))
            break;
    }
    _exit(wrong != 0);
}
