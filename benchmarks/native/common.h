/* What the programs share: time, sockets, and the end of a program that cannot go on. */
#ifndef COMMON_H
#define COMMON_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NS_PER_S 1000000000LL
#define NS_PER_US 1000LL

/* Ends the program with a line on standard error; with the text of errno if it is set. */
_Noreturn void die(const char *what);

/* calloc that never returns NULL. */
void *allocate(size_t size);

/* Monotonic, in nanoseconds. */
int64_t now_ns(void);

/* The number that text is, within 0..most; otherwise the program ends and names what was wrong. */
int64_t parse_number(const char *text, int64_t most, const char *what);

/* An IPv4 address and port from "ADDRESS:PORT". */
struct sockaddr_in parse_address(const char *text);
struct sockaddr_in make_address(const char *host, const char *port);

/* A listening socket that does not block; receive_buffer (bytes) is inherited by what it accepts, 0 leaves
 * it to the kernel. Prints "port N" when it listens. */
int listen_on(struct sockaddr_in address, int receive_buffer);

/* Begins to connect without blocking; -1 with errno if that failed at once. */
int begin_connect(struct sockaddr_in address, int receive_buffer);

/* What became of a connect: 0, or the errno. */
int socket_error(int socket);

void set_nodelay(int socket);

/* Allows as many descriptors as the hard limit does. */
void raise_file_limit(void);

int make_epoll(void);
void watch(int epoll, int socket, uint32_t events, void *owner);

/* Waits for events, until the absolute time "until" at most; precise to the kernel's high-resolution timers.
 * Returns how many there are. */
struct epoll_event;
int wait_events(int epoll, struct epoll_event *events, int room, int64_t until);

#endif
