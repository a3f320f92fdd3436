#include "visitor.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"

void fail(struct tally *tally, const char *reason)
{
    tally->failures++;
    if (!tally->reason[0])
        snprintf(tally->reason, sizeof tally->reason, "%s", reason);
}

void fail_errno(struct tally *tally, const char *what, int error)
{
    char reason[sizeof tally->reason];
    snprintf(reason, sizeof reason, "%s: %s", what, strerror(error));
    fail(tally, reason);
}

void print_tally(const struct tally *tally)
{
    if (tally->reason[0])
        printf("reason %s\n", tally->reason);
    printf("attempts %lld\n", (long long)tally->attempts);
    printf("failures %lld\n", (long long)tally->failures);
}

void add_sample(struct samples *samples, int64_t value)
{
    if (samples->count == samples->room) {
        samples->room = samples->room ? samples->room * 2 : 4096;
        samples->values = realloc(samples->values, samples->room * sizeof *samples->values);
        if (!samples->values)
            die("no memory");
    }
    samples->values[samples->count++] = value;
}

static int compare(const void *one, const void *two)
{
    int64_t a = *(const int64_t *)one, b = *(const int64_t *)two;
    return (a > b) - (a < b);
}

/* The smallest sample that "share" of all are not above. */
static double percentile_ms(const struct samples *samples, double share)
{
    if (!samples->count)
        return 0;
    size_t at = (size_t)(share * (double)samples->count);
    if (at >= samples->count)
        at = samples->count - 1;
    return (double)samples->values[at] / 1e6;
}

void print_samples(struct samples *samples)
{
    if (samples->count)
        qsort(samples->values, samples->count, sizeof *samples->values, compare);
    printf("p50_ms %.4f\n", percentile_ms(samples, 0.50));
    printf("p99_ms %.4f\n", percentile_ms(samples, 0.99));
    printf("max_ms %.4f\n", percentile_ms(samples, 1.0));
}

int parse_visitors(const char *text)
{
    int visitors = (int)parse_number(text, 100000, "visitors are at most 100000");
    if (!visitors) {
        errno = 0;
        die("there must be a visitor");
    }
    return visitors;
}

int64_t parse_seconds(const char *text)
{
    char *end;
    double seconds = strtod(text, &end);
    if (end == text || *end || !(seconds > 0 && seconds <= 3600)) {
        errno = 0;
        die("seconds are more than 0 and at most 3600");
    }
    return (int64_t)(seconds * NS_PER_S);
}

size_t make_get(char *buffer, size_t size, const char *host, const char *path, const char *lines)
{
    const char *slash = path[0] == '/' ? "" : "/";
    int length = snprintf(buffer, size, "GET %s%s HTTP/1.1\r\nHost: %s\r\n%s\r\n", slash, path, host, lines);
    if (length < 0 || (size_t)length >= size) {
        errno = 0;
        die("the host or the path is too long");
    }
    return (size_t)length;
}

struct head parse_head(const char *data, size_t count)
{
    struct head head = {.body = -1};
    char text[HEAD_MOST + 1];
    const char *end = memmem(data, count, "\r\n\r\n", 4);
    if (!end || end - data > HEAD_MOST - 4)
        return head;
    head.length = (size_t)(end - data) + 4;
    memcpy(text, data, head.length);
    text[head.length] = 0;
    if (sscanf(text, "HTTP/1.%*1[01] %3d", &head.status) != 1)
        head.status = 0;
    for (char *line = strstr(text, "\r\n"); line; line = strstr(line + 2, "\r\n")) {
        if (!strncasecmp(line + 2, "content-length:", 15))
            head.body = strtoll(line + 17, NULL, 10);
        else if (!strncasecmp(line + 2, "transfer-encoding:", 18))
            head.chunked = true;
    }
    return head;
}
