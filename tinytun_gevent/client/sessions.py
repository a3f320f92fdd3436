"""All sessions of one agent that are open: those of its tunnel, and older ones that still carry visitors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import gevent
from gevent.event import Event

from ..session import Session
from ..stream import Stream
from .config import ClientConfig
from .link import part, see_off

MOST_LEAVING: Final = 8
"""Sessions that may be left with old visitors, or twice what a tunnel may have, since two reloads of a
server in a row are nothing strange. A server that says goodbye all the time gets no more of them."""


class Sessions:
    """Those that have begun, the oldest one first, until they are closed."""

    def __init__(self, config: ClientConfig) -> None:
        self._concurrency = config.concurrency
        self._most_leaving = max(MOST_LEAVING, 2 * config.sessions)
        self._open: dict[Session, None] = {}
        #: Those that take no more visitors.
        self._leaving: dict[Session, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._open))

    def add(self, session: Session) -> None:
        """One has begun."""
        if not session.closed.is_set():
            self._open[session] = None
            session.on_close.append(self._forget)

    def _forget(self, session: Session) -> None:
        self._open.pop(session, None)
        self._leaving.pop(session, None)

    def has_room_for(self, stream: Stream) -> bool:
        """Whether all together carry no more visitors than the client takes, ``stream`` among them.

        Each session by itself sees to its own.
        """
        counted = stream.session in self._open
        if len(self._open) + (not counted) < 2:
            return True
        running = sum(session.stream_count for session in self._open)
        return running + (0 if counted else stream.session.stream_count) <= self._concurrency

    def see_off(self, session: Session) -> None:
        """Close one that takes no more visitors after the last of them, or when too many such are there."""
        if session.closed.is_set():
            return
        self._leaving[session] = None
        gevent.spawn(see_off, session)
        if len(self._leaving) > self._most_leaving:
            next(iter(self._leaving)).close()

    def dissolve(self, grace: float, idle: Event) -> bool:
        """Say goodbye on all, and close them when ``idle`` is set or ``grace`` seconds are over. Blocks.

        Whether the server has heard it, as far as one can tell.
        """
        sessions = list(self._open)
        for session in sessions:
            session.goaway()
        heard = True
        if grace > 0 and idle.wait(grace):
            heard = all(one.value for one in gevent.joinall([gevent.spawn(part, each) for each in sessions]))
        for session in sessions:
            session.close()
        return heard
