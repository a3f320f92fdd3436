"""So many at once, and so many a second after them: the arithmetic of a token bucket. Pure: no I/O, no clock.

Times are monotonic seconds; a rate of 0 is no limit.
"""

from __future__ import annotations

from typing import Final

ROUNDING: Final = 1e-5
"""Seconds that a sum of thousands of steps may lose to floating point, after months of a clock."""


class Bucket:
    """What may be taken: ``burst`` at once, ``rate`` a second in the long run.

    It keeps the time at which it will be full again, so there is nothing to refill. Within any ``t`` seconds
    never more than ``rate * t + burst`` is taken.
    """

    __slots__ = ("_full_at", "burst", "rate")

    def __init__(self, rate: float, burst: float) -> None:
        self.rate = rate
        #: The most that can be taken at once.
        self.burst = burst
        self._full_at = 0.0

    def change(self, rate: float, burst: float, now: float) -> None:
        """Goes on with other figures; what has been taken stays taken."""
        taken = max(0.0, self._full_at - now) * self.rate
        self.rate, self.burst = rate, burst
        self._full_at = now + taken / rate if rate else 0.0

    def wait(self, now: float, count: float = 1) -> float:
        """Seconds until ``count``, at most the burst, may be taken: 0.0 is now, never less."""
        if not self.rate:
            return 0.0
        left = max(self._full_at, now) + (min(count, self.burst) - self.burst) / self.rate - now
        return left if left > ROUNDING else 0.0

    def take(self, now: float, count: float = 1) -> bool:
        """Whether ``count``, never more than the burst, may be taken now; they are then."""
        if not self.rate:
            return True
        full_at = max(self._full_at, now)
        if full_at + (count - self.burst) / self.rate - now > ROUNDING:
            return False
        self._full_at = full_at + count / self.rate
        return True

    def charge(self, now: float, count: float) -> None:
        """Takes ``count`` whether they are there or not: whoever comes next waits for them too."""
        if self.rate:
            self._full_at = max(self._full_at, now) + count / self.rate

    def refund(self, count: float) -> None:
        """Puts back what was taken and not used."""
        if self.rate:
            self._full_at -= count / self.rate

    def is_full(self, now: float) -> bool:
        """Whether nothing has been taken that is not there again."""
        return self._full_at <= now
