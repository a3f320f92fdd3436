"""One HTTP/2 session on one connected socket: streams, settings, keep-alive, the end.

A locked h2 connection for control, our own path for DATA. One reader greenlet per session
reads into a buffer that all sessions share and hands DATA straight to its stream; it never
waits for the write lock and never blocks on a write. Senders take turns.

The receiving half is ``incoming.py``, the order of what is sent ``writer.py``; what an
attribute without underscore means to those two is said where it is born.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import gevent
from gevent.event import Event
from h2.exceptions import NoAvailableStreamIDError
from h2.stream import StreamClosedBy

from tinytun_gevent import sockets
from tinytun_gevent.errors import (
    PeerSilentError,
    SessionClosedError,
    SessionError,
    StreamLimitError,
    StreamResetError,
)
from tinytun_gevent.flow import INITIAL_WINDOW
from tinytun_gevent.guard import Guard
from tinytun_gevent.incoming import MAX_FRAME, Incoming
from tinytun_gevent.keepalive import KeepAlive
from tinytun_gevent.pacing import Pacing
from tinytun_gevent.shares import BULK, Share
from tinytun_gevent.sockets import Buffer, End, Socket, Source, end_of
from tinytun_gevent.stream import NO_ERROR, Gate, Stream
from tinytun_gevent.turns import let_others_run
from tinytun_gevent.wire import http2
from tinytun_gevent.wire.goodbye import SILENT
from tinytun_gevent.writer import SMALL, Writer

HANG_UP: Final = 1.0
"""Seconds for the last frames to leave when a session ends."""

REFUSAL: Final = 0.5
"""Seconds for which a peer that refused a stream is asked for no other, unless one ends."""

ABORTED_AT_ONCE: Final = 64
"""Streams that end together before others have a turn: each has an answer to write, which takes 0.1 ms."""

BACKLOG_LIMIT: Final = 16 * 1024 * 1024
"""Bytes that all streams of a session together may hold undelivered before credit is withheld."""


class Session:
    """A session; create it on a connected socket, set ``on_stream``, call :meth:`start`.

    The *opener* (HTTP/2's client: the tunnel server) opens streams, the other side accepts
    them. The socket belongs to the session, which closes it when it ends; ``closed`` is set
    then, ``error`` says why (None after a clean close), and ``on_close`` is called.
    """

    def __init__(
        self,
        sock: Socket | End,
        *,
        opener: bool,
        max_streams: int = 0,
        received: bytes = b"",
        on_stream: Callable[[Stream], None] | None = None,
    ) -> None:
        """``max_streams`` is how many the peer may have open, ``received`` what was read already."""
        now = time.monotonic()
        self.end: End = end_of(sock)
        sockets.tune_session(self.end.sock)
        #: The peer's address, for the log.
        self.peer = sockets.peer_name(self.end.sock)
        self.opener = opener
        self.max_streams = max_streams
        self._early = received
        #: Called with each stream that the peer opens; must not block.
        self.on_stream = on_stream
        self.conn = http2.Connection(
            opener=opener, max_streams=max_streams, window=INITIAL_WINDOW, max_frame=MAX_FRAME
        )
        self.writer = Writer(self.end, self._write_failed)
        #: Open streams by id, and those of them that wait for a window.
        self.streams: dict[int, Stream] = {}
        self.blocked: set[Stream] = set()
        self.keep_alive = KeepAlive(self, now)
        #: Counts what the peer sends, and what we are about to.
        self.guard = Guard(now)
        self.pacing = Pacing(self)
        #: Set when the peer's SETTINGS have come.
        self.settled = Event()
        self.closing = False
        #: DATA bytes since the start, both ways, and streams ever opened.
        self.data_received = 0
        self.data_sent = 0
        self.streams_opened = 0
        #: Received bytes that wait in this process, over all streams.
        self.backlog = 0
        #: Bytes that the largest window of a stream has had: what this path can hold.
        self.usual_window = INITIAL_WINDOW
        #: What this session moves is part of: received and sent. None where nobody competes.
        self.share_in: Share | None = None
        self.share_out: Share | None = None
        #: The peer wants no new streams.
        self.goaway_received = False
        #: What it said of the reason (RFC 9113 §7).
        self.goaway_code = NO_ERROR
        #: What it says about why, as it came.
        self.goaway_reason = b""
        self.goaway_sent = False
        #: Whether the peer knows the error codes of `answer_codes`.
        self.peer_knows_codes = False
        #: How many streams the peer takes at once.
        self.peer_max_streams = 0
        #: Until when a refused stream counts as "no room", whatever that limit says.
        self._refused_until = 0.0
        self.closed = Event()
        self.error: SessionError | None = None
        #: Called once, from any greenlet, when the session ends; must not block.
        self.on_close: list[Callable[[Session], None]] = []
        #: Called when a stream has ended or the peer allows more of them; must not block.
        self.on_room: Callable[[Session], None] | None = None
        #: Called when the peer's GOAWAY has come; must not block.
        self.on_goaway: Callable[[Session], None] | None = None
        #: Called with the code of each GOAWAY that is sent (RFC 9113 §7); must not block.
        self.on_goaway_sent: Callable[[int], None] | None = None
        self._incoming = Incoming(self)

    # -- life ---------------------------------------------------------------

    def start(self, timeout: float = 5.0) -> None:
        """Says hello and blocks until the peer's SETTINGS came, at most ``timeout`` seconds.

        An acceptor also waits for the answer to its PING: then the opener has its SETTINGS, so
        that a visitor who comes at once is not turned away. Raises :class:`PeerSilentError` or
        what ended the session; it is closed then.
        """
        self.conn.initiate_connection()
        self.writer.queue(self.conn.take_output())
        self.writer.queue(http2.window_update(0, http2.MAX_WINDOW - 65535))
        self.keep_alive.ping()
        gevent.spawn(self._incoming.read, self._early)
        gevent.spawn(self.keep_alive.run)
        deadline = time.monotonic() + timeout
        if not self.settled.wait(timeout):
            self.close(PeerSilentError(f"the peer said nothing of HTTP/2 for {timeout:g} s"))
        if not self.opener and not self.closing:
            either = [self.keep_alive.first_answer, self.closed]
            gevent.wait(either, max(0.0, deadline - time.monotonic()), count=1)
        if self.error is not None:
            raise self.error
        if self.closing:
            raise SessionClosedError("the session was closed while it started")

    def goaway(self) -> None:
        """Tells the peer to open no more streams; running ones go on. Never blocks."""
        if not self.goaway_sent and not self.closing:
            self.goaway_sent = True
            self.guard.leaving(self.max_streams)
            self._send_goaway(NO_ERROR, b"")

    def close(self, error: SessionError | None = None, code: int = NO_ERROR) -> None:
        """Ends the session: GOAWAY, every stream aborted, the socket closed. Never blocks.

        Idempotent; the first ``error`` is the one remembered.
        """
        if self.closing:
            return
        self.closing = True
        self.error = error
        if not self.goaway_sent or code:
            reason = str(error) if code else SILENT if isinstance(error, PeerSilentError) else ""
            self._send_goaway(code, reason.encode("ascii", "replace"), arrives=bool(code) or error is None)
        else:
            self.writer.control()  # what was to leave when this round of the event loop is over
        ended = error or SessionClosedError("the session was closed")
        lost = list(self.streams.values())
        self.streams.clear()
        self.blocked.clear()
        self.abort_all(lost, ended)
        unread = code and self.writer.is_stuck  # the peer would not read the GOAWAY either
        if not unread and (self.writer.pending or self.writer.unsent):
            gevent.spawn(self._hang_up)
        else:
            self.end.close()
        self.settled.set()
        self.closed.set()
        for notify in self.on_close:
            notify(self)

    def abort_all(self, streams: Sequence[Stream], error: SessionError) -> None:
        """Aborts streams that are no longer this session's; lets others run where they are many."""
        for stream in streams[:ABORTED_AT_ONCE]:
            stream.abort(error)
        if len(streams) > ABORTED_AT_ONCE:
            gevent.spawn(self._abort_rest, streams[ABORTED_AT_ONCE:], error)

    def _abort_rest(self, streams: Sequence[Stream], error: SessionError) -> None:
        for number, stream in enumerate(streams):
            stream.abort(error)
            if not number % ABORTED_AT_ONCE:
                let_others_run()

    def _send_goaway(self, code: int, reason: bytes, *, arrives: bool = True) -> None:
        """``arrives``: not where the connection is lost, or the peer dead."""
        if arrives and self.on_goaway_sent is not None:
            self.on_goaway_sent(code)
        self.writer.control(http2.goaway(self.conn.highest_inbound_stream_id, code, reason))

    def _hang_up(self) -> None:
        """Closes the socket as soon as the GOAWAY is on its way."""
        gevent.with_timeout(HANG_UP, self.writer.wait_empty, timeout_value=None)
        self.end.close()

    def finish_writing(self) -> None:
        """Half-closes the connection behind what is queued; raises ``OSError``.

        Blocks until that is sent, at most :data:`HANG_UP` seconds.
        """
        self.writer.control()
        if self.writer.pending or self.writer.unsent:
            gevent.with_timeout(HANG_UP, self.writer.wait_empty, timeout_value=None)
        self.end.finish_writing()

    # -- streams ------------------------------------------------------------

    @property
    def stream_count(self) -> int:
        """Streams that are open, in either half."""
        return len(self.streams)

    @property
    def is_backlogged(self) -> bool:
        """Whether more than :data:`BACKLOG_LIMIT` bytes that came wait here to be delivered."""
        return self.backlog > BACKLOG_LIMIT

    @property
    def round_trip(self) -> float:
        """Seconds to the peer and back, the least that was measured; 0 before the first time."""
        return self.keep_alive.min_rtt

    @property
    def behind(self) -> bool:
        """Whether bytes have come from the peer that its reader, which pauses, has not looked at."""
        return self._incoming.behind or self.end.holds

    @property
    def takes_streams(self) -> bool:
        """Whether the peer may open another stream now."""
        return len(self.streams) < self.max_streams and not self.goaway_sent and not self.closing

    @property
    def takes_visitors(self) -> bool:
        """Whether :meth:`open` may succeed again, now or when another stream has ended."""
        return not self.closing and not self.goaway_received

    @property
    def has_room(self) -> bool:
        """Whether :meth:`open` would succeed now."""
        return (
            self.takes_visitors
            and self.settled.is_set()
            and len(self.streams) < self.peer_max_streams
            and (not self._refused_until or time.monotonic() >= self._refused_until)
        )

    def refused(self) -> None:
        """The peer has refused a stream: it has no room until one ends, or :data:`REFUSAL` is over."""
        self._refused_until = time.monotonic() + REFUSAL

    def open(self, visitor: str | None = None) -> Stream:
        """Opens a stream (opener). Never blocks; the request goes out with the first DATA.

        ``visitor`` is told to the peer as ``ip:port``. Call :meth:`flush` if nothing is sent
        at once. Raises :class:`SessionClosedError` or :class:`StreamLimitError`.
        """
        if self.closing or self.goaway_received:
            raise self.error or SessionClosedError("the session takes no new streams")
        if not self.has_room:
            raise StreamLimitError(f"all {self.peer_max_streams} streams are in use")
        try:
            stream_id = self.conn.begin_outbound()
        except NoAvailableStreamIDError as error:  # after 2^30 streams: the peer opens a new session
            self.close(SessionClosedError("all stream numbers are used up"))
            raise SessionClosedError("all stream numbers are used up") from error
        self.writer.queue(http2.request(stream_id, visitor, self.conn.table_update()))
        return self.add(stream_id, [])

    def flush(self) -> None:
        """Sends what is queued when this round of the event loop is over. Never blocks."""
        self.writer.soon()

    def add(self, stream_id: int, fields: list[http2.Field]) -> Stream:
        allowance = self.conn.remote_settings.initial_window_size
        stream = self.streams[stream_id] = Stream(self, stream_id, fields, allowance)
        self.streams_opened += 1
        self.guard.opened()
        return stream

    def remove(self, stream: Stream, closed_by: StreamClosedBy = StreamClosedBy.SEND_END_STREAM) -> None:
        """Forgets a stream that is over."""
        if self.streams.pop(stream.id, None) is None:
            return
        self.conn.forget(stream.id, closed_by)
        self.blocked.discard(stream)
        self._refused_until = 0.0
        if self.on_room is not None:
            self.on_room(self)
        self.close_if_done()

    def close_if_done(self) -> None:
        """An opener whose peer goes away closes with its last stream."""
        if self.opener and self.goaway_received and not self.streams:
            self.close()

    # -- sending: what Stream calls -----------------------------------------

    def send_window(self, stream: Stream) -> int:
        """Bytes of DATA that may be sent on a stream now."""
        return min(stream.allowance, self.conn.outbound_flow_control_window)

    def block(self, stream: Stream) -> None:
        """Notes a stream that waits for a window."""
        self.blocked.add(stream)

    def unblock(self, stream: Stream) -> None:
        self.blocked.discard(stream)

    def send_small(self, stream: Stream, payload: Buffer) -> bool:
        """Sends all of a short ``payload`` in one frame, if that takes no waiting; whether it did."""
        count = len(payload)
        if count > SMALL or not self.writer.takes_small or self._allowed(stream, count) < count:
            return False
        self._charge(stream, count)
        self.writer.join(stream.id, payload)
        return True

    def send_data(self, stream: Stream, payload: memoryview) -> int:
        """Sends one frame from ``payload``: bytes sent, 0 if the window is used up. Blocks."""

        def allow(wanted: int) -> int:
            count = self._allowed(stream, wanted)
            self._charge(stream, count)
            if self.share_out is not None and count >= BULK:
                self.share_out.took(count)
            return count

        return self.writer.send_data(stream.id, payload, allow)

    def send_data_from(self, stream: Stream, source: Source, limit: int, gate: Gate | None) -> int:
        """Moves one frame from ``source``: bytes read, 0 at its end, -1 for none now. Blocks."""

        share = self.share_out

        def allow(wanted: int) -> int:
            if share is not None and share.ahead:  # by what others have sent before this turn
                return 0
            return self._allowed(stream, min(wanted, limit) if limit else wanted)

        def charge(count: int) -> None:
            self._charge(stream, count)
            if share is not None and count >= BULK:
                share.took(count)

        return self.writer.send_data_from(stream.id, source, allow, charge, gate)

    def _allowed(self, stream: Stream, wanted: int) -> int:
        if stream.error is not None:
            raise stream.error
        if stream.local_ended:
            return 0
        conn = self.conn
        window = min(stream.allowance, conn.outbound_flow_control_window)
        return min(wanted, window, conn.max_outbound_frame_size) if window > 0 else 0

    def _charge(self, stream: Stream, count: int) -> None:
        stream.allowance -= count
        self.conn.outbound_flow_control_window -= count
        stream.sent += count
        self.data_sent += count

    # A stream in ``conn.streams`` is one on which something unusual has happened: h2 follows its
    # state. Of all others this class does, by ``local_ended`` and ``remote_ended``.

    def send_response(self, stream: Stream) -> None:
        """Answers a stream's request with ``:status 200``. Never blocks."""
        if stream.closed:
            return
        stream.accept_at(self.keep_alive.liveness.last_sign)
        if stream.id in self.conn.streams:
            self.conn.send_headers(stream.id, http2.RESPONSE_FIELDS)
            self.writer.soon(self.conn.take_output())
        else:
            self.writer.soon(http2.response(stream.id, self.conn.table_update()))

    def end_stream(self, stream: Stream) -> None:
        """Sends END_STREAM. Never blocks."""
        stream.local_ended = True
        if stream.id in self.conn.streams:
            self.conn.end_stream(stream.id)
            self.writer.soon(self.conn.take_output())
        else:
            self.writer.soon(http2.empty_data(stream.id, http2.END_STREAM))
        if stream.remote_ended:
            self.remove(stream)

    def reset_stream(self, stream: Stream, code: int) -> None:
        """Aborts the stream, and sends RST_STREAM as soon as `Pacing` lets it. Never blocks."""
        if stream.id not in self.streams or not self.opener or self.pacing.admits(stream):
            self.send_reset(stream, code)
        else:
            self.pacing.hold(stream, code)
        stream.abort(StreamResetError(code, remote=False))

    def send_reset(self, stream: Stream, code: int) -> None:
        """Sends RST_STREAM and forgets the stream. Never blocks."""
        known = self.conn.streams.get(stream.id)
        if known is not None:
            if not known.closed:  # as it is when the last frame has just ended it
                self.conn.reset_stream(stream.id, code)
                self.writer.soon(self.conn.take_output())
        elif stream.id in self.streams:
            self.writer.soon(http2.rst_stream(stream.id, code))
        self.guard.abandoned(stream.receive_window.credit)
        self.remove(stream, StreamClosedBy.SEND_RST_STREAM)

    def adopt(self, stream: Stream) -> None:
        """Lets h2 follow a stream from now on, because something unusual happens on it."""
        if stream.id not in self.conn.streams:
            self.conn.adopt(
                stream.id,
                answered=stream.accepted,
                sent_all=stream.local_ended,
                received_all=stream.remote_ended,
            )
        self.conn.streams[stream.id].outbound_flow_control_window = stream.allowance

    def credit(self, stream: Stream) -> None:
        """Gives a stream's peer what the window allows. Never blocks.

        While all backlogs together are over their limit, the streams that hold the most wait.
        """
        window = stream.receive_window
        if self.is_backlogged and window.undelivered * len(self.streams) > self.backlog:
            return
        coming = self._incoming.coming(stream)
        increment = window.refill(time.monotonic(), self.keep_alive.min_rtt, self.usual_window, coming)
        self.usual_window = max(self.usual_window, window.size)
        if increment:
            self.writer.soon(http2.window_update(stream.id, increment))

    def _write_failed(self, error: OSError) -> None:
        self.close(SessionClosedError(f"the connection was lost: {error.strerror or error}"))
