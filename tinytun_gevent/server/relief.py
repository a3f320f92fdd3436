"""Ends resting streams of a tunnel when fresh ones wait for a thread of its service (``starvation.py``)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from gevent import get_hub

from tinytun_gevent.server.starvation import Starvation

if TYPE_CHECKING:
    from tinytun_gevent.server.resting import RestingStreams
    from tinytun_gevent.session import Session
    from tinytun_gevent.stream import Stream

LOOK_AGAIN: Final = 0.5
"""Seconds until the next look where nothing that rests may end for those that wait: logins do not."""


class Relief:
    """The clock of a :class:`Starvation`: looks when it is time, and only while streams wait and others rest.

    Nothing in here blocks.
    """

    __slots__ = ("_due", "_look", "_resting", "_sessions", "_starvation")

    def __init__(self, resting: RestingStreams, sessions: list[Session]) -> None:
        """``sessions`` are the tunnel's at any time."""
        self._resting = resting
        self._sessions = sessions
        self._starvation = Starvation()
        #: Fires when a fresh stream has waited for long, and when that is.
        self._look: Any = None
        self._due = 0.0

    def opened(self, stream: Stream) -> None:
        """Notes a fresh stream, on which a request leaves now."""
        self._starvation.opened(stream, time.monotonic())
        self._look_later()

    def answered(self, stream: Stream) -> None:
        """Notes the first byte of the answer on a fresh stream."""
        now, resting = time.monotonic(), self._resting
        if self._starvation.answered(stream, now, self._round_trip, len(resting) > 0):
            resting.end_oldest(len(resting), now, logins=False)
        self._look_later()

    def may_rest(self, stream: Stream, login: bool, now: float) -> bool:
        """Whether a stream that was given back may rest: no fresh one waits for its thread."""
        starvation = self._starvation
        if starvation.waiting:
            starvation.forget(stream)
        if login:
            return True
        if not starvation.may_rest(now):
            return False
        if not starvation.waiting or not starvation.excess(now, self._round_trip):
            return True
        starvation.ended(1, now)
        return False

    @property
    def watches(self) -> bool:
        """Whether a stream that is given back is of interest: fresh ones wait, or none may rest."""
        return bool(self._starvation.waiting) or self._starvation.abstains

    def rests(self) -> None:
        """Says that a stream rests now."""
        self._look_later()

    @property
    def _round_trip(self) -> float:
        """Seconds to the client and back, by the slowest session."""
        return max((session.round_trip for session in self._sessions), default=0.0)

    def _look_later(self) -> None:
        """Sees to it that :meth:`_relieve` runs when it is time, if anything waits and anything rests."""
        if not self._starvation.waiting or not self._resting:
            return
        now = time.monotonic()
        delay = self._starvation.patience(now, self._round_trip)
        due = now + (delay if delay > 0 else LOOK_AGAIN)
        if self._look is not None and self._look.active:
            if self._due <= due:
                return
            self._look.stop()
        self._due = due
        self._look = get_hub().loop.timer(due - now)
        self._look.start(self._relieve)

    def _relieve(self) -> None:
        """Ends as many resting streams as fresh ones wait."""
        now = time.monotonic()
        self._starvation.sort_out()
        count = self._resting.end_oldest(self._starvation.excess(now, self._round_trip), now, logins=False)
        if count:
            self._starvation.ended(count, now)
        self._look_later()
