"""The HTTP edge: one greenlet a visitor connection, one :class:`Exchange` a request.

Every request is parsed, routed and forwarded by itself; nothing is inherited from the
first one on a connection. The visitor's greenlet reads requests; answers are written to
his socket by the session's reader (``exchange.py``).
"""

from __future__ import annotations

import math
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
from tinytun_gevent.server import leaving, proxied
from tinytun_gevent.server.addresses import plain
from tinytun_gevent.server.exchange import Exchange
from tinytun_gevent.server.forwarder import Forwarder
from tinytun_gevent.server.handover import Moved
from tinytun_gevent.server.observed import Refused
from tinytun_gevent.server.pages import Failure, accept_of
from tinytun_gevent.server.routing import find_route
from tinytun_gevent.server.sending import failure_of
from tinytun_gevent.server.strangers import REASON
from tinytun_gevent.server.tally import Refusal
from tinytun_gevent.server.watch import Watch
from tinytun_gevent.sockets import End, Interrupted, Socket, end_of
from tinytun_gevent.turns import let_others_run
from tinytun_gevent.wire import http1, proxyproto

if TYPE_CHECKING:
    from tinytun_gevent.server.core import ServerCore
    from tinytun_gevent.server.usage import TunnelBudget

READ_SIZE: Final = 32 * 1024
"""Bytes read at once while a request head is awaited."""

OWN_ANSWERS: Final = 100
"""Answers of the server's own in a row after which the next one ends the connection: a browser asks for a
page and its icon."""


class Edge:
    """Serves the connections of the proxy port."""

    def __init__(self, core: ServerCore) -> None:
        self._core = core
        self._visitors: set[Visitor] = set()
        #: Set when there is none (any more).
        self._gone = Event()

    @property
    def visitors(self) -> int:
        return len(self._visitors)

    def handle(self, sock: Socket, address: tuple[str, int]) -> None:
        """Serves one visitor connection until it ends; closes the socket. Blocks."""
        connects = self._core.connects
        if connects is not None and (wait := connects.admit(plain(address)[0])):
            end = end_of(sock)
            connects.turn_away(end, wait)
            end.close()
            return
        port = self._core.config.proxy_port
        self.serve(end_of(sock), Moved(None, address, port, b"", fresh=True))

    def go_on(self, sock: Socket, moved: Moved) -> None:
        """As :meth:`handle`, for one that another process has served until now."""
        self._serve(Visitor(self._core, end_of(sock), moved, served=not moved.fresh))

    def serve(self, end: End, known: Moved) -> None:
        """As :meth:`handle`, for one of whom something is known already."""
        self._serve(Visitor(self._core, end, known))

    def _serve(self, visitor: Visitor) -> None:
        self._visitors.add(visitor)
        watch = Watch(self._core.config, visitor)
        self._core.clock.watch(watch)
        try:
            visitor.run()
        finally:
            self._core.clock.forget(watch)
            self._visitors.discard(visitor)
            if not self._visitors:
                self._gone.set()

    def wait_gone(self, timeout: float) -> None:
        """Blocks until no visitor is left, ``timeout`` seconds at most."""
        if self._visitors and timeout > 0:
            self._gone.clear()
            self._gone.wait(timeout)

    def drain(self) -> None:
        """Lets go of the connections that wait for a request; the others follow after their answer."""
        for visitor in list(self._visitors):
            visitor.drain()


class Visitor:
    """One connection of a visitor: reads his requests and sends them on."""

    __slots__ = (
        "_buffer",
        "_core",
        "_ended",
        "_fresh",
        "_last",
        "_own_answers",
        "_served",
        "_waiting",
        "client",
        "end",
        "exchange",
        "finished",
        "forwarder",
        "head_patience",
        "head_since",
        "request_limits",
        "since",
        "sink",
    )

    def __init__(self, core: ServerCore, end: End, known: Moved, served: bool = False) -> None:
        """``known`` is what is known of him; ``served``: another process has served him until now."""
        self._core = core
        self.end = end
        self.client = plain(known.address)
        #: How large the heads of the requests may be.
        self.request_limits = core.request_limits_of(self.client[0])
        self.sink = SocketSink(None, self.end)
        self.sink.on_lost = self.lost
        self.sink.on_drained = self._drained
        #: The exchange under way; its answer may still be on the way while the next head is read.
        self.exchange: Exchange | None = None
        self._buffer = bytearray(known.early)
        #: Whether a PROXY header may still begin the connection.
        self._fresh = known.fresh
        #: Whether it ends with the next answer.
        self._last = known.last
        forwarding = http1.Forwarding(self.client[0], known.public_port, known.proto)
        #: Sends his requests on.
        self.forwarder = Forwarder(core, self.end, self._buffer, forwarding)
        self._waiting: Event | None = None
        #: He has half-closed.
        self._ended = False
        #: Nothing more will be answered: set with the half-close, and when it was.
        self.finished = False
        #: When an exchange, or the last delivery of one, was over.
        self.since = time.monotonic()
        #: When the first byte of a head came that is not complete, and how long it may take.
        self.head_since = 0.0
        self.head_patience = core.config.head_timeout
        #: Whether there has been an exchange.
        self._served = served
        #: Answers of the server's own since the last one of a service.
        self._own_answers = 0

    @property
    def draining(self) -> bool:
        """Whether this connection must end after the exchange under way."""
        return self._last or (self._core.draining and self._core.successor is None)

    @property
    def wants_too_much(self) -> bool:
        """Whether the server has answered for services so often that its next answer is the last."""
        return self._own_answers >= OWN_ANSWERS

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
            if self._move():  # accepted in the very moment of the handover
                return
            self._take_proxy_header()
            while (head := self._read_head()) is not None:
                self._wait_delivered()
                if self.finished or self._move(head) or not self._serve(head):
                    break
                if self._own_answers:
                    let_others_run()  # nothing has blocked
            if head is None and self.gone_at_end:
                self.leave()
            self._wait_exchange()
        except Interrupted:
            if not self._move():
                self.finish()
        except MessageError as error:
            received = head or self._buffer
            stray = self._is_stray(received)
            self._wait_exchange()
            if stray:
                self._core.strangers.refuse(self.client[0], "proxy")
            self.refuse(MessageError(REASON) if stray else error, accept_of(received), counts=not stray)
        except (OSError, SessionError):
            self._abandon()
        except ProxyHeaderError:
            self._core.tally.refuse(Refusal.PROXY_HEADER)
            self.end.abort()
        finally:
            self._abandon()
            self.forwarder.close()
            self._linger()
            self.end.close()

    def _take_proxy_header(self) -> None:
        """A trusted proxy may begin with a PROXY header; anybody else's is :meth:`_is_stray`."""
        if not self._fresh or not self._core.is_trusted(self.client[0]):
            self._fresh = False
            return
        if not self._buffer:
            self._buffer += self.end.recv(READ_SIZE)  # one opened in advance may be idle until then
        self.head_since, self.head_patience = time.monotonic(), self._core.config.proxy_header_timeout
        header = proxied.read_optional(self.end, self._buffer)
        self.head_since, self.head_patience = 0.0, self._core.config.head_timeout
        self._fresh = False
        if header is not None and header.source is not None and header.destination is not None:
            self.client = plain(header.source)
            self.request_limits = self._core.request_limits_of(self.client[0])
            self.forwarder.forwarding = http1.Forwarding(self.client[0], header.destination[1])

    def _read_head(self) -> bytes | None:
        """The next request's head; None when the visitor has ended his side. Blocks."""
        buffer, searched = self._buffer, 0
        limit = self.request_limits.bytes
        if not buffer and not self._ended:
            data = self.end.recv(READ_SIZE)
            if data.find(b"\r\n\r\n") == len(data) - 4 and 4 < len(data) <= limit and not self.finished:
                return data  # one whole head and nothing else, as nearly always
            self._take(data)
        while not self._ended:
            if buffer:
                if self._is_stray(buffer):
                    raise MessageError(REASON)
                end = http1.head_end(buffer, 0, searched)
                if end > limit or (end < 0 and len(buffer) > limit):
                    raise http1.too_large(buffer, limit)
                if end >= 0:
                    self.head_since = 0.0
                    head = bytes(buffer[:end])
                    del buffer[:end]
                    return head
                searched = len(buffer)
                self.head_since = self.head_since or time.monotonic()
            self._take(self.end.recv(READ_SIZE))
        return None

    def _is_stray(self, received: bytes | bytearray) -> bool:
        """Whether the connection begins with a PROXY header that nobody may send here.

        Only asked of what is no whole request, so it costs the others nothing.
        """
        return not self._served and self.exchange is None and proxyproto.is_surely_proxy(received)

    def _take(self, data: bytes) -> None:
        """Keeps what the visitor has sent, unless nothing more will be answered."""
        if not data:
            self._ended = True
        elif not self.finished:
            self._buffer += data

    def _serve(self, head: bytes) -> bool:
        """Sends one request to where it belongs; returns when all of it has been sent.

        False if the connection has moved to another process instead.
        """
        request = http1.parse_request_head(head, self.request_limits)
        if request.claims and not self._core.is_trusted(self.client[0]):
            self._core.strangers.drop(self.client[0], request.claims)
        redirect = self._core.redirect
        moved = redirect.answer(request, self.forwarder.forwarding) if redirect is not None else None
        route = moved or find_route(self._core, request, self.client[0])
        tunnel = route if isinstance(route, Tunnel) else None
        exchange = self.exchange = Exchange(self, request, tunnel)
        self._core.begin()
        self.sink.rate = None
        if isinstance(route, Tunnel) and route.budget is not None:
            route = self._admit(exchange, route)
        try:
            if isinstance(route, Failure):
                exchange.fail(route)
            else:
                self.forwarder.forward(exchange, route)
        except MessageError as error:
            self._core.tally.refuse(Refusal.REQUEST)
            exchange.fail(Failure(error.status, f"Your request's body was not understood: {error}."))
        except SessionError as error:
            if self._withdraw(exchange, head):
                return False
            exchange.fail(failure_of(error))
        if request.upgrade and not exchange.over:
            self._continue_upgraded(exchange)
        return True

    def _admit(self, exchange: Exchange, tunnel: Tunnel) -> Tunnel | Failure:
        """The tunnel if it may have another visitor, else what he is told."""
        budget: TunnelBudget = tunnel.budget
        if failure := budget.admit():
            return failure
        exchange.budget = budget
        self.sink.rate = budget.rate
        return tunnel

    def _move(self, head: bytes = b"") -> bool:
        """Between two requests: moves to the process that serves now, if there is one. Blocks.

        ``head`` is the next request's, which has been read.
        """
        if self._core.successor is None or self.exchange is not None or not self.sink.idle:
            return False
        forwarding = self.forwarder.forwarding
        early = head + bytes(self._buffer)
        self.since = math.inf  # its idle time is the other process's to count
        known = Moved(None, self.client, forwarding.port, early, self._fresh, forwarding.proto)
        if self._core.move(self.end, known):
            return True
        self.since = time.monotonic()
        return False

    def _withdraw(self, exchange: Exchange, head: bytes) -> bool:
        """Moves with a request that found no session here, of which nothing has been sent."""
        if self._core.successor is None or exchange.stream is not None or exchange.over:
            return False
        self.exchange, moved = None, False
        try:
            moved = self._move(head)
        finally:
            if not moved:
                self.exchange = exchange
        if moved:
            exchange.over = True
            self._leave(exchange)
        return moved

    def _leave(self, exchange: Exchange) -> None:
        """An exchange is no longer carried here."""
        self._core.end()
        if exchange.budget is not None:
            exchange.budget.leave()

    def _continue_upgraded(self, exchange: Exchange) -> None:
        """After the service's 101 the connection is opaque; before it, it is not."""
        while not exchange.upgraded and not exchange.over:
            self._wait()
        stream = exchange.stream
        if exchange.over or stream is None:
            return
        if self._buffer:
            if self.sink.rate is not None:
                self.sink.rate.pass_all(len(self._buffer))
            stream.sendall(self._buffer)
            self._buffer.clear()
        pump(stream, self.end, rate=self.sink.rate)
        self.sink.wait_done()
        exchange.end_upgraded()

    # -- half-closed visitors ---------------------------------------------------

    @property
    def half_closed(self) -> bool:
        """Whether the visitor's FIN has come, read or not."""
        return self._ended or sockets.half_closed(self.end.sock)

    @property
    def gone_at_end(self) -> bool:
        """Whether a FIN right behind the request under way means that the visitor has left."""
        exchange = self.exchange
        if exchange is None or exchange.upgraded:
            return False
        return leaving.is_gone(exchange.request, self._core.is_trusted(self.client[0]))

    @property
    def gone(self) -> bool:
        """Whether the FIN has come and means that, so far as the kernel tells.

        Further requests before the FIN may have been meant; the rest of this one's body cannot be of use.
        """
        if self._ended:
            return self.gone_at_end
        exchange = self.exchange
        if exchange is None:
            return False
        if exchange.request_sent:
            if self._waiting is not None and not exchange.request.upgrade:
                return False  # the head of another request has been read
            if self._buffer or not self.end.at_end:
                return False
        return self.gone_at_end

    def leave(self) -> None:
        """The visitor has left: ends the exchange under way, so that it cannot look whole. Never blocks."""
        if self.exchange is not None and self.exchange.started:
            self.lost()
        else:
            self._abandon()

    # -- what the exchange calls; nothing here blocks -------------------------

    def answer(self, failure: Failure, accept: bytes, *, close: bool, head_only: bool = False) -> int:
        """Sends an answer of the server's own; the bytes of its body."""
        answer = failure.answer(accept, close=close, head_only=head_only)
        self.sink.write(answer, 0)
        return len(answer) - answer.index(b"\r\n\r\n") - 4

    def client_of(self, request: http1.RequestHead) -> str:
        """The IP address behind ``request``: this connection's, unless a trusted proxy says otherwise."""
        told = http1.client_from_forwarding(request, self.forwarder.forwarding, self._core.is_trusted)
        return told.client

    def exchange_over(self, exchange: Exchange) -> None:
        """The exchange has ended; the next one may begin, or the connection ends."""
        self._core.observe(exchange)
        self._leave(exchange)
        self.exchange = None
        self._served = True
        self.sink.part()
        self.since = time.monotonic()
        self._own_answers = self._own_answers + 1 if exchange.failure is not None else 0
        if exchange.close or self.draining:
            self.finish()
        elif self._core.successor is not None:
            self.end.interrupt()
        self.wake()

    def wake(self) -> None:
        """Lets the visitor's greenlet see that something about its exchange has changed."""
        if self._waiting is not None:
            self._waiting.set()

    def cut(self) -> None:
        """Delivers what has come, and then resets the visitor's connection."""
        self.finished = True
        self.sink.cut()

    def finish(self) -> None:
        """Half-closes once everything is delivered; the rest of the visitor's input is dropped."""
        self.finished = True
        self.since = time.monotonic()
        self.sink.finish()

    def _drained(self) -> None:
        self.since = time.monotonic()
        if self.exchange is not None:
            self.exchange.drained()
        self.wake()

    def lost(self) -> None:
        """The visitor takes no more bytes."""
        self.finished = True
        self.end.abort()  # first, or its end would look clean
        self._abandon()
        self.wake()

    def _abandon(self) -> None:
        """Ends the exchange under way, if there is one."""
        if self.exchange is not None:
            self.exchange.abandon()

    def _wait_exchange(self) -> None:
        """Blocks until the exchange under way has ended."""
        while self.exchange is not None:
            self._wait()

    def _wait_delivered(self) -> None:
        """Blocks until another exchange may begin: the visitor's kernel has the last one's answer."""
        while self.exchange is not None or not (self.finished or self.sink.idle or self.sink.done):
            self._wait()

    def _wait(self) -> None:
        self._waiting = Event()
        self._waiting.wait()
        self._waiting = None

    def refuse(self, error: MessageError, accept: bytes = b"", *, counts: bool = True) -> None:
        """Answers a request that cannot be understood, and ends the connection.

        ``counts``: whether it is a malformed request, and nothing that is counted already.
        """
        failure = Failure(error.status, f"Your request was not understood: {error}.")
        if not self.finished:
            since = self.head_since or time.monotonic()
            sent = self.answer(failure, accept, close=True)
            if counts:
                self._core.tally.refuse(Refusal.REQUEST)
            self._core.observe(Refused(self.client[0], failure.request_id, failure.status, sent, since))
            self.finish()

    def _linger(self) -> None:
        """Reads on for a moment, so that a reset does not take the answer from the visitor."""
        if not self.finished or self.end.closed:
            return
        self._buffer.clear()
        try:
            self.sink.wait_done()
            while not self._ended and self.end.recv(READ_SIZE):
                pass
        except OSError:
            pass

    def drain(self) -> None:
        """Ends an idle connection, or moves it; one that has just come may still say what it wants."""
        if self.exchange is not None or self.finished:
            return
        if not self.draining:
            self.end.interrupt()
        elif not self._buffer and self._served:
            self.finish()
