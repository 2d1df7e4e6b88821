/*
 * A guest's work, the same for every contender: sorts numbers, looks some of them up, and checks the outcome.
 *
 *   guest_work DATA_MIB LOOKUPS
 *
 * It fills DATA_MIB with random 64-bit numbers, sorts pieces of 256 KiB and merges them pairwise with as much
 * memory again, as an external sort does: many streams through twice DATA_MIB, forwards and backwards. Then it
 * looks numbers up by bisection: touches without order. What was sorted must be in order and add up to what
 * was filled in. The times are the guest's own; on stdout:
 *
 *   guest_work fill=SECONDS sort=SECONDS lookup=SECONDS right=0|1
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define PIECE (256 * 1024 / sizeof(uint64_t))

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* xorshift64 (Marsaglia: Xorshift RNGs). */
static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

/* By one byte after the other, from the lowest on: eight passes, so the outcome is in `data` again. */
static void sort_piece(uint64_t *data, uint64_t *spare, size_t count)
{
    for (int shift = 0; shift < 64; shift += 8) {
        size_t places[256] = {0}, next = 0;
        for (size_t at = 0; at < count; at++)
            places[data[at] >> shift & 255]++;
        for (int byte = 0; byte < 256; byte++) {
            size_t found = places[byte];
            places[byte] = next;
            next += found;
        }
        for (size_t at = 0; at < count; at++)
            spare[places[data[at] >> shift & 255]++] = data[at];
        uint64_t *sorted = spare;
        spare = data;
        data = sorted;
    }
}

static void merge(const uint64_t *from, size_t start, size_t middle, size_t end, uint64_t *to)
{
    size_t left = start, right = middle;
    for (size_t at = start; at < end; at++)
        to[at] = left < middle && (right == end || from[left] <= from[right]) ? from[left++] : from[right++];
}

static size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

static uint64_t *sort(uint64_t *data, uint64_t *spare, size_t count)
{
    for (size_t at = 0; at < count; at += PIECE)
        sort_piece(data + at, spare, smaller(PIECE, count - at));
    for (size_t width = PIECE; width < count; width *= 2) {
        for (size_t at = 0; at < count; at += 2 * width)
            merge(data, at, smaller(at + width, count), smaller(at + 2 * width, count), spare);
        uint64_t *sorted = spare;
        spare = data;
        data = sorted;
    }
    return data;
}

static int has(const uint64_t *data, size_t count, uint64_t wanted)
{
    size_t low = 0, high = count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (data[middle] < wanted)
            low = middle + 1;
        else
            high = middle;
    }
    return low < count && data[low] == wanted;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    size_t count = strtoul(argv[1], NULL, 10) * (1 << 20) / sizeof(uint64_t), lookups = strtoul(argv[2], NULL, 10);
    uint64_t *data = malloc(count * sizeof *data), *spare = malloc(count * sizeof *spare);
    if (!data || !spare || !count)
        return 3;
    double began = now();
    uint64_t random = 88172645463325252u, sum = 0;
    for (size_t at = 0; at < count; at++)
        sum += data[at] = next_random(&random);
    double filled = now();
    data = sort(data, spare, count);
    double sorted = now();
    size_t found = 0;
    for (size_t lookup = 0; lookup < lookups; lookup++)
        found += has(data, count, data[next_random(&random) % count]);
    double looked_up = now();
    int right = found == lookups;
    for (size_t at = 0; at < count; at++) {
        sum -= data[at];
        right &= !at || data[at - 1] <= data[at];
    }
    right &= !sum;
    printf("guest_work fill=%.3f sort=%.3f lookup=%.3f right=%d\n", filled - began, sorted - filled, looked_up - sorted,
           right);
    return !right;
}
