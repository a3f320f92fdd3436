/* Bytes on their way. All connections read into one chunk of memory after another, so that small messages lie
 * close together and large ones are never copied; a chunk is used again when its last segment is gone. */
#ifndef SEGMENTS_H
#define SEGMENTS_H

#include <stddef.h>
#include <stdint.h>

struct chunk;

struct segment {
    struct segment *next;
    struct chunk *chunk; /* NULL: only a count with a time */
    char *start;
    size_t left;
    int64_t due; /* nanoseconds, monotonic */
};

/* First in, first out. */
struct segments {
    struct segment *first, *last;
};

/* Memory to read into: "room" bytes, at least LEAST_ROOM. */
#define LEAST_ROOM (256 * 1024)
char *reading_room(size_t *room);

/* Appends the first "count" bytes of the reading room. */
void segments_add_read(struct segments *list, size_t count, int64_t due);

/* Appends a count without bytes. */
void segments_add_count(struct segments *list, size_t count, int64_t due);

/* Takes "count" bytes off the front. */
void segments_consume(struct segments *list, size_t count);

void segments_clear(struct segments *list);

#endif
