"""How long to wait before the next attempt to reach the server."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

FIRST = 0.5
"""Seconds before the first retry: a restarted server is back within a second."""

EARLY_MAX = 2.0
"""Longest wait while the loss is fresh, so that a server's restart costs its users little."""

EARLY = 30.0
"""Seconds for which a loss is fresh."""

MAX = 20.0
"""Longest wait after that: a computer that wakes up is connected soon, a dead server sees little."""


class Backoff:
    """Waits that double from 0.5 s to 2 s, after 30 s without a connection to 20 s, for ever.

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
        ceiling = EARLY_MAX if now - self._lost < EARLY else MAX
        base = min(self._next, ceiling)
        self._next = min(base * 2, MAX)
        return base * self._uniform(0.5, 1.0)

    def reset(self) -> None:
        """The connection has proved itself (its first PING was answered)."""
        self._lost = None
        self._next = FIRST
