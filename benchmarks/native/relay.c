/* A TCP relay that plays a long network path between its two sides.
 *
 *   relay --listen ADDR:PORT --target ADDR:PORT [--delay-us N] [--rate BYTES_PER_S] [--window BYTES]
 *         [--queue BYTES]
 *
 * Prints "port N" when it listens; port 0 is the kernel's choice. One thread, epoll.
 *
 * Delay. What is read is written N microseconds later, FIN follows the bytes before it, and RST aborts the other
 * side N microseconds after it came (what was under way by then has arrived, if it was taken).
 *
 * Connections. Our kernel answers a client's SYN at once, so its connect() returns one round trip too early. To
 * make up for that, nothing of the client is read in the first round trip after the accept, and the connection
 * to the target is begun one delay later, when the last packet of a real handshake would arrive. The first bytes
 * of a client that speaks at once thus reach the target three delays after its connect() began, and the first
 * bytes of a target that speaks first take four. A refusal by the target resets the client when it is known.
 *
 * Rate. Each way all connections share one line of that many bytes a second, the delay comes after it. It serves
 * first come, first served, from a queue of at most "queue" bytes; while that is full no socket is read, so that
 * TCP holds its sender up, and the connections that have something to send take turns of a quarter of a
 * millisecond. Nothing is ever dropped, so a busy sender keeps the queue full: its size is a standing delay.
 * The default is 5 ms of the line, what a router with CoDel lets stand (RFC 8289, 4.2), and never more than one
 * bandwidth-delay product (but always two turns).
 *
 * Window. At most so many bytes are in flight of each connection each way: from being read until one delay after
 * they were written, when a real sender would have the acknowledgement. Without it a connection holds up to
 * 256 MiB each way, which bounds memory only.
 *
 * Socket buffers. Without rate and window they are the kernel's, and everything is read as soon as it is there.
 * With one of them, what the line or the window holds up shall wait in its sender's own buffer, as on a real
 * path, and not in a receive buffer of megabytes here: that one is kept small.
 *
 * What it does not play: loss, slow start (a new connection may send at full speed), jitter, headers. */
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common.h"
#include "flow.h"

#define EVENTS 256
/* Reading stops after this, so that what is due is not late for long. */
#define READING_TIME (200 * NS_PER_US)
/* Descriptors may be short: how long until the next try to accept. */
#define ACCEPT_PAUSE (100 * 1000 * NS_PER_US)
/* The receive buffer where a rate or a window holds senders up: the kernel needs some segments of loopback's 64 KiB
 * to keep a sender going, and at 1 Gbit/s this is 2 ms. */
#define SMALL_BUFFER (256 * 1024)
#define STANDING_QUEUE (5 * 1000 * NS_PER_US)

struct connection;

struct side {
    struct connection *connection;
    int socket; /* -1: not made yet, or closed */
    struct flow out; /* what this side sends */
};

struct connection {
    struct timer timer; /* first: the timer is the connection */
    struct side client, server;
    int64_t began;
    bool connected; /* to the target */
    bool dead;
    struct connection *next_dead;
};

static struct sockaddr_in target;
static struct line up, down;
static size_t window;
static int receive_buffer;
static int epoll;
static struct heap heap;
static struct connection *dead; /* freed when no event of this round can name them */
static int listener;
static struct timer accept_timer;

static struct side *other(struct side *side)
{
    struct connection *connection = side->connection;
    return side == &connection->client ? &connection->server : &connection->client;
}

static void close_side(struct side *side, bool abort)
{
    struct linger linger = {.l_onoff = 1};
    if (side->socket < 0)
        return;
    if (abort)
        setsockopt(side->socket, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
    close(side->socket);
    side->socket = -1;
}

static void finish(struct connection *connection, bool abort)
{
    if (connection->dead)
        return;
    heap_set(&heap, &connection->timer, NEVER);
    heap_set(&heap, &connection->client.out.timer, NEVER);
    heap_set(&heap, &connection->server.out.timer, NEVER);
    flow_clear(&connection->client.out);
    flow_clear(&connection->server.out);
    close_side(&connection->client, abort);
    close_side(&connection->server, abort);
    connection->dead = true;
    connection->next_dead = dead;
    dead = connection;
}

static void free_dead(void)
{
    while (dead) {
        struct connection *next = dead->next_dead;
        free(dead);
        dead = next;
    }
}

/* After any change of what the side sends: it may have a turn to ask for, and another time to be woken. */
static void settle(struct side *side, int64_t now)
{
    flow_ask_turn(&side->out, now);
    heap_set(&heap, &side->out.timer, flow_wake(&side->out));
}

static void side_broke(struct side *side, int64_t now)
{
    flow_break(&side->out, now);
    settle(side, now);
}

/* Delivers what is due of what the side sent. */
static void deliver(struct side *side, int64_t now)
{
    struct connection *connection = side->connection;
    if (connection->dead)
        return;
    switch (flow_deliver(&side->out, now)) {
    case ABORT:
        finish(connection, true);
        return;
    case WRITE_FAILED:
        side_broke(other(side), now);
        break;
    case GOES_ON:
        if (side->out.done && other(side)->out.done) {
            finish(connection, false);
            return;
        }
    }
    settle(side, now);
}

static struct side *side_of_flow(struct flow *flow)
{
    return (struct side *)((char *)flow - offsetof(struct side, out));
}

static void wake_flow(struct timer *timer)
{
    deliver(side_of_flow((struct flow *)timer), now_ns());
}

static void watch_side(struct side *side)
{
    watch(epoll, side->socket, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, side);
}

/* The last packet of the client's handshake has arrived. */
static void reach_target(struct timer *timer)
{
    struct connection *connection = (struct connection *)timer;
    struct side *server = &connection->server;
    server->socket = begin_connect(target, receive_buffer);
    if (server->socket < 0) {
        finish(connection, true);
        return;
    }
    server->out.from = connection->client.out.to = server->socket;
    watch_side(server);
}

/* The client has the answer to its SYN: from now on it may speak. */
static void open_client(struct timer *timer)
{
    struct connection *connection = (struct connection *)timer;
    connection->client.out.held = false;
    connection->timer.wake = reach_target;
    heap_set(&heap, &connection->timer, connection->began + 3 * up.delay);
    settle(&connection->client, now_ns());
}

static void init_side(struct side *side, struct connection *connection, struct line *line)
{
    side->connection = connection;
    side->socket = -1;
    side->out = (struct flow){.line = line, .window = window, .from = -1, .to = -1};
    side->out.timer.wake = wake_flow;
}

static void add_connection(int socket)
{
    struct connection *connection = allocate(sizeof *connection);
    init_side(&connection->client, connection, &up);
    init_side(&connection->server, connection, &down);
    set_nodelay(socket);
    connection->client.socket = socket;
    connection->client.out.from = connection->server.out.to = socket;
    connection->client.out.held = true;
    connection->began = now_ns();
    connection->timer.wake = open_client;
    heap_set(&heap, &connection->timer, connection->began + 2 * up.delay);
    watch_side(&connection->client);
}

static void accept_all(struct timer *timer)
{
    heap_set(&heap, timer, NEVER);
    for (;;) {
        int socket = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (socket >= 0) {
            add_connection(socket);
        } else if (errno == EAGAIN) {
            return;
        } else if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
            heap_set(&heap, timer, now_ns() + ACCEPT_PAUSE);
            return;
        } else if (errno != EINTR && errno != ECONNABORTED) {
            die("accept");
        }
    }
}

/* The first event of the socket to the target: whether it is connected. */
static bool check_connected(struct side *server, uint32_t events)
{
    if (!(events & (EPOLLOUT | EPOLLERR | EPOLLHUP)))
        return false;
    if ((events & EPOLLERR) || socket_error(server->socket)) {
        finish(server->connection, true);
        return false;
    }
    server->connection->connected = true;
    return true;
}

static void handle(struct side *side, uint32_t events, int64_t now)
{
    struct connection *connection = side->connection;
    if (connection->dead)
        return;
    if (side == &connection->server && !connection->connected && !check_connected(side, events))
        return;
    if ((events & EPOLLERR) && side == &connection->client && !connection->connected) {
        finish(connection, true); /* nobody has heard of it yet */
        return;
    }
    if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        side->out.readable = true;
    if (events & EPOLLERR)
        flow_break(&side->out, now);
    settle(side, now);
    if (events & EPOLLOUT) {
        other(side)->out.writable = true;
        deliver(other(side), now);
    }
}

/* Lets connections read, each in its turn, for a while. */
static void serve(struct line *line)
{
    int64_t now = now_ns(), stop = now + READING_TIME;
    struct flow *flow;
    while (now < stop && (flow = line_next(line, now))) {
        flow_read(flow, now);
        heap_set(&heap, &flow->timer, flow_wake(flow));
        now = now_ns();
    }
}

/* Wakes what was due when it was called; what is due again by then has its turn after the sockets. */
static void run_timers(void)
{
    int64_t now = now_ns();
    size_t most = heap.count;
    struct timer *first;
    while (most-- && (first = heap_first(&heap)) && first->when <= now) {
        heap_set(&heap, first, NEVER); /* who wants to be woken again says so */
        first->wake(first);
    }
}

static int64_t next_time(void)
{
    struct timer *first = heap_first(&heap);
    int64_t when = first ? first->when : now_ns() + NS_PER_S;
    if (line_ready(&up) < when)
        when = line_ready(&up);
    return line_ready(&down) < when ? line_ready(&down) : when;
}

_Noreturn static void run(void)
{
    struct epoll_event events[EVENTS];
    for (;;) {
        int count = wait_events(epoll, events, EVENTS, next_time());
        run_timers();
        int64_t now = now_ns();
        for (int i = 0; i < count; i++) {
            if (events[i].data.ptr)
                handle(events[i].data.ptr, events[i].events, now);
            else
                accept_all(&accept_timer);
        }
        serve(&up);
        serve(&down);
        free_dead();
    }
}

static int64_t standing_queue(int64_t delay, int64_t rate, int64_t bytes)
{
    if (!rate)
        return 0;
    int64_t queue = bytes ? (int64_t)((double)bytes * NS_PER_S / (double)rate) : STANDING_QUEUE;
    int64_t least = 500 * NS_PER_US; /* two turns: below that the line would stand idle between them */
    if (queue > 2 * delay)
        queue = 2 * delay;
    return queue < least ? least : queue;
}

int main(int count, char **arguments)
{
    static const struct option options[] = {
        {"listen", required_argument, NULL, 'l'}, {"target", required_argument, NULL, 't'},
        {"delay-us", required_argument, NULL, 'd'}, {"rate", required_argument, NULL, 'r'},
        {"window", required_argument, NULL, 'w'}, {"queue", required_argument, NULL, 'q'},
        {NULL, 0, NULL, 0}};
    struct sockaddr_in address = {0};
    int64_t delay = 0, rate = 0, queue = 0;
    for (int option; (option = getopt_long(count, arguments, "", options, NULL)) != -1;) {
        if (option == 'l')
            address = parse_address(optarg);
        else if (option == 't')
            target = parse_address(optarg);
        else if (option == 'd')
            delay = parse_number(optarg, 60000000, "a delay is at most 60 s") * NS_PER_US;
        else if (option == 'r')
            rate = parse_number(optarg, 100000000000, "a rate is at most 100 GB/s");
        else if (option == 'w')
            window = (size_t)parse_number(optarg, 1 << 30, "a window is at most 1 GiB");
        else if (option == 'q')
            queue = parse_number(optarg, 1 << 30, "a queue is at most 1 GiB");
        else
            return 2;
    }
    if (!address.sin_family || !target.sin_family || optind != count) {
        fprintf(stderr, "usage: relay --listen ADDR:PORT --target ADDR:PORT [--delay-us N] [--rate N] ...\n");
        return 2;
    }
    prctl(PR_SET_TIMERSLACK, 1UL); /* wake-ups to the nanosecond, not to the usual 50 us */
    raise_file_limit();
    queue = standing_queue(delay, rate, queue);
    line_init(&up, delay, rate, queue);
    line_init(&down, delay, rate, queue);
    receive_buffer = rate || window ? SMALL_BUFFER : 0;
    epoll = make_epoll();
    accept_timer.wake = accept_all;
    listener = listen_on(address, receive_buffer);
    watch(epoll, listener, EPOLLIN | EPOLLET, NULL);
    run();
}
