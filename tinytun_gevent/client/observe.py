"""Watching the HTTP exchanges that pass on a stream, for the status block.

Only first lines are looked at: what a request's first chunk starts with, then what the
response's does. That costs about a microsecond a chunk, holds no bytes, and cannot disturb the
bytes that pass. It is for show: a body chunk that looks exactly like a request line would be taken for one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..relay import ServiceSink
from ..stream import Stream
from .text import clean

_REQUEST = re.compile(rb"([A-Z][A-Z-]{0,19}) ([^\s?#]{1,1024}+)[^\s]*+(?: HTTP/1\.[01]\r\n|\Z)")
_RESPONSE = re.compile(rb"HTTP/1\.[01] ([1-9][0-9][0-9])[ \r\n]")
_HEAD_END = re.compile(rb"\n\r?\n")

#: How far behind an interim response (1xx) the final one is looked for in the same chunk.
_FAR = 8192


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its answer; ``seconds`` is the time to the answer's first byte.

    ``path`` has no query, which may hold secrets; both texts are fit for a terminal.
    """

    method: str
    path: str
    status: int
    seconds: float
    #: What was wrong with the service's answer; blank if nothing was.
    problem: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """One request whose answer has not begun; ``began`` is on its clock. Texts as in `Exchange`."""

    method: str
    path: str
    began: float


def _nothing(_: Asked) -> None:
    pass


class Observer:
    """Watches one stream, which may carry many exchanges one after the other."""

    __slots__ = ("_asked", "_clock", "_last", "_on_asked", "_on_over", "_report")

    def __init__(
        self,
        report: Callable[[Exchange], None],
        clock: Callable[[], float] = time.monotonic,
        *,
        on_asked: Callable[[Asked], None] = _nothing,
        on_over: Callable[[Asked], None] = _nothing,
    ) -> None:
        """``on_asked`` gets each request as it begins, ``on_over`` the same one when it waits no longer."""
        self._report = report
        self._clock = clock
        self._on_asked = on_asked
        self._on_over = on_over
        #: The request that waits for its answer, and the last one there was.
        self._asked: Asked | None = None
        self._last: Asked | None = None

    @property
    def awaiting(self) -> bool:
        """Whether a request has passed whose final answer has not begun."""
        return self._asked is not None

    def to_service(self, view: memoryview | bytes) -> None:
        """Bytes of the visitor pass to the service."""
        if self._asked is not None:
            return
        match = _REQUEST.match(view)
        if match is not None:
            asked = Asked(clean(bytes(match[1]), 20), clean(bytes(match[2])), self._clock())
            self._asked = self._last = asked
            self._on_asked(asked)

    def to_visitor(self, view: memoryview) -> int:
        """The gate of a relay: bytes of the service pass to the visitor, all of them."""
        if self._asked is not None:
            self._look_for_answer(view)
        return len(view)

    def _look_for_answer(self, view: memoryview) -> None:
        match = _RESPONSE.match(view)
        while match is not None and match[1][:1] == b"1" and match[1] != b"101":
            end = _HEAD_END.search(view, 0, _FAR)
            if end is None:
                return
            view = view[end.end() :]
            match = _RESPONSE.match(view)
        if match is not None:
            self.answered(int(bytes(match[1])))

    def answered(self, status: int) -> None:
        """The request that is awaiting its answer gets ``status``."""
        if self._asked is not None:
            self.left()
            self._tell(status)

    def failed(self, status: int, problem: str) -> None:
        """The visitor was told ``status`` because of the service's answer to the last request."""
        self.left()
        self._tell(status, problem)

    def left(self) -> None:
        """Nobody waits any longer for the answer to the last request: it is there, or the visitor is gone."""
        asked, self._asked = self._asked, None
        if asked is not None:
            self._on_over(asked)

    def _tell(self, status: int, problem: str = "") -> None:
        if (last := self._last) is not None:
            self._report(Exchange(last.method, last.path, status, self._clock() - last.began, problem))


class WatchedSink(ServiceSink):
    """Delivers a stream's bytes to the service, and shows them to an observer."""

    __slots__ = ("observer",)

    def __init__(self, stream: Stream, observer: Observer) -> None:
        super().__init__(stream)
        self.observer = observer

    def data(self, view: memoryview) -> None:
        self.observer.to_service(view)
        self.write(view, len(view))
