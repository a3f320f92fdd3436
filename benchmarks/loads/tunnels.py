"""A client of ours that opens many tunnels to one server and carries nothing: the least that holds one.

It makes the handshake (CONNECT, 101) and speaks as much HTTP/2 (RFC 9113) as an idle session needs:
its SETTINGS, the acknowledgement of the server's, and answers to PING.
"""

from __future__ import annotations

import selectors
import socket
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from ..processes import BenchmarkError

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, GOAWAY = 4, 6, 7  # frame types
ACK = 1
HEADER = 9  # bytes of a frame's header
PATIENCE = 10.0  # seconds for one handshake


def frame(kind: int, flags: int = 0, payload: bytes = b"") -> bytes:
    """A frame of stream 0."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + bytes(4) + payload


def answers(data: bytearray) -> bytes:
    """What is to be said to the whole frames in ``data``, which are taken from it.

    BenchmarkError for a GOAWAY.
    """
    said = b""
    while len(data) >= HEADER and len(data) >= (end := HEADER + int.from_bytes(data[:3], "big")):
        kind, flags, payload = data[3], data[4], bytes(data[HEADER:end])
        del data[:end]
        if kind == GOAWAY:
            raise BenchmarkError("the server ended a tunnel")
        if kind == SETTINGS and not flags & ACK:
            said += frame(SETTINGS, ACK)
        if kind == PING and not flags & ACK:
            said += frame(PING, ACK, payload)
    return said


@dataclass
class _Tunnel:
    sock: socket.socket
    pending: bytearray = field(default_factory=bytearray)


class IdleTunnels:
    """The tunnels, with random names. A context: leaving it, all end."""

    def __init__(self, port: int) -> None:
        """``port``: the server's connection port on loopback."""
        self._port = port
        self._selector = selectors.DefaultSelector()

    def open(self, count: int) -> None:
        """``count`` more, one after another; those that are open are served meanwhile."""
        for number in range(count):
            self._selector.register((tunnel := self._open_one()).sock, selectors.EVENT_READ, tunnel)
            if number % 50 == 49:
                self._serve_once(0)

    def serve(self, seconds: float) -> None:
        """Answers what the server asks, for ``seconds``."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._serve_once(left)

    def _serve_once(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            tunnel = key.data
            data = tunnel.sock.recv(65536)
            if not data:
                raise BenchmarkError("the server closed a tunnel")
            tunnel.pending += data
            if said := answers(tunnel.pending):
                tunnel.sock.sendall(said)

    def _open_one(self) -> _Tunnel:
        tunnel = _Tunnel(socket.create_connection(("127.0.0.1", self._port), timeout=PATIENCE))
        try:
            request = f"CONNECT 127.0.0.1:{self._port} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n"
            tunnel.sock.sendall(f"{request}x-tinytun-type: http\r\n\r\n".encode())
            while b"\r\n\r\n" not in tunnel.pending:
                self._receive(tunnel)
            head, _, rest = bytes(tunnel.pending).partition(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 101 "):
                raise BenchmarkError(f"no tunnel: {head[:60]!r}")
            tunnel.pending[:] = rest
            while len(tunnel.pending) < len(PREFACE):
                self._receive(tunnel)
            if not tunnel.pending.startswith(PREFACE):
                raise BenchmarkError("the server does not speak HTTP/2")
            del tunnel.pending[: len(PREFACE)]
            tunnel.sock.sendall(frame(SETTINGS) + answers(tunnel.pending))
        except BaseException:
            tunnel.sock.close()
            raise
        return tunnel

    def _receive(self, tunnel: _Tunnel) -> None:
        data = tunnel.sock.recv(65536)
        if not data:
            raise BenchmarkError("the server closed a tunnel in its handshake")
        tunnel.pending += data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for key in list(self._selector.get_map().values()):
            key.data.sock.close()
        self._selector.close()
