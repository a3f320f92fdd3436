"""What the listeners of one server share: configuration, directory, the seams, the drain."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol

import gevent
from gevent import socket
from gevent.event import Event

from ..errors import TryLaterError, UsageError
from ..rare import Rare
from ..registry import Registry, Tunnel
from ..shares import Share, Shares
from ..sockets import End, end_of
from ..wire.claims import TrustedFields
from ..wire.handshake import HealthCheck, OpenRequest
from ..wire.http1 import HeadLimits
from ..workers import Workers
from .account import Account
from .auth import Auth
from .budgets import Budgets
from .config import ServerConfig
from .connects import Connects
from .deadlines import Clock
from .ferry import ferry
from .handover import Moved, Successor
from .observed import Observed, log_exchange
from .peers import Peers
from .pool import StreamPool
from .redirect import Redirect
from .sources import Sources
from .storage import Storage
from .strangers import Strangers
from .tally import Refusal, Tally

if TYPE_CHECKING:
    from .certificates import Certificates

log = logging.getLogger("tinytun_gevent.server")
rare = Rare(log)

RETRY_AFTER: Final = 1.0
"""Seconds after which a client turned away by a draining server tries again: its successor is up."""


QUIET: Final = 2.0
"""Seconds that the visitors of a client of the original's kind get for their answers on a reload; the others
wait for it as long."""


class Front(Protocol):
    """What serves one kind of connection: the CONNECT listener, the HTTP edge, the TCP front."""

    def handle(self, sock: socket.socket, address: tuple[str, int]) -> None:
        """Serves one connection to its end and closes it; blocks."""

    def drain(self) -> None:
        """Closes what is idle, lets what is busy finish; must not block."""


class ServerCore:
    """One server without its sockets: every handler gets it, the worker and TunnelServer own it.

    ``config`` has the real ports in it (a kernel-chosen one is known by then). Call `start`
    in the hub that serves, `drain` when it stops.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.storage = Storage(config.state_dir)
        self.registry = Registry(
            config.base_domains,
            tcp_ports=config.tcp_ports,
            limit=config.max_tunnels,
            url_of=config.url_of,
            secret=self.storage.secret,
            lease=config.lease_seconds,
        )
        self.peers = Peers(config)
        #: What is shown to whoever speaks TLS; None where nobody may.
        self.certificates = _certificates(config)
        #: What is counted, for the operator.
        self.tally = Tally()
        #: Refuses whoever pretends to be a proxy.
        self.strangers = Strangers(self.tally)
        self._trusted = config.trusted()
        #: Sends visitors to https; None if they may stay.
        self.redirect = Redirect(config, self.registry, self.is_trusted) if config.http_redirect else None
        #: What trusted proxies may set beside forwarding fields; None for nothing.
        self.trusted_fields = TrustedFields(config.trusted_fields) if config.trusted_fields else None
        #: Who may open tunnels.
        self.auth = Auth(config, self.tally, self.is_trusted)
        #: What accounts and tunnels use of what they may.
        self.budgets = Budgets(self.tally)
        #: How many tunnels clients' addresses have; accounts have limits of their own instead.
        self.sources = Sources(config.source_tunnels, self.is_trusted, self.tally)
        #: How often visitors' addresses connect; None if they may as often as they like.
        self.connects: Connects | None = None
        if config.connect_rate:
            self.connects = Connects(
                config.connect_rate,
                config.connect_burst,
                config.queue_timeout,
                self.is_trusted,
                self.tally,
            )
        self._request_limits = HeadLimits(config.head_bytes, config.head_fields, config.head_field_bytes)
        self.answer_limits = HeadLimits(config.answer_head_bytes, config.answer_head_fields)
        #: Whether the server is stopping: no new tunnels, no further request on a connection.
        self.draining = False
        #: The process that goes on serving; visitors move there between two requests. None if there is none.
        self.successor: Successor | None = None
        #: How many exchanges, and connections carried as they are, there are now.
        self.busy = 0
        self._quiet = Event()
        #: What serves connections; drained together.
        self.fronts: list[Front] = []
        #: Serve the connections of all listening sockets, those of TCP tunnels too.
        self.workers = Workers()
        #: Looks at the deadlines of everybody's connections once a second.
        self.clock = Clock()
        #: What tunnels move, in each direction, while several of them move much.
        self._received = Shares()
        self._sent = Shares()
        #: Called with every exchange that is over; must not block.
        self.observers: list[Callable[[Observed], None]] = [log_exchange]

    def start(self) -> None:
        """Reads the certificates, which blocks on the disk, and begins to resolve the peers' names."""
        if self.certificates is not None:
            self.certificates.load()
            self.certificates.start()
        self.peers.start()
        self.clock.watch(self.budgets)
        self.auth.load()
        self.clock.watch(self.auth)
        if self.config.deaf_to_peers:
            log.warning(
                "PEERS is set, but METADATA_BIND is a loopback address: no other node can ask this one"
            )

    def problem(self) -> UsageError | None:
        """What a process that has read the files before knows better than this one. Blocks on the disk."""
        if self.auth.problem is not None or self.certificates is None:
            return self.auth.problem
        return self.certificates.problem()

    def authorize(self, request: OpenRequest | HealthCheck, address: tuple[str, int]) -> Account:
        """The one place that decides whether ``request`` from ``address`` may open a tunnel.

        Returns who opens it, or raises RefusedError, whose status and text answer the CONNECT.
        """
        if self.draining:
            self.tally.refuse(Refusal.SERVER)
            raise TryLaterError("This server is restarting", 503, RETRY_AFTER)
        return self.auth.authenticate(request.token, address[0])

    def observe(self, exchange: Observed) -> None:
        """The one place that every finished exchange passes; never raises, must not block."""
        self.tally.exchange(exchange.status, time.monotonic() - exchange.started_at)
        for observer in self.observers:
            try:
                observer(exchange)
            except Exception:
                rare.exception("an observer failed")

    def is_trusted(self, ip: str) -> bool:
        """Whether PROXY headers and forwarding fields from ``ip`` (unmapped) are believed."""
        return ip in self._trusted or self.peers.is_peer(ip)

    def request_limits_of(self, ip: str) -> HeadLimits:
        """How large the heads of requests from ``ip`` (unmapped) may be."""
        return self._request_limits.of_a_peer() if self.peers.is_peer(ip) else self._request_limits

    def pool_of(self, tunnel: Tunnel) -> StreamPool:
        """The streams of ``tunnel``, whose list of sessions is the tunnel's own."""
        pool: StreamPool | None = tunnel.pool
        if pool is None:
            config = self.config
            shares = Share(self._received), Share(self._sent)
            pool = StreamPool(config.queue_timeout, config.park_seconds, config.park_visitors, shares)
            tunnel.pool = pool
            tunnel.sessions = pool.sessions
            self.clock.watch(pool)
        return pool

    def move(self, end: End, moved: Moved) -> bool:
        """Lets the successor have a connection, with what was read of it; whether it has it. Blocks.

        ``end`` is closed then. TLS has its state in this process, so here its bytes are carried on, until
        the next answer: the successor closes behind it. Without a successor nothing happens.
        """
        if self.successor is None:
            return False
        if end.movable:
            if not self.successor.take(end.sock, moved):
                return False
            end.close()
            return True
        here, there = socket.socketpair()
        with there:
            if not self.successor.take(there, replace(moved, last=True)):
                here.close()
                return False
        ferry(end, end_of(here))
        return True

    def begin(self) -> None:
        """An exchange, or a connection that is carried as it is, starts; :meth:`end` follows."""
        self.busy += 1

    def end(self) -> None:
        """What :meth:`begin` announced is over."""
        self.busy -= 1
        if not self.busy:
            self._quiet.set()

    def drain(self, deadline: float) -> bool:
        """Stops: no new tunnels, running exchanges end, then every session is closed.

        Blocks until nothing runs or until ``deadline`` (monotonic seconds), and returns whether all
        ended by themselves. The listening sockets should be closed before. Idempotent.
        """
        self.begin_drain()
        while self.busy and (left := deadline - time.monotonic()) > 0:
            self._quiet.clear()
            self._quiet.wait(left)
        ended = not self.busy
        self.peers.stop()
        if self.certificates is not None:
            self.certificates.stop()
        self.clock.stop()
        for tunnel in list(self.registry.tunnels.values()):
            for session in list(tunnel.sessions):
                session.close()
        return ended

    def begin_drain(self) -> None:
        """Says that the server is stopping, without waiting for anything; idempotent."""
        if self.draining:
            return
        self.draining = True
        for front in self.fronts:
            try:
                front.drain()
            except Exception:
                log.exception("%s could not be drained", type(front).__name__)
        for tunnel in list(self.registry.tunnels.values()):
            pool = self.pool_of(tunnel)
            pool.end_idle()
            if not tunnel.takes_visitors:
                pool.close()  # its client will not come back here
            if self.successor is None or tunnel.resumable:
                _say_goodbye(tunnel)
            else:
                gevent.spawn(_part_quietly, tunnel, pool)


def _certificates(config: ServerConfig) -> Certificates | None:
    """What ``TLS_DIR`` has; its reader is imported only where there is one."""
    if not config.tls_dir:
        return None
    from .certificates import Certificates

    return Certificates(config.tls_dir, config.base_domains)


def _say_goodbye(tunnel: Tunnel) -> None:
    for session in list(tunnel.sessions):
        session.goaway()


def _part_quietly(tunnel: Tunnel, pool: StreamPool) -> None:
    """Says goodbye when nothing runs: a client that knows no tokens ends at once, with all that it carries.

    Meanwhile its further visitors wait in the process that serves now.
    """
    pool.wait_quiet(QUIET)
    _say_goodbye(tunnel)
