"""The request side of an exchange: head and body, on their way to the local service."""

from __future__ import annotations

import time

from tinytun_gevent.errors import SessionClosedError, SessionError, StreamLimitError
from tinytun_gevent.rate import Rate
from tinytun_gevent.relay import send_some
from tinytun_gevent.server.exchange import Exchange
from tinytun_gevent.server.pages import Failure
from tinytun_gevent.sockets import End
from tinytun_gevent.stream import Upstream
from tinytun_gevent.wire.body import ChunkedBody, LengthBody


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
    body = LengthBody(length) if length > 0 else ChunkedBody(False)
    used = body.feed(buffer) if buffer else 0
    rate = exchange.visitor.sink.rate
    if rate is not None:
        rate.pass_all(used)
    first = head + bytes(buffer[:used])
    del buffer[:used]
    exchange.request_sent = body.done
    exchange.replay = first if body.done else None
    try:
        stream.sendall(first)
        while not body.done and not exchange.over:
            exchange.body_bytes += _send_more(stream, source, body, buffer, rate)
            exchange.request_sent = body.done
        exchange.waiting_since = time.monotonic()
    except SessionError:
        if not stream.closed:
            raise
    exchange.sent_on(stream)


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


def _send_more(
    stream: Upstream, source: End, body: LengthBody | ChunkedBody, buffer: bytearray, rate: Rate | None
) -> int:
    """Moves what the visitor has sent of the body's next part, how many bytes; blocks until there is some."""
    limit = body.left if isinstance(body, LengthBody) else 0

    def gate(view: memoryview) -> int:
        used = body.feed(view)
        if used < len(view):
            buffer.extend(view[used:])
        return used

    moved = send_some(stream, source, rate, limit, gate)
    if not moved:
        raise OSError("the visitor left in the middle of his request")
    return moved


def failure_of(error: SessionError) -> Failure:
    """What a visitor is told when his request could not be sent."""
    if isinstance(error, StreamLimitError):
        return Failure(503, "All connections of this tunnel are in use.", retry_after=5)
    if isinstance(error, SessionClosedError):
        return Failure(503, "The tunnel's client is away at the moment.", retry_after=2)
    return Failure(502, "The local service refused the connection or reset it.")
