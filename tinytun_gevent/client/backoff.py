"""How long to wait before the next attempt to reach the server."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

FIRST = 0.5
"""Seconds before the first retry: a restarted server is back within a second."""

EARLY_MAX = 2.0
"""Longest wait while the loss is fresh, so that a server's restart costs its users little."""

SHARE = 15.0
"""A wait is at most one part in so many of the time since the loss: `EARLY_MAX` for 30 s, and still under 5 s
when a server has been away for a minute; so an absence is made longer by a fifteenth at most."""

MAX = 20.0
"""Longest wait after 5 minutes: a computer that wakes up is connected soon, a dead server sees little."""

LASTING = 2.0
"""Seconds after which a connection whose first PING was answered resets the delay. The answer alone is no
proof: a server that answers and dies, or says goodbye each second, would be asked all the time."""

HANDOVER = 0.1
"""Longest wait in seconds when a server says that it stops: one that reloads serves already in another
process, and visitors find nobody until we are there."""


class Backoff:
    """Waits that double from 0.5 s to 2 s, and from 30 s without a connection on grow to 20 s, for ever.

    Each is shortened by up to half at random, so that the clients of a restarted server do not come back
    all at once.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._clock = clock
        self._uniform = uniform
        #: When the connection was lost, or first wanted; None while all is well.
        self._lost: float | None = None
        self._next = FIRST

    def next(self) -> float:
        """Seconds to wait now; each call makes the next wait longer."""
        now = self._clock()
        if self._lost is None:
            self._lost = now
        ceiling = min(max(EARLY_MAX, (now - self._lost) / SHARE), MAX)
        base = min(self._next, ceiling)
        self._next = min(base * 2, MAX)
        return base * self._uniform(0.5, 1.0)

    def hand_over(self) -> float:
        """Seconds to wait when the server has said goodbye: hardly any the first time since all was well."""
        if self._lost is not None:
            return self.next()
        self._lost = self._clock()
        return self._uniform(0.0, HANDOVER)

    def served(self, seconds: float) -> None:
        """A connection that had answered a PING has ended after so long; call it before the next wait."""
        if seconds >= LASTING:
            self._lost = None
            self._next = FIRST
