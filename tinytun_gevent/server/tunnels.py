"""The tunnels of one server: claimed, given sessions, lost, kept for their owners, taken from them.

`Registry` knows names; what has to happen around them happens here: ports listen, visitors wait, limits and
the operator's numbers follow. Nothing here blocks.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import gevent

from tinytun_gevent.errors import NameTakenError, RefusedError, SessionClosedError, TryLaterError
from tinytun_gevent.rare import Rare
from tinytun_gevent.registry import Tunnel
from tinytun_gevent.server.account import Account
from tinytun_gevent.server.addresses import bracketed
from tinytun_gevent.server.tally import Refusal
from tinytun_gevent.server.tcp import TcpPorts
from tinytun_gevent.session import Session
from tinytun_gevent.stream import CANCEL, NO_ERROR
from tinytun_gevent.wire.goodbye import INADEQUATE_SECURITY, NO_ACCESS, NOT_ALLOWED, REPLACED
from tinytun_gevent.wire.handshake import Kind, OpenRequest

if TYPE_CHECKING:
    from tinytun_gevent.server.core import ServerCore

log = logging.getLogger(__name__)
rare = Rare(log)

PORT_TRIES: Final = 64
"""Random ports tried when other programs hold some of the range."""


class Tunnels:
    """Opens tunnels, and keeps them registered while one session lives, or their names are kept."""

    def __init__(self, core: ServerCore) -> None:
        self._core = core
        self.ports = TcpPorts(core)
        #: Those that have sessions, also when their clients have said goodbye and their names are gone.
        self._served: set[Tunnel] = set()

    def restore(self, tunnels: list[Tunnel], ports: Mapping[int, int]) -> None:
        """Opens leased tunnels to their visitors, who wait.

        ``ports`` has listening descriptors, which are closed if nobody wants them. A port that is not
        free waits for its owner.
        """
        left = dict(ports)
        for tunnel in tunnels:
            self._core.pool_of(tunnel).expect()
            self._core.budgets.restore(tunnel)
            self._core.sources.hold(tunnel, tunnel.source)
            self._core.auth.remember(tunnel.opener)
            if isinstance(tunnel.name, int) and self._must_listen(tunnel.kind):
                try:
                    self.ports.listen(tunnel, left.pop(tunnel.name, None))
                except (NameTakenError, OSError) as error:
                    log.info("port %d cannot be opened again yet: %s", tunnel.name, error)
        for descriptor in left.values():
            os.close(descriptor)

    def find(self, request: OpenRequest, caller: tuple[str, int], account: Account) -> Tunnel:
        """The tunnel that a session is promised for; a refusal is counted here."""
        try:
            if request.join:
                return self._core.registry.join(request.join.connection_id, request.join.key, account.id)
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
        source = self._source(request, caller[0], account)
        for _ in range(PORT_TRIES):
            tunnel = self._core.registry.claim(
                request.kind,
                subdomain=request.subdomain,
                port=request.port,
                host_header=request.host_header,
                options=request.options,
                remote=f"{bracketed(caller[0])}:{caller[1]}",
                opener=account.id,
                resume=request.resume,
                rights=account.rights,
            )
            try:
                self._core.sources.hold(tunnel, source)
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

    def _source(self, request: OpenRequest, ip: str, account: Account) -> str:
        """What the tunnel that is asked for counts for; raises TryLaterError if that has all it may have.

        An account has limits of its own, so its tunnels count for nothing here. An owner who comes back has
        the tunnel already, or shows that it is his: he may come from another address.
        """
        if account.id:
            return ""
        sources, registry = self._core.sources, self._core.registry
        source = sources.source_of(ip)
        name = (request.subdomain or "").lower() if request.kind is Kind.HTTP else request.port or 0
        tunnel = registry.tunnels.get(name)
        if tunnel is not None and registry.proves(tunnel, request.resume):
            return tunnel.source or source  # where it was opened: moving it makes no room there
        if tunnel is None or tunnel.source != source:
            sources.check(source)
        return source

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
            rare.info("tunnel %s: its owner replaces a session that is still here", tunnel.name)
            self._part(tunnel, session)
            session.close(SessionClosedError(REPLACED), CANCEL)

    def _must_listen(self, kind: Kind) -> bool:
        return kind is Kind.TCP_PORT or (kind is Kind.TCP and self._core.config.tcp_listen)

    def watch(self, tunnel: Tunnel, session: Session) -> None:
        """Follows what becomes of a session that has not begun yet."""
        session.on_goaway = lambda session: self._leave(tunnel, session)
        session.on_goaway_sent = self._core.tally.goaway_sent
        session.on_close.append(lambda session: self._ended(tunnel, session))

    def add(self, tunnel: Tunnel, session: Session, key: str, joins: bool) -> None:
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
        rare.info("tunnel %s opened for %s", _named(tunnel), tunnel.remote, extra=_fields(tunnel))

    # -- how it ends ----------------------------------------------------------

    def _leave(self, tunnel: Tunnel, session: Session) -> None:
        """The client says goodbye on ``session``, whose running exchanges finish.

        If it does so on the last one, its name is free at once, unless it is an error that makes it go.
        """
        self._core.tally.goaway_received(session.goaway_code)
        self.settle(tunnel, keep=session.goaway_code != NO_ERROR)
        gevent.spawn(self._core.pool_of(tunnel).end_idle, session)

    def _ended(self, tunnel: Tunnel, session: Session) -> None:
        """``session`` is over: within this very moment visitors have to know whether to wait for another."""
        self._part(tunnel, session)
        self.settle(tunnel)
        if not tunnel.sessions and not tunnel.promised:
            kept = tunnel.leased_until is not None
            reason = session.error or "the client left"
            parted = session.goaway_received or session.goaway_sent or session.error is None
            if kept or not parted:
                self._core.tally.tunnels_lost += 1
            what = "lost, its name is kept" if kept else "closed"
            fields = {**_fields(tunnel), "duration": round(time.time() - tunnel.since, 3)}
            rare.info("tunnel %s %s: %s", _named(tunnel), what, reason, extra=fields)

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

    def settle(self, tunnel: Tunnel, *, keep: bool = True) -> None:
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

    def review(self, *, spares: bool = False) -> None:
        """Ends the tunnels of those who may not have them any more, leased ones too, and those that only
        finish what they carry; the others' figures may have changed. Does nothing while nobody knows who may.

        ``spares`` accounts that are not known: the file of tokens may not be whole yet.
        """
        if not self._core.auth.is_ready:
            return
        accounts: dict[str, Account] = {}
        for tunnel in {*self._core.registry.tunnels.values(), *self._served}:
            account = self._core.auth.account_of(tunnel.opener)
            if account is None:
                if not (spares and tunnel.opener):
                    self._expel(tunnel, NO_ACCESS)
            elif not account.rights.allows(tunnel.name):
                self._expel(tunnel, NOT_ALLOWED)
            else:
                tunnel.account = accounts[account.id] = account
        for account in accounts.values():
            self._core.budgets.update(account)

    def _expel(self, tunnel: Tunnel, reason: str) -> None:
        """Ends a tunnel at once; its client hears why."""
        log.info("tunnel %s ended: %s", _named(tunnel), reason, extra=_fields(tunnel))
        self.release(tunnel)
        for session in list(tunnel.sessions):
            self._part(tunnel, session)
            session.close(SessionClosedError(reason), INADEQUATE_SECURITY)

    def release(self, tunnel: Tunnel) -> None:
        """Frees the name at once; whoever waits for a session is told that none comes."""
        self._core.registry.release(tunnel)
        self._core.budgets.close(tunnel)
        self._core.sources.close(tunnel)
        self.ports.close(tunnel)
        pool = self._core.pool_of(tunnel)
        pool.close()
        if not tunnel.sessions:
            self._core.clock.forget(pool)


def _named(tunnel: Tunnel) -> str:
    """A tunnel's name in a log line, with the label of its token."""
    label = _label(tunnel)
    return f"{tunnel.name} ({label})" if label else str(tunnel.name)


def _label(tunnel: Tunnel) -> str:
    account: Account | None = tunnel.account
    return account.label if account is not None else ""


def _fields(tunnel: Tunnel) -> dict[str, str | int]:
    """What a log line's fields say of a tunnel."""
    fields = {"tunnel": tunnel.name, "tunnel_id": tunnel.id, "remote": tunnel.remote}
    return fields | {"label": label} if (label := _label(tunnel)) else fields
