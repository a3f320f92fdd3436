"""When one TCP connection is what limits a tunnel, and when one is not needed any more. No I/O.

All visitors of a session share one TCP connection: its window, and what every lost packet
costs. On a short path that is no limit. On a long one it is as soon as much is in flight: Linux
lets 4 MiB be in flight on a connection, which makes 80 MB/s of any line over 50 ms, however
many visitors there are. And it is one where losses keep little in flight: bytes wait in our
kernel then, although no queue has formed on the way.
"""

from __future__ import annotations

from typing import Final

LOOK: Final = 0.1
"""Seconds between two looks while bytes move: a burst of visitors is over in seconds."""

LONG_PATH: Final = 0.005
"""Round trip in seconds below which one connection is enough: with 4 MiB in flight it carries more
than the program, and it makes a loss good in no time. The first PING, from a process that has
just started, takes a millisecond or two on a loopback."""

IN_FLIGHT: Final = 1024 * 1024
"""Bytes in flight at which a connection may be what limits: a quarter of what Linux allows, so
that the others are there before it is reached."""

LOOKS: Final = 2
"""Looks in a row that must find so much: one alone may have seen a burst out of a buffer."""

WAITING: Final = 16 * 1024
"""Bytes waiting in our kernel that are more than what it is about to send anyway …"""

WAITING_LOOKS: Final = 5
"""… at so many looks in a row: at the start of a transfer it is normal, for some round trips."""

QUEUED: Final = 1.5
"""How many smallest round trips one takes at least while the line is what limits, because a queue
has formed before it. More connections would only share it then."""

IDLE: Final = 30.0
"""Seconds without a visitor after which a connection that was added is closed."""

FIRST_PAUSE: Final = 5.0
"""Seconds without an attempt after one has failed; doubled by each further one …"""

LONGEST_PAUSE: Final = 300.0
"""… up to this: behind one name there may be several servers, of which one has our tunnel."""


class Gauge:
    """Follows one session by what is known of it at each look.

    Times are monotonic seconds, and bytes are those since the session's start.
    """

    __slots__ = (
        "_full",
        "_looked_at",
        "_opened",
        "_received",
        "_sent",
        "_used_at",
        "_waiting",
        "moving",
    )

    def __init__(self, now: float) -> None:
        #: Whether bytes moved between the last two looks.
        self.moving = False
        self._looked_at = now
        self._received = self._sent = 0
        #: How many looks in a row found it full.
        self._full = 0
        #: … and how many found bytes waiting that only this connection keeps from leaving.
        self._waiting = 0
        self._used_at = now
        self._opened = 0

    def limits(
        self,
        now: float,
        received: int,
        sent: int,
        round_trip: float,
        waiting: int = 0,
        round_trip_now: float = 0.0,
    ) -> bool:
        """Whether the session may be what limits its visitors; call it at each look, and only then.

        What is in flight is what moves in a ``round_trip``, the smallest one known: a queue on
        the way makes round trips longer, and what stands in it is not in flight. Directions
        count apart, since each has its own window. ``waiting`` bytes are in our kernel now and
        may not be sent yet.
        """
        moved = max(received - self._received, sent - self._sent)
        elapsed = now - self._looked_at
        self._looked_at, self._received, self._sent = now, received, sent
        self.moving = moved > 0
        far = round_trip >= LONG_PATH
        full = far and elapsed > 0 and moved / elapsed * round_trip >= IN_FLIGHT
        self._full = self._full + 1 if full else 0
        no_queue = round_trip_now < QUEUED * round_trip
        held_up = far and no_queue and self.moving and waiting >= WAITING
        self._waiting = self._waiting + 1 if held_up else 0
        return self._full >= LOOKS or self._waiting >= WAITING_LOOKS

    def is_idle(self, now: float, opened: int, running: int) -> bool:
        """Whether it has been without a visitor for :data:`IDLE` seconds.

        ``opened`` is how many streams it ever had, ``running`` how many it has.
        """
        if running or opened != self._opened:
            self._opened = opened
            self._used_at = now
        return now - self._used_at >= IDLE


class Pauses:
    """When a further session may be asked for, after failures. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._until = 0.0
        self._next = FIRST_PAUSE

    def is_over(self, now: float) -> bool:
        """Whether there may be an attempt."""
        return now >= self._until

    def failed(self, now: float, asked: float | None = None) -> float:
        """An attempt failed, and the server ``asked`` for a pause: the seconds until the next one.

        Several attempts that were made together count once.
        """
        if self.is_over(now):
            self._until = now + min(max(self._next, asked or 0.0), LONGEST_PAUSE)
            self._next = min(2 * self._next, LONGEST_PAUSE)
        return self._until - now

    def worked(self) -> None:
        """An attempt succeeded: the next failure is the first one again."""
        self._next = FIRST_PAUSE
