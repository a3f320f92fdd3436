"""What the listeners of one server share: configuration, directory, the seams, the drain."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from gevent.event import Event

from ..errors import TryLaterError
from ..registry import Registry, Tunnel
from ..wire.handshake import OpenRequest
from .config import ServerConfig
from .peers import Peers

log = logging.getLogger("tinytun_gevent.server")

RETRY_AFTER: Final = 1.0
"""Seconds after which a client turned away by a draining server tries again: its successor is up."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One visitor's request and its answer, or one TCP connection, when it is over."""

    #: Which tunnel carried it; None if none did.
    tunnel: Tunnel | None
    #: The visitor's address, as believed.
    visitor: str
    #: The request's method; ``TCP`` for a connection of a TCP tunnel.
    method: str
    #: The request's path without its query, which may hold secrets; ``""`` for TCP.
    path: str
    #: The final answer's status, or 0 when there was none.
    status: int
    #: How long it took.
    seconds: float
    #: Bytes that the visitor sent and received.
    received: int
    sent: int
    request_id: str = ""
    #: Why it failed, in one line; None if it did not.
    error: str | None = None


class ServerCore:
    """One server without its sockets: every handler gets it, the worker and TunnelServer own it.

    ``config`` has the real ports in it (a kernel-chosen one is known by then). Call `start`
    in the hub that serves, `drain` when it stops.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.registry = Registry(
            config.base_domains, tcp_ports=config.tcp_ports, limit=config.max_tunnels, url_of=config.url_of
        )
        self.peers = Peers(config)
        #: Whose forwarding fields and PROXY headers are believed: ask with ``ip in core.trusted``.
        self.trusted = config.trusted()
        #: Whether the server is stopping: no new tunnels, no further request on a connection.
        self.draining = False
        #: Called once when draining begins, for idle visitors, pooled streams and TCP
        #: listeners to be closed; must not block.
        self.on_drain: list[Callable[[], None]] = []
        #: Called with every exchange that is over; must not block.
        self.observers: list[Callable[[Exchange], None]] = [_log_exchange]
        #: How many exchanges are running.
        self.running = 0
        self._quiet = Event()
        self._quiet.set()

    def start(self) -> None:
        """Begins to resolve the peers' names; does not block."""
        self.peers.start()

    def authorize(self, request: OpenRequest, address: tuple[str, int]) -> None:
        """The one place that decides whether ``request`` from ``address`` may open a tunnel.

        Returns nothing, or raises RefusedError, whose status and text answer the CONNECT.
        Today everybody may, unless the server is stopping.
        """
        if self.draining:
            raise TryLaterError("This server is restarting", 503, RETRY_AFTER)

    def observe(self, exchange: Exchange) -> None:
        """The one place that every finished exchange passes; never raises."""
        for observer in self.observers:
            try:
                observer(exchange)
            except Exception:
                log.exception("an observer failed")

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Counts an exchange as running inside the ``with`` block, so that a drain waits for it."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def begin(self) -> None:
        """An exchange starts; `end` must follow."""
        self.running += 1
        self._quiet.clear()

    def end(self) -> None:
        """An exchange that `begin` has counted is over."""
        assert self.running > 0, "end() without begin()"
        self.running -= 1
        if not self.running:
            self._quiet.set()

    def drain(self, deadline: float) -> bool:
        """Stops: no new tunnels, running exchanges end, then every session is closed.

        Blocks until nothing runs or until ``deadline`` (monotonic seconds), and returns whether all
        ended by themselves. The listening sockets should be closed before. Idempotent.
        """
        self._begin_drain()
        ended = bool(self._quiet.wait(max(0.0, deadline - time.monotonic())))
        self.peers.stop()
        for tunnel in list(self.registry.tunnels.values()):
            for session in list(tunnel.sessions):
                session.close()
        return ended

    def _begin_drain(self) -> None:
        if self.draining:
            return
        self.draining = True
        for callback in self.on_drain:
            try:
                callback()
            except Exception:
                log.exception("a drain callback failed")
        for tunnel in list(self.registry.tunnels.values()):
            for session in list(tunnel.sessions):
                session.goaway()


def _log_exchange(exchange: Exchange) -> None:
    if not log.isEnabledFor(logging.DEBUG):
        return
    tunnel = exchange.tunnel.name if exchange.tunnel else "-"
    log.debug(
        "%s %s %s %s %d %.0f ms, %d in, %d out%s",
        exchange.visitor,
        tunnel,
        exchange.method,
        exchange.path,
        exchange.status,
        exchange.seconds * 1000,
        exchange.received,
        exchange.sent,
        f": {exchange.error}" if exchange.error else "",
    )
