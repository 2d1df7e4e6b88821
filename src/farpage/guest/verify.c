/*
 * The guest's init: fills memory with checked data and verifies it for ever, or runs a list of commands.
 *
 * Options are on the kernel's command line: farpage.fill_mib, farpage.rewrite_percent, farpage.passes (0: endless).
 * Reports are lines on the serial console that begin with "farpage-guest". A file /commands makes
 * it run the lines of that file instead, each with a shell.
 *
 * Every 8-byte word of every page depends on the page's number, its version and the word's place, so that
 * a page of zeros, an old version, another page or a shifted one is noticed.
 */
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    PAGE_BYTES = 4096,
    WORDS = PAGE_BYTES / 8,
    PROGRESS_PER_PASS = 8,
    WRONG_WORDS_SHOWN = 8,
    /* Pages are rewritten in runs, as programs write. */
    RUN_PAGES = 16,
};

static char command_line[4096];

static void report(const char *format, ...)
{
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    int length = snprintf(line, sizeof line, "farpage-guest ");
    length += vsnprintf(line + length, sizeof line - length - 1, format, arguments);
    va_end(arguments);
    line[length++] = '\n';
    /* One write a line, so that the kernel's messages do not get into the middle of one. */
    for (int done = 0; done < length;) {
        ssize_t written = write(STDOUT_FILENO, line + done, length - done);
        if (written <= 0)
            return;
        done += written;
    }
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

/* A system call for each page would cost more than verifying it does under emulation. */
static inline uint64_t ticks(void)
{
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}

static long option(const char *name, long otherwise)
{
    char *found = strstr(command_line, name);
    return found ? strtol(found + strlen(name), NULL, 10) : otherwise;
}

static uint64_t mix(uint64_t value)
{
    value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9u;
    value = (value ^ value >> 27) * 0x94d049bb133111ebu;
    return value ^ value >> 31;
}

static inline uint64_t first_word(uint64_t page, uint32_t version)
{
    return mix(page * 0x9e3779b97f4a7c15u + version + 1);
}

static const uint64_t word_step = 0xd1342543de82ef95u;

static void write_page(uint64_t *words, uint64_t page, uint32_t version)
{
    uint64_t expected = first_word(page, version);
    for (int i = 0; i < WORDS; i++, expected += word_step)
        words[i] = expected;
}

static int page_is_wrong(const uint64_t *words, uint64_t page, uint32_t version)
{
    uint64_t expected = first_word(page, version), difference = 0;
    for (int i = 0; i < WORDS; i++, expected += word_step)
        difference |= words[i] ^ expected;
    return difference != 0;
}

static void show_wrong_page(const uint64_t *words, uint64_t page, uint32_t version)
{
    static int shown;
    uint64_t expected = first_word(page, version);
    for (int i = 0; i < WORDS && shown < WRONG_WORDS_SHOWN; i++, expected += word_step)
        if (words[i] != expected) {
            shown++;
            report("wrong page=%llu version=%u word=%d expected=%016llx found=%016llx",
                   (unsigned long long)page, version, i,
                   (unsigned long long)expected, (unsigned long long)words[i]);
        }
}

struct memory {
    uint64_t *words;
    uint32_t *versions;
    uint64_t pages;
};

static unsigned long verify_pass(struct memory *memory, long pass, long rewrite_percent)
{
    unsigned long wrong = 0, rewritten = 0;
    uint64_t longest = 0, first = ticks(), last = first;
    uint64_t progress_pages = memory->pages / PROGRESS_PER_PASS;
    double begin = now();
    for (uint64_t page = 0; page < memory->pages; page++) {
        uint64_t *words = memory->words + page * WORDS;
        if (page_is_wrong(words, page, memory->versions[page])) {
            wrong++;
            show_wrong_page(words, page, memory->versions[page]);
        }
        if ((long)((page / RUN_PAGES * 25 + pass * 25) % 100) < rewrite_percent) {
            memory->versions[page]++;
            write_page(words, page, memory->versions[page]);
            rewritten++;
        }
        uint64_t time = ticks();
        if (time - last > longest)
            longest = time - last;
        last = time;
        if (progress_pages && (page + 1) % progress_pages == 0 && page + 1 < memory->pages) {
            report("progress pass=%ld pages=%llu wrong=%lu", pass, (unsigned long long)page + 1, wrong);
            /* Writing to the console is no stall of the memory. */
            last = ticks();
        }
    }
    double seconds = now() - begin;
    double tick_ms = last > first ? seconds * 1e3 / (last - first) : 0;
    report("pass=%ld pages=%llu wrong=%lu rewritten=%lu seconds=%.3f longest_stall_ms=%.2f", pass,
           (unsigned long long)memory->pages, wrong, rewritten, seconds, longest * tick_ms);
    return wrong;
}

static void verify(void)
{
    long fill_mib = option("farpage.fill_mib=", 300);
    long rewrite_percent = option("farpage.rewrite_percent=", 25);
    long passes = option("farpage.passes=", 0);
    report("start fill_mib=%ld rewrite_percent=%ld passes=%ld uptime_seconds=%.2f", fill_mib, rewrite_percent,
           passes, now());

    struct memory memory = {.pages = (uint64_t)fill_mib << 20 >> 12};
    memory.versions = calloc(memory.pages, sizeof *memory.versions);
    memory.words = mmap(NULL, memory.pages * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory.words == MAP_FAILED || !memory.versions) {
        report("failed cause=out_of_memory");
        return;
    }
    double begin = now();
    for (uint64_t page = 0; page < memory.pages; page++)
        write_page(memory.words + page * WORDS, page, 0);
    report("fill pages=%llu seconds=%.3f", (unsigned long long)memory.pages, now() - begin);

    unsigned long wrong = 0;
    for (long pass = 1; !passes || pass <= passes; pass++)
        wrong += verify_pass(&memory, pass, rewrite_percent);
    report("end passes=%ld wrong=%lu", passes, wrong);
}

static void run_commands(FILE *file)
{
    char line[4096];
    for (int number = 0; fgets(line, sizeof line, file); number++) {
        line[strcspn(line, "\n")] = 0;
        int status = -1;
        pid_t child = fork();
        if (child == 0) {
            execl("/bin/busybox", "sh", "-c", line, (char *)NULL);
            _exit(127);
        }
        waitpid(child, &status, 0);
        report("command=%d status=%d", number,
               WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    }
    report("end passes=0 wrong=0");
}

int main(void)
{
    mkdir("/proc", 0755);
    mkdir("/dev", 0755);
    mkdir("/tmp", 01777);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    int console = open("/dev/ttyS0", O_RDWR);
    for (int descriptor = 0; console >= 0 && descriptor < 3; descriptor++)
        dup2(console, descriptor);
    setenv("PATH", "/bin:/sbin:/usr/bin:/usr/sbin", 1);

    int file = open("/proc/cmdline", O_RDONLY);
    if (file < 0 || read(file, command_line, sizeof command_line - 1) < 0)
        report("failed cause=no_command_line");
    close(file);

    FILE *commands = fopen("/commands", "r");
    if (commands)
        run_commands(commands);
    else
        verify();
    sync();
    reboot(RB_POWER_OFF);
    return 0;
}
