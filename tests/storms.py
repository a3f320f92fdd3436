"""Visitors in numbers: those who abort, those who sit there, those who come slowly; and what others notice.

Plain sockets, nothing of the code under test. Everything blocks the calling thread; run a storm in a
thread, or a process, of its own beside what it is to disturb.
"""

from __future__ import annotations

import resource
import select
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from support import Source, connect, read_response, request, reset

PATIENCE = 60.0
"""Seconds for one step of a visitor, behind whoever storms the server at the same time."""


def allow_sockets(count: int) -> None:
    """Raises this process's limit of open files, so that ``count`` sockets have room beside the rest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        top = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (top, hard))


def percentile(values: Iterable[float], part: float) -> float:
    """The value below which ``part`` (0.99) of ``values`` are."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


# -- aborts ----------------------------------------------------------------------------------------


def abort(port: int, number: int, name: str = "demo") -> None:
    """One visitor who leaves: at once, inside his head, behind it, inside his body or inside the answer.

    ``number`` chooses where, and whether by a reset or a clean end. Anything may be refused.
    """
    where = number % 6
    try:
        visitor = connect(port, timeout=PATIENCE)
    except OSError:
        return
    try:
        if where == 1:
            visitor.sendall(b"GET / HTTP/1.1\r\nHost: demo.loc")
        elif where == 2:
            visitor.sendall(request(name, method=b"POST", body=b"x" * 1000)[:-500])
        elif where >= 3:
            visitor.sendall(request(name))
        if where == 5:
            visitor.recv(1000)
    except OSError:
        pass
    if number // 6 % 3:
        reset(visitor)
    else:
        visitor.close()


def abort_many(ports: Sequence[int], count: int, name: str = "demo") -> None:
    """``count`` visitors, one after the other, who all abort; the ports take turns."""
    for number in range(count):
        abort(ports[number // 6 % len(ports)], number, name)


# -- those who stay --------------------------------------------------------------------------------


class Crowd:
    """Connections that are held open for the length of a ``with`` block."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        self._stack = ExitStack()

    def join(self, port: int) -> socket.socket:
        sock = self._stack.enter_context(connect(port, timeout=PATIENCE))
        self.sockets.append(sock)
        return sock

    def still_open(self) -> int:
        """How many of them the server has neither closed nor sent anything."""
        poll = select.poll()
        for sock in self.sockets:
            poll.register(sock, select.POLLIN)
        return len(self.sockets) - len(poll.poll(0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def idle(port: int, count: int, name: str = "demo") -> Crowd:
    """``count`` visitors whose first request was answered, and who keep the connection."""
    allow_sockets(count)
    crowd, get = Crowd(), request(name)
    for _ in range(count):
        sock = crowd.join(port)
        sock.sendall(get)
        assert read_response(sock).status == 200
    return crowd


def slow_heads(port: int, count: int) -> Crowd:
    """``count`` visitors whose heads have begun; :func:`drip` lets them go on."""
    allow_sockets(count)
    crowd = Crowd()
    for _ in range(count):
        crowd.join(port).sendall(b"GET / HTTP/1.1\r\nX: ")
    return crowd


def drip(crowd: Crowd) -> None:
    """One more byte from each; whoever was cut off meanwhile is passed over."""
    for sock in crowd.sockets:
        try:
            sock.sendall(b"x")
        except OSError:
            continue


# -- what others notice ----------------------------------------------------------------------------


def ordinary(port: int, count: int, name: str = "demo", pause: float = 0.0) -> list[float]:
    """``count`` ordinary requests, each on a connection of its own: the seconds that each took.

    Raises ``AssertionError`` for an answer that is not 200. ``pause`` is between two, in seconds.
    """
    took = []
    for _ in range(count):
        began = time.perf_counter()
        with connect(port, timeout=PATIENCE) as sock:
            sock.sendall(request(name, "/", b"Connection: close"))
            assert read_response(sock).status == 200
        took.append(time.perf_counter() - began)
        if pause:
            time.sleep(pause)
    return took


def kept(port: int, count: int, name: str = "demo") -> list[float]:
    """The same on one kept connection."""
    took = []
    with connect(port, timeout=PATIENCE) as sock:
        source = Source(sock)
        for _ in range(count):
            began = time.perf_counter()
            source.sock.sendall(request(name))
            assert read_response(sock).status == 200
            took.append(time.perf_counter() - began)
    return took
