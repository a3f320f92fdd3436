/* What the load generators share: where they go, what they count, and reading an answer's head. */
#ifndef VISITOR_H
#define VISITOR_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define HEAD_MOST 8192 /* bytes of an answer's head */

/* Attempts of which some failed; the first reason is kept. */
struct tally {
    int64_t attempts, failures;
    char reason[128];
};

void fail(struct tally *tally, const char *reason);
void fail_errno(struct tally *tally, const char *what, int error);
void print_tally(const struct tally *tally);

/* Durations in nanoseconds. */
struct samples {
    int64_t *values;
    size_t count, room;
};

void add_sample(struct samples *samples, int64_t value);
/* Prints "p50_ms", "p99_ms" and "max_ms"; 0 without samples. */
void print_samples(struct samples *samples);

/* A visitor's place: the smaller of what is asked and what the machine allows is the caller's to choose. */
int parse_visitors(const char *text);
/* Seconds, fractions allowed, in nanoseconds. */
int64_t parse_seconds(const char *text);

/* Writes a GET with these further lines (each with its CRLF); its length. */
size_t make_get(char *buffer, size_t size, const char *host, const char *path, const char *lines);

/* The head at the start of what was read. */
struct head {
    size_t length;     /* with the empty line; 0: not whole yet */
    int status;        /* 0: this is no HTTP */
    int64_t body;      /* Content-Length; -1: none */
    bool chunked;
};

struct head parse_head(const char *data, size_t count);

#endif
