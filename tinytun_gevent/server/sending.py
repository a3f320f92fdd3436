"""The request side of an exchange: head and body, on their way to the local service."""

from __future__ import annotations

import sys
import time
from typing import Final

from tinytun_gevent.errors import SessionClosedError, SessionError, StreamLimitError
from tinytun_gevent.relay import send_some
from tinytun_gevent.server.exchange import Exchange
from tinytun_gevent.server.pages import Failure
from tinytun_gevent.sockets import End
from tinytun_gevent.stream import Upstream
from tinytun_gevent.turns import let_others_run
from tinytun_gevent.wire.body import ChunkedBody, LengthBody, feed_some, taken_of

SLICE: Final = 32 * 1024
"""Bytes of a chunked body, read already, that are copied to be looked at: others have a turn after a part."""


def send_request(exchange: Exchange, stream: Upstream, head: bytes, source: End, buffer: bytearray) -> None:
    """Sends ``head`` and the body behind it; returns at its end, or when the answer made it moot.

    The body is taken from ``buffer`` (read already), then from ``source``; what belongs to the
    next request is left in ``buffer``. Blocks. Raises ``OSError`` if the visitor leaves in the
    middle, :class:`MessageError` for broken framing, :class:`SessionError` for the stream.
    """
    length = exchange.request.length
    if not length:
        exchange.replay = head
        send_whole(exchange, stream, head)
        return
    body = BodySource(LengthBody(length) if length > 0 else ChunkedBody(), source, buffer)
    rate = exchange.visitor.sink.rate
    first = head + body.take_buffered()
    if rate is not None:
        rate.pass_all(len(first) - len(head))
    exchange.request_sent = body.done
    exchange.replay = first if body.done else None
    try:
        stream.sendall(first)
        while not body.done and not exchange.over:
            moved = send_some(stream, body, rate, 0, None)
            if not moved:
                raise OSError("the visitor left in the middle of his request")
            exchange.body_bytes += moved
            exchange.request_sent = body.done
        exchange.waiting_since = time.monotonic()
    except SessionError:
        if not stream.closed:
            raise
    exchange.sent_on(stream)


class BodySource:
    """A request's body as a source of bytes: what may pass of the bytes that the visitor sends.

    They are read right into the sender's buffer, and nearly always leave from there. What
    belongs to the next request goes to ``buffer``.
    """

    __slots__ = ("_body", "_buffer", "_end", "_ready")

    def __init__(self, body: LengthBody | ChunkedBody, end: End, buffer: bytearray) -> None:
        """``buffer`` has what was read from ``end`` already."""
        self._body = body
        self._end = end
        self._buffer = buffer
        #: What may pass and found no room in the sender's buffer.
        self._ready = b""

    @property
    def done(self) -> bool:
        """Whether the whole body has been read from here."""
        return self._body.done and not self._ready

    @property
    def unread(self) -> int:
        return len(self._ready) or len(self._buffer) or min(self._end.unread, self._most)

    @property
    def _most(self) -> int:
        """Bytes that may be read: what follows a body of known length is left where it is."""
        return self._body.left if isinstance(self._body, LengthBody) else sys.maxsize

    def take_buffered(self) -> bytes:
        """The part of the body that was read already."""
        if not self._buffer:
            return b""
        data = bytes(self._buffer if isinstance(self._body, LengthBody) else self._buffer[:SLICE])
        used = feed_some(self._body, data)
        del self._buffer[:used]
        return taken_of(self._body, data, used)

    def wait_readable(self) -> None:
        if self._ready:
            return
        if self._buffer:
            let_others_run()
        else:
            self._end.wait_readable()

    def check(self) -> None:
        self._end.check()

    def recv_now(self, view: memoryview) -> int:
        if not self._ready:
            if self._buffer:
                self._ready = self.take_buffered()
            else:
                got = self._end.recv_now(view[: self._most])
                if got <= 0:
                    return got
                used = feed_some(self._body, view[:got])
                self._buffer += view[used:got]
                if self._body.rewritten is None:
                    return used or -1
                self._ready = taken_of(self._body, view, used)
        count = min(len(self._ready), len(view))
        view[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count or -1

    def recv(self, size: int) -> bytes:
        part = memoryview(bytearray(size))
        while True:
            self.wait_readable()
            if (got := self.recv_now(part)) >= 0:
                return bytes(part[:got])


def send_whole(exchange: Exchange, stream: Upstream, request: bytes) -> None:
    """Sends a whole request. Blocks.

    A stream that ends meanwhile is no error here: its exchange was told, and has answered or
    sends the request once more. Raises :class:`SessionError` for anything else.
    """
    try:
        stream.sendall(request)
    except SessionError:
        if not stream.closed:
            raise
    exchange.sent_on(stream)


def failure_of(error: SessionError) -> Failure:
    """What a visitor is told when his request could not be sent."""
    if isinstance(error, StreamLimitError):
        return Failure(503, "All connections of this tunnel are in use.", retry_after=5)
    if isinstance(error, SessionClosedError):
        return Failure(503, "The tunnel's client is away at the moment.", retry_after=2)
    return Failure(502, "The local service refused the connection or reset it.")
