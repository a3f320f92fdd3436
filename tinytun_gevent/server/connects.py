"""How often visitors of one address may connect."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Final

import gevent

from tinytun_gevent.bucket import Bucket
from tinytun_gevent.rare import Rare
from tinytun_gevent.server.addresses import network_of
from tinytun_gevent.server.pages import Failure, accept_of
from tinytun_gevent.server.tally import Refusal, Tally
from tinytun_gevent.sockets import End

log = logging.getLogger("tinytun_gevent.server")

REMEMBERED: Final = 10_000
"""Addresses that are remembered, those that came last; who is forgotten begins anew. 2 MB."""

READ_SIZE: Final = 16 * 1024
"""Bytes read at once of a request that is not served."""

MOST_HELD: Final = 1024
"""Connections that wait for their turn, over all addresses."""

SAY_AGAIN: Final = 60.0
"""Seconds for which the log says nothing more of it."""

rare = Rare(log, 1, SAY_AGAIN)

MOST_TOLD: Final = 256
"""Connections that are told properly that they are too many. Of more, each gets the same answer at once and
is closed, which may take it from him again."""

HEARD: Final = 1.0
"""Seconds for the request of such a one, and again for him to read the answer and close."""


class Connects:
    """Counts the connects of each source address; of IPv6 addresses, of each /64."""

    def __init__(
        self, rate: int, burst: int, patience: float, exempt: Callable[[str], bool], tally: Tally
    ) -> None:
        """``rate`` connects a second, ``burst`` at once; ``patience`` is how long one waits, in seconds.

        ``exempt`` addresses are not counted: behind a proxy are many visitors.
        """
        self._rate = rate
        self._burst = burst
        self._patience = patience
        self._exempt = exempt
        self._tally = tally
        self._buckets: dict[str | int, Bucket] = {}
        self._held = 0
        self._told = 0

    def __len__(self) -> int:
        return len(self._buckets)

    def admit(self, ip: str) -> int:
        """0 if a connection from ``ip`` may be served, else after how many whole seconds one may be."""
        if self._exempt(ip):
            return 0
        now, bucket = time.monotonic(), self._bucket(ip)
        if bucket.take(now):
            return 0
        self._refuse()
        return max(1, math.ceil(bucket.wait(now)))

    def wait_turn(self, ip: str) -> bool:
        """Blocks until a connection from ``ip`` may be served; False if that would take too long."""
        if self._exempt(ip):
            return True
        now, bucket = time.monotonic(), self._bucket(ip)
        wait = bucket.wait(now)
        if wait > self._patience or (wait and self._held >= MOST_HELD):
            self._refuse()
            return False
        bucket.charge(now, 1)
        if wait:
            self._held += 1
            try:
                gevent.sleep(wait)
            finally:
                self._held -= 1
        return True

    @property
    def tells(self) -> bool:
        """Whether one more can be told properly that he is one too many."""
        return self._told < MOST_TOLD

    def turn_away(self, end: End, seconds: int) -> None:
        """Answers a visitor whom :meth:`admit` has told to come again in so many seconds. Blocks briefly.

        What he asks is read for its Accept field only. The caller closes ``end``.
        """
        failure = Failure(
            429, "Your address opens too many connections.", retry_after=seconds, limit="connects"
        )
        if not self.tells:
            try:
                end.send_now(failure.answer(b"", close=True))
            except OSError:
                pass
            return
        self._told += 1
        try:
            head = gevent.with_timeout(HEARD, end.recv, READ_SIZE, timeout_value=b"")
            end.sendall(failure.answer(accept_of(head), close=True, head_only=head.startswith(b"HEAD ")))
            end.finish_writing()
            gevent.with_timeout(HEARD, _read_out, end, timeout_value=None)
        except OSError:
            pass
        finally:
            self._told -= 1

    def _bucket(self, ip: str) -> Bucket:
        """The bucket of an address, now the one that was used last."""
        key = network_of(ip)
        bucket = self._buckets.pop(key, None)
        if bucket is None:
            if len(self._buckets) >= REMEMBERED:
                del self._buckets[next(iter(self._buckets))]
            bucket = Bucket(self._rate, self._burst)
        self._buckets[key] = bucket
        return bucket

    def _refuse(self) -> None:
        self._tally.refuse(Refusal.CONNECTS)
        rare.info("an address of visitors has reached a limit: connects")


def _read_out(end: End) -> None:
    while end.recv(READ_SIZE):
        pass
