/* WebSocket messages through many sockets: each sends one, waits for its echo, looks at every byte of it, and
 * sends the next. The time begins when all sockets are open. */
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
#include "websocket.h"

#define OPENING (10 * NS_PER_S) /* for all sockets together */
#define SILENCE (5 * NS_PER_S)  /* an echo that takes longer has failed */
#define PAYLOAD_MOST (1 << 20)
#define EVENTS 256

enum state { CONNECTING, UPGRADING, OPEN, OVER };

struct socket {
    int descriptor;
    enum state state;
    uint32_t number;     /* of the last message: its bytes follow from it */
    int64_t sent_at;     /* 0: none is on its way */
    char *data;          /* what has come: a head, or a frame */
    size_t count, room;
    size_t unsent;       /* bytes of the message that the socket did not take yet */
};

static struct tally tally;
static struct samples samples;
static int epoll;
static int opening; /* sockets */
static size_t payload;
static char request[HEAD_MOST];
static size_t request_length;
static unsigned char *message; /* what is sent or expected, made anew from its number */

static void give_up(struct socket *socket, const char *reason)
{
    if (socket->state == CONNECTING || socket->state == UPGRADING) {
        opening--;
        tally.attempts++; /* a socket that did not open is one attempt; others count by message */
    }
    fail(&tally, reason);
    socket->state = OVER;
    close(socket->descriptor);
}

/* The payload of a message, different in each, and never the one before. */
static void make_payload(unsigned char *data, uint32_t number)
{
    uint32_t word = number * 2654435761u; /* Knuth's multiplier: all bits change */
    for (size_t i = 0; i < payload; i++) {
        word = word * 1664525u + 1013904223u;
        data[i] = (unsigned char)(word >> 24);
    }
}

/* Builds the masked frame of the socket's present message; its length. */
static size_t make_message(const struct socket *socket)
{
    struct frame frame = {.last = true, .masked = true, .opcode = WS_BINARY, .length = payload};
    uint32_t mask = socket->number * 2246822519u + 1;
    memcpy(frame.mask, &mask, sizeof mask);
    websocket_make_head(&frame, message);
    make_payload(message + frame.head, socket->number);
    websocket_mask(frame.mask, message + frame.head, payload);
    return frame.head + payload;
}

static void wait_for(struct socket *socket, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = socket};
    if (epoll_ctl(epoll, EPOLL_CTL_MOD, socket->descriptor, &event) < 0)
        die("epoll_ctl");
}

/* Sends what is left of the message; an event continues it if the socket is full. */
static void continue_message(struct socket *socket, bool waited)
{
    size_t length = make_message(socket);
    ssize_t count = send(socket->descriptor, message + length - socket->unsent, socket->unsent, MSG_NOSIGNAL);
    if (count < 0 && errno != EAGAIN) {
        give_up(socket, "a message could not be sent");
        return;
    }
    socket->unsent -= count > 0 ? (size_t)count : 0;
    if (waited != (socket->unsent > 0))
        wait_for(socket, waited ? EPOLLIN : EPOLLIN | EPOLLOUT);
}

static void send_message(struct socket *socket)
{
    socket->number += 0x10001;
    socket->sent_at = now_ns();
    socket->unsent = make_message(socket);
    tally.attempts++;
    continue_message(socket, false);
}

static void take_answer(struct socket *socket)
{
    struct head head = parse_head(socket->data, socket->count);
    if (!head.length && socket->count < socket->room)
        return;
    if (head.status != 101 || head.length != socket->count) {
        give_up(socket, "the upgrade was not answered with 101");
        return;
    }
    socket->count = 0;
    socket->state = OPEN;
    opening--;
}

static void take_echo(struct socket *socket, int64_t now, int64_t end)
{
    struct frame frame;
    unsigned char *data = (unsigned char *)socket->data;
    if (!websocket_parse(data, socket->count, &frame) || socket->count < frame.head + frame.length) {
        if (socket->count == socket->room)
            give_up(socket, "an echo is too long");
        return;
    }
    make_payload(message, socket->number);
    if (socket->count != frame.head + payload || frame.opcode != WS_BINARY || frame.masked || !frame.last ||
        memcmp(data + frame.head, message, payload) != 0) {
        give_up(socket, "an echo is not what was sent");
        return;
    }
    socket->count = 0;
    add_sample(&samples, now - socket->sent_at);
    socket->sent_at = 0;
    if (now < end)
        send_message(socket);
}

static void receive(struct socket *socket, int64_t now, int64_t end)
{
    ssize_t count = recv(socket->descriptor, socket->data + socket->count, socket->room - socket->count, 0);
    if (count < 0 && errno == EAGAIN)
        return;
    if (count <= 0) {
        give_up(socket, "a socket was closed");
        return;
    }
    socket->count += (size_t)count;
    if (socket->state == UPGRADING)
        take_answer(socket);
    else
        take_echo(socket, now, end);
}

static void ask(struct socket *socket)
{
    if (socket_error(socket->descriptor) ||
        send(socket->descriptor, request, request_length, MSG_NOSIGNAL) != (ssize_t)request_length) {
        give_up(socket, "a socket could not connect");
        return;
    }
    socket->state = UPGRADING;
    wait_for(socket, EPOLLIN);
}

static void handle(struct socket *socket, uint32_t events, int64_t now, int64_t end)
{
    if (socket->state == CONNECTING) {
        ask(socket);
        return;
    }
    if (events & EPOLLOUT)
        continue_message(socket, true);
    if (socket->state != OVER && (events & ~(uint32_t)EPOLLOUT))
        receive(socket, now, end);
}

/* Handles events until "until", or until no socket is opening if that is what is waited for. */
static void spin(int64_t until, bool only_opening)
{
    struct epoll_event events[EVENTS];
    while (now_ns() < until && (!only_opening || opening)) {
        int found = wait_events(epoll, events, EVENTS, until);
        for (int i = 0; i < found; i++) {
            struct socket *socket = events[i].data.ptr;
            if (socket->state != OVER)
                handle(socket, events[i].events, now_ns(), only_opening ? 0 : until);
        }
    }
}

static void open_socket(struct socket *socket, struct sockaddr_in address, int place)
{
    socket->room = WS_HEAD_MOST + (payload > HEAD_MOST ? payload : HEAD_MOST);
    socket->data = allocate(socket->room);
    socket->number = (uint32_t)place; /* messages of two sockets differ */
    socket->descriptor = begin_connect(address, 0);
    opening++;
    if (socket->descriptor < 0)
        give_up(socket, "a socket could not connect");
    else
        watch(epoll, socket->descriptor, EPOLLOUT, socket);
}

int run_load(int count, char **arguments)
{
    (void)count;
    struct sockaddr_in address = make_address(arguments[0], arguments[1]);
    int sockets = parse_visitors(arguments[3]);
    int64_t duration = parse_seconds(arguments[4]);
    epoll = make_epoll();
    payload = (size_t)parse_number(arguments[5], PAYLOAD_MOST, "a payload is at most 1 MiB");
    message = allocate(payload + WS_HEAD_MOST);
    request_length = make_get(request, sizeof request, arguments[2], "/echo",
                              "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                              "Sec-WebSocket-Key: dGlueXR1bi1iZW5jaG1hcg==\r\n");
    struct socket *all = allocate((size_t)sockets * sizeof *all);
    for (int i = 0; i < sockets; i++)
        open_socket(&all[i], address, i);
    spin(now_ns() + OPENING, true);
    int64_t began = now_ns();
    for (int i = 0; i < sockets; i++) {
        if (all[i].state == OPEN)
            send_message(&all[i]);
        else if (all[i].state != OVER)
            give_up(&all[i], "a socket did not open in time");
    }
    spin(began + duration, false);
    int64_t end = now_ns(), silence = duration < SILENCE ? duration : SILENCE;
    for (int i = 0; i < sockets; i++)
        if (all[i].state == OPEN && all[i].sent_at && end - all[i].sent_at >= silence)
            give_up(&all[i], "an echo did not come");
    printf("rate %.1f\n", (double)samples.count * NS_PER_S / (double)(end - began));
    print_samples(&samples);
    print_tally(&tally);
    return 0;
}
