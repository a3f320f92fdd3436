"""Guessing tokens has to be slow: what refusals cost the address that they came from.

As with sshd's PerSourcePenalties each costs a time, times add up to a maximum and run off by themselves.
Only when :data:`THRESHOLD` has come together is the address turned away, and then until all of it has run
off: so a mistake or two cost nothing. Nobody is kept waiting on an open socket.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from ipaddress import ip_address
from typing import Final

WRONG: Final = 5.0
"""Seconds for a token that nobody has: sshd's price of a wrong password; 6 million guesses take a year."""

MISSING: Final = 1.0
"""Seconds for none at all, or one that has expired: nothing was guessed, but it should not go on for ever."""

THRESHOLD: Final = 12.0
"""Seconds that must have come together before an address is turned away: three wrong tokens in 3 s do it."""

MAXIMUM: Final = 600.0
"""Seconds to which they add up at most, as in sshd: who has mended his mistake is not shut out for a day."""

MOST_SOURCES: Final = 16_384
"""Sources that are remembered, at some 200 bytes each."""

MOST_FRIENDS: Final = 16_384
"""Pairs of an account and an address that it has come from, likewise."""


def source_of(ip: str) -> str:
    """What of an address is one source: for IPv6 the network of 64 bits that one user has as a whole."""
    if ":" not in ip:
        return ip
    return ip_address(ip).packed[:8].hex()


class Penalties:
    """Who has to wait, and who does not although others at his address have guessed.

    Times are monotonic seconds. When there is no room for another source the half that has least to wait is
    forgotten; so it takes thousands of other sources that have guessed more to be forgotten sooner.
    """

    def __init__(self, most: int = MOST_SOURCES) -> None:
        self._most = most
        #: When each source has nothing left to wait, and whether it is turned away until then.
        self._until: dict[str, tuple[float, bool]] = {}
        self._friends: OrderedDict[tuple[str, str], None] = OrderedDict()

    def add(self, source: str, cost: float, now: float) -> None:
        """A refusal has cost ``source`` so many seconds more."""
        until, shut = self._until.get(source, (0.0, False))
        shut = shut and until > now
        until = min(max(until, now) + cost, now + MAXIMUM)
        if source not in self._until and len(self._until) >= self._most:
            self._make_room()
        self._until[source] = until, shut or until - now >= THRESHOLD

    def left(self, source: str, now: float) -> float:
        """Seconds for which ``source`` is turned away; 0 if it is not."""
        until, shut = self._until.get(source, (0.0, False))
        if until <= now:
            self._until.pop(source, None)
            return 0.0
        return until - now if shut else 0.0

    def befriend(self, source: str, account_id: str) -> None:
        """The account has come from there: what others do from there is not its fault from now on."""
        pair = source, account_id
        self._friends[pair] = None
        self._friends.move_to_end(pair)
        if len(self._friends) > MOST_FRIENDS:
            self._friends.popitem(last=False)

    def is_friend(self, source: str, account_id: str) -> bool:
        return (source, account_id) in self._friends

    def __len__(self) -> int:
        return len(self._until)

    def _make_room(self) -> None:
        """Seldom, because it looks at all of them: for every half of them that is new."""
        keep = heapq.nlargest(self._most // 2, self._until.items(), key=lambda item: item[1][0])
        self._until = dict(keep)
