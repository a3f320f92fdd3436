"""What may take too long on a visitor's connection to the HTTP edge, looked at once a second."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from tinytun_gevent import sockets
from tinytun_gevent.errors import MessageError
from tinytun_gevent.relay import SocketSink
from tinytun_gevent.server import pace
from tinytun_gevent.server.exchange import Exchange
from tinytun_gevent.server.leaving import HalfClosed
from tinytun_gevent.server.pace import Pace, Sending
from tinytun_gevent.server.pages import Failure
from tinytun_gevent.stream import Stream
from tinytun_gevent.wire.answer_codes import AnswerCode

if TYPE_CHECKING:
    from tinytun_gevent.server.config import ServerConfig
    from tinytun_gevent.server.edge import Visitor

LINGER: Final = 2.0
"""Seconds after our half-close for the visitor to read the answer and close (RFC 9112 §9.6)."""


class Reading:
    """Times a visitor for whom bytes wait here. Call :meth:`is_over` about once a second."""

    __slots__ = ("_pace", "_rate")

    def __init__(self, rate: float) -> None:
        """``rate`` is how many bytes a second are enough; 0: any."""
        self._rate = rate
        self._pace: Pace | None = None

    def is_over(self, sink: SocketSink, now: float) -> bool:
        """Whether patience is over. The visitor's kernel tells what was taken: ours takes megabytes."""
        if sink.idle or sink.done or not self._rate or sink.end is None:
            self._pace = None
            return False
        count = sockets.acknowledged(sink.end.sock)
        if count is None:
            return False
        if self._pace is None:
            self._pace = Pace(self._rate, pace.TAKING_GRACE, now, count)
        return self._pace.look(now, count, not sink.waits_turn)


class Watch:
    """The deadlines of one visitor, and of the exchange that he is in."""

    __slots__ = (
        "_config",
        "_exchange",
        "_half_closed",
        "_moved",
        "_moved_at",
        "_reading",
        "_sending",
        "_visitor",
    )

    def __init__(self, config: ServerConfig, visitor: Visitor) -> None:
        self._config = config
        self._visitor = visitor
        #: The exchange that is timed.
        self._exchange: Exchange | None = None
        #: How patient we still are with the body under way, and with the visitor as a reader.
        self._sending: Sending | None = None
        self._reading: Reading | None = None
        #: How long the visitor, who has half-closed, still keeps its place.
        self._half_closed: HalfClosed | None = None
        #: Bytes that an upgraded connection had carried when it was last looked at, and when those were new.
        self._moved = 0
        self._moved_at = time.monotonic()

    def tick(self, now: float) -> None:
        """Ends what takes too long."""
        visitor, exchange = self._visitor, self._visitor.exchange
        if self._takes_too_little(now):
            visitor.lost()
        elif exchange is not None:
            try:
                visitor.end.check()  # nobody may be reading, so nothing else would tell of a reset
                left = not exchange.upgraded and visitor.half_closed and self._has_left(exchange, now)
            except OSError:
                visitor.lost()
                return
            if left:
                visitor.leave()
            else:
                self._check_exchange(exchange, now)
        elif visitor.finished:
            if visitor.sink.done and now - visitor.since > LINGER:
                visitor.end.close()
        elif visitor.head_since:
            if now - visitor.head_since > visitor.head_patience:
                visitor.refuse(MessageError("the request head took too long", 408))
        elif now - visitor.since > self._config.idle_timeout:
            visitor.finish()

    def _check_exchange(self, exchange: Exchange, now: float) -> None:
        stream = exchange.stream
        if exchange.upgraded:
            self._check_upgraded(exchange, now)
        if exchange.started or stream is None:
            return
        waited = now - exchange.waiting_since
        theirs = exchange.request_sent or exchange.awaits_continue  # the service's turn
        if not stream.accepted and waited > self._config.stream_timeout:
            exchange.fail(Failure(504, "The tunnel's client did not accept the connection in time."))
        elif theirs and waited > self._config.answer_timeout:
            failure = Failure(504, "The local service did not answer in time.")
            exchange.fail(failure, AnswerCode.TOO_SLOW)
        elif not theirs and self._sends_too_little(exchange, now):
            exchange.fail(Failure(408, "Your request's body came too slowly."))

    def _has_left(self, exchange: Exchange, now: float) -> bool:
        """Whether the visitor, who has half-closed, has left or is not waited for any longer."""
        visitor = self._visitor
        if visitor.gone:
            return True
        if exchange.stream is None:
            return False  # it waits for a place itself, and not for long
        moved = exchange.body_bytes, exchange.response_bytes, sockets.acknowledged(visitor.end.sock)
        if self._half_closed is None or self._exchange is not exchange:
            self._notice(exchange)
            self._half_closed = HalfClosed(now, moved)
        over = self._half_closed.look(now, moved, not visitor.sink.idle)
        return over or visitor.forwarder.others_wait(now)

    def _notice(self, exchange: Exchange) -> None:
        """Begins to time ``exchange``."""
        if self._exchange is not exchange:
            self._exchange = exchange
            self._sending = self._half_closed = None

    def _sends_too_little(self, exchange: Exchange, now: float) -> bool:
        """Whether patience with a request's body is over."""
        rate = self._config.min_body_rate
        if not rate:
            return False
        if self._sending is None or self._exchange is not exchange:
            self._notice(exchange)
            self._sending = Sending(rate, now, exchange.body_bytes)
        visitor = self._visitor
        return self._sending.look(
            now, exchange.body_bytes, visitor.end.awaited, lambda: visitor.forwarder.others_wait(now)
        )

    def _takes_too_little(self, now: float) -> bool:
        """Whether patience is over with a visitor for whom bytes wait; once upgraded, any pace will do."""
        visitor = self._visitor
        if visitor.sink.idle or (visitor.exchange is not None and visitor.exchange.upgraded):
            self._reading = None
            return False
        if self._reading is None:
            self._reading = Reading(self._config.min_body_rate)
        return self._reading.is_over(visitor.sink, now)

    def _check_upgraded(self, exchange: Exchange, now: float) -> None:
        stream, limit = exchange.stream, self._config.tunnel_idle_timeout
        if not limit or not isinstance(stream, Stream):
            return
        moved = stream.sent + stream.received
        if moved != self._moved:
            self._moved, self._moved_at = moved, now
        elif now - self._moved_at > limit:
            exchange.abandon()
