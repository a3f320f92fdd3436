/* Bodies read and thrown away: each visitor asks again on its connection when one is over. Prints "at SECONDS
 * BYTES" for every tenth of a second, the body bytes of all visitors together since the last line. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common.h"
#include "messages.h"
#include "visitor.h"

#define INTERVAL (NS_PER_S / 10)
#define SILENCE (5 * NS_PER_S)   /* a visitor without a byte for this long at the end has failed */
#define THROWN_AWAY (4 << 20)    /* bytes of a body in one call */
#define EVENTS 256

/* Where in an answer the next byte belongs. */
enum place { CONNECTING, HEAD, BODY, SIZE_LINE, CHUNK, TRAILER, OVER };

struct visitor {
    int socket;
    enum place place;
    int64_t left;  /* bytes of the body, or of the chunk with its CRLF */
    int64_t heard; /* when the last byte came */
    size_t count;  /* bytes of the head, or of the line after or before a chunk */
    char *head;    /* HEAD_MOST bytes */
};

static struct tally tally;
static int64_t received; /* body bytes in this interval */
static char request[HEAD_MOST];
static size_t request_length;
static char scratch[256 * 1024];

static void give_up(struct visitor *visitor, const char *reason)
{
    fail(&tally, reason);
    visitor->place = OVER;
    close(visitor->socket);
}

static void ask(struct visitor *visitor)
{
    tally.attempts++;
    visitor->place = HEAD;
    visitor->count = 0;
    if (send(visitor->socket, request, request_length, MSG_NOSIGNAL) != (ssize_t)request_length)
        give_up(visitor, "a request could not be sent");
}

/* The value of a hexadecimal digit; -1 if it is none. */
static int digit_of(char byte)
{
    if (byte >= '0' && byte <= '9')
        return byte - '0';
    byte |= 32; /* lower case */
    return byte >= 'a' && byte <= 'f' ? byte - 'a' + 10 : -1;
}

/* A byte of a chunk's size line, or of the lines after the last chunk (RFC 9112, 7.1). */
static void take_line_byte(struct visitor *visitor, char byte)
{
    if (byte == '\n' && visitor->place == SIZE_LINE) {
        visitor->place = visitor->left ? CHUNK : TRAILER;
        visitor->left += visitor->left ? 2 : 0; /* the CRLF behind it */
        visitor->count = 0;
    } else if (byte == '\n') {
        if (!visitor->count)
            ask(visitor);
        visitor->count = 0;
    } else if (byte != '\r') {
        int digit = digit_of(byte);
        if (visitor->place == SIZE_LINE && digit >= 0 && visitor->count < 15) /* more do not fit 63 bits */
            visitor->left = visitor->left * 16 + digit;
        else if (visitor->place == SIZE_LINE && visitor->count == 0)
            give_up(visitor, "a chunk without a size");
        else if (visitor->place == SIZE_LINE)
            visitor->count = 15; /* an extension: no digits any more */
        visitor->count++;
    }
}

static void begin_size_line(struct visitor *visitor)
{
    visitor->place = SIZE_LINE;
    visitor->left = 0;
    visitor->count = 0;
}

/* Bytes of a chunked body, its framing among them. */
static void take_chunked(struct visitor *visitor, const char *data, size_t count)
{
    while (count && visitor->place != OVER) {
        if (visitor->place == HEAD) {
            give_up(visitor, "bytes behind the end of a body");
        } else if (visitor->place != CHUNK) {
            take_line_byte(visitor, *data++);
            count--;
        } else {
            size_t part = (int64_t)count < visitor->left ? count : (size_t)visitor->left;
            int64_t of_data = visitor->left - 2 < (int64_t)part ? visitor->left - 2 : (int64_t)part;
            received += of_data > 0 ? of_data : 0;
            visitor->left -= (int64_t)part;
            data += part;
            count -= part;
            if (!visitor->left)
                begin_size_line(visitor);
        }
    }
}

static void take_body(struct visitor *visitor, int64_t count)
{
    received += count;
    visitor->left -= count;
    if (visitor->left == 0)
        ask(visitor);
}

/* A whole head, with what came behind it. */
static void take_head(struct visitor *visitor, const struct head *head)
{
    const char *rest = visitor->head + head->length;
    int64_t count = (int64_t)(visitor->count - head->length);
    if (head->status != 200) {
        give_up(visitor, "the answer is not 200");
    } else if (head->chunked) {
        begin_size_line(visitor);
        take_chunked(visitor, rest, (size_t)count);
    } else if (head->body < count || head->body <= 0) {
        give_up(visitor, "the answer has no body of a known length");
    } else {
        visitor->place = BODY;
        visitor->left = head->body;
        take_body(visitor, count);
    }
}

/* One read; what it brought, as recv says it. */
static ssize_t read_once(struct visitor *visitor)
{
    if (visitor->place == HEAD)
        return recv(visitor->socket, visitor->head + visitor->count, HEAD_MOST - visitor->count, 0);
    if (visitor->place == BODY) /* TCP: the kernel drops the bytes without copying them (tcp(7), MSG_TRUNC) */
        return recv(visitor->socket, NULL, visitor->left < THROWN_AWAY ? (size_t)visitor->left : THROWN_AWAY,
                    MSG_TRUNC);
    return recv(visitor->socket, scratch, sizeof scratch, 0);
}

static void receive(struct visitor *visitor)
{
    ssize_t count = read_once(visitor);
    if (count < 0 && errno == EAGAIN)
        return;
    if (count <= 0) {
        give_up(visitor, count ? "a connection was reset" : "a connection was closed");
        return;
    }
    visitor->heard = now_ns();
    if (visitor->place == BODY) {
        take_body(visitor, count);
    } else if (visitor->place == HEAD) {
        visitor->count += (size_t)count;
        struct head head = parse_head(visitor->head, visitor->count);
        if (head.length)
            take_head(visitor, &head);
        else if (visitor->count == HEAD_MOST)
            give_up(visitor, "the answer's head is too long");
    } else {
        take_chunked(visitor, scratch, (size_t)count);
    }
}

static void handle(struct visitor *visitor, int epoll)
{
    if (visitor->place == OVER)
        return;
    if (visitor->place != CONNECTING) {
        receive(visitor);
        return;
    }
    struct epoll_event reading = {.events = EPOLLIN, .data.ptr = visitor};
    if (socket_error(visitor->socket)) {
        tally.attempts++;
        give_up(visitor, "a connection was refused");
        return;
    }
    epoll_ctl(epoll, EPOLL_CTL_MOD, visitor->socket, &reading);
    ask(visitor);
}

static void begin(struct visitor *visitor, struct sockaddr_in address, int epoll)
{
    visitor->head = allocate(HEAD_MOST);
    visitor->heard = now_ns();
    visitor->socket = begin_connect(address, 0);
    if (visitor->socket >= 0) {
        watch(epoll, visitor->socket, EPOLLOUT, visitor);
        return;
    }
    tally.attempts++;
    give_up(visitor, "a connection could not be opened");
}

/* Reads for "duration", and prints a line for each interval that is over. */
static void read_all(int epoll, int64_t duration)
{
    int64_t began = now_ns(), next = began + INTERVAL;
    while (next <= began + duration) {
        struct epoll_event events[EVENTS];
        int found = wait_events(epoll, events, EVENTS, next);
        for (int i = 0; i < found; i++)
            handle(events[i].data.ptr, epoll);
        int64_t now = now_ns();
        if (now < next)
            continue;
        printf("at %.6f %lld\n", (double)(now - began) / NS_PER_S, (long long)received);
        received = 0;
        next = now + INTERVAL - (now - next) % INTERVAL;
    }
}

int run_reader(int count, char **arguments)
{
    (void)count;
    struct sockaddr_in address = make_address(arguments[0], arguments[1]);
    int visitors = parse_visitors(arguments[4]), epoll = make_epoll();
    int64_t duration = parse_seconds(arguments[5]), silence = duration < SILENCE ? duration : SILENCE;
    struct visitor *all = allocate((size_t)visitors * sizeof *all);
    request_length = make_get(request, sizeof request, arguments[2], arguments[3], "");
    for (int i = 0; i < visitors; i++)
        begin(&all[i], address, epoll);
    read_all(epoll, duration);
    int64_t end = now_ns();
    for (int i = 0; i < visitors; i++)
        if (all[i].place != OVER && end - all[i].heard >= silence)
            give_up(&all[i], "a visitor heard nothing");
    print_tally(&tally);
    return 0;
}
