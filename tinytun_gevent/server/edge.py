"""The HTTP edge: one greenlet a visitor connection, one :class:`Exchange` a request.

Every request is parsed, routed and forwarded by itself; nothing is inherited from the
first one on a connection. The visitor's greenlet reads requests; answers are written to
his socket by the session's reader (``exchange.py``).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from gevent.event import Event

from tinytun_gevent import sockets
from tinytun_gevent.errors import (
    MessageError,
    ProxyHeaderError,
    SessionError,
)
from tinytun_gevent.registry import Tunnel
from tinytun_gevent.relay import SocketSink, pump
from tinytun_gevent.server import proxied
from tinytun_gevent.server.addresses import plain
from tinytun_gevent.server.exchange import Exchange
from tinytun_gevent.server.forwarder import Forwarder
from tinytun_gevent.server.pages import Failure, accept_of
from tinytun_gevent.server.routing import find_route
from tinytun_gevent.server.sending import failure_of
from tinytun_gevent.sockets import Socket, end_of
from tinytun_gevent.stream import Stream
from tinytun_gevent.wire import http1

if TYPE_CHECKING:
    from tinytun_gevent.server.core import ServerCore

READ_SIZE: Final = 32 * 1024
"""Bytes read at once while a request head is awaited."""

LINGER: Final = 2.0
"""Seconds after our half-close for the visitor to read the answer and close (RFC 9112 §9.6)."""


class Edge:
    """Serves the connections of the proxy port."""

    def __init__(self, core: ServerCore) -> None:
        self._core = core
        self._visitors: set[Visitor] = set()

    @property
    def visitors(self) -> int:
        return len(self._visitors)

    def handle(self, sock: Socket, address: tuple[str, int]) -> None:
        """Serves one visitor connection until it ends; closes the socket. Blocks."""
        visitor = Visitor(self._core, sock, address)
        self._visitors.add(visitor)
        self._core.clock.watch(visitor)
        try:
            visitor.run()
        finally:
            self._core.clock.forget(visitor)
            self._visitors.discard(visitor)

    def drain(self) -> None:
        """Closes the connections that wait for a request; the others end after their answer."""
        for visitor in list(self._visitors):
            visitor.drain()


class Visitor:
    """One connection of a visitor: reads his requests and sends them on."""

    __slots__ = (
        "_buffer",
        "_core",
        "_end",
        "_ended",
        "_finished",
        "_head_patience",
        "_head_since",
        "_moved",
        "_served",
        "_since",
        "_waiting",
        "client",
        "exchange",
        "forwarder",
        "sink",
    )

    def __init__(self, core: ServerCore, sock: Socket, address: tuple[str, int]) -> None:
        sockets.tune(sock)
        self._core = core
        self._end = end_of(sock)
        self.client = plain(address)
        self.sink = SocketSink(None, self._end)
        self.sink.on_lost = self._lost
        self.sink.on_drained = self._drained
        #: The exchange under way; its answer may still be on the way while the next head is read.
        self.exchange: Exchange | None = None
        self._buffer = bytearray()
        forwarding = http1.Forwarding(self.client[0], core.config.proxy_port)
        #: Sends his requests on.
        self.forwarder = Forwarder(core, self._end, self._buffer, forwarding)
        self._waiting: Event | None = None
        #: He has half-closed.
        self._ended = False
        #: Nothing more will be answered: set with the half-close, and when it was.
        self._finished = False
        self._since = time.monotonic()
        #: When the first byte of a head came that is not complete, and how long it may take.
        self._head_since = 0.0
        self._head_patience = core.config.head_timeout
        #: Whether there has been an exchange.
        self._served = False
        #: Bytes that an upgraded connection had carried when it was last looked at.
        self._moved = 0

    @property
    def draining(self) -> bool:
        """Whether this connection must end after the exchange under way."""
        return self._core.draining

    @property
    def request_limits(self) -> http1.HeadLimits:
        return self._core.request_limits

    @property
    def answer_limits(self) -> http1.HeadLimits:
        return self._core.answer_limits

    @property
    def most_interim(self) -> int:
        """How many 1xx answers one request may get."""
        return self._core.config.interim_answers

    # -- the visitor's greenlet -----------------------------------------------

    def run(self) -> None:
        """Serves requests until either side ends the connection; closes the socket."""
        head: bytes | None = b""
        try:
            self._take_proxy_header()
            while (head := self._read_head()) is not None:
                self._wait_exchange()
                if self._finished:
                    break
                self._serve(head)
            self._wait_exchange()
        except MessageError as error:
            self._wait_exchange()
            self._refuse(error, accept_of(head or self._buffer))
        except (OSError, SessionError):
            self._abandon()
        except ProxyHeaderError:
            self._end.abort()
        finally:
            self._abandon()
            self.forwarder.close()
            self._linger()
            self._end.close()

    def _take_proxy_header(self) -> None:
        """A trusted proxy may begin with a PROXY header; anybody else's is a malformed request."""
        if not self._core.is_trusted(self.client[0]):
            return
        self._buffer += self._end.recv(READ_SIZE)  # a connection opened in advance may be idle until then
        self._head_since, self._head_patience = time.monotonic(), self._core.config.proxy_header_timeout
        header = proxied.read_optional(self._end, self._buffer)
        self._head_since, self._head_patience = 0.0, self._core.config.head_timeout
        if header is not None and header.source is not None and header.destination is not None:
            self.client = plain(header.source)
            self.forwarder.forwarding = http1.Forwarding(self.client[0], header.destination[1])

    def _read_head(self) -> bytes | None:
        """The next request's head; None when the visitor has ended his side. Blocks."""
        buffer, searched = self._buffer, 0
        limit = self.request_limits.bytes
        if not buffer and not self._ended:
            data = self._end.recv(READ_SIZE)
            if data.find(b"\r\n\r\n") == len(data) - 4 and 4 < len(data) <= limit and not self._finished:
                return data  # one whole head and nothing else, as nearly always
            self._take(data)
        while not self._ended:
            if buffer:
                end = http1.head_end(buffer, 0, searched)
                if end > limit or (end < 0 and len(buffer) > limit):
                    raise http1.too_large(buffer, limit)
                if end >= 0:
                    self._head_since = 0.0
                    head = bytes(buffer[:end])
                    del buffer[:end]
                    return head
                searched = len(buffer)
                self._head_since = self._head_since or time.monotonic()
            self._take(self._end.recv(READ_SIZE))
        return None

    def _take(self, data: bytes) -> None:
        """Keeps what the visitor has sent, unless nothing more will be answered."""
        if not data:
            self._ended = True
        elif not self._finished:
            self._buffer += data

    def _serve(self, head: bytes) -> None:
        """Sends one request to where it belongs; returns when all of it has been sent."""
        request = http1.parse_request_head(head, self.request_limits)
        route = find_route(self._core, request, self.client[0])
        tunnel_id = route.id if isinstance(route, Tunnel) else ""
        exchange = self.exchange = Exchange(self, request, tunnel_id)
        self._core.begin()
        try:
            if isinstance(route, Failure):
                exchange.fail(route)
            else:
                self.forwarder.forward(exchange, route)
        except MessageError as error:
            exchange.fail(Failure(error.status, f"Your request's body was not understood: {error}."))
        except SessionError as error:
            exchange.fail(failure_of(error))
        if request.upgrade and not exchange.over:
            self._continue_upgraded(exchange)

    def _continue_upgraded(self, exchange: Exchange) -> None:
        """After the service's 101 the connection is opaque; before it, it is not."""
        while not exchange.upgraded and not exchange.over:
            self._wait()
        stream = exchange.stream
        if exchange.over or stream is None:
            return
        if self._buffer:
            stream.sendall(self._buffer)
            self._buffer.clear()
        pump(stream, self._end)
        self.sink.wait_done()
        exchange.end_upgraded()

    # -- what the exchange calls; nothing here blocks -------------------------

    def answer(self, failure: Failure, accept: bytes, *, close: bool, head_only: bool) -> None:
        """Sends an answer of the server's own."""
        self.sink.write(failure.answer(accept, close=close, head_only=head_only), 0)

    def exchange_over(self, exchange: Exchange) -> None:
        """The exchange has ended; the next one may begin, or the connection ends."""
        self._core.observe(exchange)
        self._core.end()
        self.exchange = None
        self._served = True
        self.sink.part()
        self._since = time.monotonic()
        if exchange.close or self.draining:
            self._finish()
        self.wake()

    def wake(self) -> None:
        """Lets the visitor's greenlet see that something about its exchange has changed."""
        if self._waiting is not None:
            self._waiting.set()

    def cut(self) -> None:
        """Resets the visitor's connection."""
        self._finished = True
        self.sink.abort()

    def _finish(self) -> None:
        """Half-closes once everything is delivered; the rest of the visitor's input is dropped."""
        self._finished = True
        self._since = time.monotonic()
        self.sink.finish()

    def _drained(self) -> None:
        self._since = time.monotonic()
        if self.exchange is not None:
            self.exchange.drained()

    def _lost(self) -> None:
        """The visitor takes no more bytes."""
        self._finished = True
        self._abandon()
        self._end.abort()

    def _abandon(self) -> None:
        if self.exchange is not None:
            self.exchange.abandon()

    def _wait_exchange(self) -> None:
        """Blocks until the exchange under way has ended."""
        while self.exchange is not None:
            self._wait()

    def _wait(self) -> None:
        self._waiting = Event()
        self._waiting.wait()
        self._waiting = None

    def _refuse(self, error: MessageError, accept: bytes = b"") -> None:
        """Answers a request that cannot be understood, and ends the connection."""
        failure = Failure(error.status, f"Your request was not understood: {error}.")
        if not self._finished:
            self.sink.write(failure.answer(accept, close=True), 0)
            self._finish()

    def _linger(self) -> None:
        """Reads on for a moment, so that a reset does not take the answer from the visitor."""
        if not self._finished or self._end.closed:
            return
        self._buffer.clear()
        try:
            self.sink.wait_done()
            while not self._ended and self._end.recv(READ_SIZE):
                pass
        except OSError:
            pass

    # -- deadlines ------------------------------------------------------------

    def drain(self) -> None:
        """Ends an idle connection; one that has just come may still say what it wants."""
        if self.exchange is None and not self._buffer and not self._finished and self._served:
            self._finish()

    def tick(self, now: float) -> None:
        """Ends what takes too long."""
        config, exchange = self._core.config, self.exchange
        if exchange is not None:
            try:
                self._end.check()  # nobody may be reading, so nothing else would tell of a reset
            except OSError:
                self._lost()
                return
            self._check_exchange(exchange, now)
        elif self._finished:
            if self.sink.done and now - self._since > LINGER:
                self._end.close()
        elif self._head_since:
            if now - self._head_since > self._head_patience:
                self._refuse(MessageError("the request head took too long", 408))
        elif now - self._since > config.idle_timeout:
            self._finish()

    def _check_exchange(self, exchange: Exchange, now: float) -> None:
        stream = exchange.stream
        if exchange.upgraded:
            self._check_upgraded(exchange, now)
        if exchange.started or stream is None:
            return
        waited = now - exchange.waiting_since
        if not stream.accepted and waited > self._core.config.stream_timeout:
            exchange.fail(Failure(504, "The tunnel's client did not accept the connection in time."))
        elif exchange.request_sent and waited > self._core.config.answer_timeout:
            exchange.fail(Failure(504, "The local service did not answer in time."))

    def _check_upgraded(self, exchange: Exchange, now: float) -> None:
        stream, limit = exchange.stream, self._core.config.tunnel_idle_timeout
        if not limit or not isinstance(stream, Stream):
            return
        moved = stream.sent + stream.received
        if moved != self._moved:
            self._moved, self._since = moved, now
        elif now - self._since > limit:
            exchange.abandon()
