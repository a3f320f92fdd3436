#include "buffer.h"

#include <stdlib.h>
#include <string.h>

#include "common.h"

#define FIRST_ROOM 4096 /* bytes */

size_t buffer_held(const struct buffer *buffer)
{
    return buffer->end - buffer->start;
}

void buffer_reserve(struct buffer *buffer, size_t count)
{
    if (buffer->start) {
        memmove(buffer->data, buffer->data + buffer->start, buffer_held(buffer));
        buffer->end -= buffer->start;
        buffer->start = 0;
    }
    if (buffer->room - buffer->end >= count)
        return;
    buffer->room = buffer->room ? buffer->room : FIRST_ROOM;
    while (buffer->room - buffer->end < count)
        buffer->room *= 2;
    buffer->data = realloc(buffer->data, buffer->room);
    if (!buffer->data)
        die("no memory");
}

void buffer_append(struct buffer *buffer, const void *data, size_t count)
{
    if (buffer->room - buffer->end < count)
        buffer_reserve(buffer, count);
    memcpy(buffer->data + buffer->end, data, count);
    buffer->end += count;
}

void buffer_consume(struct buffer *buffer, size_t count)
{
    buffer->start += count;
    if (buffer->start == buffer->end)
        buffer->start = buffer->end = 0;
}
