"""Greenlets that serve one thing after another.

Making a greenlet and throwing it away costs 15 µs and the kernel two calls for its stack, more than
anything else that a short connection needs. So one that has finished waits for the next task.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

import gevent
from gevent.event import Event
from gevent.hub import Waiter
from greenlet import greenlet

from tinytun_gevent.rare import Rare

log = logging.getLogger(__name__)
rare = Rare(log)

IDLE: Final = 256
"""Greenlets that wait for a task at most: as many short connections as come at once in a
burst. Each keeps its stack, about 10 KiB."""

Task = tuple[Callable[..., None], tuple[Any, ...]]


class Workers:
    """Runs each task in a greenlet of its own; belongs to the hub that it is created in."""

    def __init__(self) -> None:
        self._loop = gevent.get_hub().loop
        self._busy: set[greenlet] = set()
        self._idle: list[tuple[greenlet, Waiter[Task | None]]] = []
        self._stopped = False
        #: Set when no task runs; made by whoever waits for that.
        self._quiet: Event | None = None

    def __len__(self) -> int:
        """How many tasks run, or are about to."""
        return len(self._busy)

    def spawn(self, function: Callable[..., None], *args: Any) -> greenlet:
        """Calls ``function(*args)`` soon, in the greenlet that is returned. Never blocks.

        What it raises is logged. The greenlet is the task's only until that has ended.
        """
        if self._idle:
            worker, waiter = self._idle.pop()
            self._loop.run_callback(waiter.switch, (function, args))
        else:
            worker = gevent.spawn_raw(self._work, (function, args))
        self._busy.add(worker)
        return worker

    def kill(self) -> None:
        """Ends all tasks, by ``GreenletExit``, and the greenlets that wait for one. Never blocks."""
        self._stopped = True
        for worker in list(self._busy):
            gevent.kill(worker)
        while self._idle:
            _, waiter = self._idle.pop()
            self._loop.run_callback(waiter.switch, None)

    def join(self, timeout: float) -> bool:
        """Blocks until no task runs, for ``timeout`` seconds at most; whether that is so."""
        if not self._busy:
            return True
        self._quiet = self._quiet or Event()
        return bool(self._quiet.wait(timeout))

    def _work(self, task: Task | None) -> None:
        worker = gevent.getcurrent()
        while task is not None:
            self._run(worker, task)
            if self._stopped or len(self._idle) >= IDLE:
                return
            task = None  # what it held must not outlive it
            waiter: Waiter[Task | None] = Waiter()
            self._idle.append((worker, waiter))
            task = waiter.get()

    def _run(self, worker: greenlet, task: Task) -> None:
        function, args = task
        try:
            function(*args)
        except gevent.GreenletExit:
            pass
        except Exception:
            rare.exception("a task failed")
        finally:
            self._busy.discard(worker)
            if not self._busy and self._quiet is not None:
                self._quiet.set()
                self._quiet = None
