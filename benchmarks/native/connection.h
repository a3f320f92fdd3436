/* The relay's connections: two sides, each with what it sends, from the accept to the end. */
#ifndef CONNECTION_H
#define CONNECTION_H

#include <netinet/in.h>

#include "flow.h"
#include "heap.h"

/* What all connections go along; filled in by the program before the first event. */
struct path {
    struct sockaddr_in target;
    struct line up, down; /* from the clients, and to them */
    size_t window;        /* bytes; 0: no limit */
    int receive_buffer;   /* bytes; 0: the kernel's */
    int epoll, listener;
    struct heap timers;
};

extern struct path path;

/* An event of epoll; its owner is NULL for the listener. */
void handle_event(void *owner, uint32_t events);

/* Frees the connections that ended; to be called when no event that was taken can name them. */
void free_dead(void);

#endif
