"""One visitor's stream: dial the local service, relay both ways, or say that it is away."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable

from gevent.event import Event

from ..errors import LocalServiceError, SessionError
from ..relay import ServiceSink, relay
from ..sockets import end_of
from ..stream import CANCEL, NO_ERROR, Stream
from ..wire.handshake import Kind
from .faults import fault_of
from .local import LocalDialer, error_page
from .observe import Observer, WatchedSink

log = logging.getLogger(__name__)

#: Seconds for which the rest of a request is taken and dropped after a 502, so that the
#: visitor reads the page instead of a reset.
LINGER = 5.0

#: Seconds to wait for the request's head, which tells whether the 502 is to be HTML or JSON.
HEAD_TIMEOUT = 1.0

#: Bytes of a request that are looked at for that, as many as its head may have at a server.
MAX_LOOK = 32768


class LocalHealth:
    """Whether the local service answers; says so when that changes, not once a visitor."""

    def __init__(self, on_down: Callable[[str], None], on_up: Callable[[], None]) -> None:
        self._on_down = on_down
        self._on_up = on_up
        #: What is wrong with the service, one line; None while it answers.
        self.problem: str | None = None

    def failed(self, problem: str) -> None:
        """A visitor could not be connected."""
        if problem != self.problem:
            self.problem = problem
            self._on_down(problem)

    def worked(self) -> None:
        """A visitor was connected."""
        if self.problem is not None:
            self.problem = None
            self._on_up()


class Visitor:
    """A stream on its way to the local service; make it in the session's ``on_stream``.

    Bytes that arrive before the service is connected wait in the sink, bounded by the
    stream's window.
    """

    __slots__ = ("_bad_answer", "_observer", "_sink", "stream")

    def __init__(
        self,
        stream: Stream,
        observer: Observer | None = None,
        bad_answer: Callable[[str], None] | None = None,
    ) -> None:
        """``observer`` sees every exchange on the stream; None watches nothing.

        ``bad_answer`` gets what was wrong with an answer of the service.
        """
        self.stream = stream
        self._bad_answer = bad_answer
        self._observer = observer
        self._sink = ServiceSink(stream) if observer is None else WatchedSink(stream, observer)
        stream.receiver = self._sink
        stream.accept()

    def serve(self, dialer: LocalDialer, health: LocalHealth, kind: Kind) -> None:
        """Carry the visitor until both directions are over; blocks. Raises nothing of the network."""
        try:
            self._serve(dialer, health, kind)
        finally:
            if self._observer is not None:
                self._observer.left()

    def _serve(self, dialer: LocalDialer, health: LocalHealth, kind: Kind) -> None:
        try:
            sock = dialer.dial()
        except LocalServiceError as error:
            health.failed(str(error))
            self._turn_away(str(error), kind)
            return
        except BaseException:
            self.stream.reset(CANCEL)
            raise
        health.worked()
        end = end_of(sock, prompt=True)
        if self._sink.done:  # the visitor has left meanwhile
            end.abort()
            return
        self._sink.attach(end)
        relay(self.stream, self._sink, None if self._observer is None else self._observer.to_visitor)
        if kind is not Kind.HTTP or self.stream.error is None:
            return
        awaiting = not self.stream.sent if self._observer is None else self._observer.awaiting
        fault = fault_of(self.stream.error, dialer.target, awaiting=awaiting)
        if fault is not None:
            self._blame(*fault)

    def _blame(self, status: int, problem: str) -> None:
        """Tells of an answer that the visitor could not be given."""
        if self._observer is not None:
            self._observer.failed(status, problem)
        if self._bad_answer is not None:
            self._bad_answer(problem)

    def _turn_away(self, problem: str, kind: Kind) -> None:
        """A page for an HTTP visitor, a reset for any other."""
        if kind is not Kind.HTTP:
            self.stream.reset(CANCEL)
            return
        if self._observer is not None:
            self._observer.answered(502)
        drain = _Drain(self.stream, self._sink.waiting(MAX_LOOK))
        drain.told.wait(HEAD_TIMEOUT)
        request_id = secrets.token_hex(6)
        log.debug("answered 502 to request %s: %s", request_id, problem)
        try:
            self.stream.sendall(error_page(problem, bytes(drain.begun), request_id))
            self.stream.shutdown()
        except SessionError:
            return
        drain.over.wait(LINGER)
        # What is still to come of the request is not wanted (RFC 9113 §8.1).
        self.stream.reset(NO_ERROR)


class _Drain:
    """A receiver that takes bytes and drops them, all but how the request began."""

    def __init__(self, stream: Stream, begun: bytes) -> None:
        self._stream = stream
        #: The request's first bytes, `MAX_LOOK` at most.
        self.begun = bytearray(begun)
        #: Set when they hold its whole head, or as much as ever will be there.
        self.told = Event()
        #: Set when nothing more will come.
        self.over = Event()
        self._look()
        if stream.remote_ended or stream.error is not None:
            self._end()
        stream.receiver = self
        stream.consumed(stream.receive_window.undelivered)  # what the sink held until now

    def data(self, view: memoryview) -> None:
        if not self.told.is_set():
            held = len(self.begun)
            self.begun += view[: MAX_LOOK - held]
            self._look(max(0, held - 3))
        self._stream.consumed(len(view))

    def eof(self) -> None:
        self._end()

    def aborted(self, error: SessionError) -> None:
        self._end()

    def _look(self, start: int = 0) -> None:
        if self.begun.find(b"\r\n\r\n", start) >= 0 or len(self.begun) >= MAX_LOOK:
            self.told.set()

    def _end(self) -> None:
        self.told.set()
        self.over.set()
