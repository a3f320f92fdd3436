#include "heap.h"

#include <stdlib.h>

#include "common.h"

static void place(struct heap *heap, struct timer *timer, size_t at)
{
    heap->timers[at] = timer;
    timer->place = at;
}

static void rise(struct heap *heap, struct timer *timer, size_t at)
{
    for (; at > 1 && heap->timers[at / 2]->when > timer->when; at /= 2)
        place(heap, heap->timers[at / 2], at);
    place(heap, timer, at);
}

static void sink(struct heap *heap, struct timer *timer, size_t at)
{
    for (;;) {
        size_t child = at * 2;
        if (child < heap->count && heap->timers[child + 1]->when < heap->timers[child]->when)
            child++;
        if (child > heap->count || heap->timers[child]->when >= timer->when)
            break;
        place(heap, heap->timers[child], at);
        at = child;
    }
    place(heap, timer, at);
}

static void grow(struct heap *heap)
{
    heap->room = heap->room ? heap->room * 2 : 64;
    heap->timers = realloc(heap->timers, (heap->room + 1) * sizeof *heap->timers);
    if (!heap->timers)
        die("no memory");
}

static void take_out(struct heap *heap, struct timer *timer)
{
    size_t at = timer->place;
    struct timer *last = heap->timers[heap->count--];
    timer->place = 0;
    if (last == timer)
        return;
    sink(heap, last, at);
    rise(heap, last, last->place);
}

void heap_set(struct heap *heap, struct timer *timer, int64_t when)
{
    if (when == NEVER) {
        if (timer->place)
            take_out(heap, timer);
        return;
    }
    timer->when = when;
    if (!timer->place) {
        if (heap->count == heap->room)
            grow(heap);
        rise(heap, timer, ++heap->count);
        return;
    }
    sink(heap, timer, timer->place);
    rise(heap, timer, timer->place);
}

struct timer *heap_first(const struct heap *heap)
{
    return heap->count ? heap->timers[1] : NULL;
}
