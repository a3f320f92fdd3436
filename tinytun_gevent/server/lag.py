"""How late the event loop wakes: what everybody waits for behind whatever runs for too long."""

from __future__ import annotations

import time
from typing import Any, Final

import gevent

from .tally import Histogram

INTERVAL: Final = 0.25
"""Seconds between two looks: a stall of half that is noticed every other time, and looking costs nothing."""

BOUNDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Seconds: 1 ms is what a busy loop has always, from 0.1 s on people notice."""


class LoopLag:
    """Measures, while it runs, how late a timer of the hub's own is; no greenlet has to wake for it."""

    def __init__(self) -> None:
        #: How late it was, in seconds.
        self.lateness = Histogram(BOUNDS)
        #: The worst so far.
        self.worst = 0.0
        self._due = 0.0
        self._timer: Any = None

    def start(self) -> None:
        """Begins to measure in this thread's hub; idempotent."""
        if self._timer is None:
            # Without a reference: a hub that has nothing else to wait for is not kept alive by this.
            self._timer = gevent.get_hub().loop.timer(INTERVAL, INTERVAL, ref=False)
            self._begin()

    def stop(self) -> None:
        """Idempotent."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.close()

    def _look(self) -> None:
        now = time.monotonic()
        late = max(0.0, now - self._due)
        self.lateness.add(late)
        self.worst = max(self.worst, late)
        self._begin()

    def _begin(self) -> None:
        """Sets the timer anew, from this very moment: the loop's own idea of the time is as old as its round,
        and a timer that counts from there would be early ever after, and hide as much of each stall.
        """
        self._due = time.monotonic() + INTERVAL
        self._timer.again(self._look, update=True)
