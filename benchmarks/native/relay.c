/* A TCP relay that plays a long network path between its two sides.
 *
 *   relay --listen ADDR:PORT --target ADDR:PORT [--delay-us N] [--rate BYTES_PER_S] [--window BYTES]
 *         [--queue BYTES]
 *
 * Prints "port N" when it listens; port 0 is the kernel's choice. One thread, epoll.
 *
 * Delay. What is read is written N microseconds later, FIN follows the bytes before it, and RST aborts the
 * other side N microseconds after it came (what was under way by then has arrived, if it was taken).
 *
 * Connections. Our kernel answers a client's SYN at once, so its connect() returns one round trip too early.
 * To make up for that, nothing of the client is read in the first round trip after the accept, and the
 * connection to the target is begun one delay later, when the last packet of a real handshake would arrive.
 * The first bytes of a client that speaks at once thus reach the target three delays after its connect()
 * began, and the first bytes of a target that speaks first take four. A refusal by the target resets the
 * client when it is known.
 *
 * Rate. Each way all connections share one line of that many bytes a second, the delay comes after it. It
 * serves first come, first served, from a queue of at most "queue" bytes; while that is full no socket is
 * read, so that TCP holds its sender up, and the connections that have something to send take turns of a
 * quarter of a millisecond. Nothing is ever dropped, so a busy sender keeps the queue full: its size is a
 * standing delay. The default is 5 ms of the line, what a router with CoDel lets stand (RFC 8289, 4.2), and
 * never more than one bandwidth-delay product (but always two turns).
 *
 * Window. At most so many bytes are in flight of each connection each way: from being read until one delay
 * after they were written, when a real sender would have the acknowledgement. Without it a connection holds
 * up to 256 MiB each way, which bounds memory only.
 *
 * Socket buffers. Without rate and window they are the kernel's, and everything is read as soon as it is
 * there. With one of them, what the line or the window holds up shall wait in its sender's own buffer, as on
 * a real path, and not in a receive buffer of megabytes here: that one is kept small.
 *
 * What it does not play: loss, slow start (a new connection may send at full speed), jitter, headers. */
#include <getopt.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/prctl.h>

#include "common.h"
#include "connection.h"

#define EVENTS 256
/* Reading stops after this, so that what is due is not late for long. */
#define READING_TIME (200 * NS_PER_US)
/* The receive buffer where a rate or a window holds senders up: the kernel needs some segments of loopback's
 * 64 KiB to keep a sender going, and at 1 Gbit/s this is 2 ms. */
#define SMALL_BUFFER (256 * 1024)
#define STANDING_QUEUE (5 * 1000 * NS_PER_US)

/* Lets connections read, each in its turn, for a while. */
static void serve(struct line *line)
{
    int64_t now = now_ns(), stop = now + READING_TIME;
    struct flow *flow;
    while (now < stop && (flow = line_next(line, now))) {
        flow_read(flow, now);
        heap_set(&path.timers, &flow->timer, flow_wake(flow));
        now = now_ns();
    }
}

/* Wakes what was due when it was called; what is due again by then has its turn after the sockets. */
static void run_timers(void)
{
    int64_t now = now_ns();
    size_t most = path.timers.count;
    struct timer *first;
    while (most-- && (first = heap_first(&path.timers)) && first->when <= now) {
        heap_set(&path.timers, first, NEVER); /* who wants to be woken again says so */
        first->wake(first);
    }
}

static int64_t next_time(void)
{
    struct timer *first = heap_first(&path.timers);
    int64_t when = first ? first->when : now_ns() + NS_PER_S;
    if (line_ready(&path.up) < when)
        when = line_ready(&path.up);
    return line_ready(&path.down) < when ? line_ready(&path.down) : when;
}

_Noreturn static void run(void)
{
    struct epoll_event events[EVENTS];
    for (;;) {
        int count = wait_events(path.epoll, events, EVENTS, next_time());
        run_timers();
        for (int i = 0; i < count; i++)
            handle_event(events[i].data.ptr, events[i].events);
        serve(&path.up);
        serve(&path.down);
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
            path.target = parse_address(optarg);
        else if (option == 'd')
            delay = parse_number(optarg, 60000000, "a delay is at most 60 s") * NS_PER_US;
        else if (option == 'r')
            rate = parse_number(optarg, 100000000000, "a rate is at most 100 GB/s");
        else if (option == 'w')
            path.window = (size_t)parse_number(optarg, 1 << 30, "a window is at most 1 GiB");
        else if (option == 'q')
            queue = parse_number(optarg, 1 << 30, "a queue is at most 1 GiB");
        else
            return 2;
    }
    if (!address.sin_family || !path.target.sin_family || optind != count) {
        fprintf(stderr, "usage: relay --listen ADDR:PORT --target ADDR:PORT [--delay-us N] [--rate N] ...\n");
        return 2;
    }
    prctl(PR_SET_TIMERSLACK, 1UL); /* wake-ups to the nanosecond, not to the usual 50 us */
    raise_file_limit();
    queue = standing_queue(delay, rate, queue);
    line_init(&path.up, delay, rate, queue);
    line_init(&path.down, delay, rate, queue);
    path.receive_buffer = rate || path.window ? SMALL_BUFFER : 0;
    path.epoll = make_epoll();
    path.listener = listen_on(address, path.receive_buffer);
    watch(path.epoll, path.listener, EPOLLIN | EPOLLET, NULL);
    run();
}
