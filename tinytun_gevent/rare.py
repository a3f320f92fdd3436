"""Log lines that peers can cause at will: the first ones of a kind, then few of them, with a count.

A kind is the line's text before anything is put into it, so there are as many as the program has.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Final

FIRST: Final = 20
"""Lines of a kind that are written as they come: what happens at an ordinary pace is seen one by one."""

SECONDS: Final = 10.0
"""Seconds for which those count; in a flood a line and its count are written once in so many, some 30 bytes a
second instead of 190,000."""


class Rare:
    """A logger for lines of which a flood is summed up.

    Used in one thread, that of a hub, which says the count when the lines have stopped to come.
    """

    def __init__(self, log: logging.Logger | Rare, first: int = FIRST, seconds: float = SECONDS) -> None:
        """What is written goes to ``log``: ``first`` lines of each kind in so many seconds."""
        self._log = log
        self._first = first
        self._seconds = seconds
        self._kinds: dict[tuple[str, object], _Kind] = {}

    def info(self, text: str, *args: object, **options: Any) -> None:
        """As the standard library's; see :meth:`log`."""
        self.log(logging.INFO, text, *args, **options)

    def warning(self, text: str, *args: object, **options: Any) -> None:
        self.log(logging.WARNING, text, *args, **options)

    def error(self, text: str, *args: object, **options: Any) -> None:
        self.log(logging.ERROR, text, *args, **options)

    def exception(self, text: str, *args: object, **options: Any) -> None:
        self.log(logging.ERROR, text, *args, **{"exc_info": True, **options})

    def isEnabledFor(self, level: int) -> bool:  # the standard library's name
        """Whether lines at ``level`` are written at all."""
        return self._log.isEnabledFor(level)

    def log(self, level: int, text: str, *args: object, kind: object = None, **options: Any) -> None:
        """Writes a line, or counts it. ``kind``, one of few values of ours, tells lines of one text apart."""
        if not self._log.isEnabledFor(level):
            return
        now = time.monotonic()
        known = self._kinds.get((text, kind))
        if known is None:
            known = self._kinds[text, kind] = _Kind(self._log, self._first, self._seconds)
        if known.admit(now):
            self._log.log(level, text, *args, **options)
        else:
            known.leave_out(now, level, text % args if args else text, options.get("extra"))


class _Kind:
    """The lines of one kind."""

    __slots__ = ("_began", "_first", "_flooded", "_last", "_left", "_log", "_seconds", "_skipped")

    def __init__(self, log: logging.Logger | Rare, first: int, seconds: float) -> None:
        self._log = log
        self._first = first
        self._seconds = seconds
        #: When the seconds began that are counted now, and how many lines may yet be written in them.
        self._began = -2 * seconds
        self._left = 0
        #: Whether any had to be left out; how many were; and the last of those: level, text, fields.
        self._flooded = False
        self._skipped = 0
        self._last: tuple[int, str, dict[str, Any] | None] = (0, "", None)

    def admit(self, now: float) -> bool:
        """Whether a line may be written now; it counts as written then."""
        if now - self._began >= self._seconds:
            self.sum_up(now)
            goes_on = self._flooded and now - self._began < 2 * self._seconds
            self._began, self._flooded = now, False
            self._left = 1 if goes_on else self._first
        if not self._left:
            return False
        self._left -= 1
        return True

    def leave_out(self, now: float, level: int, line: str, fields: dict[str, Any] | None) -> None:
        """Counts a line that is not written, and sees to it that the count is."""
        self._flooded = True
        self._skipped += 1
        self._last = level, line, fields
        if self._skipped == 1:
            _later(self._began + self._seconds - now, self)

    def sum_up(self, now: float) -> None:
        """Writes the last line that was left out, and how many were."""
        more, self._skipped = self._skipped - 1, 0
        _waiting.discard(self)
        if more < 0:
            return
        level, line, fields = self._last
        if more:
            seconds = now - self._began
            line = f"{line}, and {more:,} more like this in {seconds:.0f} s"
            fields = {**(fields or {}), "more": more}
        self._log.log(level, "%s", line, extra=fields)


_waiting: set[_Kind] = set()
"""Kinds with lines that were left out, whose count has not been written."""


def sum_up() -> None:
    """Writes all counts at once: the program ends."""
    now = time.monotonic()
    while _waiting:  # what one writes may be left out by the one that it writes through
        _waiting.pop().sum_up(now)


def _later(seconds: float, kind: _Kind) -> None:
    """Has the count written when the time is over, unless that has happened by then."""
    import gevent  # not for a process that serves nobody

    def say() -> None:
        if kind in _waiting:
            kind.sum_up(time.monotonic())

    _waiting.add(kind)
    gevent.spawn_later(max(0.0, seconds), say)
