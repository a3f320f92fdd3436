/* Bytes that wait: appended at one end, consumed at the other. All zero is an empty one. */
#ifndef BUFFER_H
#define BUFFER_H

#include <stddef.h>

struct buffer {
    char *data;
    size_t start, end, room;
};

size_t buffer_held(const struct buffer *buffer);

/* Makes room for "count" bytes after the end. */
void buffer_reserve(struct buffer *buffer, size_t count);

void buffer_append(struct buffer *buffer, const void *data, size_t count);
void buffer_consume(struct buffer *buffer, size_t count);

#endif
