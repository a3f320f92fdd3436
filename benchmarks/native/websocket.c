#include "websocket.h"

#include <string.h>

#define SHA1_BLOCK 64
#define SHA1_SIZE 20
static const char GUID[] = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"; /* RFC 6455, 1.3 */

static uint32_t rotate(uint32_t word, int bits)
{
    return word << bits | word >> (32 - bits);
}

static uint32_t sha1_mix(int round, uint32_t b, uint32_t c, uint32_t d)
{
    if (round < 20)
        return ((b & c) | (~b & d)) + 0x5a827999;
    if (round < 40)
        return (b ^ c ^ d) + 0x6ed9eba1;
    if (round < 60)
        return ((b & c) | (b & d) | (c & d)) + 0x8f1bbcdc;
    return (b ^ c ^ d) + 0xca62c1d6;
}

static void sha1_block(uint32_t state[5], const unsigned char *block)
{
    uint32_t words[80], s[5];
    for (int i = 0; i < 16; i++)
        words[i] = (uint32_t)block[4 * i] << 24 | (uint32_t)block[4 * i + 1] << 16 |
                   (uint32_t)block[4 * i + 2] << 8 | block[4 * i + 3];
    for (int i = 16; i < 80; i++)
        words[i] = rotate(words[i - 3] ^ words[i - 8] ^ words[i - 14] ^ words[i - 16], 1);
    memcpy(s, state, sizeof s);
    for (int i = 0; i < 80; i++) {
        uint32_t next = rotate(s[0], 5) + sha1_mix(i, s[1], s[2], s[3]) + s[4] + words[i];
        s[4] = s[3];
        s[3] = s[2];
        s[2] = rotate(s[1], 30);
        s[1] = s[0];
        s[0] = next;
    }
    for (int i = 0; i < 5; i++)
        state[i] += s[i];
}

/* SHA-1 (FIPS 180-4) of a text that fits two blocks with its padding. */
static void sha1_short(const char *text, size_t length, unsigned char digest[SHA1_SIZE])
{
    uint32_t state[5] = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0};
    unsigned char padded[2 * SHA1_BLOCK] = {0};
    memcpy(padded, text, length);
    padded[length] = 0x80;
    padded[sizeof padded - 2] = (unsigned char)(length * 8 >> 8);
    padded[sizeof padded - 1] = (unsigned char)(length * 8);
    sha1_block(state, padded);
    sha1_block(state, padded + SHA1_BLOCK);
    for (int i = 0; i < SHA1_SIZE; i++)
        digest[i] = (unsigned char)(state[i / 4] >> (24 - 8 * (i % 4)));
}

void websocket_accept(const char key[WS_KEY_LENGTH], char accept[WS_ACCEPT_LENGTH + 1])
{
    static const char alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    char text[WS_KEY_LENGTH + sizeof GUID];
    unsigned char digest[SHA1_SIZE + 1] = {0}; /* 21 bytes are 28 characters; the last is padding */
    memcpy(text, key, WS_KEY_LENGTH);
    memcpy(text + WS_KEY_LENGTH, GUID, sizeof GUID);
    sha1_short(text, WS_KEY_LENGTH + sizeof GUID - 1, digest); /* 60 bytes: padded to two blocks */
    for (int i = 0; i < WS_ACCEPT_LENGTH; i++) {
        const unsigned char *three = digest + i / 4 * 3;
        uint32_t bits = (uint32_t)three[0] << 16 | (uint32_t)three[1] << 8 | three[2];
        accept[i] = alphabet[bits >> (18 - 6 * (i % 4)) & 63];
    }
    accept[WS_ACCEPT_LENGTH - 1] = '=';
    accept[WS_ACCEPT_LENGTH] = 0;
}

bool websocket_parse(const unsigned char *data, size_t count, struct frame *frame)
{
    if (count < 2)
        return false;
    size_t extended = (data[1] & 127) == 127 ? 8 : (data[1] & 127) == 126 ? 2 : 0;
    *frame = (struct frame){.last = data[0] & 128, .opcode = data[0] & 15, .masked = data[1] & 128};
    frame->head = 2 + extended + (frame->masked ? 4 : 0);
    if (count < frame->head)
        return false;
    frame->length = extended ? 0 : data[1] & 127;
    for (size_t i = 0; i < extended; i++)
        frame->length = frame->length << 8 | data[2 + i];
    if (frame->masked)
        memcpy(frame->mask, data + 2 + extended, 4);
    return true;
}

void websocket_make_head(struct frame *frame, unsigned char *data)
{
    size_t extended = frame->length > 65535 ? 8 : frame->length > 125 ? 2 : 0;
    unsigned char mark = frame->masked ? 128 : 0;
    data[0] = (unsigned char)((frame->last ? 128 : 0) | frame->opcode);
    data[1] = mark | (extended == 8 ? 127 : extended == 2 ? 126 : (unsigned char)frame->length);
    for (size_t i = 0; i < extended; i++)
        data[2 + i] = (unsigned char)(frame->length >> 8 * (extended - 1 - i));
    frame->head = 2 + extended;
    if (frame->masked) {
        memcpy(data + frame->head, frame->mask, 4);
        frame->head += 4;
    }
}

void websocket_mask(const unsigned char mask[4], unsigned char *data, size_t count)
{
    for (size_t i = 0; i < count; i++)
        data[i] ^= mask[i & 3];
}
