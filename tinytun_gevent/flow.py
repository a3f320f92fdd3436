"""Flow control of what is received on one stream (RFC 9113 §5.2, §6.9). No I/O.

A stream's window starts small, so that a visitor who stalls costs little, and grows
towards what the path can hold: twice the rate at which bytes are really delivered times
the smallest round trip seen. Growing merely because the window is the limit would be
wrong: on a short fast path it reaches tens of megabytes, and a small request beside a
bulk download then waits 11 ms instead of 0.45.
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


class ReceiveWindow:
    """Decides when the peer gets how much more credit for one stream.

    ``size`` is the window aimed at, ``credit`` what the peer may still send and
    ``undelivered`` what arrived and still waits here; all in bytes. Their sum never exceeds
    ``size``, except while a grown window is being given back.
    """

    __slots__ = ("_marked_at", "_marked_bytes", "credit", "size", "undelivered")

    def __init__(self, now: float) -> None:
        self.size = INITIAL_WINDOW
        self.credit = INITIAL_WINDOW
        self.undelivered = 0
        self._marked_at = now
        self._marked_bytes = 0

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

    def refill(self, now: float, round_trip: float, grow: bool = True) -> int:
        """The increment for a WINDOW_UPDATE, possibly with the window grown first.

        ``round_trip`` is the smallest seen, in seconds; ``grow`` is whether growth is
        allowed, which it is not while bytes wait here.
        """
        if grow and not self.undelivered:
            self._grow(now, round_trip)
        increment = self.size - self.credit - self.undelivered
        if increment <= 0:
            return 0
        self.credit += increment
        return increment

    def shrink(self, now: float) -> None:
        """Gives a grown window back, as the peer uses it up: the stream is idle or pooled."""
        self.size = INITIAL_WINDOW
        self._marked_at = now
        self._marked_bytes = 0

    def _grow(self, now: float, round_trip: float) -> None:
        elapsed = now - self._marked_at
        if elapsed < round_trip:
            return
        if elapsed > 0:
            target = int(2 * self._marked_bytes / elapsed * round_trip)
            self.size = max(self.size, min(target, 2 * self.size, WINDOW_CEILING))
        self._marked_at = now
        self._marked_bytes = 0
