"""How fast the opener of streams resets them, so that honest visitors' aborts never look like an attack.

A peer counts the streams that were opened for nothing (`guard.py`), and thousands of visitors a second may
abort. So a reset that would be counted leaves at once only as long as few do. Any other one waits until it
is an ordinary one, a tenth of a second after the peer's ``200`` or with its first DATA: until then the
stream keeps its place among those that the peer takes, and no visitor can be served faster than it allows.
"""

from __future__ import annotations

import time
from itertools import islice
from typing import TYPE_CHECKING, Final

import gevent

from tinytun_gevent.guard import MOMENT, RESETS, bucket_of, is_rapid
from tinytun_gevent.stream import Stream

if TYPE_CHECKING:
    from tinytun_gevent.session import Session

PACE: Final = (RESETS[0] // 2, RESETS[1] // 2)
"""Resets that may leave at once although they are counted: half of what is allowed, because those of six
seconds arrive together after a path has stalled, and for longer no session lives."""

MARGIN: Final = MOMENT / 5
"""Seconds beyond :data:`MOMENT`: two computers' clocks do not run equally fast."""

LOOK: Final = 0.02
"""Seconds between two looks at the resets that wait."""

LOOKED_AT: Final = 256
"""Of which so many, the oldest, are looked at: a client may take ten thousand streams."""


class Pacing:
    """The resets of one opener that have to wait; a part of its session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._allowance = bucket_of(PACE)
        #: Streams that are over for everybody here, with the code for the peer, the oldest first.
        self._held: dict[Stream, int] = {}
        self._running = False

    def admits(self, stream: Stream) -> bool:
        """Whether ``stream`` may be reset now."""
        now = time.monotonic()
        return not is_rapid(now - MARGIN, stream.accepted_at, stream.received) or self._allowance.take(now)

    def hold(self, stream: Stream, code: int) -> None:
        """Keeps a reset until it may go. Never blocks."""
        self._held[stream] = code
        if not self._running:
            self._running = True
            gevent.spawn(self._run)

    def heard(self, stream: Stream) -> None:
        """DATA has come on a stream whose reset waits: it may go."""
        code = self._held.pop(stream, None)
        if code is not None:
            self._session.send_reset(stream, code)

    def _run(self) -> None:
        """The greenlet that sends what has waited, for as long as there is something."""
        session = self._session
        while self._held and not session.closed.wait(LOOK):
            for stream in list(islice(self._held, LOOKED_AT)):
                if session.streams.get(stream.id) is not stream:
                    del self._held[stream]  # the peer has ended it
                elif self.admits(stream):
                    session.send_reset(stream, self._held.pop(stream))
        self._held.clear()
        self._running = False
