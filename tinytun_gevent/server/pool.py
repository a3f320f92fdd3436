"""The streams of one tunnel: which session opens one, which resting one is used again, who waits.

To the client a stream is one connection to the local service. When an exchange on it ended
cleanly and both messages allow persistence, it comes back here and carries the next request of
any visitor, or of the same one, which makes a new request cheap and costs no round trip.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

from gevent.event import Event

from tinytun_gevent.errors import SessionClosedError, SessionError, StreamLimitError
from tinytun_gevent.server.relief import Relief
from tinytun_gevent.server.resting import Lane, Resting, RestingStreams
from tinytun_gevent.session import Session
from tinytun_gevent.shares import Share
from tinytun_gevent.stream import Stream

if TYPE_CHECKING:
    from tinytun_gevent.wire.keep_alive import KeepAlive

IDLE_LIFE: Final = 4.0
"""Seconds that a stream rests at most: Node closes idle connections after 5."""

MARGIN: Final = 1.0
"""Seconds by which a stream ends before the time that its service tells: a request that is on the way when
the service closes is lost."""

FRESH_LIFE: Final = 1.0
"""Seconds within which an idle stream may carry a request that must not be sent twice."""

LOOK_AGAIN: Final = 0.5
"""Seconds after which a waiting visitor looks by himself: a refusal wears off silently."""


class _Patience:
    """How long one visitor still waits: for a session, and then for a stream, from when he came to that."""

    def __init__(self, wait: float, park: float) -> None:
        self._wait = wait
        self._park = park
        self._parked = False
        self._until = 0.0
        self._at_most = time.monotonic() + wait + park

    def left(self, away: bool) -> float:
        """Seconds left now, not below 0; ``away``: it is a session that is waited for."""
        now = time.monotonic()
        if not self._until or away is not self._parked:
            self._parked = away
            self._until = min(now + (self._park if away else self._wait), self._at_most)
        return max(0.0, self._until - now)

    def error(self) -> SessionError:
        """What ends the wait."""
        if self._parked:
            return SessionClosedError(f"the tunnel's client stayed away for {self._park:g} s")
        return StreamLimitError(f"all connections stayed in use for {self._wait:g} s")


class _Wish(NamedTuple):
    """What one request needs; see :meth:`StreamPool.acquire`."""

    reuse: bool
    retriable: bool
    visitor: str | None
    owner: object | None
    gone: Callable[[], bool] | None


def _suits(resting: Resting, retriable: bool, now: float) -> bool:
    """Whether a stream that rests hardly can have ended meanwhile, or that would not matter."""
    return now < resting.until and (retriable or resting.since >= now - FRESH_LIFE)


def _lifetime(stream: Stream, promise: KeepAlive | None) -> float:
    """Seconds for which a stream may rest after an answer in which the service gave ``promise``."""
    left = stream.requests_left
    if left is not None:
        left -= 1
    if promise is not None and promise.max is not None:
        left = promise.max if left is None else min(left, promise.max)
    stream.requests_left = left
    if left is not None and left <= 0:
        return 0.0
    if promise is None or promise.timeout is None:
        return IDLE_LIFE
    return min(IDLE_LIFE, promise.timeout - MARGIN)


class StreamPool:
    """Gives out the streams of a tunnel, over all of its sessions.

    A stream comes from :meth:`acquire`; give it back with :meth:`release`, or reset it. The
    session that is least in use serves the next visitor, so that they share several TCP
    connections evenly. Its idle streams are used last in, first out, so that those of a
    past burst age and end.

    A stream that was given back rests. The visitor that used it may use it at once; others only if it was
    given back as ``shared``, and a turn of the event loop later. Those that rest end when somebody needs
    their place, or a thread of the service (``starvation.py``).

    Each session announces the limit that the client has for all of them together. While a session is
    expected, visitors are parked: they wait for it, with nothing read from them but their request's head.
    """

    def __init__(
        self,
        wait: float,
        park: float = 10.0,
        places: int = 256,
        shares: tuple[Share, Share] | None = None,
    ) -> None:
        """``wait`` is how long a visitor waits for a free stream, ``park`` for a session, in seconds.

        ``places`` is how many may wait for a session at once; of those who waited for a stream when the
        last session was lost, the others give up. ``shares`` are what its sessions are part of, received
        and sent.
        """
        self._shares = shares
        self.sessions: list[Session] = []
        #: Whether a session is on its way, or expected to come back.
        self.expecting = True
        self._wait = wait
        self._park = park
        self._places = places
        self._lanes: dict[Session, Lane] = {}
        #: The one lane, while there is only one: most tunnels have no other.
        self._only: Lane | None = None
        self._resting = RestingStreams(self._note_free)
        self._relief = Relief(self._resting, self.sessions)
        self._waiting: deque[Event] = deque()
        #: When :meth:`claim` was last called, and how many places were claimed in that round.
        self._claimed = (0.0, 0)
        #: Set when a stream has become free; made by whoever waits for that.
        self._freed: Event | None = None

    @property
    def idle_count(self) -> int:
        """Streams that rest."""
        return len(self._resting)

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    def add(self, session: Session) -> None:
        """Lets ``session``, which has started, serve the tunnel."""
        self.expecting = False
        self.sessions.append(session)
        self._lanes[session] = Lane(session)
        self._count_lanes()
        session.on_room = self._room
        if self._shares is not None:
            session.share_in, session.share_out = self._shares
        self._wake_first()

    def remove(self, session: Session) -> None:
        """Takes a session away; its streams end with it."""
        if self._lanes.pop(session, None) is not None:
            self.sessions.remove(session)
            self._count_lanes()
            session.on_room = None
        self._wake_first()

    def expect(self) -> None:
        """Says that the last session is gone and another one may come: visitors wait for it."""
        self.expecting = True

    def _count_lanes(self) -> None:
        self._only = next(iter(self._lanes.values())) if len(self._lanes) == 1 else None

    def close(self) -> None:
        """Says that no session will come (any more): whoever waits gives up."""
        self.expecting = False
        self._wake_all()

    def claim(self, now: float) -> bool:
        """Whether a visitor waits for the place of another one that can be given up.

        Call it for each such place, with the same ``now`` in each round: no more are claimed than are waited
        for.
        """
        at, claimed = self._claimed
        if at != now:
            claimed = 0
        if claimed >= len(self._waiting) or self._is_away:
            return False
        self._claimed = now, claimed + 1
        return True

    def acquire(
        self,
        *,
        reuse: bool = False,
        retriable: bool = True,
        first: bool = False,
        visitor: str | None = None,
        owner: object | None = None,
        gone: Callable[[], bool] | None = None,
    ) -> Stream:
        """A stream to the local service; blocks while all are in use, first come first served.

        With ``reuse`` a resting one will do, if it was used a moment ago or the request is ``retriable``:
        the one that ``owner`` gave back, or one that is shared. ``first`` puts the caller at the head of the
        queue (a refused stream, RFC 9113 §8.7). ``visitor`` is told to the client on a new stream. ``gone``
        tells whether the caller's visitor has left, which ends the wait within :data:`LOOK_AGAIN`.

        Raises :class:`StreamLimitError` after waiting in vain for a stream,
        :class:`SessionClosedError` if no session is expected, or none came, or the visitor has ``gone``.
        """
        at_once = first or not self._waiting
        if reuse and at_once and (lane := self._only) is not None:  # as nearly always
            stream = self._rested(lane, retriable, owner)
            if stream is not None:
                return stream
        wish = _Wish(reuse, retriable, visitor, owner, gone)
        if at_once:
            if reuse and self._resting.worth_a_turn() and not self._rests_for(owner):
                self._resting.wait_settled()
            stream = self._take(wish)
            if stream is not None:
                return stream
        return self._queue(wish, first)

    @property
    def in_use(self) -> int:
        """Streams that carry a visitor now."""
        unused = len(self._resting) + self._resting.leaving
        return sum(session.stream_count for session in self.sessions) - unused

    def wait_quiet(self, timeout: float) -> None:
        """Blocks until no stream carries a visitor, ``timeout`` seconds at most."""
        until = time.monotonic() + timeout
        while self.in_use and (left := until - time.monotonic()) > 0:
            self._freed = Event()
            self._freed.wait(left)

    def release(
        self,
        stream: Stream,
        *,
        owner: object | None = None,
        shared: bool = True,
        login: bool = False,
        promise: KeepAlive | None = None,
    ) -> None:
        """Takes back a stream whose exchange ended cleanly, for the next one.

        That may be ``owner``'s, or anybody's if it is ``shared``. ``login``: it has one of its owner's.
        ``promise`` is what the service said about its connection. A stream that is of no further use ends.
        Never blocks.
        """
        now, life = time.monotonic(), IDLE_LIFE
        lane = self._lanes.get(stream.session)
        if promise is not None or stream.requests_left is not None:
            life = _lifetime(stream, promise)
        if (
            lane is None
            or life <= 0
            or (not shared and owner is None)
            or stream.closed
            or stream.remote_ended
            or lane.session.goaway_received
            or (self._relief.watches and not self._relief.may_rest(stream, login, now))
        ):
            self._resting.let_go(stream, now)
            self._note_free()
            return
        self._resting.add(lane, stream, owner, shared, login, now, now + life)
        if self._relief.watches:
            self._relief.rests()
        if not shared:
            self._wake_first()
        if self._freed is not None:
            self._freed.set()

    def keeps(self, owner: object | None) -> bool:
        """Whether a stream rests that ``owner`` gave back a moment ago, or that is nobody else's."""
        return self._resting.owned_by(owner) is not None

    def leave(self, owner: object) -> None:
        """Says that ``owner`` has left: what rests for no other ends. Never blocks."""
        self._resting.leave(owner, time.monotonic())

    def answered(self, stream: Stream) -> None:
        """Says that a fresh stream has got the first byte of its answer. Never blocks."""
        self._relief.answered(stream)

    def tick(self, now: float) -> None:
        """Ends streams that have rested for too long; called about once a second."""
        self._resting.tick(now)

    def end_idle(self, session: Session | None = None) -> None:
        """Ends every resting stream, or those of a session: the client leaves it, or the server drains.

        Whoever waits looks again.
        """
        now = time.monotonic()
        if session is None:
            self._resting.end_oldest(len(self._resting), now, logins=True)
        else:
            self._resting.end_all(session, now)
        self._wake_all()

    def _queue(self, wish: _Wish, first: bool) -> Stream:
        if self._is_away and len(self._waiting) >= self._places:
            raise SessionClosedError("too many visitors wait for the tunnel's client")
        patience = _Patience(self._wait, self._park)
        turn = Event()
        if first:
            self._waiting.appendleft(turn)
        else:
            self._waiting.append(turn)
        try:
            while True:
                turn.wait(min(LOOK_AGAIN, patience.left(self._is_away)))
                turn.clear()
                if wish.gone is not None and wish.gone():
                    raise SessionClosedError("the visitor has left")
                if self._waiting[0] is turn:
                    stream = self._take(wish)
                    if stream is not None:
                        return stream
                if not patience.left(self._is_away):
                    raise patience.error()
                if self._is_away and len(self._waiting) > self._places:
                    self._check_place(turn)
        finally:
            self._waiting.remove(turn)
            self._wake_first()

    def _check_place(self, turn: Event) -> None:
        """Raises SessionClosedError for one behind those who may wait for a session."""
        if not any(turn is other for other in islice(self._waiting, self._places)):
            raise SessionClosedError("too many visitors wait for the tunnel's client")

    @property
    def _is_away(self) -> bool:
        """Whether no session takes visitors now, though one is expected."""
        return self.expecting and not any(session.takes_visitors for session in self.sessions)

    def _take(self, wish: _Wish) -> Stream | None:
        """A stream without waiting, or None."""
        lane = self._only
        if lane is None or not lane.session.takes_visitors:
            return self._take_from_several(wish)
        if wish.reuse and (rested := self._rested(lane, wish.retriable, wish.owner)) is not None:
            return rested
        if lane.session.has_room or (self._resting.make_room() and lane.session.has_room):
            return self._open(lane, wish)
        return None

    def _take_from_several(self, wish: _Wish) -> Stream | None:
        """The same where the tunnel has more than one session, or none that takes visitors."""
        lanes = self._by_load()
        full: bool | None = None
        for lane in lanes:
            if wish.reuse and (rested := self._rested(lane, wish.retriable, wish.owner)) is not None:
                return rested
            if full is None:
                full = self._is_full(lanes)
            if not full and lane.session.has_room:
                return self._open(lane, wish)
        if not lanes or not self._resting.make_room() or self._is_full(lanes):
            return None
        roomy = next((lane for lane in lanes if lane.session.has_room), None)
        return None if roomy is None else self._open(roomy, wish)

    def _rested(self, lane: Lane, retriable: bool, owner: object | None) -> Stream | None:
        """A stream that rests and will do, if there is one: the owner's, or one of ``lane``."""
        owned = self._resting.owned_by(owner)
        if owned is None and not lane.idle:
            return None
        now = time.monotonic()
        if owned is not None and _suits(owned, retriable, now) and owned.lane.session.takes_visitors:
            return self._resting.take(owned)
        if lane.idle and lane.session.takes_visitors:
            last = next(reversed(lane.idle.values()))
            if _suits(last, retriable, now):
                return self._resting.take(last)
        return None

    def _open(self, lane: Lane, wish: _Wish) -> Stream:
        """A new stream. Where one rests that is too old for the request, it takes its place.

        A service with few threads has none for both.
        """
        if wish.reuse and self._resting:
            oldest = self._resting.owned_by(wish.owner) or next(iter(lane.idle.values()), None)
            if oldest is not None:
                self._resting.end(oldest, time.monotonic())
        stream = lane.session.open(wish.visitor)
        if wish.visitor is None:  # an HTTP tunnel's: those of the others never rest
            self._relief.opened(stream)
        return stream

    def _rests_for(self, owner: object | None) -> bool:
        """Whether a stream rests that ``owner`` may use now, its own or anybody's."""
        return self.keeps(owner) or any(lane.idle for lane in self._lanes.values())

    def _by_load(self) -> list[Lane]:
        """The sessions that take visitors, the least busy one first; none while one is expected."""
        lanes = [lane for lane in self._lanes.values() if lane.session.takes_visitors]
        if not lanes and not self.expecting:
            raise SessionClosedError("the tunnel's client is away")
        lanes.sort(key=Lane.load)
        return lanes

    def _is_full(self, lanes: list[Lane]) -> bool:
        """Whether all sessions together have as many streams as the client takes."""
        limit = max((lane.session.peer_max_streams for lane in lanes), default=0)
        return sum(session.stream_count for session in self.sessions) >= limit

    def _room(self, session: Session) -> None:
        self._note_free()

    def _note_free(self) -> None:
        self._wake_first()
        if self._freed is not None:
            self._freed.set()

    def _wake_all(self) -> None:
        for turn in self._waiting:
            turn.set()

    def _wake_first(self) -> None:
        if self._waiting:
            self._waiting[0].set()
