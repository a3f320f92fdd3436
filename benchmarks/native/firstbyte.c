/* New connections, all at once, a GET on each: how long until the first byte of the answer. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "common.h"
#include "messages.h"
#include "visitor.h"

#define PATIENCE (10 * NS_PER_S) /* an answer that takes longer has failed */
#define EVENTS 256

struct visitor {
    int socket;
    int64_t began;
    bool asked, over;
};

static struct tally tally;
static struct samples samples;
static char request[HEAD_MOST];
static size_t request_length;

static void begin(struct visitor *visitor, struct sockaddr_in address, int epoll)
{
    tally.attempts++;
    visitor->began = now_ns();
    visitor->socket = begin_connect(address, 0);
    if (visitor->socket < 0) {
        fail_errno(&tally, "connect", errno);
        visitor->over = true;
        return;
    }
    watch(epoll, visitor->socket, EPOLLIN | EPOLLOUT | EPOLLET, visitor);
}

static void ask(struct visitor *visitor)
{
    int error = socket_error(visitor->socket);
    if (!error && send(visitor->socket, request, request_length, MSG_NOSIGNAL) == (ssize_t)request_length) {
        visitor->asked = true;
        return;
    }
    fail_errno(&tally, "connect", error ? error : errno);
    visitor->over = true;
}

/* Looks at the answer's start; the connection stays open until all are done, so that closing costs nobody. */
static void look(struct visitor *visitor, int64_t now)
{
    char answer[13] = {0};
    ssize_t count = recv(visitor->socket, answer, sizeof answer - 1, MSG_PEEK);
    if (count < 0 && errno == EAGAIN)
        return;
    visitor->over = true;
    if (count < 0)
        fail_errno(&tally, "receive", errno);
    else if (count == 0)
        fail(&tally, "closed without an answer");
    else if (strncmp(answer, "HTTP/1.1 200", (size_t)count) != 0)
        fail(&tally, "the answer is not 200");
    else
        add_sample(&samples, now - visitor->began);
}

static bool handle(struct visitor *visitor, uint32_t events, int64_t now)
{
    if (!visitor->over && !visitor->asked && (events & (EPOLLOUT | EPOLLERR | EPOLLHUP)))
        ask(visitor);
    if (!visitor->over && (events & (EPOLLIN | EPOLLERR | EPOLLHUP)))
        look(visitor, now);
    return visitor->over;
}

int run_firstbyte(int count, char **arguments)
{
    (void)count;
    struct sockaddr_in address = make_address(arguments[0], arguments[1]);
    int visitors = parse_visitors(arguments[4]), open = 0;
    struct visitor *all = allocate((size_t)visitors * sizeof *all);
    int epoll = make_epoll();
    request_length = make_get(request, sizeof request, arguments[2], arguments[3], "");
    for (int i = 0; i < visitors; i++) {
        begin(&all[i], address, epoll);
        open += !all[i].over;
    }
    int64_t deadline = now_ns() + PATIENCE;
    while (open && now_ns() < deadline) {
        struct epoll_event events[EVENTS];
        int found = wait_events(epoll, events, EVENTS, deadline);
        int64_t now = now_ns();
        for (int i = 0; i < found; i++) {
            struct visitor *visitor = events[i].data.ptr;
            if (!visitor->over && handle(visitor, events[i].events, now))
                open--;
        }
    }
    for (; open; open--)
        fail(&tally, "no answer in time");
    print_samples(&samples);
    print_tally(&tally);
    return 0;
}
