#include "flow.h"

#include <errno.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "common.h"

/* Without a window a flow holds this much at most: 100 ms at 2.5 GB/s. */
#define MOST_HELD (256UL << 20)
/* A sender does not send less than this because the window is nearly full (RFC 9293, 3.8.6.2.1). */
#define LEAST_SENT (16UL << 10)
/* One read; a larger one makes nothing cheaper. */
#define MOST_READ (256UL << 10)
/* Time of the line that one turn takes: short, for what comes next waits for it. */
#define QUANTUM_NS (250 * NS_PER_US)
#define LEAST_QUANTUM 1500
/* The relay may be late by this much without the line standing idle: what waited had waited before, too. */
#define CATCH_UP (5 * 1000 * NS_PER_US)
/* Acknowledgements closer together than this travel as one, as kernels merge them. */
#define ACKS_MERGED (20 * NS_PER_US)
#define VECTORS 32

void line_init(struct line *line, int64_t delay, int64_t rate, int64_t queue)
{
    *line = (struct line){.delay = delay, .rate = rate, .queue = queue, .quantum = MOST_READ};
    TAILQ_INIT(&line->turns);
    if (rate) {
        int64_t quantum = rate * QUANTUM_NS / NS_PER_S;
        if (quantum < LEAST_QUANTUM)
            quantum = LEAST_QUANTUM;
        if (quantum < (int64_t)MOST_READ)
            line->quantum = (size_t)quantum;
    }
}

int64_t line_ready(const struct line *line)
{
    if (TAILQ_EMPTY(&line->turns))
        return NEVER;
    return line->rate ? line->free_at - line->queue : 0;
}

struct flow *line_next(struct line *line, int64_t now)
{
    struct flow *flow = TAILQ_FIRST(&line->turns);
    if (!flow) {
        line->pressed = false;
        return NULL;
    }
    if (line_ready(line) > now) {
        line->pressed = true;
        return NULL;
    }
    TAILQ_REMOVE(&line->turns, flow, turn);
    flow->waiting = false;
    return flow;
}

/* Takes "count" bytes on; when they arrive. */
static int64_t line_carry(struct line *line, size_t count, int64_t now)
{
    if (!line->rate)
        return now + line->delay;
    int64_t earliest = line->pressed ? now - CATCH_UP : now;
    if (line->free_at < earliest)
        line->free_at = earliest;
    line->free_at += (int64_t)((double)count * NS_PER_S / (double)line->rate);
    return line->free_at + line->delay;
}

/* Forgets the bytes in flight whose acknowledgement has arrived. */
static void take_acks(struct flow *flow, int64_t now)
{
    while (flow->acks.first && flow->acks.first->due <= now) {
        flow->in_flight -= flow->acks.first->left;
        segments_consume(&flow->acks, flow->acks.first->left);
    }
}

static void delivered(struct flow *flow, size_t count, int64_t now)
{
    segments_consume(&flow->bytes, count);
    if (!flow->window) {
        flow->in_flight -= count;
        return;
    }
    int64_t due = now + flow->line->delay;
    struct segment *last = flow->acks.first ? flow->acks.last : NULL;
    if (last && due - last->due < ACKS_MERGED)
        last->left += count; /* early by less than what is merged */
    else
        segments_add_count(&flow->acks, count, due);
}

/* How much may be read now; 0 is to wait for acknowledgements, or for "to" to take something. */
static size_t allowance(const struct flow *flow)
{
    size_t limit = flow->window ? flow->window : MOST_HELD;
    size_t least = limit / 2 < LEAST_SENT ? limit / 2 + 1 : LEAST_SENT;
    size_t room = flow->in_flight < limit ? limit - flow->in_flight : 0;
    if (flow->broken) /* it can send no more, so what is left is bounded by its socket's buffer */
        return MOST_READ;
    return room < least ? 0 : room;
}

static bool can_read(const struct flow *flow)
{
    return flow->readable && !flow->held && !flow->cut && flow->ending == OPEN;
}

static void end(struct flow *flow, enum ending ending, int64_t now)
{
    flow->ending = ending;
    flow->end_due = line_carry(flow->line, 0, now);
}

void flow_read(struct flow *flow, int64_t now)
{
    size_t room, most = allowance(flow);
    char *place = reading_room(&room);
    if (!can_read(flow) || !most)
        return;
    if (most > flow->line->quantum)
        most = flow->line->quantum;
    ssize_t count = recv(flow->from, place, most < room ? most : room, 0);
    if (count > 0) {
        segments_add_read(&flow->bytes, (size_t)count, line_carry(flow->line, (size_t)count, now));
        flow->in_flight += (size_t)count;
    } else if (count == 0) {
        end(flow, flow->broken ? RST : FIN, now);
    } else if (errno == EAGAIN) {
        flow->readable = false;
    } else if (errno != EINTR) {
        end(flow, RST, now);
    }
    flow_ask_turn(flow, now);
}

void flow_ask_turn(struct flow *flow, int64_t now)
{
    take_acks(flow, now);
    if (flow->waiting || !can_read(flow) || !allowance(flow))
        return;
    TAILQ_INSERT_TAIL(&flow->line->turns, flow, turn);
    flow->waiting = true;
}

/* What is due at the front, as vectors; how many. */
static int gather(const struct flow *flow, struct iovec *vectors, int64_t now)
{
    int count = 0;
    struct segment *segment = flow->bytes.first;
    for (; segment && segment->due <= now && count < VECTORS; segment = segment->next)
        vectors[count++] = (struct iovec){segment->start, segment->left};
    return count;
}

static size_t total(const struct iovec *vectors, int count)
{
    size_t sum = 0;
    for (int i = 0; i < count; i++)
        sum += vectors[i].iov_len;
    return sum;
}

/* One write of what is due; what came of it. */
static enum outcome write_due(struct flow *flow, int64_t now)
{
    struct iovec vectors[VECTORS];
    struct msghdr message = {.msg_iov = vectors, .msg_iovlen = (size_t)gather(flow, vectors, now)};
    if (!message.msg_iovlen)
        return GOES_ON;
    ssize_t count = sendmsg(flow->to, &message, MSG_NOSIGNAL);
    if (count < 0 && errno == EINTR)
        return GOES_ON;
    if (count < 0 && errno != EAGAIN) {
        flow->cut = true;
        segments_clear(&flow->bytes);
        return WRITE_FAILED;
    }
    /* Less than asked means that the buffer is full: an event tells when it is not. */
    flow->writable = count == (ssize_t)total(vectors, (int)message.msg_iovlen);
    if (count > 0)
        delivered(flow, (size_t)count, now);
    return GOES_ON;
}

enum outcome flow_deliver(struct flow *flow, int64_t now)
{
    if (flow->ending == RST && flow->end_due <= now)
        return ABORT;
    if (flow->cut || !flow->writable)
        return GOES_ON;
    enum outcome outcome = write_due(flow, now);
    bool at_end = outcome == GOES_ON && !flow->bytes.first && flow->ending == FIN;
    if (at_end && flow->end_due <= now && !flow->done) {
        shutdown(flow->to, SHUT_WR);
        flow->done = true;
    }
    return outcome;
}

void flow_break(struct flow *flow, int64_t now)
{
    if (flow->broken || flow->ending == RST)
        return;
    flow->broken = true;
    if (flow->ending == FIN || flow->cut || flow->held)
        end(flow, RST, now);
    else
        flow->readable = true;
}

int64_t flow_wake(const struct flow *flow)
{
    int64_t when = NEVER;
    if (flow->ending == RST)
        return flow->end_due;
    if (flow->cut)
        return NEVER;
    if (flow->writable && flow->bytes.first)
        when = flow->bytes.first->due;
    else if (flow->writable && flow->ending == FIN && !flow->done)
        when = flow->end_due;
    if (flow->acks.first && can_read(flow) && !allowance(flow) && flow->acks.first->due < when)
        when = flow->acks.first->due;
    return when;
}

void flow_clear(struct flow *flow)
{
    segments_clear(&flow->bytes);
    segments_clear(&flow->acks);
    if (flow->waiting)
        TAILQ_REMOVE(&flow->line->turns, flow, turn);
    flow->waiting = false;
}
