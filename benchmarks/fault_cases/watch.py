"""A visitor who asks again and again while something happens, and remembers every answer."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from ..way import Endpoint
from .site import FAILED, status_of


@dataclass(frozen=True)
class Visit:
    """One request; ``status`` is `FAILED` where there was no answer."""

    began: float
    seconds: float
    status: int


class Watch:
    """Asks every ``pause`` seconds, one request after the other, for the length of a ``with`` block."""

    def __init__(self, endpoint: Endpoint, pause: float = 0.05) -> None:
        self.visits: list[Visit] = []
        self._endpoint = endpoint
        self._pause = pause
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    @property
    def wrong(self) -> list[Visit]:
        """The requests that were not answered with 200."""
        return [visit for visit in self.visits if visit.status != 200]

    @property
    def slowest(self) -> float:
        """Seconds that the slowest request took."""
        return max((visit.seconds for visit in self.visits), default=0.0)

    def summary(self) -> str:
        """For the table: how many requests, what went wrong, the slowest."""
        if not self.wrong:
            return f"{len(self.visits)} requests, none failed"
        kinds = sorted({"no answer" if v.status == FAILED else str(v.status) for v in self.wrong})
        return f"{len(self.visits)} requests, {len(self.wrong)} failed ({', '.join(kinds)})"

    def _ask(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            status = status_of(self._endpoint)
            self.visits.append(Visit(began, time.monotonic() - began, status))
            self._over.wait(self._pause)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
