"""The connection port: CONNECT, 101, and from then on a session for as long as its client likes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import gevent
from gevent import socket

from tinytun_gevent import sockets
from tinytun_gevent.errors import (
    HandshakeError,
    NameTakenError,
    ProxyHeaderError,
    RefusedError,
    SessionClosedError,
    SessionError,
    TryLaterError,
)
from tinytun_gevent.registry import Registry, Tunnel
from tinytun_gevent.server import proxied
from tinytun_gevent.server.account import Account
from tinytun_gevent.server.addresses import bracketed, plain
from tinytun_gevent.server.entrance import Entrance, Shaking, say_last
from tinytun_gevent.server.tally import Refusal
from tinytun_gevent.server.tcp import TcpPorts
from tinytun_gevent.session import Session
from tinytun_gevent.sockets import End, end_of
from tinytun_gevent.stream import CANCEL, NO_ERROR
from tinytun_gevent.wire import clienthello, handshake
from tinytun_gevent.wire.handshake import HealthCheck, Join, Kind, OpenReply, OpenRequest

if TYPE_CHECKING:
    from tinytun_gevent.server.core import ServerCore

log = logging.getLogger(__name__)

PORT_TRIES: Final = 64
"""Random ports tried when other programs hold some of the range."""

REPLACED: Final = "replaced"
"""What a session is told whose tunnel its owner has opened anew."""

READ_SIZE: Final = 4096
"""Bytes read at once of a CONNECT head."""

NO_ACCESS: Final = "its token was revoked or has expired"
NOT_ALLOWED: Final = "its token does not allow the name any more"
"""What a session is told whose tunnel its opener may not have any more."""

INADEQUATE_SECURITY: Final = 12
"""The code it is told with (RFC 9113 §7). Its client comes back, and is refused with a reason."""


class Listener:
    """Opens tunnels, adds sessions to them, and keeps them registered while one session lives."""

    def __init__(self, core: ServerCore, entrance: Entrance) -> None:
        self._core = core
        self._entrance = entrance
        self.ports = TcpPorts(core)
        #: Those that have sessions, also when their clients have said goodbye and their names are gone.
        self._served: set[Tunnel] = set()

    def drain(self) -> None:
        self.ports.drain()

    def restore(self, tunnels: list[Tunnel], ports: Mapping[int, int]) -> None:
        """Opens leased tunnels to their visitors, who wait.

        ``ports`` has listening descriptors, which are closed if nobody wants them. A port that is not
        free waits for its owner.
        """
        left = dict(ports)
        for tunnel in tunnels:
            self._core.pool_of(tunnel).expect()
            self._core.budgets.restore(tunnel)
            if isinstance(tunnel.name, int) and self._must_listen(tunnel.kind):
                try:
                    self.ports.listen(tunnel, left.pop(tunnel.name, None))
                except (NameTakenError, OSError) as error:
                    log.info("port %d cannot be opened again yet: %s", tunnel.name, error)
        for descriptor in left.values():
            os.close(descriptor)

    def handle(self, sock: socket.socket, address: tuple[str, int]) -> None:
        """Serves one connection until it ends; closes the socket. Blocks."""
        caller = plain(address)
        shaking = Shaking(end_of(sock), self._core.config.handshake_timeout)
        self._core.clock.watch(shaking)
        try:
            sockets.tune(sock)
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
        try:
            head, rest = self._read_head(end, early)
            request = handshake.parse_request(head)
            if isinstance(request, HealthCheck):
                say_last(end, handshake.build_health())
                return
            account = self._core.authorize(request, caller)
            tunnel = self._find(request, caller, account)
        except (HandshakeError, RefusedError) as error:
            if isinstance(error, HandshakeError):
                self._core.tally.refuse(Refusal.HANDSHAKE)
            fields = {"remote": f"{bracketed(caller[0])}:{caller[1]}", "status": error.status}
            log.info("refused %s: %s", caller[0], error, extra=fields)
            retry = int(error.retry_after or 1) if isinstance(error, TryLaterError) else None
            say_last(end, handshake.build_refusal(error.status, str(error), retry))
            return
        self._core.clock.forget(shaking)
        self._serve(end, rest, tunnel, request)

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

    # -- the tunnel -----------------------------------------------------------

    def _find(self, request: OpenRequest, caller: tuple[str, int], account: Account) -> Tunnel:
        """The tunnel that a session is promised for; a refusal is counted here."""
        try:
            if request.join:
                return self._join(request.join, account)
            return self._claim(request, caller, account)
        except TryLaterError as error:
            if error.status == 503:  # 429 is a limit of his own
                self._core.tally.refuse(Refusal.SERVER)
            raise
        except RefusedError:
            self._core.tally.refuse(Refusal.NAME)
            raise

    def _claim(self, request: OpenRequest, caller: tuple[str, int], account: Account) -> Tunnel:
        """Registers the name, and binds the port, before anything is promised.

        The owner who comes back gets his tunnel, without the sessions that it had: they are dead, or he
        would not be here.
        """
        for _ in range(PORT_TRIES):
            tunnel = self._core.registry.claim(
                request.kind,
                subdomain=request.subdomain,
                port=request.port,
                host_header=request.host_header,
                remote=f"{bracketed(caller[0])}:{caller[1]}",
                opener=account.id,
                resume=request.resume,
                rights=account.rights,
            )
            try:
                self._core.budgets.open(tunnel, account)
                if self._must_listen(request.kind):
                    self.ports.listen(tunnel)
            except NameTakenError:
                self._withdraw(tunnel, request)
                if request.port is not None:
                    raise
            except BaseException:
                self._withdraw(tunnel, request)
                raise
            else:
                self._replace_sessions(tunnel)
                return tunnel
        raise TryLaterError("No port is available", 503, 5)

    def _withdraw(self, tunnel: Tunnel, request: OpenRequest) -> None:
        """A claim has failed: its owner keeps what he had, a lease or sessions; anybody else had nothing."""
        tunnel.promised -= 1
        leased = tunnel.leased_until is not None and (request.resume or tunnel.opener)
        if not leased and not tunnel.sessions and not tunnel.promised:
            self.release(tunnel)

    def _replace_sessions(self, tunnel: Tunnel) -> None:
        """Ends the sessions that a tunnel has; its visitors wait for the one that has just been promised."""
        pool = self._core.pool_of(tunnel)
        pool.expect()
        for session in list(tunnel.sessions):
            log.info("tunnel %s: its owner replaces a session that is still here", tunnel.name)
            self._part(tunnel, session)
            session.close(SessionClosedError(REPLACED), CANCEL)

    def _join(self, join: Join, account: Account) -> Tunnel:
        """The tunnel that another session is added to, with a place kept for it."""
        return self._core.registry.join(join.connection_id, join.key, account.id)

    def _must_listen(self, kind: Kind) -> bool:
        return kind is Kind.TCP_PORT or (kind is Kind.TCP and self._core.config.tcp_listen)

    def _serve(self, end: End, early: bytes, tunnel: Tunnel, request: OpenRequest) -> None:
        """Promises a session of the tunnel and keeps it until it ends. Blocks."""
        try:
            session = self._begin(end, early, tunnel, request)
        except SessionError as error:
            log.info("a session of tunnel %s for %s did not come up: %s", tunnel.name, tunnel.remote, error)
        else:
            try:
                session.closed.wait()
            finally:
                session.close()
        finally:
            self._settle(tunnel)

    def _begin(self, end: End, early: bytes, tunnel: Tunnel, request: OpenRequest) -> Session:
        """A session that has begun and that the tunnel has. Blocks.

        Raises :class:`SessionError`, or ``OSError`` from the 101.
        """
        key = tunnel.key
        try:
            end.sendall(handshake.build_reply(_reply(self._core.registry, tunnel, request)))
            session = Session(end, opener=True, received=early)
            session.on_goaway = lambda session: self._leave(tunnel, session)
            session.on_goaway_sent = self._core.tally.goaway_sent
            session.on_close.append(lambda session: self._ended(tunnel, session))
            try:
                session.start(self._core.config.handshake_timeout)
                self._open(tunnel, session, key, joins=request.join is not None)
            except BaseException:
                session.close()
                raise
            return session
        finally:
            tunnel.promised -= 1

    def _open(self, tunnel: Tunnel, session: Session, key: str, joins: bool) -> None:
        """Adds a session that was promised while ``key`` was the tunnel's; raises SessionClosedError."""
        if not self._core.registry.holds(tunnel):  # its last session has ended meanwhile
            raise SessionClosedError("the tunnel is gone")
        if key != tunnel.key:
            replaced = SessionClosedError(REPLACED)
            session.close(replaced, CANCEL)
            raise replaced
        came_back = tunnel.ready or tunnel.leased_until is not None
        self._core.pool_of(tunnel).add(session)
        self._served.add(tunnel)
        self._core.tally.sessions.add(session)
        self._core.registry.establish(tunnel)
        if self._core.draining:
            session.goaway()
        if joins:
            fields = _fields(tunnel)
            log.debug("tunnel %s has %d sessions", tunnel.name, len(tunnel.sessions), extra=fields)
            return
        self._core.tally.opened(came_back)
        log.info("tunnel %s opened for %s", tunnel.name, tunnel.remote, extra=_fields(tunnel))

    # -- how it ends ----------------------------------------------------------

    def _leave(self, tunnel: Tunnel, session: Session) -> None:
        """The client says goodbye on ``session``, whose running exchanges finish.

        If it does so on the last one, its name is free at once, unless it is an error that makes it go.
        """
        self._core.tally.goaway_received(session.goaway_code)
        self._settle(tunnel, keep=session.goaway_code != NO_ERROR)
        gevent.spawn(self._core.pool_of(tunnel).end_idle, session)

    def _ended(self, tunnel: Tunnel, session: Session) -> None:
        """``session`` is over: within this very moment visitors have to know whether to wait for another."""
        self._part(tunnel, session)
        self._settle(tunnel)
        if not tunnel.sessions and not tunnel.promised:
            kept = tunnel.leased_until is not None
            reason = session.error or "the client left"
            parted = session.goaway_received or session.goaway_sent or session.error is None
            if kept or not parted:
                self._core.tally.tunnels_lost += 1
            what = "lost, its name is kept" if kept else "closed"
            fields = {**_fields(tunnel), "duration": round(time.time() - tunnel.since, 3)}
            log.info("tunnel %s %s: %s", tunnel.name, what, reason, extra=fields)

    def _part(self, tunnel: Tunnel, session: Session) -> None:
        """``session`` is none of the tunnel's any more; idempotent."""
        if session in tunnel.sessions:
            pool = self._core.pool_of(tunnel)
            pool.remove(session)
            tunnel.part(session)
            self._core.tally.part(session)
            if not tunnel.sessions:
                self._served.discard(tunnel)
                if not self._core.registry.holds(tunnel):
                    self._core.clock.forget(pool)

    def _settle(self, tunnel: Tunnel, *, keep: bool = True) -> None:
        """What becomes of a tunnel that may have lost its last session: nothing, while another one serves it.

        Its name waits for its owner, if he has a token, was served once and did not say goodbye.
        """
        registry, was_served = self._core.registry, tunnel.ready or tunnel.leased_until is not None
        keep = keep and was_served and tunnel.resumable and self._core.config.lease_seconds > 0
        if tunnel.takes_visitors or not registry.holds(tunnel):
            return
        if tunnel.promised:
            self._core.pool_of(tunnel).expect()
        elif not keep or self._core.draining:
            self.release(tunnel)
        elif tunnel.leased_until is None:
            registry.lease(tunnel, time.monotonic())
            self._core.pool_of(tunnel).expect()

    def review(self) -> None:
        """Ends the tunnels of those who may not have them any more, leased ones too, and those that only
        finish what they carry; the others' figures may have changed. Does nothing while nobody knows who may.
        """
        if not self._core.auth.is_ready:
            return
        accounts: dict[str, Account] = {}
        for tunnel in {*self._core.registry.tunnels.values(), *self._served}:
            account = self._core.auth.account_of(tunnel.opener)
            if account is None:
                self._expel(tunnel, NO_ACCESS)
            elif not account.rights.allows(tunnel.name):
                self._expel(tunnel, NOT_ALLOWED)
            else:
                tunnel.account = accounts[account.id] = account
        for account in accounts.values():
            self._core.budgets.update(account)

    def _expel(self, tunnel: Tunnel, reason: str) -> None:
        """Ends a tunnel at once; its client hears why."""
        log.info("tunnel %s ended: %s", tunnel.name, reason, extra=_fields(tunnel))
        self.release(tunnel)
        for session in list(tunnel.sessions):
            self._part(tunnel, session)
            session.close(SessionClosedError(reason), INADEQUATE_SECURITY)

    def release(self, tunnel: Tunnel) -> None:
        """Frees the name at once; whoever waits for a session is told that none comes."""
        self._core.registry.release(tunnel)
        self._core.budgets.close(tunnel)
        self.ports.close(tunnel)
        pool = self._core.pool_of(tunnel)
        pool.close()
        if not tunnel.sessions:
            self._core.clock.forget(pool)


def _fields(tunnel: Tunnel) -> dict[str, str | int]:
    """What a log line's fields say of a tunnel."""
    return {"tunnel": tunnel.name, "tunnel_id": tunnel.id, "remote": tunnel.remote}


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
    )
