"""Bytes a second: whose turn it is to move some.

A limit is shared in turns, in the order of asking. A turn is a hundredth of a second's bytes, so that who
moves little hardly waits behind those who move much.
"""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any, Final

import gevent
from gevent.hub import Waiter

from tinytun_gevent.bucket import Bucket

BURST: Final = 0.05
"""Seconds of the rate that may pass at once after a pause; with a turn's own bytes no second is more than
6 % above the rate. An event loop that is late by less makes up for it."""

TURN: Final = 0.01
"""Seconds of the rate that one turn lasts."""

SHORTEST: Final = 1024
"""Bytes of a turn at least: packets with less carry more head than payload."""

LONGEST: Final = 256 * 1024
"""… and at most: as much as one frame of a session has."""


class Rate:
    """A limit of bytes a second, shared by all who move bytes under it; ``above`` is one that holds as well.

    Belongs to the hub that uses it.
    """

    __slots__ = ("_bucket", "_timer", "_turn", "_waiting", "above")

    def __init__(self, rate: int, above: Rate | None = None) -> None:
        """``rate`` of 0 is no limit."""
        self.above = above
        self._waiting: deque[tuple[Waiter[None], int]] = deque()
        self._timer: Any = None
        self._turn = self._length(rate)
        self._bucket = Bucket(rate, self._burst(rate))

    def _length(self, rate: int) -> int:
        return min(LONGEST, max(SHORTEST, int(rate * TURN))) if rate else LONGEST

    def _burst(self, rate: int) -> float:
        return max(rate * BURST, self._length(rate)) if rate else math.inf

    @property
    def rate(self) -> float:
        """Bytes a second; 0 is no limit."""
        return self._bucket.rate

    def change(self, rate: int) -> None:
        """Goes on with another figure; never blocks."""
        self._turn = self._length(rate)
        self._bucket.change(rate, self._burst(rate), time.monotonic())
        self._serve()

    @property
    def rests(self) -> bool:
        """Whether nobody waits, and nothing that was used is remembered."""
        return not self._waiting and self._bucket.is_full(time.monotonic())

    def take_now(self, count: int) -> bool:
        """Whether ``count`` bytes may be moved without waiting for a turn; they are charged then."""
        if self._waiting or not self._bucket.take(time.monotonic(), count):
            return False
        if self.above is None or self.above.take_now(count):
            return True
        self._bucket.refund(count)
        return False

    def take(self, wanted: int) -> int:
        """Waits for a turn: how many bytes, of at least one ``wanted``, may be moved now. Blocks."""
        count = min(wanted, self._turn)
        if self._waiting or not self._bucket.take(time.monotonic(), count):
            self._queue(count)
        if self.above is None:
            return count
        try:
            granted = self.above.take(count)
        except BaseException:  # what is above has taken nothing
            self._bucket.refund(count)
            self._serve()
            raise
        if granted < count:
            self._bucket.refund(count - granted)
            self._serve()
        return granted

    def pass_all(self, count: int) -> None:
        """Waits until ``count`` bytes may have been moved. Blocks."""
        while count > 0:
            count -= self.take(count)

    def refund(self, count: int) -> None:
        """Gives back what was taken and not moved."""
        if count <= 0:
            return
        self._bucket.refund(count)
        self._serve()
        if self.above is not None:
            self.above.refund(count)

    def _queue(self, count: int) -> None:
        waiter: Waiter[None] = Waiter()
        turn = (waiter, count)
        self._waiting.append(turn)
        self._serve()
        try:
            waiter.get()
        except BaseException:
            if turn in self._waiting:
                self._waiting.remove(turn)
            else:
                self._bucket.refund(count)
            self._serve()
            raise

    def _serve(self) -> None:
        """Gives a turn to all who may have one now, and looks again when the next one may."""
        self._stop_timer()
        loop = gevent.get_hub().loop
        while self._waiting:
            waiter, count = self._waiting[0]
            delay = self._bucket.wait(time.monotonic(), count)
            if delay:
                self._timer = loop.timer(delay)
                self._timer.start(self._serve)
                return
            self._bucket.charge(time.monotonic(), count)
            self._waiting.popleft()
            loop.run_callback(waiter.switch, None)

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.stop()
            timer.close()
