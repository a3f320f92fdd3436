"""Bytes of an answer that take long to look at, passed on bit by bit while others run.

A stream's receiver must not block the session's reader, and a frame may hold tens of thousands of chunks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import gevent

from tinytun_gevent.errors import SessionError
from tinytun_gevent.turns import let_others_run

if TYPE_CHECKING:
    from tinytun_gevent.server.exchange import Exchange
    from tinytun_gevent.stream import Upstream

SLICE: Final = 16 * 1024
"""Bytes shown to the exchange at once; it takes as many as are good before others have a turn."""


class Deferred:
    """The receiver of a stream until its exchange has looked at everything that came.

    It gives no credit, so that what waits here is bounded by the stream's window. The stream's end, clean or
    not, waits behind the bytes. The greenlet ends with them, or with the exchange.
    """

    def __init__(self, exchange: Exchange, stream: Upstream, rest: memoryview) -> None:
        """``rest`` is copied; the exchange becomes the receiver again when it is used up."""
        self._exchange = exchange
        self._stream = stream
        self._waiting = bytearray(rest)
        self._ended = False
        self._error: SessionError | None = None
        stream.receiver = self
        gevent.spawn(self._run)

    def data(self, view: memoryview) -> None:
        """Keeps bytes behind those that wait."""
        self._waiting += view

    def eof(self) -> None:
        """Notes a half-close."""
        self._ended = True

    def aborted(self, error: SessionError) -> None:
        """Notes how the stream was aborted."""
        self._error = error

    def _run(self) -> None:
        exchange, waiting = self._exchange, self._waiting
        while waiting and not exchange.over:
            let_others_run()
            piece = bytes(waiting[:SLICE])
            used = exchange.take(memoryview(piece))
            del waiting[:used]
        if waiting:
            exchange.take(memoryview(bytes(waiting)))
        if self._stream.receiver is self:
            self._stream.receiver = exchange
        if self._error is not None:
            exchange.aborted(self._error)
        elif self._ended:
            exchange.eof()
