"""How long a hub was held, in seconds of its own processor time: the measure of tests of attacks.

While one greenlet runs, all others of its hub wait. How long that lasts by the clock on the wall depends on
what else the machine does; how much of a processor it takes does not::

    with hub_turns() as turns:      # of the hub where this process's servers and clients live
        attack()
    assert turns.longest < 0.1      # nobody waited for longer behind anybody

A turn of the loop is what runs between two looks at the sockets. gevent ends it after 5 ms, unless a single
greenlet goes on without yielding, so a long one means just that.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

import gevent

from tinytun_gevent.background import run_in_hub

REQUEST: Final = 8
"""Turns that one request takes, one after the other: accepted, read, sent on, answered, written."""


class HubTurns:
    """Measures, while it runs, each turn of the hub in which `start` is called."""

    def __init__(self) -> None:
        #: Processor seconds of the longest turn since the start or the last `take`.
        self.longest = 0.0
        #: The same of the longest :data:`REQUEST` turns in a row: what somebody's request has waited.
        self.request = 0.0
        self._last: deque[float] = deque(maxlen=REQUEST)
        #: Turns so far. A hub with nothing to do makes none.
        self.count = 0
        self._began = 0.0
        self._watcher: Any = None

    def start(self) -> None:
        """Begins with the turn after this one: what this one has done before is nobody's fault."""
        self._watcher = gevent.get_hub().loop.prepare(ref=False)
        self._watcher.start(self._first)

    def stop(self) -> None:
        """Ends; the turn that is running counts as far as it has come. Idempotent."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.close()
            if self._began:
                self._note()

    def take(self) -> float:
        """The longest turn up to now, once; from any thread."""
        longest, self.longest = self.longest, 0.0
        return longest

    def take_request(self) -> float:
        """The longest :data:`REQUEST` turns in a row up to now, once; from any thread."""
        request, self.request = self.request, 0.0
        return request

    def _first(self) -> None:
        self._began = time.thread_time()
        self._watcher.stop()
        self._watcher.start(self._note)

    def _note(self) -> None:
        now = time.thread_time()
        self.longest = max(self.longest, now - self._began)
        self._last.append(now - self._began)
        self.request = max(self.request, sum(self._last))
        self.count += 1
        self._began = now


@contextlib.contextmanager
def hub_turns() -> Iterator[HubTurns]:
    """Measures the hub of the calling greenlet; from a plain thread, that of its servers and clients."""
    turns = HubTurns()
    run_in_hub(turns.start)
    try:
        yield turns
    finally:
        run_in_hub(turns.stop)
