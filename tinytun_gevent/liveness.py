"""When a silent peer counts as dead, and whether it was this side that did not listen. Without I/O."""

from __future__ import annotations

import time
from typing import Final

QUIET: Final = 4.0
"""Seconds of silence after which a PING is sent."""

PATIENCE: Final = 5.0
"""Seconds without any sign of life after which a peer that owes an answer is dead."""


RECENT: Final = 2 * (QUIET + PATIENCE)
"""Seconds behind a pause of this process within which it explains the end of a session: twice what it takes
to notice that."""

LOOK: Final = 0.25
"""Seconds between two looks at what the peer's kernel has acknowledged: how much later than it
could a death is noticed, since the last acknowledgement counts from when it was seen."""


class Liveness:
    """Follows one PING at a time.

    An unanswered PING alone proves nothing: on an uplink of 1 Mbit/s full of bulk the answer
    comes late from a healthy peer. So a peer is dead when it owes an answer and for
    :data:`PATIENCE` seconds there was no sign of life: no byte arrived, and the bytes that
    its kernel acknowledged did not move. Acknowledgements count only until they cover the
    PING: after that it has it, and a stopped process's kernel goes on acknowledging what
    visitors send. All times are monotonic seconds.
    """

    __slots__ = ("_acknowledged", "_covered_at", "awaited", "last_sign")

    def __init__(self, now: float) -> None:
        #: When the peer last showed life.
        self.last_sign = now
        #: Whether a PING is unanswered; no second one goes out meanwhile.
        self.awaited = False
        self._covered_at: int | None = None
        self._acknowledged = 0

    def arrived(self, now: float) -> None:
        """A byte came from the peer."""
        self.last_sign = now

    def pinged(self, now: float, acknowledged: int | None, behind: int) -> None:
        """A PING was queued; ``behind`` bytes, itself included, are not acknowledged yet."""
        self.awaited = True
        self.last_sign = now
        self._acknowledged = acknowledged or 0
        self._covered_at = None if acknowledged is None else acknowledged + behind

    def answered(self) -> None:
        """The PING's answer came."""
        self.awaited = False

    def acknowledged(self, now: float, count: int | None) -> None:
        """What the peer's kernel has acknowledged so far, in bytes; None where unknown."""
        if count is None or self._covered_at is None:
            return
        if self._acknowledged < min(count, self._covered_at):
            self.last_sign = now
        self._acknowledged = count

    def next_check(self) -> float:
        """When something has to be done unless the peer shows life before."""
        return self.last_sign + (PATIENCE if self.awaited else QUIET)

    def is_dead(self, now: float) -> bool:
        return self.awaited and now >= self.last_sign + PATIENCE


class Pauses:
    """Notes when this process did not run: the computer was asleep, or the process was stopped.

    Times are seconds of :func:`waking_time`. Who looks does so every :data:`QUIET` seconds at least.
    """

    __slots__ = ("_began", "_ended", "_looked")

    def __init__(self, now: float) -> None:
        self._looked = now
        #: The last pause; none yet.
        self._began = self._ended = -RECENT

    def look(self, now: float) -> None:
        """The process runs at ``now``."""
        if now - self._looked > PATIENCE:
            self._began, self._ended = self._looked, now
        self._looked = now

    def since(self, now: float) -> float:
        """Seconds since the beginning of a pause that ended just now; 0 if there was none."""
        self.look(now)
        return now - self._began if now - self._ended < RECENT else 0.0


def waking_time() -> float:
    """Seconds on a clock that goes on while the computer is asleep. Only to explain what happened."""
    return time.clock_gettime(_CLOCK) if _CLOCK is not None else time.monotonic()


_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))
"""Linux's; macOS's CLOCK_MONOTONIC counts sleep as well, and Python's ``monotonic`` on Windows does."""
