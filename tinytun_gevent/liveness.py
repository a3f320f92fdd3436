"""When does a silent peer count as dead? The rule, without I/O."""

from __future__ import annotations

from typing import Final

QUIET: Final = 4.0
"""Seconds of silence after which a PING is sent."""

PATIENCE: Final = 5.0
"""Seconds without any sign of life after which a peer that owes an answer is dead."""


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
