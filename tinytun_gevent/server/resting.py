"""The streams of a tunnel that carry no exchange: those that rest until the next one, and those that are
ending."""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from typing import TYPE_CHECKING, Final

from gevent.event import Event

from tinytun_gevent.server import deadlines
from tinytun_gevent.server.next_turn import NextTurn
from tinytun_gevent.stream import CANCEL

if TYPE_CHECKING:
    from collections.abc import Callable

    from tinytun_gevent.errors import SessionError
    from tinytun_gevent.session import Session
    from tinytun_gevent.stream import Stream

LAST_GOODBYE: Final = 5.0
"""Seconds that the service gets to close a connection whose stream was ended."""


class Lane:
    """One session of the tunnel and the streams on it that rest."""

    __slots__ = ("idle", "resting", "session")

    def __init__(self, session: Session) -> None:
        self.session = session
        #: Those that anybody may use, the one used last at the end.
        self.idle: OrderedDict[Stream, Resting] = OrderedDict()
        #: How many rest, whoever may use them.
        self.resting = 0

    def load(self) -> int:
        """How busy it is: streams in use; of two that are equal the one with an idle stream first."""
        return 2 * (len(self.session.streams) - self.resting) - (len(self.idle) > 0)


class Resting:
    """The receiver of a stream between two exchanges. Whatever arrives, the stream is no longer of use."""

    __slots__ = ("_home", "lane", "login", "owner", "settled", "shared", "since", "stream", "until")

    def __init__(
        self,
        home: RestingStreams,
        lane: Lane,
        stream: Stream,
        owner: object | None,
        shared: bool,
        login: bool,
        since: float,
        until: float,
    ) -> None:
        self._home = home
        self.lane = lane
        self.stream = stream
        #: The visitor that may use it at once; None if it has left, or is not known.
        self.owner = owner
        #: Whether others may use it too, once it is settled.
        self.shared = shared
        #: Whether nothing has come behind its last answer for one turn of the loop.
        self.settled = False
        #: Whether it belongs to its owner because of a login.
        self.login = login
        #: When it began to rest, and until when it may, in monotonic seconds.
        self.since = since
        self.until = until

    def data(self, view: memoryview) -> None:
        self.stream.reset(CANCEL)

    def eof(self) -> None:
        self._home.take(self)
        self.stream.shutdown()

    def aborted(self, error: SessionError) -> None:
        self._home.take(self)


class Leaving:
    """The receiver of a stream that was ended: it waits for the service to close as well."""

    __slots__ = ("_home", "_stream", "since")

    def __init__(self, home: RestingStreams, stream: Stream, since: float) -> None:
        self._home = home
        self._stream = stream
        #: When it was ended, in monotonic seconds.
        self.since = since

    def data(self, view: memoryview) -> None:
        self._stream.consumed(len(view))

    def eof(self) -> None:
        self._home.left(self._stream)

    def aborted(self, error: SessionError) -> None:
        self._home.left(self._stream)


class RestingStreams:
    """All streams of one tunnel that rest or end, over all of its sessions.

    One that rests is for its owner at once. One that is ``shared`` becomes anybody's, in its lane's
    ``idle``, when it is *settled*: when one turn of the event loop has passed in which nothing came behind
    its last answer. Nothing in here blocks but :meth:`wait_settled`.
    """

    def __init__(self, on_settled: Callable[[], None]) -> None:
        """``on_settled`` is called in the hub when streams have become anybody's."""
        #: The one that has rested longest at the front.
        self._all: OrderedDict[Stream, Resting] = OrderedDict()
        self._owned: dict[object | None, Resting] = {}
        self._leaving: OrderedDict[Stream, Leaving] = OrderedDict()
        self._turn: NextTurn[Resting] = NextTurn(self._settle)
        self._on_settled = on_settled
        #: How many shared ones are not settled yet, and how many callers wait for one of them.
        self._settling = 0
        self._waiting = 0
        self._settled = Event()

    def __len__(self) -> int:
        """How many rest."""
        return len(self._all)

    @property
    def leaving(self) -> int:
        """How many are ending."""
        return len(self._leaving)

    def add(
        self,
        lane: Lane,
        stream: Stream,
        owner: object | None,
        shared: bool,
        login: bool,
        since: float,
        until: float,
    ) -> None:
        """Lets a stream rest; ``since`` is now, ``until`` the time at which it has to end at the latest."""
        if owner in self._owned:  # one that was too old for its last request
            self.leave(owner, since)
        stream.rest()
        resting = Resting(self, lane, stream, owner, shared, login, since, until)
        stream.receiver = resting
        self._all[stream] = resting
        lane.resting += 1
        if owner is not None:
            self._owned[owner] = resting
        if shared:
            self._settling += 1
            self._turn.add(resting)

    def take(self, resting: Resting) -> Stream:
        """Takes a stream that rests out of here, for its next exchange or for its end."""
        stream = resting.stream
        if self._all.pop(stream, None) is None:
            return stream
        resting.lane.resting -= 1
        if resting.owner is not None:
            del self._owned[resting.owner]
        if resting.settled:
            del resting.lane.idle[stream]
        elif resting.shared:
            self._settling -= 1
        return stream

    def owned_by(self, owner: object | None) -> Resting | None:
        """The stream that rests for ``owner``, if one does."""
        return self._owned.get(owner)

    def end(self, resting: Resting, now: float) -> None:
        """Ends a stream that rests: the service sees a clean end and closes as well."""
        self.let_go(self.take(resting), now)

    def let_go(self, stream: Stream, now: float) -> None:
        """Ends a stream that carries no exchange and does not rest."""
        leaving = Leaving(self, stream, now)
        stream.receiver = leaving
        stream.rest()
        stream.shutdown()
        if not stream.closed:
            self._leaving[stream] = leaving

    def left(self, stream: Stream) -> None:
        """Forgets an ending stream that is over."""
        self._leaving.pop(stream, None)

    def leave(self, owner: object, now: float) -> None:
        """Says that ``owner`` has left: what nobody else may use ends."""
        resting = self._owned.pop(owner, None)
        if resting is not None:
            resting.owner = None
            if not resting.shared:
                self.end(resting, now)

    def end_oldest(self, most: int, now: float, *, logins: bool) -> int:
        """Ends those that have rested longest, ``most`` of them; returns how many.

        Those with a login only if ``logins``.
        """
        those = (resting for resting in self._all.values() if logins or not resting.login)
        oldest = list(islice(those, most))
        for resting in oldest:
            self.end(resting, now)
        return len(oldest)

    def end_all(self, session: Session, now: float) -> None:
        """Ends all that rest on one session."""
        for resting in [resting for resting in self._all.values() if resting.lane.session is session]:
            self.end(resting, now)

    def make_room(self) -> bool:
        """Aborts the stream that is of least use, because its place is needed; False if there is none.

        Those that settle are of use in a moment.
        """
        for stream in self._leaving:
            stream.reset(CANCEL)
            return True
        for resting in self._all.values():
            if resting.settled or not resting.shared:
                resting.stream.reset(CANCEL)
                return True
        return False

    def tick(self, now: float) -> None:
        """Ends streams that would be too old at the next look, and aborts those whose end takes too long."""
        for resting in [resting for resting in self._all.values() if resting.until <= now + deadlines.TICK]:
            self.end(resting, now)
        late = [stream for stream, leaving in self._leaving.items() if leaving.since < now - LAST_GOODBYE]
        for stream in late:
            stream.reset(CANCEL)

    def worth_a_turn(self) -> bool:
        """Whether a stream settles that no caller of :meth:`wait_settled` waits for already."""
        return self._settling > self._waiting

    def wait_settled(self) -> None:
        """Blocks until streams have settled, which takes a turn or two of the event loop."""
        self._waiting += 1
        try:
            self._settled.wait()
        finally:
            self._waiting -= 1

    def _settle(self, due: list[Resting]) -> None:
        for resting in due:
            if self._all.get(resting.stream) is not resting:
                continue  # in use again, or over
            if resting.lane.session.behind:  # what came behind its answer may not have been looked at
                self._turn.add(resting)
                continue
            self._settling -= 1
            resting.settled = True
            if resting.owner is not None:
                del self._owned[resting.owner]
                resting.owner = None
            resting.lane.idle[resting.stream] = resting
        if self._waiting:
            settled, self._settled = self._settled, Event()
            settled.set()
        self._on_settled()
