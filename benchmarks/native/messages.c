/* A service of small messages and chunks, and the visitors that load a tunnel with them.
 *
 *   messages echo                                         the service, on a port of the kernel's choice
 *   messages load ADDR PORT HOST SOCKETS SECONDS PAYLOAD  WebSocket messages, each after the echo of the last
 *   messages reader ADDR PORT HOST PATH VISITORS SECONDS  bodies, read and thrown away
 *   messages firstbyte ADDR PORT HOST PATH VISITORS       the first byte on new connections, all at once
 *
 * HOST is the Host field. The visitors print lines of a name and a number, "failures" among them. */
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "common.h"
#include "messages.h"

int main(int count, char **arguments)
{
    static const struct {
        const char *name;
        int (*run)(int, char **);
        int arguments;
    } modes[] = {{"echo", run_echo, 0},
                 {"load", run_load, 6},
                 {"reader", run_reader, 6},
                 {"firstbyte", run_firstbyte, 5}};
    signal(SIGPIPE, SIG_IGN);
    raise_file_limit();
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++)
        if (count >= 2 && !strcmp(arguments[1], modes[i].name) && count - 2 == modes[i].arguments)
            return modes[i].run(count - 2, arguments + 2);
    fprintf(stderr, "usage: messages echo | load ... | reader ... | firstbyte ...\n");
    return 2;
}
