"""Downloads that are read by this process and thrown away in the kernel, with a look at the clock in between.

curl cannot leave out the first second. Reading with MSG_TRUNC discards what has come without
copying it (tcp(7)), so this reader is never the slowest part: it takes several GB/s from loopback.
"""

from __future__ import annotations

import selectors
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from ..processes import BenchmarkError
from ..way import Endpoint
from .outcome import Outcome

CHUNK = 4 << 20  # bytes discarded in one call at most
HEAD = 16384  # bytes of a response head at most


@dataclass(frozen=True)
class Flow:
    """What came in the time that was measured."""

    bytes: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.bytes / self.seconds


class Downloads:
    """Visitors who download ``path``, and ask for it again, on the same connection, when they have all of it.

    Each is an attempt in ``outcome``; one who gets nothing, or is cut off, has failed. A context:
    leaving it, they go, wherever they are.
    """

    def __init__(self, endpoint: Endpoint, path: str, count: int, outcome: Outcome) -> None:
        self._outcome = outcome
        self._got = [0] * count
        self._stack = ExitStack()
        self._selector = self._stack.enter_context(selectors.DefaultSelector())
        buffer = bytearray(CHUNK)
        outcome.attempts += count
        try:
            self._readers = [_Reader(self._stack, endpoint, path, buffer) for _ in range(count)]
        except BaseException:
            self._stack.close()
            raise
        for number, reader in enumerate(self._readers):
            self._selector.register(reader.sock, selectors.EVENT_READ, number)

    def read(self, seconds: float) -> Flow:
        """What comes in the next ``seconds``, or until all were cut off."""
        began, before = time.monotonic(), sum(self._got)
        while (left := began + seconds - time.monotonic()) > 0 and self._selector.get_map():
            for key, _ in self._selector.select(left):
                number = key.data
                try:
                    self._got[number] += self._readers[number].read()
                except (OSError, BenchmarkError) as error:
                    self._outcome.failed(str(error))
                    self._selector.unregister(self._readers[number].sock)
        return Flow(sum(self._got) - before, time.monotonic() - began)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if silent := sum(not amount for amount in self._got):
            self._outcome.failed("a visitor got nothing", silent)


def read_streams(
    endpoint: Endpoint, path: str, count: int, ignored: float, seconds: float, outcome: Outcome
) -> Flow:
    """``count`` visitors download ``path``; what comes in the first ``ignored`` seconds is not counted."""
    with Downloads(endpoint, path, count, outcome) as visitors:
        if ignored:
            visitors.read(ignored)
        return visitors.read(seconds)


class _Reader:
    """One visitor: blocking until the request is sent, then read when there is something."""

    def __init__(self, stack: ExitStack, endpoint: Endpoint, path: str, buffer: bytearray) -> None:
        self.sock = stack.enter_context(socket.create_connection(("127.0.0.1", endpoint.port), timeout=10))
        self._request = endpoint.request(path)
        self._buffer = buffer
        self._left = 0  # bytes of the body that are still to come
        self.sock.sendall(self._request)
        self.sock.setblocking(False)

    def read(self) -> int:
        """Bytes of the body that came, at most `CHUNK`; asks again after the last one."""
        if self._left == 0:
            return self._head()
        count = self.sock.recv_into(self._buffer, min(CHUNK, self._left), socket.MSG_TRUNC)
        if count == 0:
            raise BenchmarkError("a download was cut off")
        self._left -= count
        if self._left == 0:
            self.sock.send(self._request)
        return count

    def _head(self) -> int:
        data = self.sock.recv(HEAD, socket.MSG_PEEK)
        head, end, _ = data.partition(b"\r\n\r\n")
        if not data or (not end and len(data) == HEAD):
            raise BenchmarkError("a download was cut off")
        if not end:
            return 0
        self.sock.recv(len(head) + len(end))
        if not head.startswith(b"HTTP/1.1 200 "):
            raise BenchmarkError(f"a wrong answer: {head[:60]!r}")
        for line in head.lower().split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name == b"content-length":
                self._left = int(value)
        return 0


def stalled(stack: ExitStack, endpoint: Endpoint, path: str, read: float = 0.0) -> None:
    """A visitor who asks for ``path``, reads for ``read`` seconds, then never again; ``stack`` ends him."""
    sock = stack.enter_context(socket.create_connection(("127.0.0.1", endpoint.port), timeout=10))
    sock.sendall(endpoint.request(path))
    buffer = bytearray(1 << 20)
    end = time.monotonic() + read
    while time.monotonic() < end:
        if not sock.recv_into(buffer, len(buffer), socket.MSG_TRUNC):
            raise BenchmarkError("a download was cut off")
