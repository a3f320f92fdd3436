"""What the visitors of one tunnel use now of what they may: counts, and the buckets of everything a second.

A tunnel has a budget only if a limit applies to its visitors, so where none does they cost nothing.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from gevent.event import Event

from tinytun_gevent.bucket import Bucket
from tinytun_gevent.rare import Rare
from tinytun_gevent.rate import Rate
from tinytun_gevent.registry import Tunnel
from tinytun_gevent.server.account import Limits
from tinytun_gevent.server.pages import Failure
from tinytun_gevent.server.tally import Refusal, Tally

log = logging.getLogger("tinytun_gevent.server")
rare = Rare(log)

ROOM_AGAIN: Final = 1
"""Seconds after which a visitor may find room; exchanges are short."""

SAY_AGAIN: Final = 60.0
"""Seconds for which a limit of a tunnel is not logged again."""

MOST_HELD: Final = 1024
"""Accepted connections that wait for room, for each tunnel; each costs a descriptor and some 10 KiB."""


class Scope:
    """The live state of one `Limits`."""

    __slots__ = ("limits", "rate", "requests", "visitors")

    def __init__(self, limits: Limits, above: Rate | None = None) -> None:
        self.limits = limits
        self.visitors = 0
        self.requests = Bucket(limits.requests, limits.requests)
        #: None as long as there has been no limit: then that of the account, ``above``, is all there is.
        self.rate = Rate(limits.rate, above) if limits.rate else None

    def change(self, limits: Limits, above: Rate | None = None) -> None:
        """Goes on with other figures; what is used stays used."""
        self.limits = limits
        self.requests.change(limits.requests, limits.requests, time.monotonic())
        if self.rate is not None:
            self.rate.change(limits.rate)
            self.rate.above = above
        elif limits.rate:
            self.rate = Rate(limits.rate, above)

    @property
    def full(self) -> bool:
        most = self.limits.visitors
        return 0 < most <= self.visitors

    @property
    def rests(self) -> bool:
        """Whether it could be forgotten without anybody getting more than he may."""
        quiet = self.rate is None or self.rate.rests
        return quiet and not self.visitors and self.requests.is_full(time.monotonic())


class Holder:
    """One account's state."""

    __slots__ = ("hopeful", "scope", "tunnels")

    def __init__(self, limits: Limits) -> None:
        self.scope = Scope(limits)
        #: By id, leased ones included: their names are taken.
        self.tunnels: dict[str, Tunnel] = {}
        #: Those of its tunnels where somebody waits for room, first come first.
        self.hopeful: dict[TunnelBudget, None] = {}

    def offer_room(self) -> None:
        """Lets those in who wait, at any of its tunnels, as far as there is room. Never blocks."""
        _offer_room(self.hopeful)


class TunnelBudget:
    """What the visitors of one tunnel may use: its own limits, and those of its account."""

    __slots__ = ("_doors", "_holder", "_hopeful", "_log", "_own", "_queue", "_scopes", "_tally", "_tunnel")

    def __init__(self, tunnel: Tunnel, holder: Holder | None, each: Limits, tally: Tally) -> None:
        self._tunnel = tunnel
        self._tally = tally
        self._holder = holder
        self._own = Scope(each, holder.scope.rate if holder else None)
        self._scopes = (self._own, holder.scope) if holder else (self._own,)
        self._hopeful: dict[TunnelBudget, None] = holder.hopeful if holder else {}
        #: Connections that were accepted and wait for room, and who pauses accepting until there is some.
        self._queue: deque[Event] = deque()
        self._doors: dict[Callable[[], None], None] = {}
        self._log = Rare(rare, 1, SAY_AGAIN)

    @property
    def rate(self) -> Rate | None:
        """What limits the bytes of a visitor who comes now; None if nothing does."""
        return self._own.rate or (self._holder.scope.rate if self._holder else None)

    @property
    def visitors(self) -> int:
        """Visitors of this tunnel now."""
        return self._own.visitors

    @property
    def full(self) -> bool:
        """Whether there are as many visitors as there may be."""
        return self._own.full or (self._holder is not None and self._holder.scope.full)

    def change(self, each: Limits) -> None:
        """Goes on with other figures of its own; the account's are in the same object as before."""
        self._own.change(each, self._holder.scope.rate if self._holder else None)
        _offer_room(self._hopeful)

    # -- HTTP -----------------------------------------------------------------

    def admit(self) -> Failure | None:
        """Lets a request in, whose :meth:`leave` follows; or says what its visitor is told instead."""
        if self.full:
            return self._refuse_visitor()
        buckets = [scope.requests for scope in self._scopes if scope.requests.rate]
        if buckets:
            now = time.monotonic()
            wait = max([bucket.wait(now) for bucket in buckets])
            if wait:
                return self._refuse_request(wait)
            for bucket in buckets:
                bucket.charge(now, 1)
        self.enter()
        return None

    def _refuse_visitor(self) -> Failure:
        self._note(Refusal.VISITORS)
        self._tally.refuse(Refusal.VISITORS)
        reason = f"{self._whose(lambda scope: scope.full)} as many visitors as it may have at once."
        return Failure(503, reason, retry_after=ROOM_AGAIN, limit="visitors")

    def _refuse_request(self, wait: float) -> Failure:
        now = time.monotonic()
        self._note(Refusal.REQUESTS)
        self._tally.refuse(Refusal.REQUESTS)
        whose = self._whose(lambda scope: scope.requests.wait(now) > 0)
        reason = f"{whose} as many requests a second as it may have."
        return Failure(429, reason, retry_after=max(1, math.ceil(wait)), limit="requests")

    def _whose(self, over: Callable[[Scope], bool]) -> str:
        return "This tunnel has" if over(self._own) else "This tunnel's owner has with all tunnels together"

    # -- connections that are carried as they are -----------------------------

    def enter(self) -> None:
        """Counts a visitor, for whom there should be room; :meth:`leave` follows."""
        for scope in self._scopes:
            scope.visitors += 1

    def leave(self) -> None:
        """A visitor is gone; whoever waits for room may have it. Never blocks."""
        for scope in self._scopes:
            scope.visitors -= 1
        if self._hopeful:
            _offer_room(self._hopeful)

    def is_shut(self, reopen: Callable[[], None]) -> bool:
        """Whether no visitor may be accepted now; then ``reopen`` is called once when one may."""
        if not self.full:
            return False
        self._note(Refusal.VISITORS)
        self._doors[reopen] = None
        self._hopeful[self] = None
        return True

    def wait_room(self, patience: float) -> bool:
        """Enters as soon as there is room, first come first served; blocks for ``patience`` seconds at most.

        False if there was none in time, or too many wait already.
        """
        if not self._queue and not self.full:
            self.enter()
            return True
        self._note(Refusal.VISITORS)
        turn = Event()
        if len(self._queue) < MOST_HELD:
            self._queue.append(turn)
            self._hopeful[self] = None
            try:
                if turn.wait(patience):
                    return True
            except BaseException:
                if turn.is_set():
                    self.leave()
                raise
            finally:
                if turn in self._queue:
                    self._queue.remove(turn)
        self._tally.refuse(Refusal.VISITORS)
        return False

    def _let_in(self) -> None:
        while self._queue and not self.full:
            self.enter()
            self._queue.popleft().set()
        if self._doors and not self.full:
            doors, self._doors = self._doors, {}
            for reopen in doors:
                reopen()
        if self._queue or self._doors:
            self._hopeful[self] = None

    def _note(self, limit: Refusal) -> None:
        """Logs that a limit was reached, once in a while."""
        text = "tunnel %s has reached a limit: %s"
        self._log.info(text, self._tunnel.name, limit.name.lower(), kind=limit)


def _offer_room(hopeful: dict[TunnelBudget, None]) -> None:
    """Lets those in who wait at one of these tunnels, as far as there is room."""
    for budget in list(hopeful):
        del hopeful[budget]
        budget._let_in()
