"""The visitors of the soak: ``visitors.py JSON``; each does one thing after another until SIGTERM.

The argument is a list of `Crowd`. At SIGTERM what has begun is finished; then the counts of each crowd
are printed, and the process ends.
"""

from __future__ import annotations

import json
import random
import signal
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from gevent import monkey

monkey.patch_all()

import gevent  # noqa: E402
from gevent import socket  # noqa: E402
from gevent.event import Event  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.soak_parts.counting import Closed, Counts, Line  # noqa: E402
from benchmarks.soak_parts.crowds import LARGEST, Crowd  # noqa: E402
from benchmarks.soak_parts.frames import CLOSE, read_frame, write_frame  # noqa: E402

PATIENCE = 60.0  # seconds for one step; longer than anything takes that ends well
PAUSE = 0.05  # seconds between two things that a visitor does, at most
CUT = 0.1  # of the things that a visitor does, how many end in a reset where visitors are cut
_PATTERN = bytes(range(256)) * (LARGEST // 256 + 1)
_RESET = struct.pack("ii", 1, 0)


class Wrong(Exception):
    """An answer that is not the right one, though it came whole."""


class Left(Exception):
    """The visitor has gone in the middle, as he meant to."""


class Visitor:
    """One of a crowd."""

    def __init__(self, crowd: Crowd, number: int, counts: Counts) -> None:
        self._crowd = crowd
        self._counts = counts
        self._random = random.Random(crowd.seed * 1000 + number)  # nosec B311 # repeatable
        self._leaving = False

    def run(self, over: Event) -> None:
        """One thing after another until ``over`` is set."""
        http = (
            self._keep_alive,
            self._new_connection,
            self._download,
            self._upload,
            self._chunks,
            self._chat,
        )
        things: tuple[Callable[[Line], None], ...] = http if self._crowd.kind == "http" else (self._echo,)
        while not over.is_set():
            self._one(self._random.choice(things))
            over.wait(self._random.random() * PAUSE)

    def _one(self, thing: Callable[[Line], None]) -> None:
        self._counts["things"] += 1
        self._leaving = self._crowd.cut and self._random.random() < CUT
        try:
            with gevent.Timeout(PATIENCE, Closed("too slow")):
                line = Line(socket.create_connection(("127.0.0.1", self._crowd.port)), self._counts)
                line.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    thing(line)
                finally:
                    line.close()
        except Left:
            self._counts["left"] += 1
        except Wrong as error:
            self._counts["wrong"] += 1
            print("wrong:", self._crowd.name, error, flush=True)
        except (OSError, Closed, ValueError):
            self._counts["failed"] += 1

    def _may_leave(self, line: Line) -> None:
        if self._leaving:
            line.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            raise Left

    # -- HTTP -----------------------------------------------------------------

    def _ask(self, line: Line, target: str, body: bytes = b"", method: str = "GET", *fields: str) -> None:
        lines = [f"{method} /{target} HTTP/1.1", f"Host: {self._crowd.name}.localhost", *fields]
        if method == "POST":
            lines.append(f"Content-Length: {len(body)}")
        line.send("\r\n".join([*lines, "", ""]).encode())
        if body:
            half = len(body) // 2
            self._counts["up"] += half
            line.send(body[:half])
            self._may_leave(line)
            self._counts["up"] += len(body) - half
            line.send(body[half:])

    def _answer(self, line: Line) -> bytes:
        """An answer's body, read to its end. Raises `Closed` if there is none, or none of a service."""
        head = line.until(b"\r\n\r\n").lower()
        if not head:
            raise Closed
        if not head.startswith(b"http/1.1 200 "):
            raise Closed(head[:40])
        return self._chunked(line) if b"chunked" in head else self._sized(line, head)

    def _page(self, line: Line, what: str, size: int) -> None:
        """Asks for so many bytes; `Wrong` if others come."""
        self._ask(line, f"{what}/{size}")
        body = self._answer(line)
        if len(body) != size or (what == "down" and body != _PATTERN[:size]):
            raise Wrong(f"{len(body)} bytes instead of {size}, or other ones")

    def _sized(self, line: Line, head: bytes) -> bytes:
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        first = line.exactly(length // 2, "down")
        self._may_leave(line)
        return first + line.exactly(length - length // 2, "down")

    def _chunked(self, line: Line) -> bytes:
        body = bytearray()
        while size := int(line.until(b"\r\n"), 16):
            body += line.exactly(size, "down")
            line.exactly(2)
            self._may_leave(line)
        line.exactly(2)
        return bytes(body)

    def _keep_alive(self, line: Line) -> None:
        for _ in range(20):
            self._page(line, "down", self._random.randint(1, 2000))

    def _new_connection(self, line: Line) -> None:
        self._page(line, "down", 500)

    def _download(self, line: Line) -> None:
        self._page(line, "down", self._random.randint(1, LARGEST))

    def _upload(self, line: Line) -> None:
        size = self._random.randint(1, LARGEST)
        self._ask(line, "up/", _PATTERN[:size], "POST")
        if (said := self._answer(line)) != b"%d" % size:
            raise Wrong(f"{said!r} instead of {size}")

    def _chunks(self, line: Line) -> None:
        self._page(line, "chunks", self._random.randint(1, 50_000))

    def _chat(self, line: Line) -> None:
        upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
        self._ask(line, "chat/", b"", "GET", *upgrade, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
        if not line.until(b"\r\n\r\n").startswith(b"HTTP/1.1 101 "):
            raise Closed
        for _ in range(20):
            message = self._random.randbytes(self._random.randint(1, 2000))
            line.send(write_frame(message, masked=True))
            if read_frame(line) != message:
                raise Wrong("another message came back")
            self._may_leave(line)
        line.send(write_frame(b"\x03\xe8", masked=True, opcode=CLOSE))
        if line.some():
            raise Wrong("something came behind the close")

    # -- TCP ------------------------------------------------------------------

    def _echo(self, line: Line) -> None:
        for _ in range(5):
            message = _PATTERN[: self._random.randint(1, LARGEST // 5)]
            sender = gevent.spawn(line.send, message)
            try:
                first = line.exactly(len(message) // 2)
                self._may_leave(line)
                if first + line.exactly(len(message) - len(first)) != message:
                    raise Wrong("something else came back")
            finally:
                sender.kill()
        line.sock.shutdown(socket.SHUT_WR)
        if line.some():
            raise Wrong("something came behind the end")


def main(text: str) -> None:
    """Visits until SIGTERM."""
    over = Event()
    gevent.signal_handler(signal.SIGTERM, over.set)
    gevent.signal_handler(signal.SIGINT, over.set)
    crowds = [Crowd(**fields) for fields in json.loads(text)]
    counts: dict[str, Counts] = {crowd.name: Counter() for crowd in crowds}
    running = [
        gevent.spawn(Visitor(crowd, number, counts[crowd.name]).run, over)
        for crowd in crowds
        for number in range(crowd.count)
    ]
    print("ready", flush=True)
    gevent.joinall(running)
    print("counts", json.dumps(counts), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
