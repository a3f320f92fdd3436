"""The connection port: CONNECT, 101, and from then on a session for as long as its client likes."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

import gevent
from gevent import socket

from tinytun_gevent import sockets
from tinytun_gevent.errors import (
    HandshakeError,
    NameTakenError,
    RefusedError,
    SessionClosedError,
    SessionError,
    TryLaterError,
)
from tinytun_gevent.registry import Tunnel
from tinytun_gevent.server.addresses import bracketed, plain
from tinytun_gevent.server.tcp import TcpPorts
from tinytun_gevent.session import Session
from tinytun_gevent.wire import handshake
from tinytun_gevent.wire.handshake import HealthCheck, Join, Kind, OpenReply, OpenRequest

if TYPE_CHECKING:
    from tinytun_gevent.server.core import ServerCore

log = logging.getLogger(__name__)

PORT_TRIES: Final = 64
"""Random ports tried when other programs hold some of the range."""

LAST_WORDS: Final = 2.0
"""Seconds for a refused client to read why."""


class Listener:
    """Opens tunnels, adds sessions to them, and keeps them registered while one session lives."""

    def __init__(self, core: ServerCore) -> None:
        self._core = core
        self.ports = TcpPorts(core)

    def drain(self) -> None:
        self.ports.drain()

    def handle(self, sock: socket.socket, address: tuple[str, int]) -> None:
        """Serves one connection until it ends; closes the socket. Blocks."""
        caller = plain(address)
        try:
            self._handle(sock, caller)
        except OSError as error:
            log.debug("%s left while opening a tunnel: %s", caller[0], error)
        finally:
            sock.close()

    def _handle(self, sock: socket.socket, caller: tuple[str, int]) -> None:
        sockets.tune(sock)
        try:
            head, rest = self._read_head(sock)
            request = handshake.parse_request(head)
            if isinstance(request, HealthCheck):
                self._say(sock, handshake.build_health())
                return
            self._core.authorize(request, caller)
            tunnel = self._join(request.join) if request.join else self._claim(request, caller)
        except (HandshakeError, RefusedError) as error:
            log.info("refused %s: %s", caller[0], error)
            retry = int(error.retry_after or 1) if isinstance(error, TryLaterError) else None
            self._say(sock, handshake.build_refusal(error.status, str(error), retry))
            return
        self._serve(sock, rest, tunnel, request)

    def _read_head(self, sock: socket.socket) -> tuple[bytes, bytes]:
        """The CONNECT head, and what followed it. Blocks within the handshake's deadline."""
        deadline = time.monotonic() + self._core.config.handshake_timeout
        buffer = bytearray()
        while (end := handshake.head_end(buffer)) < 0:
            if len(buffer) > handshake.MAX_HEAD:
                raise HandshakeError("The request head is too large", 431)
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            data = sock.recv(4096)
            if not data:
                raise OSError("closed before a whole request head")
            buffer += data
        return bytes(buffer[:end]), bytes(buffer[end:])

    def _say(self, sock: socket.socket, answer: bytes) -> None:
        """Sends a last answer and lets it arrive before the socket is closed."""
        sock.settimeout(LAST_WORDS)
        sock.sendall(answer)
        sock.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LAST_WORDS
        while time.monotonic() < deadline and sock.recv(4096):
            pass

    # -- the tunnel -----------------------------------------------------------

    def _claim(self, request: OpenRequest, caller: tuple[str, int]) -> Tunnel:
        """Registers the name, and binds the port, before anything is promised."""
        for _ in range(PORT_TRIES):
            tunnel = self._core.registry.claim(
                request.kind,
                subdomain=request.subdomain,
                port=request.port,
                host_header=request.host_header,
                remote=f"{bracketed(caller[0])}:{caller[1]}",
            )
            if request.kind is Kind.HTTP or not self._must_listen(request):
                return tunnel
            try:
                self.ports.listen(tunnel)
                return tunnel
            except NameTakenError:
                self._core.registry.release(tunnel)
                if request.port is not None:
                    raise
            except BaseException:
                self._core.registry.release(tunnel)
                raise
        raise TryLaterError("No port is available", 503, 5)

    def _join(self, join: Join) -> Tunnel:
        """The tunnel that another session is added to, with a place kept for it."""
        return self._core.registry.join(join.connection_id, join.key)

    def _must_listen(self, request: OpenRequest) -> bool:
        return request.kind is Kind.TCP_PORT or self._core.config.tcp_listen

    def _serve(self, sock: socket.socket, early: bytes, tunnel: Tunnel, request: OpenRequest) -> None:
        """Promises a session of the tunnel and keeps it until it ends. Blocks."""
        session: Session | None = None
        try:
            session = self._begin(sock, early, tunnel, request)
            session.closed.wait()
        except SessionError as error:
            log.info("a session of tunnel %s for %s did not come up: %s", tunnel.name, tunnel.remote, error)
        finally:
            self._close(tunnel, session)

    def _begin(self, sock: socket.socket, early: bytes, tunnel: Tunnel, request: OpenRequest) -> Session:
        """A session that has begun and that the tunnel has. Blocks.

        Raises :class:`SessionError`, or ``OSError`` from the 101.
        """
        try:
            sock.settimeout(self._core.config.handshake_timeout)
            sock.sendall(handshake.build_reply(_reply(tunnel, request)))
            session = Session(sock, opener=True, received=early)
            session.on_goaway = lambda session: self._leave(tunnel, session)
            try:
                session.start(self._core.config.handshake_timeout)
                self._open(tunnel, session, joins=request.join is not None)
            except BaseException:
                session.close()
                raise
            return session
        finally:
            if request.join is not None:
                tunnel.joining -= 1

    def _open(self, tunnel: Tunnel, session: Session, joins: bool) -> None:
        if joins and not self._core.registry.holds(tunnel):  # its last session has ended meanwhile
            raise SessionClosedError("the tunnel is gone")
        self._core.pool_of(tunnel).add(session)
        self._core.registry.establish(tunnel)
        if self._core.draining:
            session.goaway()
        if joins:
            log.debug("tunnel %s has %d sessions", tunnel.name, len(tunnel.sessions))
        else:
            log.info("tunnel %s opened for %s", tunnel.name, tunnel.remote)

    def _leave(self, tunnel: Tunnel, session: Session) -> None:
        """The client says goodbye on ``session``, whose running exchanges finish.

        If it does so on the last one, its name is free at once.
        """
        if not tunnel.takes_visitors:
            self._release(tunnel)
        gevent.spawn(self._core.pool_of(tunnel).end_idle, session)

    def _close(self, tunnel: Tunnel, session: Session | None) -> None:
        """``session`` is over, or None came up: the tunnel goes with its last one."""
        pool = self._core.pool_of(tunnel)
        if session is not None:
            session.close()
            pool.remove(session)
            tunnel.part(session)
        if tunnel.sessions:
            if not tunnel.takes_visitors:
                self._release(tunnel)
            return
        self._release(tunnel)
        pool.close()
        self._core.clock.forget(pool)
        if session is not None:
            log.info("tunnel %s closed: %s", tunnel.name, session.error or "the client left")

    def _release(self, tunnel: Tunnel) -> None:
        self._core.registry.release(tunnel)
        self.ports.close(tunnel)


def _reply(tunnel: Tunnel, request: OpenRequest) -> OpenReply:
    port = tunnel.name if isinstance(tunnel.name, int) else None
    return OpenReply(
        connection_id=tunnel.id,
        domain=tunnel.domain,
        subdomain=tunnel.name if isinstance(tunnel.name, str) else None,
        port=port,
        url=tunnel.url,
        host_header=request.host_header is not None,
        join_key=tunnel.key,
    )
