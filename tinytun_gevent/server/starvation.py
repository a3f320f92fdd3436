"""Notices when resting streams hold the threads of a small service that fresh streams wait for.

A service with one thread for each connection, and few threads, serves a resting connection until that ends. A
fresh one then waits in its queue. Whether a service is one of these it does not say; it shows, and that is
what is looked for here.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tinytun_gevent.stream import Stream

PATIENCE: Final = 0.02
"""Seconds, beside two round trips, in which no fresh stream gets a first byte before resting ones end. A
service that has just accepted many connections answers one after the other, in less than a millisecond each;
and six requests to a service with one thread may take 0.1 s longer than without a tunnel, before it is known
for one."""

OVERTAKEN: Final = 0.25
"""Seconds by which a stream must be younger than another for its first byte to say that the other has been
accepted: the client opens connections of one moment in any order."""

REPEAT: Final = 0.5
"""Seconds without a first byte after which ends that were meant for those who wait count as vain: somebody
else may have got the threads."""

CAUSE: Final = 0.05
"""Seconds, beside the round trip, within which a first byte behind the end of a resting stream is due to
it."""

PROOFS: Final = 2
"""How often that must happen, one time behind the other, to the stream that has waited longest: once may be
chance, and answers of a service that takes now longer, now shorter come in any order."""

PROOF_LIFE: Final = 60.0
"""Seconds between two proofs, at most: on a small service that is in use they come one behind the other, and
a large one that is paused now and then gives one."""

ABSTINENCE: Final = 600.0
"""Seconds for which no stream rests after that: a service gets more threads when it is started anew."""


class Starvation:
    """Which fresh streams of a tunnel wait for their first byte, and how many resting ones must end for them.

    Services accept connections in the order in which they came. So a fresh stream that a clearly later one
    has overtaken has been accepted: it is slow by itself (a long poll, an upload), and no reason to end
    anything. For each of the others one resting stream ends, the first only when for a while none got a first
    byte, and another one only when that did not help for longer.

    Pure: times are passed in, in monotonic seconds. Call :meth:`opened` for each fresh stream and
    :meth:`answered` at its first byte, then :meth:`excess` to learn how many resting streams have to end, and
    :meth:`ended` once they have.
    """

    __slots__ = (
        "_abstains_until",
        "_ended_at",
        "_paid",
        "_proofs",
        "_proved_at",
        "_prune_at",
        "_since",
        "_tried",
        "abstains",
        "waiting",
    )

    def __init__(self) -> None:
        #: Fresh streams that no later one has overtaken, in the order in which they were opened, and when.
        self.waiting: OrderedDict[Stream, float] = OrderedDict()
        #: For how many of them a resting stream has ended already, and when the last one did.
        self._paid = 0
        self._ended_at = -math.inf
        #: Whether no first byte has followed that end.
        self._tried = False
        #: Since when none of them has got a first byte.
        self._since = 0.0
        self._proofs = 0
        self._proved_at = -math.inf
        #: Whether no stream may rest, and until when.
        self.abstains = False
        self._abstains_until = -math.inf
        #: How many may wait before those that are over are sorted out.
        self._prune_at = 64

    def may_rest(self, now: float) -> bool:
        """Whether streams may rest at all, which a small service cannot afford."""
        if now >= self._abstains_until:
            self.abstains = False
        return not self.abstains

    def opened(self, stream: Stream, now: float) -> None:
        """Notes a fresh stream, on which a request leaves now."""
        if len(self.waiting) <= self._paid:
            self._since = now
        self.waiting[stream] = now
        if len(self.waiting) > self._prune_at:
            self.sort_out()

    def forget(self, stream: Stream) -> None:
        """Says that a stream waits no more, without a byte."""
        self.waiting.pop(stream, None)
        self._paid = min(self._paid, len(self.waiting))

    def answered(self, stream: Stream, now: float, round_trip: float, resting: bool) -> bool:
        """Notes a stream's first byte; returns whether from now on no stream may rest.

        ``round_trip`` is that of the session, in seconds; ``resting``: other streams of the tunnel rest.
        """
        longest = next(iter(self.waiting), None) is stream
        opened_at = self.waiting.pop(stream, None)
        if opened_at is None:  # overtaken, or not fresh
            return False
        overtakes = False
        while self.waiting and next(iter(self.waiting.values())) < opened_at - OVERTAKEN:
            self.waiting.popitem(last=False)
            overtakes = True
        due = self._tried and round_trip / 2 <= now - self._ended_at <= CAUSE + round_trip
        if not self._paid and resting:  # more are answered than were ended: the service has threads enough
            self._proofs = 0
        if self._tried and not (due and longest):  # that end has freed no thread that this one waited for
            self._proofs = 0
        self._since, self._tried = now, False
        self._paid = min(max(self._paid - 1, 0), len(self.waiting))
        return due and longest and not overtakes and self._prove(now)

    def excess(self, now: float, round_trip: float) -> int:
        """Returns how many resting streams have to end now, if there are so many."""
        if not self.waiting or self.patience(now, round_trip) > 0:
            return 0
        self._drop_front()
        if self._paid >= len(self.waiting):
            self._paid = 0
        return len(self.waiting) - self._paid

    def ended(self, count: int, now: float) -> None:
        """Notes that ``count`` resting streams ended for those that wait."""
        self._paid += count
        self._ended_at, self._tried = now, True

    def patience(self, now: float, round_trip: float) -> float:
        """Returns in how many seconds streams have to end, unless there is a first byte before."""
        due = self._since + PATIENCE + 2 * round_trip
        if self._paid >= len(self.waiting):
            due = max(due, self._ended_at + REPEAT)
        return due - now

    def _prove(self, now: float) -> bool:
        self._proofs = 1 if now - self._proved_at > PROOF_LIFE else self._proofs + 1
        self._proved_at = now
        if self._proofs < PROOFS:
            return False
        self._proofs = 0
        self._abstains_until, self.abstains = now + ABSTINENCE, True
        return True

    def _drop_front(self) -> None:
        """Forgets the oldest streams as far as they are over: their visitors have left."""
        while self.waiting and (oldest := next(iter(self.waiting))).closed:
            self.forget(oldest)

    def sort_out(self) -> None:
        """Forgets all streams that are over. The time that it takes grows with how many wait."""
        self.waiting = OrderedDict(item for item in self.waiting.items() if not item[0].closed)
        self._paid = min(self._paid, len(self.waiting))
        self._prune_at = 2 * len(self.waiting) + 64
