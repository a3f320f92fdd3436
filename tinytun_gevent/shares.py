"""Fair shares of one busy server: no tunnel gets far ahead of another one that could go as fast.

What a tunnel moves depends on how often its sockets are ready, on how many visitors it has, on how large its
windows have grown, and on which client the operating system lets run: with eight alike, one had six times as
much as another. So bytes are counted by tunnel while several move much at once. One that is ahead pauses
until the others have caught up, unless less is moved altogether then: it is a slow path that keeps them.
"""

from __future__ import annotations

import time
from typing import Final

from gevent.event import Event

from tinytun_gevent.turns import TurnLock

BULK: Final = 16 * 1024
"""Bytes moved at once that count. Small answers are neither counted nor, on a quiet tunnel, ever delayed."""

LEAD: Final = 512 * 1024
"""Bytes that one tunnel may be ahead of another: a few turns, for they do not come in order."""

STEP: Final = 128 * 1024
"""Bytes after which it is looked who is ahead."""

ABSENT: Final = 0.1
"""Seconds after which one that has moved nothing does not compete (any more): an operating system with
more programs than processors lets each wait for less, also a busy one."""

FREE: Final = 0.03
"""Seconds for which one that begins to compete goes on whatever the others do: what all move then is what
there is to be shared."""

FREE_AGAIN: Final = 1.0
"""… and again after so many seconds: things change. It costs the others a hundredth or two."""

PATIENCE: Final = 0.03
"""Seconds that one has been waited for when it is looked whether that was of use."""

USE: Final = 0.5
"""Part of what there is to be shared that must have been moved in that time, by all together."""

LEFT_OUT: Final = (0.1, 3.2)
"""Seconds for which nobody waits for one if it was not, the first time and at most; doubled each time."""


class Share:
    """What one tunnel moves in one direction."""

    __slots__ = (
        "_all",
        "_caught_up",
        "_expected",
        "_free_from",
        "_free_until",
        "_gained",
        "_left_out",
        "_look_at",
        "_next_free",
        "_rate",
        "_total",
        "_waited",
        "ahead",
        "at",
        "level",
        "turns",
        "until",
    )

    def __init__(self, all_shares: Shares) -> None:
        self._all = all_shares
        #: Whose turn it is to go on, where there are many to move its bytes.
        self.turns = TurnLock()
        #: Whether it has to :meth:`wait`.
        self.ahead = False
        #: Bytes that count, compared with the others'.
        self.level = 0
        #: When it has last moved something, in monotonic seconds.
        self.at = 0.0
        #: Until when nobody waits for it.
        self.until = 0.0
        self._left_out = LEFT_OUT[0]
        #: Bytes that it has really moved, and at how many it is looked who is ahead.
        self._total = 0
        self._look_at = 0
        #: Until when it goes on whatever the others do, 0.0: it does not; and where that began.
        self._free_until = 0.0
        self._free_from = (0, 0.0)
        self._next_free = 0.0
        #: Bytes a second that all moved then.
        self._rate = 0.0
        #: For how long others have waited for it, what all have moved meanwhile, and what they should have.
        self._waited = 0.0
        self._gained = 0.0
        self._expected = 0.0
        #: Those who wait until its level is so high.
        self._caught_up: list[tuple[int, Event]] = []

    def took(self, count: int) -> None:
        """Counts bytes that were moved at once. Never blocks."""
        self.level += count
        self._total += count
        self._all.total += count
        if self._total < self._look_at:
            return
        now = time.monotonic()
        if now - self.at > ABSENT:
            self._all.join(self, now)
            self._next_free = 0.0
        self.at = now
        self._look_at = self._total + STEP
        self.ahead = not self._is_free(now) and self._all.last_behind(self, now) is not None
        if self._caught_up:
            self._wake()

    def wait(self) -> None:
        """Blocks until it is no longer ahead of one that makes use of that; some milliseconds."""
        while (other := self._all.last_behind(self, now := time.monotonic())) is not None:
            before = self._all.total
            other._reach(self.level - LEAD // 2)
            waited = min(time.monotonic() - now, PATIENCE)  # more is this process's own lateness
            other._judge(waited, self._all.total - before, USE * self._rate * waited, self.level)
        self.ahead = False
        self.at = time.monotonic()

    def _reach(self, level: int) -> None:
        """Blocks until its level is so high, for :data:`PATIENCE` at most."""
        turn = (level, Event())
        self._caught_up.append(turn)
        try:
            turn[1].wait(PATIENCE)
        finally:
            if turn in self._caught_up:
                self._caught_up.remove(turn)

    def _judge(self, waited: float, gained: float, expected: float, level: int) -> None:
        """Somebody at ``level`` has waited for it: sometimes, whether that should go on.

        If not, nobody waits for a while, and what it lacks is forgiven.
        """
        self._waited += waited
        self._gained += gained
        self._expected += expected
        if self._waited < PATIENCE:
            return
        if self._gained >= self._expected:
            self._left_out = LEFT_OUT[0]
        else:
            self.until = time.monotonic() + self._left_out
            self._left_out = min(2 * self._left_out, LEFT_OUT[1])
            self.level = max(self.level, level)
        self._waited = self._gained = self._expected = 0.0

    def _is_free(self, now: float) -> bool:
        """Whether it goes on whatever the others do; what it gains by that is forgiven as well."""
        if not self._free_until:
            if now < self._next_free:
                return False
            self._free_until, self._free_from = now + FREE, (self._all.total, now)
        if now < self._free_until:
            return True
        count, since = self._free_from
        self._rate = (self._all.total - count) / (now - since)
        self._free_until, self._next_free = 0.0, now + FREE_AGAIN
        other = self._all.last_behind(self, now)
        if other is not None:
            self.level = other.level + LEAD
        return False

    def _wake(self) -> None:
        for turn in [turn for turn in self._caught_up if turn[0] <= self.level]:
            self._caught_up.remove(turn)
            turn[1].set()


class Shares:
    """The tunnels of one server, in one direction."""

    def __init__(self) -> None:
        #: Those that compete now, or did a moment ago.
        self._running: list[Share] = []
        #: Bytes that all together have moved.
        self.total = 0

    def join(self, share: Share, now: float) -> None:
        """``share`` competes from now on, with those that are furthest behind."""
        self._running = [other for other in self._running if other is not share and now - other.at <= ABSENT]
        if self._running:
            share.level = min(other.level for other in self._running)
        self._running.append(share)

    def last_behind(self, share: Share, now: float) -> Share | None:
        """The one furthest behind ``share``, by more than it may be; None if there is none."""
        last = share
        for other in self._running:
            if other.level < last.level and other.until <= now and now - other.at <= ABSENT:
                last = other
        return last if last.level + LEAD < share.level else None
