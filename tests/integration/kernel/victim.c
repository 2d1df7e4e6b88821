/*
 * A process that notices whatever an injected system call could change: threads in restartable system calls and
 * in computations, counted signals, an ignored SIGTRAP, blocked signals.
 * Prints "THREAD NAME" lines, then "ready"; after a byte on standard input "signals=N failures=N".
 * With the argument "filtered" it is killed for userfaultfd(2), by a seccomp filter.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <math.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static atomic_int failures, signals, quit, started;
static uint32_t futex_word;
static int quiet_pipe[2];

static void fail(const char *where, long result)
{
    fprintf(stderr, "%s: result %ld, errno %d\n", where, result, errno);
    failures++;
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

static void count_signal(int number)
{
    (void)number;
    signals++;
}

static void announce(const char *name)
{
    printf("%ld %s\n", syscall(SYS_gettid), name);
    fflush(stdout);
    started++;
}

static void check_mask(const sigset_t *before, const char *where)
{
    sigset_t after;
    pthread_sigmask(SIG_SETMASK, NULL, &after);
    for (int number = 1; number < 64; number++)
        if (sigismember(before, number) != sigismember(&after, number))
            fail(where, number);
}

static void *read_loop(void *unused)
{
    (void)unused;
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    announce("read");
    char byte;
    long result = read(STDIN_FILENO, &byte, 1);
    if (result != 1)
        fail("read", result);
    check_mask(&mask, "mask of read");
    quit = 1;
    futex_word = 1;
    syscall(SYS_futex, &futex_word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
    return NULL;
}

static void *futex_loop(void *unused)
{
    (void)unused;
    announce("futex");
    long result = syscall(SYS_futex, &futex_word, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
    /* EAGAIN: it was stopped while the word changed, and the call, made again, sees that. */
    if ((result != 0 && errno != EAGAIN) || !quit)
        fail("futex", result);
    return NULL;
}

static void *sleep_loop(void *unused)
{
    (void)unused;
    announce("nanosleep");
    while (!quit) {
        struct timespec time = {.tv_nsec = 50000000};
        double begin = now();
        long result = nanosleep(&time, NULL);
        double seconds = now() - begin;
        if (result != 0 || seconds < 0.05)
            fail("nanosleep", result);
    }
    return NULL;
}

static void *poll_loop(void *unused)
{
    (void)unused;
    announce("poll");
    while (!quit) {
        struct pollfd file = {.fd = quiet_pipe[0], .events = POLLIN};
        double begin = now();
        int result = poll(&file, 1, 50);
        if (result != 0 || now() - begin < 0.05)
            fail("poll", result);
    }
    return NULL;
}

static uint64_t integers(void)
{
    uint64_t value = 88172645463325252u;
    for (int i = 0; i < 20000; i++) {
        value ^= value << 13;
        value ^= value >> 7;
        value ^= value << 17;
    }
    return value;
}

static double reals(void)
{
    double value = 0.5;
    for (int i = 0; i < 20000; i++)
        value = 3.9 * value * (1 - value);
    return value;
}

static void *compute_loop(void *unused)
{
    (void)unused;
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    uint64_t expected_integer = integers();
    double expected_real = reals();
    announce("compute");
    while (!quit)
        if (integers() != expected_integer || reals() != expected_real)
            fail("compute", 0);
    return NULL;
}

static void refuse_userfaultfd(void)
{
    struct sock_filter program[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog filter = {.len = sizeof program / sizeof *program, .filter = program};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter))
        fail("seccomp", -1);
}

int main(int argument_count, char **arguments)
{
    void *(*loops[])(void *) = {read_loop, futex_loop, sleep_loop, poll_loop, compute_loop};
    enum { LOOPS = sizeof loops / sizeof *loops };
    pthread_t threads[LOOPS];
    if (pipe(quiet_pipe))
        return 2;
    if (argument_count > 1 && !strcmp(arguments[1], "filtered"))
        refuse_userfaultfd();
    signal(SIGTRAP, SIG_IGN);

    /* Signals are for the main thread alone, so that the others may expect to be undisturbed. */
    sigset_t counted;
    sigemptyset(&counted);
    sigaddset(&counted, SIGRTMIN);
    pthread_sigmask(SIG_BLOCK, &counted, NULL);
    for (int i = 0; i < LOOPS; i++)
        pthread_create(&threads[i], NULL, loops[i], NULL);
    while (started < LOOPS)
        sched_yield();
    struct sigaction action = {.sa_handler = count_signal, .sa_flags = SA_RESTART};
    sigaction(SIGRTMIN, &action, NULL);
    pthread_sigmask(SIG_UNBLOCK, &counted, NULL);
    announce("signals");
    printf("ready\n");
    fflush(stdout);

    for (int i = 0; i < LOOPS; i++)
        pthread_join(threads[i], NULL);
    sigaction(SIGTRAP, NULL, &action);
    if (action.sa_handler != SIG_IGN)
        fail("disposition of SIGTRAP", 0);
    printf("signals=%d failures=%d\n", signals, failures);
    return failures != 0;
}
