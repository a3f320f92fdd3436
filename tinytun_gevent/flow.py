"""Flow control of what is received on one stream (RFC 9113 §5.2, §6.9). No I/O.

A stream's window starts small, so that a visitor who stalls costs little, and grows
towards what the path can hold: twice what is really delivered in the smallest round trip
seen, and as much more as that was more than in the round trip before, or the window would
always lag behind a sender who speeds up. Growing merely because the window is the limit
would be wrong: on a short fast path it reaches tens of megabytes, and a small request
beside a bulk download then waits 11 ms instead of 0.45.
"""

from __future__ import annotations

from typing import Final

INITIAL_WINDOW: Final = 256 * 1024
"""Bytes a stream may have in flight from the start."""

WINDOW_CEILING: Final = 32 * 1024 * 1024
"""Bytes a window grows to at most: 2.5 Gbit/s over 100 ms."""

CREDIT_STEP: Final = 1024 * 1024
"""Bytes after which credit is given at the latest; with half a 16 MiB window over 100 ms
instead, a line of 119 MB/s carried 81."""


LIMITED: Final = 0.6
"""Part of a window that is delivered in a round trip when it is the window that limits the sender."""

PERIOD: Final = 0.75
"""Round trips after which what was delivered is looked at. The bursts of a small window come a round
trip apart, so this is when the next one begins: from beginning to beginning there is one window."""

TURNAROUND: Final = 0.0005
"""Seconds that two busy programs take to answer one another, however short the path: with a window of
one frame each waited for the other, and a download on loopback had 0.95 GB/s instead of 1.45."""

SHORTEST: Final = 0.005
"""Seconds that stand for a shorter round trip there: in less, what one read brings looks like a rate."""

STALE: Final = 2.0
"""Round trips after which that says nothing: whoever is limited by his window is heard in each."""


class ReceiveWindow:
    """Decides when the peer gets how much more credit for one stream.

    ``size`` is the window aimed at, ``credit`` what the peer may still send and
    ``undelivered`` what arrived and still waits here; all in bytes. Their sum never exceeds
    ``size``, except while a grown window is being given back.
    """

    __slots__ = ("_before", "_marked_at", "_marked_bytes", "credit", "size", "undelivered")

    def __init__(self) -> None:
        self.size = INITIAL_WINDOW
        self.credit = INITIAL_WINDOW
        self.undelivered = 0
        # The first bytes, a round trip or more from now, are where the first look begins.
        self._marked_at = float("-inf")
        self._marked_bytes = 0
        #: What was delivered in the round trip before; 0.0 if that is not known.
        self._before = 0.0

    def receive(self, count: int) -> bool:
        """Charges ``count`` bytes; False if the peer had no credit for them."""
        self.credit -= count
        self.undelivered += count
        return self.credit >= 0

    def deliver(self, count: int) -> bool:
        """Notes ``count`` bytes delivered; True if it is time for :meth:`refill`."""
        self.undelivered -= count
        self._marked_bytes += count
        due = self.size - self.credit - self.undelivered
        return due >= CREDIT_STEP or due >= self.size >> 2

    def refill(self, now: float, round_trip: float, usual: int = INITIAL_WINDOW, coming: int = 0) -> int:
        """The increment for a WINDOW_UPDATE, possibly with the window grown first.

        ``round_trip`` is the smallest seen, in seconds; ``usual`` is the size, in bytes, that
        other streams of the same path have grown to, and that this one may have as soon as its window
        is what limits it. A window does not grow while bytes wait here; the ``coming`` ones of
        a frame whose first bytes only have arrived do not.
        """
        if self.undelivered <= coming:
            self._grow(now, round_trip, usual)
        increment = self.size - self.credit - self.undelivered
        if increment <= 0:
            return 0
        self.credit += increment
        return increment

    def shrink(self) -> None:
        """Gives a grown window back, as the peer uses it up: the stream is idle or pooled."""
        self.size = INITIAL_WINDOW
        self._marked_at = float("-inf")
        self._marked_bytes = 0
        self._before = 0.0

    def _grow(self, now: float, round_trip: float, usual: int) -> None:
        elapsed, span = now - self._marked_at, max(round_trip, SHORTEST)
        if elapsed < PERIOD * span:
            return
        if elapsed <= STALE * span:
            delivered = self._marked_bytes / elapsed * max(round_trip, TURNAROUND)
            faster = min(2.0, max(1.0, delivered / self._before)) if self._before else 2.0
            target = int(2 * delivered * faster)
            if delivered >= LIMITED * self.size:
                target = max(target, usual)
            self.size = max(self.size, min(target, WINDOW_CEILING))
            self._before = delivered
        self._marked_at = now
        self._marked_bytes = 0
