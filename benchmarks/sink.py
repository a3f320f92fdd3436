"""A web service that takes bodies of any size and throws them away: what uploads are measured against.

nginx cannot play this part: it answers a body that it discards before it has arrived, or
writes it to a disk. This answers 200 when the last byte is here. One thread a connection;
prints its port.
"""

from __future__ import annotations

import re
import socket
import threading

BUFFER = 256 * 1024  # bytes; beyond this one recv_into gets no cheaper


def serve(connection: socket.socket) -> None:
    """Answers requests on one connection until it ends."""
    buffer = memoryview(bytearray(BUFFER))
    pending = b""
    with connection:
        while True:
            while b"\r\n\r\n" not in pending:
                data = connection.recv(65536)
                if not data:
                    return
                pending += data
            head, _, pending = pending.partition(b"\r\n\r\n")
            length = re.search(rb"(?im)^content-length:\s*(\d+)", head)
            left = (int(length[1]) if length else 0) - len(pending)
            pending = b""  # a body is in flight: nobody here pipelines
            while left > 0:
                count = connection.recv_into(buffer, min(left, BUFFER))
                if count == 0:
                    return
                left -= count
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n")


def _serve_quietly(connection: socket.socket) -> None:
    try:
        serve(connection)
    except OSError:
        pass  # the visitor went away


def main() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        print(f"port {listener.getsockname()[1]}", flush=True)
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_serve_quietly, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
