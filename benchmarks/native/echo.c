/* The service: WebSocket echo on every path, "/chunks", and "/bytes/N"; HTTP/1.1 with keep-alive. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "buffer.h"
#include "common.h"
#include "messages.h"
#include "websocket.h"

#define CHUNKS 200000
#define CHUNK_LINE "64\r\n" /* 100 bytes, in hexadecimal */
#define CHUNK_DATA 100
#define CHUNKED_END "0\r\n\r\n"
#define FILLER (256 * 1024)     /* bytes of one write of "/bytes/N" */
#define WRITES_A_TURN 256       /* then the other connections have theirs */
#define MESSAGE_MOST (1 << 20)  /* bytes of a frame; whoever sends a larger one is closed */
#define INPUT_MOST (MESSAGE_MOST + WS_HEAD_MOST)
#define READ_LEAST 2048 /* bytes of room for one read */
#define EVENTS 256

enum mode { HTTP, WEBSOCKET };

struct client {
    int socket;
    enum mode mode;
    struct buffer in, out;
    int64_t bytes_left; /* of "/bytes/N" */
    int chunks_left;
    bool last;     /* closed when what is to be sent has been sent */
    uint32_t mask; /* what epoll waits for */
};

static int epoll;
static char chunk[sizeof CHUNK_LINE - 1 + CHUNK_DATA + 2];
static char filler[FILLER];

static void drop(struct client *client)
{
    close(client->socket);
    free(client->in.data);
    free(client->out.data);
    free(client);
}

/* The value of a field in a head that ends with an empty line; NULL without one. */
static const char *field(const char *head, const char *name)
{
    size_t length = strlen(name);
    for (const char *line = strstr(head, "\r\n"); line; line = strstr(line + 2, "\r\n"))
        if (!strncasecmp(line + 2, name, length) && line[2 + length] == ':')
            return line + 3 + length + strspn(line + 3 + length, " \t");
    return NULL;
}

static void answer(struct client *client, const char *text)
{
    buffer_append(&client->out, text, strlen(text));
}

static void upgrade(struct client *client, const char *key)
{
    char accept[WS_ACCEPT_LENGTH + 1];
    websocket_accept(key, accept);
    answer(client, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                   "Sec-WebSocket-Accept: ");
    answer(client, accept);
    answer(client, "\r\n\r\n");
    client->mode = WEBSOCKET;
}

/* Begins the answer to one request, whose head ends with 0. */
static void respond(struct client *client, const char *head)
{
    const char *key = field(head, "Sec-WebSocket-Key");
    const char *connection = field(head, "Connection");
    long long bytes;
    client->last = connection && !strncasecmp(connection, "close", 5);
    if (key && strcspn(key, "\r") >= WS_KEY_LENGTH) {
        upgrade(client, key);
    } else if (!strncmp(head, "GET /chunks ", 12)) {
        answer(client, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
        client->chunks_left = CHUNKS;
    } else if (sscanf(head, "GET /bytes/%18lld ", &bytes) == 1 && bytes >= 0) {
        char text[96];
        snprintf(text, sizeof text, "HTTP/1.1 200 OK\r\nContent-Length: %lld\r\n\r\n", bytes);
        answer(client, text);
        client->bytes_left = bytes;
    } else {
        answer(client, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
    }
}

/* Takes one request out of the input; false if there is none whole. A head without an end is let grow to
 * the input's limit. */
static bool take_request(struct client *client)
{
    char *start = client->in.data + client->in.start;
    char *end = buffer_held(&client->in) ? memmem(start, buffer_held(&client->in), "\r\n\r\n", 4) : NULL;
    if (!end)
        return false;
    end[2] = 0; /* in place of the empty line */
    respond(client, start);
    buffer_consume(&client->in, (size_t)(end - start) + 4);
    return true;
}

/* Takes one frame out of the input and answers it; false if there is none whole. */
static bool take_frame(struct client *client)
{
    struct frame frame;
    unsigned char head[WS_HEAD_MOST];
    unsigned char *start = (unsigned char *)client->in.data + client->in.start;
    if (!websocket_parse(start, buffer_held(&client->in), &frame))
        return false;
    if (frame.length > MESSAGE_MOST || !frame.masked) {
        client->last = true;
        return false;
    }
    size_t whole = frame.head + frame.length;
    if (buffer_held(&client->in) < whole)
        return false;
    unsigned char *payload = start + frame.head;
    if (frame.opcode != WS_PONG) {
        websocket_mask(frame.mask, payload, frame.length);
        client->last = frame.opcode == WS_CLOSE;
        frame.masked = false;
        if (frame.opcode == WS_PING)
            frame.opcode = WS_PONG;
        websocket_make_head(&frame, head);
        buffer_append(&client->out, head, frame.head);
        buffer_append(&client->out, payload, frame.length);
    }
    buffer_consume(&client->in, whole);
    return true;
}

static bool busy(const struct client *client)
{
    return buffer_held(&client->out) || client->chunks_left || client->bytes_left;
}

/* Sends the next piece of a body from where it lies; false with errno if nothing was sent. */
static bool send_body(struct client *client)
{
    const char *data = client->chunks_left ? chunk : filler;
    size_t size = client->chunks_left ? sizeof chunk : sizeof filler;
    if (!client->chunks_left && (int64_t)size > client->bytes_left)
        size = (size_t)client->bytes_left;
    ssize_t count = send(client->socket, data, size, MSG_NOSIGNAL);
    if (count < 0)
        return false;
    if (!client->chunks_left) {
        client->bytes_left -= count;
        return true;
    }
    /* What a full socket cut off; nothing, as a rule. */
    buffer_append(&client->out, chunk + count, sizeof chunk - (size_t)count);
    if (--client->chunks_left == 0)
        answer(client, CHUNKED_END);
    return true;
}

/* Writes as long as the socket takes something, a turn at most; false if the connection is over. */
static bool flush(struct client *client)
{
    for (int writes = 0; busy(client) && writes < WRITES_A_TURN; writes++) {
        if (buffer_held(&client->out)) {
            char *start = client->out.data + client->out.start;
            ssize_t count = send(client->socket, start, buffer_held(&client->out), MSG_NOSIGNAL);
            if (count < 0)
                return errno == EAGAIN;
            buffer_consume(&client->out, (size_t)count);
        } else if (!send_body(client)) {
            return errno == EAGAIN;
        }
    }
    return busy(client) || !client->last;
}

/* Answers what has come, in order: nothing is taken while an answer waits to be sent. */
static bool work(struct client *client)
{
    for (;;) {
        if (!flush(client))
            return false;
        if (busy(client))
            return true;
        if (client->mode == HTTP ? !take_request(client) : !take_frame(client))
            return !client->last;
    }
}

static bool read_more(struct client *client)
{
    if (buffer_held(&client->in) >= INPUT_MOST)
        return false;
    if (client->in.room - client->in.end < READ_LEAST)
        buffer_reserve(&client->in, READ_LEAST);
    struct buffer *in = &client->in;
    ssize_t count = recv(client->socket, in->data + in->end, in->room - in->end, 0);
    if (count <= 0)
        return count < 0 && errno == EAGAIN;
    in->end += (size_t)count;
    return true;
}

static void handle(struct client *client, uint32_t events)
{
    bool alive = true;
    if (!busy(client) && (events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
        alive = read_more(client);
    if (!alive || !work(client)) {
        drop(client);
        return;
    }
    struct epoll_event wanted = {.events = busy(client) ? EPOLLOUT : EPOLLIN, .data.ptr = client};
    if (wanted.events != client->mask) {
        client->mask = wanted.events;
        if (epoll_ctl(epoll, EPOLL_CTL_MOD, client->socket, &wanted) < 0)
            die("epoll_ctl");
    }
}

static void accept_one(int listener)
{
    int socket = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (socket < 0)
        return; /* it went away again, or descriptors are short: the listener is asked again */
    struct client *client = allocate(sizeof *client);
    client->socket = socket;
    client->mask = EPOLLIN;
    set_nodelay(socket);
    watch(epoll, socket, EPOLLIN, client);
}

int run_echo(int count, char **arguments)
{
    (void)count;
    (void)arguments;
    struct sockaddr_in address = make_address("127.0.0.1", "0");
    memcpy(chunk, CHUNK_LINE, sizeof CHUNK_LINE - 1);
    memset(chunk + sizeof CHUNK_LINE - 1, 'c', CHUNK_DATA);
    memcpy(chunk + sizeof chunk - 2, "\r\n", 2);
    memset(filler, 'f', sizeof filler);
    epoll = make_epoll();
    int listener = listen_on(address, 0);
    watch(epoll, listener, EPOLLIN, NULL);
    for (;;) {
        struct epoll_event events[EVENTS];
        int found = wait_events(epoll, events, EVENTS, now_ns() + 60 * NS_PER_S);
        for (int i = 0; i < found; i++) {
            if (events[i].data.ptr)
                handle(events[i].data.ptr, events[i].events);
            else
                accept_one(listener);
        }
    }
}
