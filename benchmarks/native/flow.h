/* One direction of a connection through the relay, and the line that all connections share that way. */
#ifndef FLOW_H
#define FLOW_H

#include <stdbool.h>
#include <sys/queue.h>

#include "heap.h"
#include "segments.h"

struct flow;
TAILQ_HEAD(turns, flow);

/* A router's queue before a wire: one each way. */
struct line {
    int64_t delay;   /* nanoseconds that the wire takes */
    int64_t rate;    /* bytes a second; 0: no limit */
    int64_t queue;   /* nanoseconds of waiting at which the line is full */
    size_t quantum;  /* bytes that one connection sends when it is its turn */
    int64_t free_at; /* when what was taken on is on the wire */
    bool pressed;    /* connections waited for room when it was last looked at */
    struct turns turns;
};

enum ending { OPEN, FIN, RST };

struct flow {
    struct timer timer; /* first: the timer is the flow */
    struct line *line;
    size_t window; /* bytes that may be in flight until acknowledged; 0: no limit */
    int from, to;  /* sockets; "to" is -1 while there is none */
    bool held;     /* nothing is read yet: the handshake is still on its way */
    bool readable; /* nothing has said that "from" is empty */
    bool writable; /* nothing has said that "to" is full */
    bool waiting;  /* among the line's turns */
    bool broken;   /* "from" ended with RST, which may stand behind bytes not read yet */
    bool cut;      /* "to" takes nothing any more */
    bool done;     /* "to" has had the end */
    enum ending ending;
    int64_t end_due;
    size_t in_flight;
    struct segments bytes; /* read and not delivered */
    struct segments acks;  /* delivered, and not known to the sender; with a window only */
    TAILQ_ENTRY(flow) turn;
};

/* What came of a step. */
enum outcome {
    GOES_ON,
    WRITE_FAILED, /* "to" is dead: the other direction ends with RST */
    ABORT,        /* a RST arrived: both sockets are to be closed with one */
};

void line_init(struct line *line, int64_t delay, int64_t rate, int64_t queue);

/* When there is room on the line for one that waits; NEVER if nobody does. */
int64_t line_ready(const struct line *line);

/* Whose turn it is, taken out of the line's turns; NULL if nobody's at the time "now". */
struct flow *line_next(struct line *line, int64_t now);

/* Reads once, for the quantum at most, and puts the flow at the end of the turns if there may be more. */
void flow_read(struct flow *flow, int64_t now);

/* Writes what is due. */
enum outcome flow_deliver(struct flow *flow, int64_t now);

/* "from" is dead: what it sent is still carried, then RST. */
void flow_break(struct flow *flow, int64_t now);

/* Puts the flow into the turns if it can read. To be called after every change, before flow_wake. */
void flow_ask_turn(struct flow *flow, int64_t now);

/* When flow_deliver has to be called next, if no event comes before. */
int64_t flow_wake(const struct flow *flow);

/* Gives back all that the flow holds; the sockets are the caller's. */
void flow_clear(struct flow *flow);

#endif
