"""A connection to a peer server that can carry a visitor as a stream of a tunnel does."""

from __future__ import annotations

from typing import Final

import gevent
from gevent import socket
from gevent.event import Event

from tinytun_gevent import sockets
from tinytun_gevent.errors import SessionClosedError, SessionError, StreamResetError
from tinytun_gevent.sockets import Buffer, Source, end_of
from tinytun_gevent.stream import CANCEL, Gate, Receiver
from tinytun_gevent.wire.answer_codes import AnswerCode

READ_SIZE: Final = 64 * 1024
"""Bytes read from a peer at once."""

LOW_BACKLOG: Final = 256 * 1024
"""Undelivered bytes beyond which a peer is not read from."""

DIAL_TIMEOUT: Final = 1.0
"""Seconds to reach a peer server, which is near."""


class PeerConnection:
    """A TCP connection to a peer's port that behaves like a stream."""

    def __init__(self, address: tuple[str, int]) -> None:
        """Connects; blocks for :data:`DIAL_TIMEOUT` at most. Raises ``SessionClosedError``."""
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        sock: socket.socket | None = None
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.settimeout(DIAL_TIMEOUT)
            sock.connect(address)
            sockets.tune(sock)
        except OSError as error:
            if sock is not None:
                sock.close()
            raise SessionClosedError(f"the peer {address[0]}:{address[1]} cannot be reached") from error
        self.receiver: Receiver | None = None
        self.accepted = True
        self.remote_ended = False
        self._local_ended = False
        self._error: SessionError | None = None
        self._undelivered = 0
        self._low = Event()
        self._end = end_of(sock)
        gevent.spawn(self._read)

    @property
    def closed(self) -> bool:
        return self._error is not None or (self._local_ended and self.remote_ended)

    @property
    def answers(self) -> bool:
        """It carries what a visitor sends."""
        return False

    def sendall(self, data: Buffer) -> None:
        self._check()
        try:
            self._end.sendall(data)
        except OSError as error:
            self._fail(StreamResetError(CANCEL, remote=True))
            raise SessionClosedError("the peer has closed the connection") from error

    def send_from(self, source: Source, limit: int = 0, gate: Gate | None = None) -> int:
        self._check()
        data = source.recv(min(limit or READ_SIZE, READ_SIZE))
        view = memoryview(data)
        self.sendall(view if gate is None else view[: gate(view)])
        return len(data)

    def shutdown(self) -> None:
        if self._local_ended or self._error is not None:
            return
        self._local_ended = True
        try:
            self._end.finish_writing()
        except OSError:
            pass
        if self.remote_ended:
            self._end.close()

    def reset(self, code: int = CANCEL) -> None:
        if not self.closed:
            self._fail(StreamResetError(code, remote=False))

    def blame(self, code: AnswerCode) -> None:
        """Resets the connection: a peer judges its services' answers itself."""
        self.reset()

    def consumed(self, count: int) -> None:
        self._undelivered -= count
        if self._undelivered < LOW_BACKLOG:
            self._low.set()

    def keep(self, count: int) -> bool:
        """What was read before the connection was lost may be delivered: it is little."""
        return True

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _fail(self, error: SessionError) -> None:
        if self._error is None:
            self._error = error
            self._low.set()
            self._end.abort()
            if self.receiver is not None:
                self.receiver.aborted(error)

    def _read(self) -> None:
        try:
            while data := self._end.recv(READ_SIZE):
                if self._error is not None:
                    return
                self._undelivered += len(data)
                if self.receiver is not None:
                    self.receiver.data(memoryview(data))
                if self._undelivered >= LOW_BACKLOG:
                    self._low.clear()
                    self._low.wait()
        except OSError:
            self._fail(StreamResetError(CANCEL, remote=True))
            return
        self.remote_ended = True
        if self.receiver is not None:
            self.receiver.eof()
        if self._local_ended:
            self._end.close()
