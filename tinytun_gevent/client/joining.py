"""The sessions of one tunnel: the first one, and those that join it while one is not enough."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

import gevent
from gevent.event import Event

from .. import sockets
from ..errors import HandshakeError, TryLaterError, TunnelError
from ..session import Session
from ..stream import CANCEL, NO_ERROR, Stream
from ..wire.goodbye import ends_access
from ..wire.handshake import Join, OpenReply, OpenRequest
from .config import ClientConfig
from .dial import address_of
from .growth import LOOK, Gauge, Pauses
from .link import open_session
from .sessions import Sessions
from .text import clean, hide

log = logging.getLogger(__name__)

QUIET_LOOK: Final = 0.5
"""Seconds between two looks while visitors are there and nothing moves."""

IDLE_LOOK: Final = 2.0
"""Seconds between two looks at idle sessions, while there is no visitor at all."""


class Team:
    """The sessions that serve one tunnel together; it begins with the one that opened it.

    All are equal: the death of one costs its visitors only. One on which the server says GOAWAY
    takes no more of them and is closed after the last; a server that stops says it on all. `over`
    is set when none is left. Nothing that goes wrong with a session that is to be added
    disturbs the others.
    """

    def __init__(
        self,
        config: ClientConfig,
        first: Session,
        granted: OpenReply,
        on_stream: Callable[[Stream], None],
        sessions: Sessions,
    ) -> None:
        """``on_stream`` gets each visitor and must not block, ``sessions`` each session that has begun."""
        self._config = config
        self._granted = granted
        self._on_stream = on_stream
        self._all = sessions
        #: Set when the tunnel takes no visitors any more.
        self.over = Event()
        #: The session that was the last to take visitors.
        self.last = first
        #: Whether the server has closed any for another client, that showed the same token.
        self.replaced = False
        #: Whether the server has closed any because the token is not valid any more.
        self.access_ended = False
        #: Whether it said goodbye without a fault on the last one: it stops, or another process takes over.
        self.stops = False
        #: Those that take visitors, the oldest one first.
        self._gauges: dict[Session, Gauge] = {}
        #: Those and the ones that still carry some, whose connections count as well.
        self._open: set[Session] = set()
        self._traffic = Event()
        self._joining: set[gevent.Greenlet[[OpenRequest], None]] = set()
        self._pauses = Pauses()
        self._watcher: gevent.Greenlet[[str], None] | None = None
        self._welcome(first)
        if config.sessions > 1 and granted.join_key is not None:
            self._watcher = gevent.spawn(self._watch, granted.join_key)

    @property
    def said(self) -> str:
        """Why the server has ended it, in the server's words; empty if it gave no reason."""
        reason = self.last.goaway_reason if self.last.goaway_code != NO_ERROR else b""
        return f"the server says: {clean(hide(reason, self._config.token))}" if reason else ""

    @property
    def sessions(self) -> list[Session]:
        """Those that take visitors, the oldest one first."""
        return list(self._gauges)

    def close(self) -> None:
        """Add no session any more, and give up those on their way; what serves visitors goes on."""
        if self._watcher is not None:
            self._watcher.kill()
        gevent.killall(list(self._joining))

    # -- who belongs to it --------------------------------------------------

    def _welcome(self, session: Session) -> None:
        self._gauges[session] = Gauge(time.monotonic())
        if session.closed.is_set():
            self._lost(session)
            return
        session.on_stream = self._admit
        session.on_goaway = self._told_to_leave
        session.on_close.append(self._lost)
        session.on_close.append(self._open.discard)
        self._open.add(session)
        self._all.add(session)
        if session.goaway_received:
            self._told_to_leave(session)

    def _admit(self, stream: Stream) -> None:
        self._traffic.set()
        self._on_stream(stream)

    def _told_to_leave(self, session: Session) -> None:
        """GOAWAY has come on it: the server stops, or has had enough of this one."""
        self.replaced = self.replaced or session.goaway_code == CANCEL
        if ends_access(session.goaway_code, session.goaway_reason):
            self.access_ended = True
        if self._part_with(session, stops=session.goaway_code == NO_ERROR):
            self._all.see_off(session)

    def _lost(self, session: Session) -> None:
        if self._part_with(session) and self._gauges:
            log.debug("lost one of %d connections: %s", len(self._gauges) + 1, session.error)

    def _part_with(self, session: Session, stops: bool = False) -> bool:
        """It takes no visitors any more; False if that is known."""
        if self._gauges.pop(session, None) is None:
            return False
        if not self._gauges:
            self.last = session
            self.stops = stops
            self.over.set()
        return True

    # -- how many there are -------------------------------------------------

    def _watch(self, key: str) -> None:
        """The greenlet that looks whether there are too few or too many; sleeps while nobody visits."""
        while True:
            if any(session.stream_count for session in self._gauges):
                if any(gauge.moving for gauge in self._gauges.values()):
                    gevent.sleep(LOOK)
                elif self._traffic.wait(QUIET_LOOK):  # a new visitor: what he moves is of interest
                    self._traffic.clear()
                    gevent.sleep(LOOK)
            else:
                self._traffic.clear()
                self._traffic.wait(IDLE_LOOK if len(self._gauges) > 1 else None)
            self._look(time.monotonic(), key)

    def _look(self, now: float, key: str) -> None:
        too_few = False
        for session, gauge in self._gauges.items():
            moved = session.data_received, session.data_sent
            if gauge.limits(now, *moved, session.keep_alive.min_rtt, *sockets.held_up(session.end.sock)):
                too_few = True
        if too_few and self._pauses.is_over(now):
            for _ in range(self._config.sessions - len(self._open) - len(self._joining)):
                self._joining.add(gevent.spawn(self._join, self._request(key)))
        for session in self.sessions[1:]:
            if self._gauges[session].is_idle(now, session.streams_opened, session.stream_count):
                self._dismiss(session)

    def _dismiss(self, session: Session) -> None:
        self._part_with(session)
        log.debug("closing a connection that was idle; %d left", len(self._gauges))
        session.goaway()
        self._all.see_off(session)

    def _request(self, key: str) -> OpenRequest:
        join = Join(self._granted.connection_id, key)
        config = self._config
        return OpenRequest(
            config.kind, config.server.authority, join=join, token=config.token, reset_codes=True
        )

    def _join(self, request: OpenRequest) -> None:
        """Adds one session, or remembers that it failed. Blocks."""
        try:
            if self.over.is_set():
                return
            beside = address_of(self.sessions[0].end.sock)  # another server of that name has no such tunnel
            session, reply, _ = open_session(self._config, request, self._admit, beside)
            if reply.connection_id != self._granted.connection_id:
                session.close()
                raise HandshakeError("the server added the session to another tunnel", 502)
        except (TunnelError, OSError) as error:
            asked = error.retry_after if isinstance(error, TryLaterError) else None
            pause = self._pauses.failed(time.monotonic(), asked)
            log.debug("no further connection for this tunnel, next try after %.0f s: %s", pause, error)
            return
        finally:
            self._joining.discard(gevent.getcurrent())
        if self.over.is_set():
            session.close()
            return
        self._pauses.worked()
        self._welcome(session)
        log.debug("the tunnel has %d connections", len(self._gauges))
