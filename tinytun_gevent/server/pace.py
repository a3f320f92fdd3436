"""Whether a visitor is too slow: sending his request's body, or taking the answer that waits for him. No I/O.

Only the time counts in which he is the one that is waited for. An average over the whole transfer would
allow somebody who was fast once to stall for days, so time is saved up to a limit only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

BODY_PAUSE: Final = 60.0
"""Seconds that a body may pause: nginx's client_body_timeout. A program whose output is uploaded as it comes
(``curl -T -``) says nothing for a while."""

SENDING_GRACE: Final = 20.0
"""Seconds that a body may stall while another visitor waits for its place: a telephone between two cells is
back by then."""

TAKING_GRACE: Final = 300.0
"""Seconds that an answer may: players fetch the next minutes of a film, and then nothing for a while."""


class Pace:
    """The patience with one visitor in one direction: waiting uses it up, progress gives it back.

    ``rate`` bytes are worth a second, up to ``grace`` seconds. Call :meth:`look` about once a second.
    """

    __slots__ = ("_grace", "_left", "_looked_at", "_rate", "_seen", "_waited")

    def __init__(self, rate: float, grace: float, now: float, count: int = 0) -> None:
        """``count`` is how many bytes have passed at monotonic time ``now``."""
        self._rate = rate
        self._grace = grace
        self._left = grace
        self._looked_at = now
        self._seen = count
        #: Whether he was waited for when it was last looked.
        self._waited = False

    def look(self, now: float, count: int, waiting: bool) -> bool:
        """Whether patience is over; ``count`` bytes have passed so far, ``waiting`` is for him now.

        The time since the last look counts if he was waited for then and is now.
        """
        self._left = min(self._grace, self._left + (count - self._seen) / self._rate)
        if waiting and self._waited:
            self._left -= now - self._looked_at
        self._looked_at, self._seen, self._waited = now, count, waiting
        over = self._left < 0
        self._left = max(self._left, 0.0)  # where nothing follows from it, a fast second makes it good
        return over


class Pause:
    """How long nothing has come from a visitor that is waited for. Call :meth:`look` about once a second."""

    __slots__ = ("_limit", "_seen", "_since")

    def __init__(self, limit: float, now: float, count: int = 0) -> None:
        """``count`` is how many bytes have passed at monotonic time ``now``."""
        self._limit = limit
        self._seen = count
        self._since = now

    def look(self, now: float, count: int, waiting: bool) -> bool:
        """Whether it is over ``limit`` seconds; ``count`` bytes have passed so far."""
        if count != self._seen or not waiting:
            self._seen, self._since = count, now
        return now - self._since > self._limit


class Sending:
    """The patience with a visitor that sends a body. Call :meth:`look` about once a second."""

    __slots__ = ("_pace", "_pause")

    def __init__(self, rate: float, now: float, count: int = 0) -> None:
        """As for :class:`Pace`."""
        self._pace = Pace(rate, SENDING_GRACE, now, count)
        self._pause = Pause(BODY_PAUSE, now, count)

    def look(self, now: float, count: int, waiting: bool, wanted: Callable[[], bool]) -> bool:
        """Whether patience is over; ``wanted`` tells whether another visitor waits for the place."""
        slow = self._pace.look(now, count, waiting)
        return self._pause.look(now, count, waiting) or (slow and wanted())
