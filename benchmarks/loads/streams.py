"""Downloads that are read by this process and thrown away in the kernel, with a look at the clock in between.

curl cannot leave out the first second. Reading with MSG_TRUNC discards what has come without
copying it (tcp(7)), so this reader is never the slowest part: it takes several GB/s from loopback.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

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


def read_streams(
    endpoint: Endpoint,
    path: str,
    count: int,
    ignored: float,
    seconds: float,
    outcome: Outcome,
    at_start: Callable[[], None] | None = None,
) -> Flow:
    """``count`` visitors download ``path``; what comes in the first ``ignored`` seconds is not counted.

    The clock starts with the first connection. A visitor who has all of it asks again, on the same
    connection. ``at_start`` is called when the measured time begins. Each visitor is an attempt; one who gets nothing, or
    is cut off, has failed.
    """
    buffer = bytearray(CHUNK)
    got = [0] * count
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        began = time.monotonic()
        readers = [_Reader(stack, endpoint, path, buffer) for _ in range(count)]
        for number, reader in enumerate(readers):
            selector.register(reader.sock, selectors.EVENT_READ, number)
        start, end, before = began + ignored, began + ignored + seconds, None
        outcome.attempts += count
        while (now := time.monotonic()) < end and selector.get_map():
            if before is None and now >= start:
                start, before = now, sum(got)
                if at_start:
                    at_start()
            for key, _ in selector.select(min(0.1, end - now)):
                number = key.data
                try:
                    got[number] += readers[number].read()
                except (OSError, BenchmarkError) as error:
                    outcome.failed(str(error))
                    selector.unregister(readers[number].sock)
    silent = sum(not amount for amount in got)
    if silent:
        outcome.failed("a visitor got nothing", silent)
    if before is None:  # all were cut off before the measured time began
        return Flow(0, seconds)
    return Flow(sum(got) - before, now - start)


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
    """A visitor who asks for ``path``, reads for ``read`` seconds, then never again; he goes with ``stack``."""
    sock = stack.enter_context(socket.create_connection(("127.0.0.1", endpoint.port), timeout=10))
    sock.sendall(endpoint.request(path))
    buffer = bytearray(1 << 20)
    end = time.monotonic() + read
    while time.monotonic() < end:
        if not sock.recv_into(buffer, len(buffer), socket.MSG_TRUNC):
            raise BenchmarkError("a download was cut off")
