"""The visitors of one agent: served, counted, waited for."""

from __future__ import annotations

from gevent.event import Event

from ..stream import Stream
from ..wire.handshake import Kind
from ..workers import Workers
from .config import ClientConfig
from .events import Counters, Listener
from .local import LocalDialer
from .loopback import LoopbackCheck
from .observe import Observer
from .visitor import LocalHealth, Visitor

FAREWELL = 1.0
"""Seconds for visitors that are cut off to end."""


class Crowd:
    """Serves each stream that it is given, whichever session that is on."""

    def __init__(self, config: ClientConfig, events: Listener) -> None:
        """Raises UsageError for a target that cannot be reached at all."""
        self._kind = config.kind
        self._events = events
        self.dialer = LocalDialer(config.target)
        self._loopback = LoopbackCheck(self.dialer, config.kind, events.warning)
        self.local = LocalHealth(events.local_down, events.local_up)
        #: Set while no visitor is being served.
        self.idle = Event()
        self.idle.set()
        self._visitors: set[Stream] = set()
        #: Serve the visitors; made in the hub that has the first one.
        self._workers: Workers | None = None
        self._finished_in = self._finished_out = self._total = 0

    def look_at_service(self) -> None:
        """Says, now or later, if ``localhost`` is two services; never blocks."""
        self._loopback.look()

    @property
    def counters(self) -> Counters:
        """What has passed until now; may be read from any thread."""
        streams = list(self._visitors)
        return Counters(
            visitors=len(streams),
            total=self._total,
            bytes_in=self._finished_in + sum(stream.received for stream in streams),
            bytes_out=self._finished_out + sum(stream.sent for stream in streams),
        )

    def admit(self, stream: Stream) -> None:
        """A visitor has come. Called by a session's reader: must not block."""
        watched = self._events.wants_exchanges and self._kind is Kind.HTTP
        visitor = Visitor(stream, self._observer() if watched else None, self._events.bad_answer)
        self._total += 1
        self.idle.clear()
        self._visitors.add(stream)
        if self._workers is None:  # an idle crew is false, too
            self._workers = Workers()
        self._workers.spawn(self._serve, visitor)

    def _observer(self) -> Observer:
        events = self._events
        return Observer(events.exchange, on_asked=events.asked, on_over=events.over)

    def disperse(self) -> None:
        """Cut off whoever is still served; blocks for at most `FAREWELL` seconds."""
        if self._workers is not None:
            self._workers.kill()
            self._workers.join(FAREWELL)

    def _serve(self, visitor: Visitor) -> None:
        stream = visitor.stream
        try:
            visitor.serve(self.dialer, self.local, self._kind)
        finally:
            self._visitors.discard(stream)
            self._finished_in += stream.received
            self._finished_out += stream.sent
            if not self._visitors:
                self.idle.set()
