#include "common.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

void die(const char *what)
{
    if (errno)
        fprintf(stderr, "%s: %s\n", what, strerror(errno));
    else
        fprintf(stderr, "%s\n", what);
    exit(1);
}

void *allocate(size_t size)
{
    void *memory = calloc(1, size);
    if (!memory)
        die("no memory");
    return memory;
}

int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * NS_PER_S + now.tv_nsec;
}

int64_t parse_number(const char *text, int64_t most, const char *what)
{
    char *end;
    errno = 0;
    long long number = strtoll(text, &end, 10);
    if (errno || end == text || *end || number < 0 || number > most) {
        errno = 0;
        die(what);
    }
    return number;
}

struct sockaddr_in make_address(const char *host, const char *port)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    address.sin_port = htons((uint16_t)parse_number(port, 65535, "a port is a number of 0 to 65535"));
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1) {
        errno = 0;
        die("an address is four numbers, like 127.0.0.1");
    }
    return address;
}

struct sockaddr_in parse_address(const char *text)
{
    const char *colon = strrchr(text, ':');
    char host[INET_ADDRSTRLEN];
    if (!colon || (size_t)(colon - text) >= sizeof host) {
        errno = 0;
        die("an address and port are written ADDRESS:PORT");
    }
    memcpy(host, text, (size_t)(colon - text));
    host[colon - text] = 0;
    return make_address(host, colon + 1);
}

static int make_socket(int receive_buffer)
{
    int made = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (made >= 0 && receive_buffer)
        setsockopt(made, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer);
    return made;
}

int listen_on(struct sockaddr_in address, int receive_buffer)
{
    int listener = make_socket(receive_buffer);
    int yes = 1;
    socklen_t size = sizeof address;
    if (listener < 0 || setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes) < 0 ||
        bind(listener, (struct sockaddr *)&address, size) < 0 || listen(listener, 4096) < 0 ||
        getsockname(listener, (struct sockaddr *)&address, &size) < 0)
        die("cannot listen");
    signal(SIGPIPE, SIG_IGN);
    printf("port %d\n", ntohs(address.sin_port));
    fflush(stdout);
    return listener;
}

int begin_connect(struct sockaddr_in address, int receive_buffer)
{
    int made = make_socket(receive_buffer);
    if (made < 0)
        return -1;
    set_nodelay(made);
    if (connect(made, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS) {
        int reason = errno;
        close(made);
        errno = reason;
        return -1;
    }
    return made;
}

int socket_error(int socket)
{
    int error = 0;
    socklen_t size = sizeof error;
    if (getsockopt(socket, SOL_SOCKET, SO_ERROR, &error, &size) < 0)
        return errno;
    return error;
}

void set_nodelay(int socket)
{
    int yes = 1;
    setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
}

void raise_file_limit(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

int make_epoll(void)
{
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll < 0)
        die("epoll_create1");
    return epoll;
}

void watch(int epoll, int socket, uint32_t events, void *owner)
{
    struct epoll_event event = {.events = events, .data.ptr = owner};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, socket, &event) < 0)
        die("epoll_ctl");
}

int wait_events(int epoll, struct epoll_event *events, int room, int64_t until)
{
    int64_t left = until - now_ns();
    if (left < 0)
        left = 0;
    struct timespec timeout = {.tv_sec = left / NS_PER_S, .tv_nsec = left % NS_PER_S};
    int count = epoll_pwait2(epoll, events, room, &timeout, NULL);
    if (count < 0 && errno != EINTR)
        die("epoll_pwait2");
    return count < 0 ? 0 : count;
}
