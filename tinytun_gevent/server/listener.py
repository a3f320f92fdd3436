"""The connection port: CONNECT, 101, and from then on a session for as long as its client likes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from gevent import socket

from tinytun_gevent.errors import (
    HandshakeError,
    ProxyHeaderError,
    RefusedError,
    SessionError,
    TryLaterError,
)
from tinytun_gevent.rare import Rare
from tinytun_gevent.registry import Registry, Tunnel
from tinytun_gevent.server import proxied
from tinytun_gevent.server.account import Account
from tinytun_gevent.server.addresses import bracketed, plain
from tinytun_gevent.server.entrance import Entrance, Shaking, say_last
from tinytun_gevent.server.tally import Refusal
from tinytun_gevent.server.tunnels import Tunnels
from tinytun_gevent.session import Session
from tinytun_gevent.sockets import End, end_of
from tinytun_gevent.wire import clienthello, handshake
from tinytun_gevent.wire.handshake import HealthCheck, Kind, OpenReply, OpenRequest

if TYPE_CHECKING:
    from tinytun_gevent.server.core import ServerCore

log = logging.getLogger(__name__)
rare = Rare(log)

READ_SIZE: Final = 4096
"""Bytes read at once of a CONNECT head."""


class Listener:
    """Lets clients in, and serves each session of theirs until it ends."""

    def __init__(self, core: ServerCore, entrance: Entrance, tunnels: Tunnels) -> None:
        self._core = core
        self._entrance = entrance
        self._tunnels = tunnels

    def drain(self) -> None:
        self._tunnels.ports.drain()

    def handle(self, sock: socket.socket, address: tuple[str, int]) -> None:
        """Serves one connection until it ends; closes the socket. Blocks."""
        caller = plain(address)
        shaking = Shaking(end_of(sock), self._core.config.handshake_timeout)
        self._core.clock.watch(shaking)
        try:
            early, port = bytearray(), self._core.config.connection_port
            caller, _ = proxied.who_comes(self._core, shaking.end, early, caller, port, "connection")
            received = self._enter(shaking, bytes(early))
            if received is not None:
                self._handle(shaking, received, caller)
        except ProxyHeaderError as error:
            log.debug("%s sent a PROXY header: %s", caller[0], error)
        except OSError as error:
            if shaking.late and not shaking.counted:
                self._core.tally.refuse(Refusal.HANDSHAKE)
            log.debug("%s left while opening a tunnel: %s", caller[0], error.strerror or error)
        finally:
            self._core.clock.forget(shaking)
            shaking.end.close()

    def _enter(self, shaking: Shaking, early: bytes) -> bytes | None:
        """What came first, through TLS if that began it; None if it was refused, and told so. Blocks.

        ``early`` is what has been read of it, if anything.
        """
        early = early or shaking.end.recv(READ_SIZE)
        offered, required = self._core.certificates is not None, self._core.config.tls_required
        if early[:1] == clienthello.HELLO:
            if offered:
                shaking.end = self._entrance.shake(shaking, early, strict=False)
                return b""
            # In the clear: a TLS client then says that this is no TLS, which it would not of an alert.
            self._core.tally.refuse(Refusal.TLS)
            say_last(shaking.end, handshake.build_refusal(400, "This port speaks no TLS: use http://"))
            return None
        if required:
            self._core.tally.refuse(Refusal.TLS)
            say_last(shaking.end, handshake.build_refusal(403, "This port speaks TLS only: use https://"))
            return None
        return early

    def _handle(self, shaking: Shaking, early: bytes, caller: tuple[str, int]) -> None:
        end = shaking.end
        request: OpenRequest | HealthCheck | None = None
        account: Account | None = None
        try:
            head, rest = self._read_head(end, early)
            request = handshake.parse_request(head)
            if isinstance(request, HealthCheck):
                say_last(end, self._health(request, caller))
                return
            account = self._core.authorize(request, caller)
            tunnel = self._tunnels.find(request, caller, account)
        except (HandshakeError, RefusedError) as error:
            if isinstance(error, HandshakeError):
                self._core.tally.refuse(Refusal.HANDSHAKE)
            label = account.label if account is not None else ""
            fields: dict[str, str | int] = {
                "remote": f"{bracketed(caller[0])}:{caller[1]}",
                "status": error.status,
            }
            wish = ""
            if isinstance(request, OpenRequest):
                wish = _wish(request)
                wanted = request.subdomain or request.port
                fields |= {"tunnel": wanted} if wanted else {}
            fields |= {"label": label} if label else {}
            who = f"{caller[0]} ({label})" if label else caller[0]
            level = logging.DEBUG if error.status == 429 else logging.INFO  # whoever asks on and on is known
            rare.log(level, "refused %s%s: %s", who, wish, error, kind=error.status, extra=fields)
            retry = int(error.retry_after or 1) if isinstance(error, TryLaterError) else None
            say_last(end, handshake.build_refusal(error.status, str(error), retry))
            return
        self._core.clock.forget(shaking)
        self._serve(end, rest, tunnel, request)

    def _health(self, request: HealthCheck, caller: tuple[str, int]) -> bytes:
        """The answer to a health check; with a token it says whether that is valid.

        Who asks that is treated as by a CONNECT. Raises RefusedError.
        """
        if request.token is None:
            return handshake.build_health()
        self._core.authorize(request, caller)
        return handshake.build_checked(needed=not self._core.auth.is_open)

    def _read_head(self, end: End, early: bytes) -> tuple[bytes, bytes]:
        """The CONNECT head, which ``early`` begins, and what followed it. Blocks."""
        buffer = bytearray(early)
        while (length := handshake.head_end(buffer)) < 0:
            if len(buffer) > handshake.MAX_HEAD:
                raise HandshakeError("The request head is too large", 431)
            data = end.recv(READ_SIZE)
            if not data:
                raise OSError("closed before a whole request head")
            buffer += data
        return bytes(buffer[:length]), bytes(buffer[length:])

    def _serve(self, end: End, early: bytes, tunnel: Tunnel, request: OpenRequest) -> None:
        """Promises a session of the tunnel and keeps it until it ends. Blocks."""
        try:
            session = self._begin(end, early, tunnel, request)
        except SessionError as error:
            rare.info("a session of tunnel %s for %s did not come up: %s", tunnel.name, tunnel.remote, error)
        else:
            try:
                session.closed.wait()
            finally:
                session.close()
        finally:
            self._tunnels.settle(tunnel)

    def _begin(self, end: End, early: bytes, tunnel: Tunnel, request: OpenRequest) -> Session:
        """A session that has begun and that the tunnel has. Blocks.

        Raises :class:`SessionError`, or ``OSError`` from the 101.
        """
        key = tunnel.key
        try:
            end.sendall(handshake.build_reply(_reply(self._core.registry, tunnel, request)))
            session = Session(end, opener=True, received=early)
            session.peer_knows_codes = request.reset_codes
            self._tunnels.watch(tunnel, session)
            try:
                session.start(self._core.config.handshake_timeout)
                self._tunnels.add(tunnel, session, key, joins=request.join is not None)
            except BaseException:
                session.close()
                raise
            return session
        finally:
            tunnel.promised -= 1


def _wish(request: OpenRequest) -> str:
    """What was asked for, as it stands in a log line behind the caller."""
    if request.join is not None:
        return " another session"
    if request.kind is Kind.HTTP:
        return f" the subdomain {request.subdomain}" if request.subdomain else " a subdomain"
    return f" port {request.port}" if request.port is not None else " a port"


def _reply(registry: Registry, tunnel: Tunnel, request: OpenRequest) -> OpenReply:
    port = tunnel.name if isinstance(tunnel.name, int) else None
    token = registry.token_of(tunnel) if request.resume is not None else None
    return OpenReply(
        connection_id=tunnel.id,
        domain=tunnel.domain,
        subdomain=tunnel.name if isinstance(tunnel.name, str) else None,
        port=port,
        url=tunnel.url,
        host_header=request.host_header is not None,
        join_key=tunnel.key,
        resume=token,
        options=request.options.names if request.options is not None else (),
        kind=tunnel.kind,
    )
