"""The streams of one tunnel: which session opens one, which idle one is used again, who waits.

To the client a stream is one connection to the local service. When an exchange on it ended
cleanly and both messages allow persistence, it comes back here and carries the next request
of any visitor, which makes a new visitor cheap and costs no round trip.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Final

from gevent.event import Event

from tinytun_gevent.errors import SessionClosedError, SessionError, StreamLimitError
from tinytun_gevent.session import Session
from tinytun_gevent.shares import Share
from tinytun_gevent.stream import CANCEL, Stream

IDLE_LIFE: Final = 4.0
"""Seconds that a stream stays in the pool: Node closes idle connections after 5."""

FRESH_LIFE: Final = 1.0
"""Seconds within which an idle stream may carry a request that must not be sent twice."""

LOOK_AGAIN: Final = 0.5
"""Seconds after which a waiting visitor looks by himself: a refusal wears off silently."""

LAST_GOODBYE: Final = 5.0
"""Seconds that the service gets to close a connection whose stream was ended for age."""


class _Resting:
    """The receiver of a pooled stream. Whatever arrives, the stream is no longer of use."""

    __slots__ = ("_pool", "_stream", "since")

    def __init__(self, pool: StreamPool, stream: Stream) -> None:
        self._pool = pool
        self._stream = stream
        self.since = time.monotonic()

    def data(self, view: memoryview) -> None:
        self._stream.reset(CANCEL)

    def eof(self) -> None:
        self._pool.drop(self._stream)
        self._stream.shutdown()

    def aborted(self, error: SessionError) -> None:
        self._pool.drop(self._stream)


class _Leaving(_Resting):
    """The receiver of a stream that was ended for age: it waits for the other half."""

    __slots__ = ()

    def data(self, view: memoryview) -> None:
        self._stream.consumed(len(view))

    def eof(self) -> None:
        pass


class _Lane:
    """One session of the tunnel and the streams on it that nobody uses now."""

    __slots__ = ("idle", "session")

    def __init__(self, session: Session) -> None:
        self.session = session
        #: The one used last at the end.
        self.idle: list[Stream] = []

    def load(self) -> int:
        """How busy it is: streams in use; of two that are equal the one with an idle stream first."""
        idle = len(self.idle)
        return 2 * (len(self.session.streams) - idle) - (idle > 0)


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


class StreamPool:
    """Gives out the streams of a tunnel, over all of its sessions.

    A stream comes from :meth:`acquire`; give it back with :meth:`release`, or reset it. The
    session that is least in use serves the next visitor, so that they share several TCP
    connections evenly. Its idle streams are used last in, first out, so that those of a
    past burst age and end.

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
        self._lanes: dict[Session, _Lane] = {}
        #: The one lane, while there is only one: most tunnels have no other.
        self._only: _Lane | None = None
        self._leaving: list[Stream] = []
        self._waiting: deque[Event] = deque()
        #: When :meth:`claim` was last called, and how many places were claimed in that round.
        self._claimed = (0.0, 0)
        #: Set when a stream has become free; made by whoever waits for that.
        self._freed: Event | None = None

    @property
    def idle_count(self) -> int:
        return sum(len(lane.idle) for lane in self._lanes.values())

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    def add(self, session: Session) -> None:
        """Lets ``session``, which has started, serve the tunnel."""
        self.expecting = False
        self.sessions.append(session)
        self._lanes[session] = _Lane(session)
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
        gone: Callable[[], bool] | None = None,
    ) -> Stream:
        """A stream to the local service; blocks while all are in use, first come first served.

        With ``reuse`` an idle one will do, if it was used a moment ago or the request is
        ``retriable``. ``first`` puts the caller at the head of the queue (a refused stream,
        RFC 9113 §8.7). ``visitor`` is told to the client on a new stream. ``gone`` tells whether the caller's
        visitor has left, which ends the wait within :data:`LOOK_AGAIN`.

        Raises :class:`StreamLimitError` after waiting in vain for a stream,
        :class:`SessionClosedError` if no session is expected, or none came, or the visitor has ``gone``.
        """
        if first or not self._waiting:
            stream = self._take(reuse, retriable, visitor)
            if stream is not None:
                return stream
        return self._queue(reuse, retriable, first, visitor, gone)

    @property
    def in_use(self) -> int:
        """Streams that carry a visitor now."""
        leaving = sum(not stream.closed for stream in self._leaving)
        return sum(session.stream_count for session in self.sessions) - self.idle_count - leaving

    def wait_quiet(self, timeout: float) -> None:
        """Blocks until no stream carries a visitor, ``timeout`` seconds at most."""
        until = time.monotonic() + timeout
        while self.in_use and (left := until - time.monotonic()) > 0:
            self._freed = Event()
            self._freed.wait(left)

    def release(self, stream: Stream) -> None:
        """Takes back a stream whose exchange ended cleanly, for the next one."""
        lane = self._lanes.get(stream.session)
        if lane is None or stream.closed or stream.remote_ended or stream.session.goaway_received:
            self._end(stream)
            return
        stream.rest()
        stream.receiver = _Resting(self, stream)
        lane.idle.append(stream)
        self._note_free()

    def drop(self, stream: Stream) -> None:
        """Forgets an idle stream that has ended."""
        lane = self._lanes.get(stream.session)
        if lane is not None and stream in lane.idle:
            lane.idle.remove(stream)

    def tick(self, now: float) -> None:
        """Ends streams that have been idle for too long; called about once a second."""
        for lane in self._lanes.values():
            while lane.idle and self._resting_since(lane.idle[0]) < now - IDLE_LIFE:
                self._end(lane.idle.pop(0))
        while self._leaving and self._resting_since(self._leaving[0]) < now - LAST_GOODBYE:
            self._leaving.pop(0).reset(CANCEL)

    def end_idle(self, session: Session | None = None) -> None:
        """Ends every idle stream, or those of a session: the client leaves it, or the server drains.

        Whoever waits looks again.
        """
        for lane in list(self._lanes.values()):
            if session is None or lane.session is session:
                while lane.idle:
                    self._end(lane.idle.pop())
        self._wake_all()

    def _end(self, stream: Stream) -> None:
        stream.receiver = _Leaving(self, stream)
        stream.rest()
        stream.shutdown()
        if not stream.closed:
            self._leaving.append(stream)

    def _queue(
        self,
        reuse: bool,
        retriable: bool,
        first: bool,
        visitor: str | None,
        gone: Callable[[], bool] | None,
    ) -> Stream:
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
                if gone is not None and gone():
                    raise SessionClosedError("the visitor has left")
                if self._waiting[0] is turn:
                    stream = self._take(reuse, retriable, visitor)
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

    def _take(self, reuse: bool, retriable: bool, visitor: str | None) -> Stream | None:
        """A stream without waiting, or None."""
        lane = self._only
        if lane is None or not lane.session.takes_visitors:
            return self._take_from_several(reuse, retriable, visitor)
        if reuse and lane.idle and (retriable or self._is_fresh(lane.idle[-1])):
            return lane.idle.pop()
        if lane.session.has_room or (self._make_room() and lane.session.has_room):
            return lane.session.open(visitor)
        return None

    def _take_from_several(self, reuse: bool, retriable: bool, visitor: str | None) -> Stream | None:
        """The same where the tunnel has more than one session, or none that takes visitors."""
        lanes = self._by_load()
        full: bool | None = None
        for lane in lanes:
            if reuse and lane.idle and (retriable or self._is_fresh(lane.idle[-1])):
                return lane.idle.pop()
            if full is None:
                full = self._is_full(lanes)
            if not full and lane.session.has_room:
                return lane.session.open(visitor)
        if not lanes or not self._make_room() or self._is_full(lanes):
            return None
        roomy = next((lane.session for lane in lanes if lane.session.has_room), None)
        return None if roomy is None else roomy.open(visitor)

    def _by_load(self) -> list[_Lane]:
        """The sessions that take visitors, the least busy one first; none while one is expected."""
        lanes = [lane for lane in self._lanes.values() if lane.session.takes_visitors]
        if not lanes and not self.expecting:
            raise SessionClosedError("the tunnel's client is away")
        lanes.sort(key=_Lane.load)
        return lanes

    def _is_full(self, lanes: list[_Lane]) -> bool:
        """Whether all sessions together have as many streams as the client takes."""
        limit = max((lane.session.peer_max_streams for lane in lanes), default=0)
        return sum(session.stream_count for session in self.sessions) >= limit

    def _make_room(self) -> bool:
        """Gives up the oldest stream that nobody uses, whose place is needed."""
        while True:
            if self._leaving:
                unused = self._leaving
            else:
                lanes = [lane for lane in self._lanes.values() if lane.idle]
                if not lanes:
                    return False
                unused = min(lanes, key=lambda lane: self._resting_since(lane.idle[0])).idle
            stream = unused.pop(0)
            if not stream.closed:  # those that left by themselves have made room already
                stream.reset(CANCEL)
                return True

    def _is_fresh(self, idle: Stream) -> bool:
        """Whether it was used a moment ago, so that it hardly can have ended meanwhile."""
        return self._resting_since(idle) >= time.monotonic() - FRESH_LIFE

    @staticmethod
    def _resting_since(stream: Stream) -> float:
        return stream.receiver.since if isinstance(stream.receiver, _Resting) else 0.0

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
