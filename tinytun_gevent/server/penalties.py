"""What guessing at tokens costs: an address that was refused has to wait, longer each time.

The idea is that of sshd's PerSourcePenalties: nothing is held open meanwhile. Who has to wait is refused
whatever he shows, or the wait would be none; his tunnels that are open are not touched by it. Only whoever
has been let in from there before is let in again: one client that is wrong must not shut out its office.
"""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from tinytun_gevent.server.addresses import network_of

FREE: Final = 3.0
"""Wrong tokens of one address without a wait: a typing mistake is none of an attacker's guesses."""

FIRST: Final = 5.0
"""Seconds of the first wait. Each further wrong token doubles it."""

LONGEST: Final = 300.0
"""Seconds of a wait at most: somebody else may have been given that address by then."""

FORGET: Final = 600.0
"""Seconds after a wait for which an address keeps its history."""

LAPSE: Final = 0.25
"""What a missing or expired token counts: it is no guess, but again and again it is no mistake either."""

MOST_LAPSES: Final = FREE + 2
"""What those come to at most, a wait of 10 s: one client in an office that was not told of the token must not
keep its others out for long."""

MOST: Final = 16_384
"""Addresses that are remembered; 3 MB."""

MOST_KNOWN: Final = 16_384
"""Pairs of an address and an account that has come from there, likewise."""


@dataclass(slots=True)
class _Record:
    #: How many wrong tokens it was.
    score: float = 0.0
    #: Until when it is refused, in monotonic seconds.
    until: float = 0.0


class Penalties:
    """The addresses that were refused of late; of IPv6 addresses, each /64 is one."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._records: dict[str | int, _Record] = {}
        self._known: OrderedDict[tuple[str | int, str], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def wait(self, ip: str, now: float | None = None) -> float:
        """Seconds for which ``ip`` is still refused; 0 if it is not."""
        record = self._records.get(network_of(ip))
        return 0.0 if record is None else max(0.0, record.until - (time.monotonic() if now is None else now))

    def welcome(self, ip: str, account: str) -> None:
        """``account`` was let in from ``ip``: others' guesses there do not make it wait from now on."""
        pair = network_of(ip), account
        self._known[pair] = None
        self._known.move_to_end(pair)
        if len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)

    def knows(self, ip: str, account: str) -> bool:
        """Whether ``account`` was let in from ``ip`` before."""
        return (network_of(ip), account) in self._known

    def guessed(self, ip: str, now: float | None = None) -> None:
        """A wrong token came from ``ip``."""
        self._add(ip, 1.0, float("inf"), now)

    def lapsed(self, ip: str, now: float | None = None) -> None:
        """No token came from ``ip``, or one that was valid once."""
        self._add(ip, LAPSE, MOST_LAPSES, now)

    def _add(self, ip: str, weight: float, most: float, now: float | None) -> None:
        now = time.monotonic() if now is None else now
        key = network_of(ip)
        record = self._records.get(key)
        if record is None or now > record.until + FORGET:
            if record is None and len(self._records) >= self._most:
                self._make_room(now)
            record = self._records[key] = _Record()
        record.score = max(record.score, min(record.score + weight, most))
        over = record.score - FREE
        seconds = FIRST * 2 ** min(over - 1, 16) if over > 0 else 0.0
        record.until = now + min(seconds, LONGEST)

    def _make_room(self, now: float) -> None:
        """Forgets a sixteenth, whose waits end first: nobody loses his own by using other addresses."""
        least = heapq.nsmallest(
            max(1, self._most // 16), self._records.items(), key=lambda item: (item[1].until, item[1].score)
        )
        for key, _ in least:
            del self._records[key]
