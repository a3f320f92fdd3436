#include "segments.h"

#include <stdlib.h>

#include "common.h"

#define CHUNK (4 * LEAST_ROOM)
/* Chunks kept for later: 64 MiB, what a path of 100 ms has in flight at 640 MB/s. */
#define KEPT 64

struct chunk {
    struct chunk *next; /* among the free ones */
    size_t used;
    size_t holders; /* segments, and one for being read into */
    char bytes[CHUNK];
};

static struct chunk *reading;
static struct chunk *free_chunks;
static size_t free_count;
static struct segment *free_segments;

static struct chunk *new_chunk(void)
{
    struct chunk *chunk = free_chunks;
    if (chunk) {
        free_chunks = chunk->next;
        free_count--;
    } else {
        chunk = malloc(sizeof *chunk);
        if (!chunk)
            die("no memory");
    }
    chunk->used = 0;
    chunk->holders = 1;
    return chunk;
}

static void let_go(struct chunk *chunk)
{
    if (--chunk->holders)
        return;
    if (free_count == KEPT) {
        free(chunk);
        return;
    }
    chunk->next = free_chunks;
    free_chunks = chunk;
    free_count++;
}

static void append(struct segments *list, struct chunk *chunk, char *start, size_t count, int64_t due)
{
    struct segment *segment = free_segments;
    if (segment)
        free_segments = segment->next;
    else
        segment = allocate(sizeof *segment);
    *segment = (struct segment){.chunk = chunk, .start = start, .left = count, .due = due};
    if (list->first)
        list->last->next = segment;
    else
        list->first = segment;
    list->last = segment;
}

static void drop_first(struct segments *list)
{
    struct segment *segment = list->first;
    list->first = segment->next;
    if (segment->chunk)
        let_go(segment->chunk);
    segment->next = free_segments;
    free_segments = segment;
}

char *reading_room(size_t *room)
{
    if (reading && reading->used > CHUNK - LEAST_ROOM) {
        let_go(reading);
        reading = NULL;
    }
    if (!reading)
        reading = new_chunk();
    *room = CHUNK - reading->used;
    return reading->bytes + reading->used;
}

void segments_add_read(struct segments *list, size_t count, int64_t due)
{
    reading->holders++;
    append(list, reading, reading->bytes + reading->used, count, due);
    reading->used += count;
}

void segments_add_count(struct segments *list, size_t count, int64_t due)
{
    append(list, NULL, NULL, count, due);
}

void segments_consume(struct segments *list, size_t count)
{
    while (count) {
        struct segment *segment = list->first;
        size_t part = count < segment->left ? count : segment->left;
        segment->start = segment->start ? segment->start + part : NULL;
        segment->left -= part;
        count -= part;
        if (!segment->left)
            drop_first(list);
    }
}

void segments_clear(struct segments *list)
{
    while (list->first)
        drop_first(list);
}
