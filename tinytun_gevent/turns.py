"""Whose turn it is: to send on a session, and to run."""

from __future__ import annotations

from collections import deque

import gevent
from gevent.hub import Waiter


def let_others_run() -> None:
    """Blocks until every socket that is ready now has been served once.

    ``gevent.sleep(0)`` looks at no socket for 5 ms, and somebody's request needs half a dozen looks.
    """
    hub = gevent.get_hub()
    timer = hub.loop.timer(0)
    try:
        hub.wait(timer)
    finally:
        timer.close()


class TurnLock:
    """A lock that is handed on in the order of asking, so that streams take turns."""

    def __init__(self) -> None:
        self.held = False
        self._waiting: deque[Waiter[None]] = deque()

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for it."""
        return bool(self._waiting)

    def acquire(self) -> None:
        """Blocks until it is this greenlet's turn."""
        if not self.held:
            self.held = True
            return
        waiter: Waiter[None] = Waiter()
        self._waiting.append(waiter)
        try:
            waiter.get()
        except BaseException:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            else:
                self.release()
            raise

    def release(self) -> None:
        """Hands the lock to whoever has waited longest."""
        assert self.held
        if self._waiting:
            gevent.get_hub().loop.run_callback(self._waiting.popleft().switch, None)
        else:
            self.held = False
