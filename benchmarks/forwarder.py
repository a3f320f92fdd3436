"""A plain TCP forwarder on gevent, in one process: what a hop costs that is no tunnel and promises nothing.

Started with the ports to forward to; prints ``PORT leads to TARGET`` for each.
"""

from __future__ import annotations

import sys

import gevent
from gevent import socket
from gevent.server import StreamServer

CHUNK = 256 * 1024  # bytes


def copy(source: socket.socket, target: socket.socket) -> None:
    """Moves bytes one way until their end, and passes the end on."""
    try:
        while data := source.recv(CHUNK):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # one end went away; the other direction ends by itself


def forward(visitor: socket.socket, port: int) -> None:
    """Serves one visitor; closes both sockets."""
    service = socket.socket()
    try:
        for sock in (visitor, service):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        service.connect(("127.0.0.1", port))
        back = gevent.spawn(copy, service, visitor)
        copy(visitor, service)
        back.join()
    except OSError:
        pass
    finally:
        service.close()
        visitor.close()


def listen(port: int) -> None:
    """Forwards a port that the kernel chooses to ``port``."""

    def handle(visitor: socket.socket, _address: object) -> None:
        forward(visitor, port)

    server = StreamServer(("127.0.0.1", 0), handle, backlog=2048)
    server.start()
    print(f"{server.server_port} leads to {port}", flush=True)


def main() -> None:
    for argument in sys.argv[1:]:
        listen(int(argument))
    gevent.wait()


if __name__ == "__main__":
    main()
