/*
 * An NBD client that takes little of a core, so that it is the server that is measured: it keeps a number of
 * commands under way on each connection, and checks every reply and what was read.
 *
 *   nbd_load unix:PATH|tcp:HOST:PORT EXPORT read|write|mixed|sequential SIZE DEPTH CONNECTIONS SECONDS SEED
 *
 * SIZE is in bytes, of one command, and a multiple of 4096. `mixed` is half reads, half writes, drawn; these
 * three are at offsets drawn uniformly, aligned to SIZE. `sequential` are reads from a place of its own for
 * each connection, a thread of its own too.
 *
 * Every 4096 bytes of the export begin and end with eight bytes that depend on their offset: stamp() below.
 * Whoever makes the export writes them; writes write the same again. What is between is not looked at.
 *
 * All requests that one receive allows leave with one send, and each receive takes what is there, so the more
 * replies a server sends at a time, the less both ends need for each.
 *
 * Prints one line of JSON. Replies that break the protocol, errors, and 10 seconds without a reply end it with
 * a message and status 1; wrong contents do so at the end, with the first of them told.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* Names and numbers of the NBD protocol, https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md */
#define NBDMAGIC 0x4e42444d41474943u
#define IHAVEOPT 0x49484156454f5054u
#define OPTION_REPLY_MAGIC 0x3e889045565a9u
#define NBD_FLAG_FIXED_NEWSTYLE 1
#define NBD_FLAG_NO_ZEROES 2
#define NBD_OPT_GO 7
#define NBD_REP_ACK 1
#define NBD_REP_INFO 3
#define NBD_INFO_EXPORT 0
#define NBD_REQUEST_MAGIC 0x25609513u
#define NBD_SIMPLE_REPLY_MAGIC 0x67446698u
#define NBD_CMD_READ 0
#define NBD_CMD_WRITE 1
#define NBD_CMD_DISC 2

#define UNIT_BYTES 4096
#define REPLY_BYTES 16
#define INPUT_BYTES (256u << 10)
#define DEPTH_MAX 1024 /* IOV_MAX */
#define CONNECTIONS_MAX 64
#define SIZE_MAX_BYTES (32u << 20)
#define SILENCE_SECONDS 10
#define WRONG_SHOWN_MAX 5

struct request {
    uint32_t magic;
    uint16_t flags, command;
    uint64_t cookie, offset;
    uint32_t length;
} __attribute__((packed));

struct reply {
    uint32_t magic, error;
    uint64_t cookie;
} __attribute__((packed));

/* A place for one command: its request and, behind it, what it writes. */
struct slot {
    struct request *request;
    uint64_t cookie, offset;
    bool waits, writes;
};

struct connection {
    int socket;
    uint64_t random_state, export_bytes, next_offset;
    struct slot *slots;
    struct iovec *output; /* requests that are not sent */
    size_t output_count;
    unsigned char *input;
    size_t input_bytes, input_start, input_end;
    unsigned under_way;
    uint64_t commands, wrong;
    pthread_t thread;
};

enum work { READ, WRITE, MIXED, SEQUENTIAL, WORKS };
static const char *const names[] = {"read", "write", "mixed", "sequential"};

static enum work work;
static uint32_t size;
static unsigned depth, connections;
static uint64_t end_ns;
static struct connection all[CONNECTIONS_MAX];

static void __attribute__((noreturn, format(printf, 1, 2))) fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "nbd_load: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    _exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Both ends of the unit at an offset. */
static inline uint64_t stamp(uint64_t offset)
{
    return (offset / UNIT_BYTES + 1) * 0x9e3779b97f4a7c15u;
}

static uint64_t next_random(struct connection *c)
{
    c->random_state ^= c->random_state << 13;
    c->random_state ^= c->random_state >> 7;
    return c->random_state ^= c->random_state << 17;
}

static void *allocate(size_t bytes)
{
    void *got = NULL;
    if (posix_memalign(&got, 64, bytes))
        fail("no memory");
    return memset(got, 0, bytes);
}

static void send_whole(int socket, const void *from, size_t bytes)
{
    for (const char *at = from; bytes;) {
        ssize_t sent = send(socket, at, bytes, MSG_NOSIGNAL);
        if (sent < 0)
            fail("send: %s", strerror(errno));
        at += sent;
        bytes -= (size_t)sent;
    }
}

static void receive_whole(int socket, void *to, size_t bytes)
{
    ssize_t received = recv(socket, to, bytes, MSG_WAITALL);
    if (received != (ssize_t)bytes)
        fail("the server ends the handshake: %s", received < 0 ? strerror(errno) : "it is gone");
}

static int dial(const char *address)
{
    int socket_ = -1;
    struct timeval silence = {.tv_sec = SILENCE_SECONDS};
    if (!strncmp(address, "unix:", 5)) {
        struct sockaddr_un where = {.sun_family = AF_UNIX};
        if (strlen(address + 5) >= sizeof where.sun_path)
            fail("the name of the socket is too long: %s", address);
        strcpy(where.sun_path, address + 5);
        socket_ = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (socket_ < 0 || connect(socket_, (struct sockaddr *)&where, sizeof where))
            fail("%s: %s", address, strerror(errno));
    } else {
        char host[256];
        const char *port = strrchr(address, ':');
        struct addrinfo *found, hints = {.ai_socktype = SOCK_STREAM};
        if (strncmp(address, "tcp:", 4) || port < address + 4 || port - address - 4 >= (long)sizeof host)
            fail("not an address: %s", address);
        snprintf(host, sizeof host, "%.*s", (int)(port - address - 4), address + 4);
        int error = getaddrinfo(host, port + 1, &hints, &found);
        if (error)
            fail("%s: %s", address, gai_strerror(error));
        socket_ = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (socket_ < 0 || connect(socket_, found->ai_addr, found->ai_addrlen))
            fail("%s: %s", address, strerror(errno));
        freeaddrinfo(found);
        setsockopt(socket_, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    }
    if (setsockopt(socket_, SOL_SOCKET, SO_RCVTIMEO, &silence, sizeof silence))
        fail("SO_RCVTIMEO: %s", strerror(errno));
    return socket_;
}

/* The newstyle handshake with NBD_OPT_GO; returns the size of the export. */
static uint64_t negotiate(int socket_, const char *export)
{
    struct { uint64_t magic, option; uint16_t flags; } __attribute__((packed)) greeting;
    struct { uint64_t magic; uint32_t option, type, length; } __attribute__((packed)) answer;
    uint32_t name_bytes = (uint32_t)strlen(export);
    uint64_t export_bytes = 0;
    struct {
        uint32_t flags;
        uint64_t magic;
        uint32_t option, length, name_bytes;
        char rest[4096 + 2]; /* the name and the number of information requests, none */
    } __attribute__((packed)) go = {
        .flags = htobe32(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES),
        .magic = htobe64(IHAVEOPT),
        .option = htobe32(NBD_OPT_GO),
        .length = htobe32(4 + name_bytes + 2),
        .name_bytes = htobe32(name_bytes),
    };
    if (name_bytes > 4096)
        fail("the name of the export is too long");
    memcpy(go.rest, export, name_bytes);
    receive_whole(socket_, &greeting, sizeof greeting);
    if (be64toh(greeting.magic) != NBDMAGIC || be64toh(greeting.option) != IHAVEOPT)
        fail("the greeting is not that of a newstyle server");
    if (!(be16toh(greeting.flags) & NBD_FLAG_FIXED_NEWSTYLE) || !(be16toh(greeting.flags) & NBD_FLAG_NO_ZEROES))
        fail("the server lacks fixed newstyle or NO_ZEROES");
    send_whole(socket_, &go, sizeof go - sizeof go.rest + name_bytes + 2);
    for (;;) {
        unsigned char data[4096];
        receive_whole(socket_, &answer, sizeof answer);
        uint32_t type = be32toh(answer.type), length = be32toh(answer.length);
        if (be64toh(answer.magic) != OPTION_REPLY_MAGIC || be32toh(answer.option) != NBD_OPT_GO || length > sizeof data)
            fail("the reply to NBD_OPT_GO breaks the protocol");
        if (length)
            receive_whole(socket_, data, length);
        if (type == NBD_REP_INFO && length == 12 && !data[0] && data[1] == NBD_INFO_EXPORT) {
            memcpy(&export_bytes, data + 2, sizeof export_bytes);
            export_bytes = be64toh(export_bytes);
        } else if (type == NBD_REP_ACK) {
            break;
        } else if (type != NBD_REP_INFO) {
            fail("the server refuses the export with reply %#x: %.*s", type, (int)length, (const char *)data);
        }
    }
    if (export_bytes < size)
        fail("the export has %llu bytes, less than one command", (unsigned long long)export_bytes);
    return export_bytes;
}

/* Have the next command of a slot leave with the next send. */
static void begin(struct connection *c, struct slot *slot)
{
    uint64_t blocks = c->export_bytes / size, random = next_random(c);
    slot->writes = work == WRITE || (work == MIXED && random & 1);
    if (work == SEQUENTIAL) {
        slot->offset = c->next_offset;
        c->next_offset = (slot->offset / size + 1) % blocks * size;
    } else {
        slot->offset = (random >> 8) % blocks * size;
    }
    slot->cookie += depth; /* a slot's cookies are its own, and none is used twice */
    slot->waits = true;
    c->under_way++;
    struct request *request = slot->request;
    request->command = htobe16(slot->writes ? NBD_CMD_WRITE : NBD_CMD_READ);
    request->cookie = slot->cookie;
    request->offset = htobe64(slot->offset);
    struct iovec *whole = &c->output[c->output_count++];
    whole->iov_base = request;
    whole->iov_len = sizeof *request;
    if (!slot->writes)
        return;
    whole->iov_len += size;
    for (uint32_t unit = 0; unit < size; unit += UNIT_BYTES) {
        uint64_t ends = stamp(slot->offset + unit);
        unsigned char *data = (unsigned char *)(request + 1) + unit;
        memcpy(data, &ends, sizeof ends);
        memcpy(data + UNIT_BYTES - sizeof ends, &ends, sizeof ends);
    }
}

/* Send as much as the socket takes. */
static void push(struct connection *c)
{
    struct msghdr message = {.msg_iov = c->output, .msg_iovlen = c->output_count};
    ssize_t sent = sendmsg(c->socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN && errno != EINTR)
        fail("send: %s", strerror(errno));
    size_t left = sent < 0 ? 0 : (size_t)sent, gone = 0;
    for (; gone < c->output_count && left >= c->output[gone].iov_len; gone++)
        left -= c->output[gone].iov_len;
    c->output_count -= gone;
    if (!c->output_count)
        return;
    memmove(c->output, c->output + gone, c->output_count * sizeof *c->output);
    c->output[0].iov_base = (char *)c->output[0].iov_base + left;
    c->output[0].iov_len -= left;
}

/* Receive what is there; wait for it, unless something has yet to be sent. */
static void pull(struct connection *c)
{
    size_t left = c->input_end - c->input_start;
    if (!left || c->input_bytes - c->input_start < REPLY_BYTES + size) {
        memmove(c->input, c->input + c->input_start, left);
        c->input_start = 0;
        c->input_end = left;
    }
    ssize_t received = recv(c->socket, c->input + c->input_end, c->input_bytes - c->input_end,
                            c->output_count ? MSG_DONTWAIT : 0);
    if (received > 0) {
        c->input_end += (size_t)received;
        return;
    }
    if (!received)
        fail("the server is gone");
    if (errno == EINTR)
        return;
    if (errno != EAGAIN)
        fail("recv: %s", strerror(errno));
    struct pollfd either = {.fd = c->socket, .events = POLLIN | POLLOUT};
    if (!c->output_count || !poll(&either, 1, SILENCE_SECONDS * 1000))
        fail("no reply for %d s", SILENCE_SECONDS);
}

static void check(struct connection *c, const struct slot *slot, const unsigned char *data)
{
    for (uint32_t unit = 0; unit < size; unit += UNIT_BYTES) {
        uint64_t first, last, expected = stamp(slot->offset + unit);
        memcpy(&first, data + unit, sizeof first);
        memcpy(&last, data + unit + UNIT_BYTES - sizeof last, sizeof last);
        if (first == expected && last == expected)
            continue;
        if (c->wrong++ < WRONG_SHOWN_MAX)
            fprintf(stderr, "nbd_load: wrong content at %llu: begins with %#llx, ends with %#llx, both must be %#llx\n",
                    (unsigned long long)(slot->offset + unit), (unsigned long long)first, (unsigned long long)last,
                    (unsigned long long)expected);
    }
}

/* Take the replies that have come whole, and begin a command for each unless the time is over. */
static void settle(struct connection *c)
{
    bool over = now_ns() >= end_ns;
    while (c->input_end - c->input_start >= REPLY_BYTES) {
        const unsigned char *at = c->input + c->input_start;
        struct reply reply;
        memcpy(&reply, at, sizeof reply);
        struct slot *slot = &c->slots[reply.cookie % depth];
        if (be32toh(reply.magic) != NBD_SIMPLE_REPLY_MAGIC)
            fail("a reply begins with %#x", be32toh(reply.magic));
        if (!slot->waits || slot->cookie != reply.cookie)
            fail("a reply to a command that was not sent");
        if (reply.error)
            fail("a %s at %llu fails with error %u", slot->writes ? "write" : "read", (unsigned long long)slot->offset,
                 be32toh(reply.error));
        size_t whole = REPLY_BYTES + (slot->writes ? 0 : size);
        if (c->input_end - c->input_start < whole)
            break;
        if (!slot->writes)
            check(c, slot, at + REPLY_BYTES);
        slot->waits = false;
        c->under_way--;
        c->commands++;
        c->input_start += whole;
        if (!over)
            begin(c, slot);
    }
}

static void *serve(void *argument)
{
    struct connection *c = argument;
    for (unsigned i = 0; i < depth; i++)
        begin(c, &c->slots[i]);
    while (c->under_way) {
        if (c->output_count)
            push(c);
        pull(c);
        settle(c);
    }
    return NULL;
}

static void open_connection(struct connection *c, unsigned number, const char *address, const char *export,
                            uint64_t seed)
{
    size_t bytes = 64 + size; /* of a slot; what it writes is aligned */
    c->socket = dial(address);
    c->export_bytes = negotiate(c->socket, export);
    c->next_offset = c->export_bytes / size * number / connections * size;
    c->random_state = (seed * CONNECTIONS_MAX + number + 1) * 0x9e3779b97f4a7c15u;
    c->input_bytes = 4 * (REPLY_BYTES + (size_t)size);
    if (c->input_bytes < INPUT_BYTES)
        c->input_bytes = INPUT_BYTES;
    c->input = allocate(c->input_bytes);
    c->output = allocate(depth * sizeof *c->output);
    c->slots = allocate(depth * sizeof *c->slots);
    unsigned char *requests = allocate(depth * bytes);
    for (size_t i = 0; i < depth * bytes / sizeof(uint64_t) && (work == WRITE || work == MIXED); i++)
        ((uint64_t *)requests)[i] = next_random(c);
    for (unsigned i = 0; i < depth; i++) {
        struct slot *slot = &c->slots[i];
        slot->request = (struct request *)(requests + (i + 1) * bytes - size - sizeof(struct request));
        slot->request->magic = htobe32(NBD_REQUEST_MAGIC);
        slot->request->flags = 0;
        slot->request->length = htobe32(size);
        slot->cookie = i;
    }
}

static void close_connection(struct connection *c)
{
    struct request goodbye = {.magic = htobe32(NBD_REQUEST_MAGIC), .command = htobe16(NBD_CMD_DISC)};
    if (c->input_end != c->input_start)
        fail("%zu bytes behind the last reply", c->input_end - c->input_start);
    send_whole(c->socket, &goodbye, sizeof goodbye);
    close(c->socket);
}

static double processor_seconds(void)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
           (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

int main(int count, char **arguments)
{
    unsigned long bytes = count == 9 ? strtoul(arguments[4], NULL, 10) : 0;
    if (count == 9) {
        while (work < WORKS && strcmp(arguments[3], names[work]))
            work++;
        depth = (unsigned)strtoul(arguments[5], NULL, 10);
        connections = (unsigned)strtoul(arguments[6], NULL, 10);
    }
    if (!bytes || bytes % UNIT_BYTES || bytes > SIZE_MAX_BYTES || work == WORKS || !depth || depth > DEPTH_MAX ||
        !connections || connections > CONNECTIONS_MAX) {
        fprintf(stderr, "usage: nbd_load unix:PATH|tcp:HOST:PORT EXPORT read|write|mixed|sequential "
                        "SIZE DEPTH CONNECTIONS SECONDS SEED\n");
        return 2;
    }
    size = (uint32_t)bytes;
    for (unsigned i = 0; i < connections; i++)
        open_connection(&all[i], i, arguments[1], arguments[2], strtoull(arguments[8], NULL, 10));
    double used = processor_seconds();
    uint64_t began_ns = now_ns(), commands = 0, wrong = 0;
    end_ns = began_ns + (uint64_t)(strtod(arguments[7], NULL) * 1e9);
    for (unsigned i = 0; i < connections; i++) {
        int error = pthread_create(&all[i].thread, NULL, serve, &all[i]);
        if (error)
            fail("pthread_create: %s", strerror(error));
    }
    for (unsigned i = 0; i < connections; i++)
        pthread_join(all[i].thread, NULL);
    double seconds = (double)(now_ns() - began_ns) / 1e9;
    used = processor_seconds() - used;
    for (unsigned i = 0; i < connections; i++) {
        close_connection(&all[i]);
        commands += all[i].commands;
        wrong += all[i].wrong;
    }
    printf("{\"commands\": %llu, \"seconds\": %.6f, \"bytes\": %llu, \"wrong\": %llu, \"cpu_seconds\": %.6f}\n",
           (unsigned long long)commands, seconds, (unsigned long long)commands * size, (unsigned long long)wrong, used);
    return wrong != 0;
}
