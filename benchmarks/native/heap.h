/* Timers: a binary heap of what is to be woken, the earliest first. */
#ifndef HEAP_H
#define HEAP_H

#include <stddef.h>
#include <stdint.h>

#define NEVER INT64_MAX

/* Part of what is woken; all zero is "not in the heap". */
struct timer {
    int64_t when; /* nanoseconds, monotonic */
    size_t place; /* in the heap, counted from 1; 0 is outside */
    void (*wake)(struct timer *timer);
};

struct heap {
    struct timer **timers; /* from 1 */
    size_t count, room;
};

/* Puts the timer at "when", wherever it was; NEVER takes it out. */
void heap_set(struct heap *heap, struct timer *timer, int64_t when);

/* The earliest, or NULL. */
struct timer *heap_first(const struct heap *heap);

#endif
