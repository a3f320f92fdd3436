"""Keep-alive of one session: PINGs, the round trips that they measure, and the end of a dead peer."""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING, Final

from gevent.event import Event

from tinytun_gevent import sockets
from tinytun_gevent.errors import PeerSilentError
from tinytun_gevent.liveness import LOOK, Liveness, Pauses, waking_time

if TYPE_CHECKING:
    from tinytun_gevent.session import Session

PROBES: Final = 5
"""PINGs one after another when a session starts. The first ones are answered by a process that is still
busy with starting: on a short path they would say ten times the round trip, and windows grow by that."""

PING_SIZE: Final = 17
"""Bytes of a PING frame (RFC 9113 §6.7)."""


UNKNOWN_RTT: Final = 0.0
"""Round trip assumed before the first one is measured, in seconds: no window grows by a guess."""


class KeepAlive:
    """A part of its session, for which it asks whether the peer is there."""

    def __init__(self, session: Session, now: float) -> None:
        self._session = session
        self.liveness = Liveness(now)
        #: When this process did not run.
        self.pauses = Pauses(waking_time())
        #: PINGs that are still to follow upon the answer to the one before.
        self.probes = PROBES - 1
        #: Set by the first answer.
        self.first_answer = Event()
        #: Smallest round trip seen, in seconds.
        self.min_rtt = UNKNOWN_RTT
        self._sent_at = now
        #: What the PING under way says, and its answer has to.
        self._said = b""

    def ping(self) -> None:
        """Sends a PING; one at a time. Never blocks."""
        session, sock = self._session, self._session.end.sock
        self._sent_at = now = time.monotonic()
        self._said = struct.pack(">d", now)
        behind = session.writer.pending + session.writer.unsent + PING_SIZE
        session.conn.ping(self._said)
        self.liveness.pinged(now, sockets.acknowledged(sock), behind + sockets.queued(sock))
        session.writer.control(session.conn.take_output())

    def answered(self, said: bytes) -> bool:
        """An answer came; False if it is one to no question of ours."""
        session = self._session
        if not self.liveness.awaited or said != self._said:
            return False
        self.liveness.answered()
        took = time.monotonic() - self._sent_at
        self.min_rtt = min(self.min_rtt, took) if self.first_answer.is_set() else took
        self.first_answer.set()
        if self.probes and not session.closing and not session.goaway_sent:
            self.probes -= 1
            self.ping()
        return True

    def run(self) -> None:
        """Pings a quiet peer, and ends the session with one that is dead. Blocks as long as that lives."""
        session, liveness = self._session, self.liveness
        while not session.closing:
            now = time.monotonic()
            self.pauses.look(waking_time())
            delay = liveness.next_check() - now
            if liveness.awaited:
                delay = min(delay, LOOK)
            if delay > 0:
                session.closed.wait(delay)
                if liveness.awaited and not session.closing:
                    liveness.acknowledged(time.monotonic(), sockets.acknowledged(session.end.sock))
            elif liveness.is_dead(now):
                session.close(PeerSilentError("the peer fell silent"))
            else:
                self.ping()
