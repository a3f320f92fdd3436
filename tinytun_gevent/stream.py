"""One stream of a session: a two-way flow of bytes that behaves like a socket."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from gevent.event import Event

from tinytun_gevent.errors import SessionError, StreamResetError
from tinytun_gevent.flow import ReceiveWindow
from tinytun_gevent.wire.answer_codes import AnswerCode
from tinytun_gevent.wire.http2 import Field

if TYPE_CHECKING:
    from tinytun_gevent.session import Session
    from tinytun_gevent.shares import Share
    from tinytun_gevent.sockets import Buffer, Source

NO_ERROR: Final = 0
PROTOCOL_ERROR: Final = 1
REFUSED_STREAM: Final = 7
CANCEL: Final = 8

LOOK: Final = 1.0
"""Seconds between two looks at a source whose bytes wait for a window."""

Gate = Callable[[memoryview], int]


class Receiver(Protocol):
    """What a stream delivers to. Everything is called by the session's reader.

    So nothing here may block or switch greenlets, and a view passed to :meth:`data` is
    only valid during the call. After :meth:`eof` or :meth:`aborted` no more data comes.
    """

    def data(self, view: memoryview) -> None:
        """Takes bytes, and calls ``stream.consumed`` when they have been delivered."""

    def eof(self) -> None:
        """The peer half-closed: the bytes so far are the whole."""

    def aborted(self, error: SessionError) -> None:
        """The stream was reset, or its session ended: the bytes so far are a part."""


class Upstream(Protocol):
    """What a relay or an exchange needs of a :class:`Stream`, or of something like one."""

    receiver: Receiver | None
    accepted: bool
    remote_ended: bool

    @property
    def closed(self) -> bool: ...
    @property
    def answers(self) -> bool: ...
    def sendall(self, data: Buffer) -> None: ...
    def send_from(self, source: Source, limit: int = 0, gate: Gate | None = None) -> int: ...
    def shutdown(self) -> None: ...
    def reset(self, code: int = CANCEL) -> None: ...
    def blame(self, code: AnswerCode) -> None: ...
    def consumed(self, count: int) -> None: ...
    def keep(self, count: int) -> bool: ...


class Stream:
    """A stream as :meth:`Session.open` returns it or ``on_stream`` gets it.

    Set ``receiver`` before the session's reader runs again. Sending blocks the calling
    greenlet for flow control and for its turn on the socket; one greenlet at a time may
    send. A stream is over when both directions have ended, or at a reset.
    """

    __slots__ = (
        "_error",
        "_window_open",
        "accepted",
        "accepted_at",
        "allowance",
        "hears",
        "id",
        "kept",
        "local_ended",
        "peer_fields",
        "receive_window",
        "received",
        "receiver",
        "remote_ended",
        "requests_left",
        "sent",
        "session",
    )

    def __init__(self, session: Session, stream_id: int, peer_fields: list[Field], allowance: int) -> None:
        self.session = session
        self.id = stream_id
        #: The fields of the request (acceptor), empty on streams that this side opened.
        self.peer_fields = peer_fields
        self.receiver: Receiver | None = None
        #: Whether the ``:status 200`` has come (opener) or been sent (acceptor).
        self.accepted = False
        #: When that was, on the monotonic clock.
        self.accepted_at = math.inf
        #: Whether DATA may come and is for the receiver: an answer begins with the ``200``.
        self.hears = not session.opener
        #: DATA bytes that the peer takes on this stream now (RFC 9113 §6.9).
        self.allowance = allowance
        self.local_ended = False
        self.remote_ended = False
        #: DATA bytes, both ways, since the stream was opened.
        self.received = 0
        self.sent = 0
        #: Requests that the local service still takes on it; None if it has not said.
        self.requests_left: int | None = None
        self.receive_window = ReceiveWindow()
        #: Bytes that had come before it was aborted and are still being delivered.
        self.kept = 0
        self._error: SessionError | None = None
        self._window_open: Event | None = None

    @property
    def closed(self) -> bool:
        """Whether nothing more will be sent or received."""
        return self._error is not None or (self.local_ended and self.remote_ended)

    @property
    def answers(self) -> bool:
        """Whether what is sent on it comes from the local service (acceptor), and not from a visitor."""
        return not self.session.opener

    @property
    def error(self) -> SessionError | None:
        """Why the stream was aborted, if it was."""
        return self._error

    @property
    def send_window(self) -> int:
        """Bytes that the peer takes now on this stream, its share of the session included."""
        return self.session.send_window(self)

    def accept(self) -> None:
        """Answers ``:status 200`` (acceptor). Never blocks."""
        self.session.send_response(self)

    def sendall(self, data: Buffer) -> None:
        """Sends ``data``; blocks until the kernel has all of it, or will have a small rest at once.

        Raises :class:`StreamResetError` or :class:`SessionClosedError`.
        """
        if not len(data) or self.session.send_small(self, data):
            return
        with memoryview(data) as view:
            sent = 0
            while sent < len(view):
                self.wait_window()
                sent += self.session.send_data(self, view[sent:])

    def send_from(self, source: Source, limit: int = 0, gate: Gate | None = None) -> int:
        """Moves once what ``source`` has to read: bytes read, 0 at its end.

        Blocks until there is something to move and a window for it. Nothing is buffered
        meanwhile, so backpressure reaches the source's own kernel. At most ``limit`` bytes
        are read, if it is not 0; ``gate`` is shown them, says how many may pass and keeps the
        rest. Raises ``OSError`` for the source and :class:`SessionError` for the stream.
        """
        while True:
            if self._error is not None:
                raise self._error
            source.wait_readable()
            self.wait_window(source)
            share = self.session.share_out
            if share is not None and (share.ahead or share.turns.held):
                moved = self._send_in_turn(share, source, limit, gate)
            else:
                moved = self.session.send_data_from(self, source, limit, gate)
            if moved >= 0:
                return moved

    def _send_in_turn(self, share: Share, source: Source, limit: int, gate: Gate | None) -> int:
        """Waits until the tunnel may go on, one of its visitors after the other, and moves what there is."""
        share.turns.acquire()
        try:
            share.wait()
            return self.session.send_data_from(self, source, limit, gate)
        finally:
            share.turns.release()

    def shutdown(self) -> None:
        """Half-closes: END_STREAM. Idempotent, never blocks, no error on a stream that is over."""
        if not self.local_ended and self._error is None:
            self.session.end_stream(self)

    def reset(self, code: int = CANCEL) -> None:
        """Aborts the stream in both directions. Idempotent, never blocks.

        The receiver is told too, by :meth:`Receiver.aborted`.
        """
        if not self.closed:
            self.session.reset_stream(self, code)

    def blame(self, code: AnswerCode) -> None:
        """Aborts the stream because of the service's answer; the peer is told why if it understands that."""
        self.reset(code if self.session.peer_knows_codes else CANCEL)

    def consumed(self, count: int) -> None:
        """Says that ``count`` received bytes have been delivered; may give the peer credit."""
        if self._error is not None:
            count = min(count, self.kept)
            self.kept -= count
            self.session.backlog -= count
            return
        self.session.backlog -= count
        if self.receive_window.deliver(count) and not self.remote_ended:
            self.session.credit(self)

    def keep(self, count: int) -> bool:
        """Says that ``count`` bytes that came are still being delivered although the stream may be aborted.

        They count as the session's backlog until they are :meth:`consumed`. False if that is over its limit:
        then they have to be dropped.
        """
        if self._error is None:
            return True
        if self.session.is_backlogged:
            return False
        self.kept += count
        self.session.backlog += count
        return True

    def rest(self) -> None:
        """Says that the stream goes idle between uses, so that it keeps no grown window."""
        self.receive_window.shrink()

    def wait_window(self, source: Source | None = None) -> int:
        """Blocks until at least one byte may be sent; returns how many.

        Nobody reads ``source`` meanwhile, so this looks now and then whether it was reset, and
        raises its ``OSError``: a service that reads no more must not keep visitors that left. What a
        service had sent before its reset is for the visitor all the same.
        """
        while True:
            if self._error is not None:
                raise self._error
            if self.local_ended:
                raise StreamResetError(NO_ERROR, remote=False)
            window = self.session.send_window(self)
            if window > 0:
                return window
            self._window_open = Event()
            self.session.block(self)
            self.session.flush()
            try:
                opened = self._window_open.wait(None if source is None else LOOK)
                if not opened and source is not None and not (self.answers and source.unread):
                    source.check()
            finally:
                self._window_open = None
                self.session.unblock(self)

    # The session calls what follows.

    def accept_at(self, now: float) -> None:
        """Notes that the ``:status 200`` has come or leaves."""
        self.accepted = True
        self.accepted_at = now
        self.hears = self._error is None and not self.remote_ended

    def wake(self) -> None:
        """Lets :meth:`wait_window` look again."""
        if self._window_open is not None:
            self._window_open.set()

    def abort(self, error: SessionError) -> None:
        """Ends the stream with ``error``, the first of which is the one remembered."""
        if self._error is not None:
            return
        self._error = error
        self.hears = False
        self.session.backlog -= self.receive_window.undelivered
        self.wake()
        if self.receiver is not None:
            self.receiver.aborted(error)
