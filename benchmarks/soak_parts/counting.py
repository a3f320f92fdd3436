"""Sockets that count, and programs of gevent's that tell their counts when they get SIGUSR1."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any

import gevent
from gevent import socket

Counts = Counter[str]
PIECE = 65536  # bytes read at once


class Closed(Exception):
    """The other side ended the connection where it should not."""


class Line:
    """A socket whose every byte is counted, with what was read ahead. ``close`` ends it."""

    def __init__(self, sock: socket.socket, counts: Counts) -> None:
        self.sock = sock
        self._counts = counts
        self._ahead = b""

    def send(self, data: bytes) -> None:
        """Sends all of ``data``; what the kernel has taken is counted also if it fails."""
        view = memoryview(data)
        while view:
            sent = self.sock.send(view)
            self._counts["sent"] += sent
            view = view[sent:]

    def some(self) -> bytes:
        """What has come, ``b""`` at the end."""
        data, self._ahead = self._ahead, b""
        if not data:
            data = self.sock.recv(PIECE)
            self._counts["received"] += len(data)
        return data

    def exactly(self, count: int, part: str = "") -> bytes:
        """So many bytes; counted as ``part`` too, as they come. Raises `Closed`."""
        got = bytearray()
        while len(got) < count:
            data = self.some()
            if not data:
                raise Closed
            taken = data[: count - len(got)]
            self._ahead = data[len(taken) :]
            got += taken
            if part:
                self._counts[part] += len(taken)
        return bytes(got)

    def until(self, mark: bytes) -> bytes:
        """Up to and with ``mark``; ``b""`` if the connection ends before anything came. Raises `Closed`."""
        got = b""
        while mark not in got:
            data = self.some()
            if not data:
                if got:
                    raise Closed
                return b""
            got += data
        end = got.index(mark) + len(mark)
        self._ahead = got[end:]
        return got[:end]

    def close(self) -> None:
        self.sock.close()


def tell_on_signal(what: Callable[[], dict[str, Any]]) -> None:
    """From now on each SIGUSR1 prints one line: ``counts`` and ``what()`` as JSON."""
    gevent.signal_handler(signal.SIGUSR1, lambda: print("counts", json.dumps(what()), flush=True))
