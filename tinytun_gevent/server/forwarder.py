"""Sends the requests of one visitor to where they belong: a tunnel's stream, or a peer server."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import gevent

from tinytun_gevent.errors import SessionClosedError, SessionError
from tinytun_gevent.registry import Tunnel
from tinytun_gevent.server.exchange import Exchange
from tinytun_gevent.server.pages import Failure
from tinytun_gevent.server.peers import Peer
from tinytun_gevent.server.pool import StreamPool
from tinytun_gevent.server.reuse import NextUser, next_user
from tinytun_gevent.server.routing import mark_hop
from tinytun_gevent.server.sending import failure_of, send_request, send_whole
from tinytun_gevent.server.upstream import PeerConnection
from tinytun_gevent.sockets import End
from tinytun_gevent.stream import Stream, Upstream
from tinytun_gevent.wire import http1

if TYPE_CHECKING:
    from tinytun_gevent.server.core import ServerCore


PEER_PATIENCE: Final = 0.4
"""Seconds without an answer after which a peer is asked whether it lives. With the time it has to
say so, a silent peer delays no answer by more than a second."""


MOST_LOSSES: Final = 2
"""How many sessions one request may outlive: it may be the one that kills the client."""


class Forwarder:
    """Finds a stream for each request, sends the request on it, and gives the stream back.

    The visitor's greenlet calls :meth:`forward`; his exchanges call the rest from a session's
    reader, so nothing else in here blocks.
    """

    __slots__ = ("_buffer", "_core", "_login", "_own", "_pool", "_source", "forwarding")

    def __init__(
        self, core: ServerCore, source: End, buffer: bytearray, forwarding: http1.Forwarding
    ) -> None:
        """Bodies are taken from ``buffer``, then from ``source``."""
        self._core = core
        self._source = source
        self._buffer = buffer
        #: What the local service is told of the visitor, unless a trusted proxy says otherwise.
        self.forwarding = forwarding
        #: The streams of the tunnel that the last request went to.
        self._pool: StreamPool | None = None
        #: The stream that belongs to this visitor alone: see ``reuse.py``.
        self._own: Stream | None = None
        #: Whose login it has, if it has one: the client's address.
        self._login = ""

    def forward(self, exchange: Exchange, route: Tunnel | Peer) -> None:
        """Sends the request of ``exchange``; returns when all of it has been sent. Blocks.

        Raises what :func:`send_request` does, and :class:`SessionError` if there is no stream.
        """
        request = exchange.request
        forwarding = self.forwarding
        if request.claims:
            forwarding = http1.client_from_forwarding(request, forwarding, self._core.is_trusted)
            self._keep_trusted(request)
        if isinstance(route, Tunnel):
            self._enter(self._core.pool_of(route), forwarding.client)
            override = route.host_header.encode() if route.host_header else None
            fields = None
            if route.rewriting is not None:
                exchange.links = route.rewriting.links(request, forwarding)
                fields, forwarding = route.rewriting.request(request, forwarding)
            head = http1.build_request_head(request, forwarding, override, fields=fields)
            rate = exchange.visitor.sink.rate
            if rate is not None:
                rate.pass_all(len(head))
            stream = self._acquire(exchange)
        else:
            self._enter(None)
            mark_hop(request)
            head = http1.build_request_head(request, forwarding)
            stream = self._connect(exchange, route)
        send_request(exchange, stream, head, self._source, self._buffer)

    def _keep_trusted(self, request: http1.RequestHead) -> None:
        """Adds what a trusted proxy may set (``TRUSTED_FIELDS``); Connection does not remove it."""
        trusted = self._core.trusted_fields
        if trusted is not None and self._core.is_trusted(self.forwarding.client):
            request.fields = [*request.fields, *trusted.kept(request.claims)]

    def retry(self, exchange: Exchange, *, refused: bool = False, lost: bool = False) -> bool:
        """Sends the request once more if that is allowed; False if it is not.

        A stream that was refused has done nothing (RFC 9113 §8.7). One from the pool that
        ended without a byte may have, and so may one whose session was ``lost``: there only what is
        idempotent is repeated (RFC 9110 §9.2.2), on the client's next session.
        """
        again = refused or ((exchange.pooled or lost) and exchange.request.method in http1.IDEMPOTENT)
        if not again or exchange.replay is None:
            return False
        if lost:
            exchange.losses += 1
            if exchange.losses > MOST_LOSSES:
                return False
        elif time.monotonic() - exchange.started_at > self._core.config.queue_timeout:
            return False
        gevent.spawn(self._resend, exchange, exchange.replay, refused)
        return True

    def answered(self, stream: Upstream) -> None:
        """The first byte of an answer has come on ``stream``, which was new."""
        if self._pool is not None and isinstance(stream, Stream):
            self._pool.answered(stream)

    def give_back(self, stream: Upstream, exchange: Exchange, response: http1.ResponseHead) -> None:
        """``exchange`` was completed on ``stream``, whose two ends are open: it may carry another."""
        user = next_user(exchange.request, response)
        if user is NextUser.NOBODY or self._pool is None or not isinstance(stream, Stream):
            stream.reset()
            return
        own = stream is self._own
        login = user is NextUser.SAME_LOGIN or (own and bool(self._login))
        private = own or user is not NextUser.ANYBODY
        keeps = not exchange.close and (login or not self._proxied)
        self._own = stream if private and keeps else None
        self._login = exchange.client if login else ""
        self._pool.release(
            stream,
            owner=self if keeps else None,
            shared=not private,
            login=login,
            promise=response.promise,
        )

    def close(self) -> None:
        """Lets go of what is kept for this visitor."""
        if self._pool is not None:
            self._pool.leave(self)
        self._own, self._login = None, ""

    @property
    def _proxied(self) -> bool:
        """Whether requests of several people may come on the connection, so that it is no visitor's.

        Then nothing is kept for it but a login, which serves requests of the same client.
        """
        return self._core.is_trusted(self.forwarding.client)

    def _enter(self, pool: StreamPool | None, client: str = "") -> None:
        """Notes which tunnel the next request is for, and of which client.

        What is kept for another tunnel, or as another client's login, ends.
        """
        if pool is not self._pool or (self._login and self._login != client):
            self.close()
        self._pool = pool

    def _acquire(self, exchange: Exchange, *, fresh: bool = False, first: bool = False) -> Upstream:
        """The stream for a request: one that rests, or a new one. Blocks."""
        assert self._pool is not None
        request = exchange.request
        retriable = request.method in http1.IDEMPOTENT and 0 <= request.length <= len(self._buffer)
        if self._login and self._pool.keeps(self):
            retriable = True  # another stream would not do
        stream = self._pool.acquire(
            reuse=not fresh,
            retriable=retriable,
            first=first,
            owner=self,
            gone=lambda: exchange.over,
        )
        if exchange.over or self._has_left(exchange):
            self._pool.release(stream, owner=self, shared=stream is not self._own)
            raise SessionClosedError("the visitor has left")
        exchange.attach(stream, pooled=stream.received > 0)
        return stream

    def _has_left(self, exchange: Exchange) -> bool:
        """Whether the visitor has reset his connection: the next one gets the stream in his place.

        Otherwise each of those who abort in a storm would cost a stream and a connection to the service.
        """
        try:
            self._source.check()
        except OSError:
            exchange.abandon()
            return True
        return False

    def others_wait(self, now: float) -> bool:
        """Whether another visitor waits for this one's place (:meth:`StreamPool.claim`)."""
        return self._pool is not None and self._pool.claim(now)

    def _connect(self, exchange: Exchange, peer: Peer) -> Upstream:
        """A connection to a peer. Blocks; one that cannot be reached is not believed any longer."""
        name = self._core.registry.label_of(exchange.request.host) or ""
        try:
            upstream = PeerConnection((peer.host, peer.proxy_port))
        except SessionClosedError:
            self._core.peers.forget(name)
            raise
        exchange.attach(upstream, pooled=False)
        gevent.spawn_later(PEER_PATIENCE, self._check_peer, exchange, peer, name)
        return upstream

    def _check_peer(self, exchange: Exchange, peer: Peer, name: str) -> None:
        """Gives a peer up that has frozen since it was asked: a slow service's server still talks."""
        if exchange.started or exchange.over or self._core.peers.answers(peer, name):
            return
        self._core.peers.forget(name)
        exchange.fail(Failure(503, "The server that has this tunnel does not answer.", retry_after=2))

    def _resend(self, exchange: Exchange, request: bytes, refused: bool) -> None:
        try:
            send_whole(exchange, self._acquire(exchange, fresh=True, first=refused), request)
        except SessionError as error:
            exchange.fail(failure_of(error))
