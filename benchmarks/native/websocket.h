/* As much of RFC 6455 as an echo and its load need. */
#ifndef WEBSOCKET_H
#define WEBSOCKET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum opcode { WS_CONTINUATION, WS_TEXT, WS_BINARY, WS_CLOSE = 8, WS_PING, WS_PONG };

#define WS_HEAD_MOST 14    /* bytes of a frame's head */
#define WS_KEY_LENGTH 24   /* characters of Sec-WebSocket-Key */
#define WS_ACCEPT_LENGTH 28 /* of Sec-WebSocket-Accept */

struct frame {
    bool last; /* FIN: of its message */
    bool masked;
    int opcode;
    uint64_t length; /* of the payload */
    size_t head;     /* bytes before the payload */
    unsigned char mask[4];
};

/* The Sec-WebSocket-Accept that answers a key (4.2.2), terminated by 0. */
void websocket_accept(const char key[WS_KEY_LENGTH], char accept[WS_ACCEPT_LENGTH + 1]);

/* Reads a frame's head; false if it is not whole yet. */
bool websocket_parse(const unsigned char *data, size_t count, struct frame *frame);

/* Writes the head that "frame" describes, and sets frame->head. */
void websocket_make_head(struct frame *frame, unsigned char *data);

/* Masks or unmasks. */
void websocket_mask(const unsigned char mask[4], unsigned char *data, size_t count);

#endif
