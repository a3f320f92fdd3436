"""The local services of the soak: ``service.py NAME:KIND..``, each on a port of its own; prints the ports.

``http`` answers ``/down/N`` with N bytes, ``/chunks/N`` with N bytes in chunks, ``/up`` with the length of
the body that came, and talks WebSocket on ``/chat``; ``tcp`` echoes.
"""

from __future__ import annotations

import hashlib
import sys
from base64 import b64encode
from collections import Counter
from pathlib import Path

from gevent import monkey

monkey.patch_all()

import gevent.event  # noqa: E402
from gevent import socket  # noqa: E402
from gevent.server import StreamServer  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.soak_parts.counting import Closed, Counts, Line, tell_on_signal  # noqa: E402
from benchmarks.soak_parts.frames import read_frame, write_frame  # noqa: E402

CHUNK = 1000  # bytes
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3
_BLOCK = bytes(range(256)) * 256


class Service:
    """One port; what passed it."""

    def __init__(self, kind: str) -> None:
        self.counts: Counts = Counter()
        self._talk = self._http if kind == "http" else self._echo
        self._server = StreamServer(("127.0.0.1", 0), self._serve, backlog=2048)
        self._server.start()
        self.port = int(self._server.server_port)

    def _serve(self, sock: socket.socket, _: object) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line = Line(sock, self.counts)
        try:
            self._talk(line)
        except (OSError, Closed):
            self.counts["cut"] += 1
        finally:
            line.close()

    def _echo(self, line: Line) -> None:
        while data := line.some():
            line.send(data)
        line.sock.shutdown(socket.SHUT_WR)

    def _http(self, line: Line) -> None:
        while head := line.until(b"\r\n\r\n"):
            _, target, _ = head.split(b" ", 2)
            fields = {
                name.lower(): value.strip()
                for name, _, value in (field.partition(b":") for field in head.split(b"\r\n")[1:])
            }
            length = int(fields.get(b"content-length", b"0"))
            line.exactly(length, "up")
            _, what, number = target.split(b"/", 2)
            if what == b"chat":
                self._chat(line, fields[b"sec-websocket-key"])
                return
            if what == b"up":
                said = b"%d" % length
                self.counts["down"] += len(said)
                line.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(said), said))
            elif what == b"chunks":
                line.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                self._body(line, int(number), chunked=True)
            else:
                line.send(b"HTTP/1.1 200 OK\r\nContent-Length: %b\r\n\r\n" % number)
                self._body(line, int(number), chunked=False)

    def _body(self, line: Line, left: int, *, chunked: bool) -> None:
        while left:
            piece = _BLOCK[: min(left, CHUNK if chunked else len(_BLOCK))]
            self.counts["down"] += len(piece)  # before it is sent: what is cut off counts as sent
            line.send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            left -= len(piece)
        if chunked:
            line.send(b"0\r\n\r\n")

    def _chat(self, line: Line, key: bytes) -> None:
        accept = b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())
        line.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n")
        line.send(b"Sec-WebSocket-Accept: %b\r\n\r\n" % accept)
        while (message := read_frame(line)) is not None:
            line.send(write_frame(message))


def main(words: list[str]) -> None:
    """Serves until the process is ended."""
    services = {}
    for word in words:
        name, _, kind = word.partition(":")
        services[name] = Service(kind)
        print(f"port {name} {services[name].port}", flush=True)
    tell_on_signal(lambda: {name: dict(service.counts) for name, service in services.items()})
    print("ready", flush=True)
    gevent.event.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1:])
