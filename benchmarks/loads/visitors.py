"""Visitors of our own making: many that stay, and when their first bytes come. All in one thread."""

from __future__ import annotations

import errno
import selectors
import socket
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from ..processes import BenchmarkError
from ..services import SMALL
from ..way import Endpoint
from .outcome import Outcome

AT_ONCE = 64  # visitors that are on their way in at the same time: fewer than any backlog
PATIENCE = 20.0  # seconds without any progress after which those that wait have failed
ENOUGH_FAILURES = 100  # a contender that refuses so many will refuse the rest, too


@dataclass
class _Visitor:
    """One that is on his way in."""

    sock: socket.socket
    began: float
    answer: bytearray = field(default_factory=bytearray)


class Visitors:
    """Visitors who each made one request and keep their connection. A context: leaving it, they all go."""

    def __init__(self, endpoint: Endpoint, outcome: Outcome) -> None:
        """Failures are counted in ``outcome``."""
        self.held: list[socket.socket] = []
        #: Seconds from the beginning of a visitor's connection to the first byte of his answer.
        self.first_bytes: list[float] = []
        self._endpoint = endpoint
        self._outcome = outcome
        self._selector = selectors.DefaultSelector()
        self._progress = 0.0

    def come(self, count: int, at_once: int = AT_ONCE) -> None:
        """``count`` more, ``at_once`` of them on their way at a time. Blocks until all have their answer."""
        failures = self._outcome.failures
        coming = 0
        self._progress = time.monotonic()
        while count or coming:
            if self._outcome.failures - failures >= ENOUGH_FAILURES:
                count = 0
            while count and coming < at_once:
                count -= 1
                coming += self._begin()
            for key, events in self._selector.select(0.5):
                coming -= self._go_on(key.data, events)
            if time.monotonic() - self._progress > PATIENCE:
                self._give_up(coming)
                return

    def _begin(self) -> int:
        """A new visitor; how many are on their way because of it: 1, or 0 if the connection failed."""
        self._outcome.attempts += 1
        sock = socket.socket()
        sock.setblocking(False)
        began = time.monotonic()
        error = sock.connect_ex(("127.0.0.1", self._endpoint.port))
        try:
            if error and error != errno.EINPROGRESS:
                raise OSError(error, "connect")
            if not error:
                sock.send(self._endpoint.request("small"))
        except OSError as failure:
            sock.close()
            self._outcome.failed(str(failure))
            return 0
        wanted = selectors.EVENT_WRITE if error else selectors.EVENT_READ
        self._selector.register(sock, wanted, _Visitor(sock, began))
        return 1

    def _go_on(self, visitor: _Visitor, events: int) -> int:
        """What the socket is ready for; 1 if the visitor has arrived or failed, 0 if he is still coming."""
        self._progress = time.monotonic()
        try:
            if events & selectors.EVENT_WRITE:
                visitor.sock.send(self._endpoint.request("small"))
                self._selector.modify(visitor.sock, selectors.EVENT_READ, visitor)
                return 0
            data = visitor.sock.recv(65536)
            if not data:
                raise BenchmarkError("a visitor's connection was closed")
            if not visitor.answer:
                self.first_bytes.append(self._progress - visitor.began)
            visitor.answer += data
            if not complete(visitor.answer):
                return 0
        except (OSError, BenchmarkError) as failure:
            self._outcome.failed(str(failure))
            self._selector.unregister(visitor.sock)
            visitor.sock.close()
            return 1
        self._selector.unregister(visitor.sock)
        self.held.append(visitor.sock)
        return 1

    def _give_up(self, count: int) -> None:
        self._outcome.failed(f"no answer for {PATIENCE:.0f} s", count)
        for key in list(self._selector.get_map().values()):
            self._selector.unregister(key.fileobj)
            key.data.sock.close()

    def leave(self) -> None:
        """All that stay close their connections."""
        for sock in self.held:
            sock.close()
        self.held.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
        for key in list(self._selector.get_map().values()):
            key.data.sock.close()
        self._selector.close()


def complete(answer: bytes | bytearray) -> bool:
    """Whether the answer to a small request is all here; BenchmarkError if it is not the right one."""
    head, end, body = bytes(answer).partition(b"\r\n\r\n")
    if not end or len(body) < SMALL:
        return False
    if not head.startswith(b"HTTP/1.1 200 ") or len(body) != SMALL:
        raise BenchmarkError(f"a wrong answer: {head[:60]!r}")
    return True


def knock(endpoint: Endpoint, visitors: int, times: int = 1) -> None:
    """A warm-up: so many visitors come at once, make a request and go, ``times`` times.

    Fails only if nobody is served: what goes wrong for some is for the measurement to count.
    """
    outcome = Outcome()
    with Visitors(endpoint, outcome) as crowd:
        for _ in range(times):
            crowd.come(visitors)
            if not crowd.held:
                raise BenchmarkError(f"in the warm-up: {'; '.join(outcome.reasons)}")
            crowd.leave()


def kept_requests(endpoint: Endpoint, seconds: float, outcome: Outcome) -> list[float]:
    """Seconds that each of the small requests took that one visitor makes one after another."""
    took: list[float] = []
    end = time.monotonic() + seconds
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=10) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while (began := time.monotonic()) < end:
            outcome.attempts += 1
            sock.sendall(endpoint.request("small"))
            answer = b""
            while not complete(answer):
                data = sock.recv(65536)
                if not data:
                    raise BenchmarkError("a visitor's connection was closed")
                answer += data
            took.append(time.monotonic() - began)
    return took
