"""Deadlines of many connections, looked at once a second by one greenlet.

A timer for each step of each connection would cost more than the steps themselves.
"""

from __future__ import annotations

import logging
import time
from typing import Final, Protocol

import gevent

from tinytun_gevent.rare import Rare
from tinytun_gevent.turns import let_others_run

log = logging.getLogger(__name__)
rare = Rare(log)

TICK: Final = 1.0
"""Seconds between two looks, so a deadline is noticed that much late at most."""


LOOKS_AT_ONCE: Final = 128
"""Connections looked at before others have a turn: ten thousand take some 30 ms."""


class Timed(Protocol):
    """Something with deadlines of its own."""

    def tick(self, now: float) -> None:
        """Does what is due at monotonic time ``now``; must not block."""


class Clock:
    """Calls :meth:`Timed.tick` of everything it watches, once every :data:`TICK`."""

    def __init__(self) -> None:
        self._watched: dict[int, Timed] = {}
        self._greenlet: gevent.Greenlet[..., None] | None = None

    def __len__(self) -> int:
        return len(self._watched)

    def watch(self, timed: Timed) -> None:
        self._watched[id(timed)] = timed
        if self._greenlet is None:
            self._greenlet = gevent.spawn(self._run)

    def forget(self, timed: Timed) -> None:
        self._watched.pop(id(timed), None)

    def stop(self) -> None:
        """Ends the greenlet; watching something starts it again."""
        greenlet, self._greenlet = self._greenlet, None
        if greenlet is not None:
            greenlet.kill(block=False)

    @property
    def runs(self) -> bool:
        """Whether it looks by itself."""
        return self._greenlet is not None

    def look(self) -> None:
        """Looks at all deadlines, once; lets others run meanwhile."""
        now = time.monotonic()
        for number, (key, timed) in enumerate(list(self._watched.items()), 1):
            if self._watched.get(key) is not timed:
                continue
            try:
                timed.tick(now)
            except Exception:  # everybody else's deadlines go on
                rare.exception("a deadline could not be looked at")
            if not number % LOOKS_AT_ONCE:
                let_others_run()

    def _run(self) -> None:
        while True:
            gevent.sleep(TICK)
            self.look()
