"""Calls back once the event loop has looked at all sockets, for many items with one timer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from gevent import get_hub

T = TypeVar("T")


class NextTurn(Generic[T]):
    """Collects items, and hands each on after one whole turn of the loop.

    One timer serves all items of a turn, and none runs while there is nothing to hand on. It fires twice
    for an item: libev looks at timers before it calls those who wait for sockets, so only between the two has
    every socket been served that was readable when the item came.
    """

    __slots__ = ("_deliver", "_fresh", "_seen", "_timer")

    def __init__(self, deliver: Callable[[list[T]], None]) -> None:
        """``deliver`` gets the items of one turn, in the hub: it must not block."""
        self._deliver = deliver
        #: Items that came since the timer fired last, and those that came before.
        self._fresh: list[T] = []
        self._seen: list[T] = []
        self._timer: Any = None

    def add(self, item: T) -> None:
        """Takes an item. Never blocks."""
        if not self._fresh and not self._seen:
            self._start()
        self._fresh.append(item)

    def _start(self) -> None:
        if self._timer is None:
            self._timer = get_hub().loop.timer(0)
        self._timer.start(self._fire)

    def _fire(self) -> None:
        due, self._seen, self._fresh = self._seen, self._fresh, []
        if self._seen:
            self._start()
        if due:
            self._deliver(due)
