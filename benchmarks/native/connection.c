#include "connection.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common.h"

/* Descriptors may be short: how long until the next try to accept. */
#define ACCEPT_PAUSE (100 * 1000 * NS_PER_US)

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

struct path path;
static void accept_all(struct timer *timer);
static struct connection *dead; /* freed when no event of this round can name them */
static struct timer accept_timer = {.wake = accept_all};

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
    heap_set(&path.timers, &connection->timer, NEVER);
    heap_set(&path.timers, &connection->client.out.timer, NEVER);
    heap_set(&path.timers, &connection->server.out.timer, NEVER);
    flow_clear(&connection->client.out);
    flow_clear(&connection->server.out);
    close_side(&connection->client, abort);
    close_side(&connection->server, abort);
    connection->dead = true;
    connection->next_dead = dead;
    dead = connection;
}

void free_dead(void)
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
    heap_set(&path.timers, &side->out.timer, flow_wake(&side->out));
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
    watch(path.epoll, side->socket, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, side);
}

/* The last packet of the client's handshake has arrived. */
static void reach_target(struct timer *timer)
{
    struct connection *connection = (struct connection *)timer;
    struct side *server = &connection->server;
    server->socket = begin_connect(path.target, path.receive_buffer);
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
    heap_set(&path.timers, &connection->timer, connection->began + 3 * path.up.delay);
    settle(&connection->client, now_ns());
}

static void init_side(struct side *side, struct connection *connection, struct line *line)
{
    side->connection = connection;
    side->socket = -1;
    side->out = (struct flow){.line = line, .window = path.window, .from = -1, .to = -1};
    side->out.timer.wake = wake_flow;
}

static void add_connection(int socket)
{
    struct connection *connection = allocate(sizeof *connection);
    init_side(&connection->client, connection, &path.up);
    init_side(&connection->server, connection, &path.down);
    set_nodelay(socket);
    connection->client.socket = socket;
    connection->client.out.from = connection->server.out.to = socket;
    connection->client.out.held = true;
    connection->began = now_ns();
    connection->timer.wake = open_client;
    heap_set(&path.timers, &connection->timer, connection->began + 2 * path.up.delay);
    watch_side(&connection->client);
}

static void accept_all(struct timer *timer)
{
    heap_set(&path.timers, timer, NEVER);
    for (;;) {
        int socket = accept4(path.listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (socket >= 0) {
            add_connection(socket);
        } else if (errno == EAGAIN) {
            return;
        } else if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
            heap_set(&path.timers, timer, now_ns() + ACCEPT_PAUSE);
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

void handle_event(void *owner, uint32_t events)
{
    struct side *side = owner;
    int64_t now = now_ns();
    if (!side) {
        accept_all(&accept_timer);
        return;
    }
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
