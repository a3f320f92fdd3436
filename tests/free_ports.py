"""Ports that several processes must know before any of them is started."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

_RESERVED = Path(tempfile.gettempdir()) / f"tinytun-test-ports-{os.getuid()}"
"""An empty file. A lock on a byte of it is a port that a process of the tests has, as long as it lives."""


class Ports:
    """Gives ports to this process that no other one of the tests gets, and nobody has now."""

    def __init__(self) -> None:
        self._given: set[int] = set()
        self._file = -1
        self._owner = 0

    def take(self, count: int, low: int, high: int, host: str = "") -> list[int]:
        """Different ones of a range, free on ``host`` (all addresses by default)."""
        held: list[socket.socket] = []
        try:
            while len(held) < count:
                port = random.randrange(low, high)
                if self._reserve(port):
                    try:
                        held.append(socket.create_server((host, port)))
                    except OSError:
                        continue
            return [int(sock.getsockname()[1]) for sock in held]
        finally:
            for sock in held:
                sock.close()

    def _reserve(self, port: int) -> bool:
        """Whether nobody has been given it; between its being looked at and used it might be given twice."""
        if self._owner != os.getpid():  # a child has its own ports
            self._given, self._owner = set(), os.getpid()
            self._file = os.open(_RESERVED, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if port in self._given:
            return False
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
        except OSError:
            return False
        self._given.add(port)
        return True


_ports = Ports()


def free_ports(count: int) -> list[int]:
    """Different ports that are free on all addresses now, below the range that the kernel gives away."""
    return _ports.take(count, 10_000, 19_000)


def free_tunnel_ports(count: int) -> list[int]:
    """Ports that a TCP tunnel may have and nobody does now, below those that the kernel gives away."""
    return _ports.take(count, 20_000, 32_000, "127.0.0.1")
