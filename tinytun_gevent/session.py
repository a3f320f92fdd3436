"""One HTTP/2 session on one connected socket: streams, settings, keep-alive, the end.

A locked h2 connection for control, our own path for DATA. One reader greenlet per session
reads into a buffer that all sessions share and hands DATA straight to its stream; it never
waits for the write lock and never blocks on a write. Senders take turns (``writer.py``).
"""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Callable
from typing import Any, Final
from weakref import WeakKeyDictionary

import gevent
from gevent import socket
from gevent.event import Event
from gevent.hub import Hub
from h2 import events as h2_events
from h2.exceptions import FlowControlError, ProtocolError

from tinytun_gevent import sockets
from tinytun_gevent.errors import (
    PeerProtocolError,
    PeerSilentError,
    SessionClosedError,
    SessionError,
    StreamLimitError,
    StreamResetError,
)
from tinytun_gevent.flow import INITIAL_WINDOW
from tinytun_gevent.liveness import Liveness
from tinytun_gevent.sockets import Buffer, End, end_of
from tinytun_gevent.stream import CANCEL, NO_ERROR, REFUSED_STREAM, Gate, Stream
from tinytun_gevent.wire import http2
from tinytun_gevent.wire.frames import FrameSplitter, FrameTooLongError
from tinytun_gevent.writer import Writer

log = logging.getLogger(__name__)

RECEIVE_BUFFER: Final = 1024 * 1024
"""Bytes read at once; one buffer a hub, not one a session, which would make idle tunnels dear."""

MAX_FRAME: Final = 256 * 1024
"""Longest DATA frame taken, in bytes: fewer headers, and its pieces pass as they arrive."""

CONNECTION_CREDIT: Final = 64 * 1024 * 1024
"""Bytes of DATA after which the connection's window, kept at its maximum, is refilled."""

BACKLOG_LIMIT: Final = 16 * 1024 * 1024
"""Bytes that all streams of a session together may hold undelivered before credit is withheld."""

HANG_UP: Final = 1.0
"""Seconds for the last frames to leave when a session ends."""

INTERNAL_ERROR: Final = 2
FLOW_CONTROL_ERROR: Final = 3
FRAME_SIZE_ERROR: Final = 6

_buffers: WeakKeyDictionary[Hub, memoryview] = WeakKeyDictionary()


def _receive_buffer() -> memoryview:
    hub = gevent.get_hub()
    if hub not in _buffers:
        _buffers[hub] = memoryview(bytearray(RECEIVE_BUFFER))
    return _buffers[hub]


class Session:
    """A session; create it on a connected socket, set ``on_stream``, call :meth:`start`.

    The *opener* (HTTP/2's client: the tunnel server) opens streams, the other side accepts
    them. The socket belongs to the session, which closes it when it ends; ``closed`` is set
    then, ``error`` says why (None after a clean close), and ``on_close`` is called.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        opener: bool,
        max_streams: int = 0,
        received: bytes = b"",
        on_stream: Callable[[Stream], None] | None = None,
    ) -> None:
        """``max_streams`` is how many the peer may have open, ``received`` what was read already."""
        sockets.tune_session(sock)
        now = time.monotonic()
        self._sock = sock
        self._end: End = end_of(sock)
        self._opener = opener
        self._max_streams = max_streams
        self._early = received
        self._on_stream = on_stream
        self._conn = http2.Connection(
            opener=opener, max_streams=max_streams, window=INITIAL_WINDOW, max_frame=MAX_FRAME
        )
        self._writer = Writer(self._end, self._write_failed)
        self._splitter = FrameSplitter(self, MAX_FRAME)
        self._preface_left = b"" if opener else http2.PREFACE
        self._streams: dict[int, Stream] = {}
        self._blocked: set[Stream] = set()
        #: The stream whose DATA frame is being received, and the flags of that frame.
        self._current: Stream | None = None
        self._current_id = 0
        self._current_flags = 0
        self._connection_used = 0
        self._liveness = Liveness(now)
        self._ping_sent = now
        self._settled = Event()
        self._closing = False
        #: DATA bytes since the start, both ways, and streams ever opened.
        self.data_received = 0
        self.data_sent = 0
        self.streams_opened = 0
        #: Received bytes that wait in this process, over all streams.
        self.backlog = 0
        #: Smallest round trip seen, in seconds.
        self.min_rtt = 0.05
        self._measured = False
        #: The peer wants no new streams.
        self.goaway_received = False
        self.goaway_sent = False
        #: How many streams the peer takes at once.
        self.peer_max_streams = 0
        self.closed = Event()
        self.error: SessionError | None = None
        #: Set by the first answer to a PING.
        self.first_answer = Event()
        #: Called once, from any greenlet, when the session ends; must not block.
        self.on_close: list[Callable[[Session], None]] = []
        #: Called when a stream has ended or the peer allows more of them; must not block.
        self.on_room: Callable[[Session], None] | None = None
        #: Called when the peer's GOAWAY has come; must not block.
        self.on_goaway: Callable[[Session], None] | None = None

    # -- life ---------------------------------------------------------------

    def start(self, timeout: float = 5.0) -> None:
        """Says hello and blocks until the peer's SETTINGS came, at most ``timeout`` seconds.

        Raises :class:`PeerSilentError` or what ended the session; it is closed then.
        """
        self._conn.initiate_connection()
        self._writer.queue(self._conn.take_output())
        self._writer.queue(http2.window_update(0, http2.MAX_WINDOW - 65535))
        self._ping()
        gevent.spawn(self._read)
        gevent.spawn(self._keep_alive)
        if not self._settled.wait(timeout):
            self.close(PeerSilentError(f"the peer said nothing of HTTP/2 for {timeout:g} s"))
        if self.error is not None:
            raise self.error
        if self._closing:
            raise SessionClosedError("the session was closed while it started")

    def goaway(self) -> None:
        """Tells the peer to open no more streams; running ones go on. Never blocks."""
        if not self.goaway_sent and not self._closing:
            self.goaway_sent = True
            self._writer.control(http2.goaway(self._conn.highest_inbound_stream_id))

    def close(self, error: SessionError | None = None, code: int = NO_ERROR) -> None:
        """Ends the session: GOAWAY, every stream aborted, the socket closed. Never blocks.

        Idempotent; the first ``error`` is the one remembered.
        """
        if self._closing:
            return
        self._closing = True
        self.error = error
        if not self.goaway_sent or code:
            reason = str(error).encode("ascii", "replace") if code else b""
            self._writer.control(http2.goaway(self._conn.highest_inbound_stream_id, code, reason))
        ended = error or SessionClosedError("the session was closed")
        for stream in list(self._streams.values()):
            stream.abort(ended)
        self._streams.clear()
        self._blocked.clear()
        if self._writer.pending:
            gevent.spawn(self._hang_up)
        else:
            self._end.close()
        self._settled.set()
        self.closed.set()
        for notify in self.on_close:
            notify(self)

    def _hang_up(self) -> None:
        """Closes the socket as soon as the GOAWAY is on its way."""
        gevent.with_timeout(HANG_UP, self._writer.wait_empty, timeout_value=None)
        self._end.close()

    # -- streams ------------------------------------------------------------

    @property
    def stream_count(self) -> int:
        """Streams that are open, in either half."""
        return len(self._streams)

    @property
    def has_room(self) -> bool:
        """Whether :meth:`open` would succeed now."""
        return (
            not self._closing
            and not self.goaway_received
            and self._settled.is_set()
            and len(self._streams) < self.peer_max_streams
        )

    def open(self, visitor: str | None = None) -> Stream:
        """Opens a stream (opener). Never blocks; the request goes out with the first DATA.

        ``visitor`` is told to the peer as ``ip:port``. Call :meth:`flush` if nothing is sent
        at once. Raises :class:`SessionClosedError` or :class:`StreamLimitError`.
        """
        if self._closing or self.goaway_received:
            raise self.error or SessionClosedError("the session takes no new streams")
        if not self.has_room:
            raise StreamLimitError(f"all {self.peer_max_streams} streams are in use")
        stream_id = self._conn.get_next_available_stream_id()
        self._conn.send_headers(stream_id, http2.request_fields(visitor))
        self._writer.queue(self._conn.take_output())
        return self._add(stream_id, [])

    def flush(self) -> None:
        """Sends what is queued and the kernel takes at once. Never blocks."""
        self._writer.control()

    def _add(self, stream_id: int, fields: list[http2.Field]) -> Stream:
        stream = self._streams[stream_id] = Stream(self, stream_id, fields)
        self.streams_opened += 1
        return stream

    def _remove(self, stream: Stream) -> None:
        """Forgets a stream that is over."""
        if self._streams.pop(stream.id, None) is None:
            return
        self._conn.forget(stream.id)
        self._blocked.discard(stream)
        if self.on_room is not None:
            self.on_room(self)

    # -- sending: what Stream calls -----------------------------------------

    def send_window(self, stream_id: int) -> int:
        """Bytes of DATA that may be sent on a stream now; 0 if it is over."""
        state = self._conn.streams.get(stream_id)
        if state is None:
            return 0
        return min(state.outbound_flow_control_window, self._conn.outbound_flow_control_window)

    def block(self, stream: Stream) -> None:
        """Notes a stream that waits for a window."""
        self._blocked.add(stream)

    def unblock(self, stream: Stream) -> None:
        self._blocked.discard(stream)

    def send_data(self, stream: Stream, payload: memoryview) -> int:
        """Sends one frame from ``payload``: bytes sent, 0 if the window is used up. Blocks."""

        def allow(wanted: int) -> int:
            count = self._allowed(stream, wanted)
            self._charge(stream, count)
            return count

        return self._writer.send_data(stream.id, payload, allow)

    def send_data_from(self, stream: Stream, source: End, limit: int, gate: Gate | None) -> int:
        """Moves one frame from ``source``: bytes read, 0 at its end, -1 for none now. Blocks."""

        def allow(wanted: int) -> int:
            return self._allowed(stream, min(wanted, limit) if limit else wanted)

        def charge(count: int) -> None:
            self._charge(stream, count)

        return self._writer.send_data_from(stream.id, source, allow, charge, gate)

    def _allowed(self, stream: Stream, wanted: int) -> int:
        if stream.error is not None:
            raise stream.error
        return min(wanted, self.send_window(stream.id), self._conn.max_outbound_frame_size)

    def _charge(self, stream: Stream, count: int) -> None:
        self._conn.streams[stream.id].outbound_flow_control_window -= count
        self._conn.outbound_flow_control_window -= count
        stream.sent += count
        self.data_sent += count

    def send_response(self, stream: Stream) -> None:
        """Answers a stream's request with ``:status 200``. Never blocks."""
        if not stream.closed:
            self._conn.send_headers(stream.id, http2.RESPONSE_FIELDS)
            self._writer.control(self._conn.take_output())

    def end_stream(self, stream: Stream) -> None:
        """Sends END_STREAM. Never blocks."""
        stream.local_ended = True
        self._conn.end_stream(stream.id)
        self._writer.control(self._conn.take_output())
        if stream.remote_ended:
            self._remove(stream)

    def reset_stream(self, stream: Stream, code: int) -> None:
        """Sends RST_STREAM and aborts the stream. Never blocks."""
        if stream.id in self._conn.streams:
            self._conn.reset_stream(stream.id, code)
            self._writer.control(self._conn.take_output())
        self._remove(stream)
        stream.abort(StreamResetError(code, remote=False))

    def credit(self, stream: Stream) -> None:
        """Gives a stream's peer what the window allows. Never blocks.

        While all backlogs together are over their limit, the streams that hold the most wait.
        """
        window = stream.receive_window
        if self.backlog > BACKLOG_LIMIT and window.undelivered * len(self._streams) > self.backlog:
            return
        increment = window.refill(time.monotonic(), self.min_rtt)
        if increment:
            self._writer.control(http2.window_update(stream.id, increment))

    # -- receiving ----------------------------------------------------------

    def _read(self) -> None:
        """The reader: one a session, for as long as it lives."""
        buffer = _receive_buffer()
        try:
            if self._early:
                self._receive(memoryview(self._early))
                self._early = b""
            while not self._closing:
                self._end.wait_readable()
                count = self._end.recv_now(buffer)
                if count > 0:
                    self._receive(buffer[:count])
                    if self._writer.pending:
                        self._writer.wait_drained()
                elif count == 0:
                    self._ended_by_peer()
        except (FrameTooLongError, ProtocolError) as error:
            self._broken_by_peer(error)
        except OSError as error:
            self.close(SessionClosedError(f"the connection was lost: {error.strerror or error}"))
        except Exception:
            log.exception("a session ended by an internal error")
            self.close(SessionClosedError("internal error"), INTERNAL_ERROR)

    def _ended_by_peer(self) -> None:
        if self.goaway_received:
            self.close()
        else:
            self.close(SessionClosedError("the peer closed the connection"))

    def _broken_by_peer(self, error: Exception) -> None:
        if isinstance(error, FrameTooLongError):
            code = FRAME_SIZE_ERROR
        elif isinstance(error, FlowControlError):
            code = FLOW_CONTROL_ERROR
        else:
            code = int(getattr(error, "error_code", 1))
        self.close(PeerProtocolError(f"the peer broke HTTP/2: {error}", code), code)

    def _receive(self, view: memoryview) -> None:
        """Takes the bytes of one read. Nothing in here switches greenlets."""
        self._liveness.last_sign = time.monotonic()
        if self._preface_left:
            view = self._check_preface(view)
        self._splitter.feed(view)
        output = self._conn.take_output()
        self._writer.control(output)

    def _check_preface(self, view: memoryview) -> memoryview:
        expected = self._preface_left[: len(view)]
        if view[: len(expected)] != expected:
            raise ProtocolError("not an HTTP/2 preface")
        self._preface_left = self._preface_left[len(expected) :]
        self._conn.receive_data(expected)
        return view[len(expected) :]

    # The splitter calls what follows.

    def data_begins(self, stream_id: int, length: int, flags: int) -> None:
        if not self._settled.is_set():
            raise ProtocolError("DATA before SETTINGS")
        self._use_connection(length)
        stream = self._streams.get(stream_id)
        self._current_id = stream_id
        self._current_flags = flags
        if stream is None or stream.remote_ended:
            self._current = None
            if stream is not None or not self._conn.was_reset_by_us(stream_id):
                self._tell_h2(http2.empty_data(stream_id))
            return
        self._current = stream
        if length and not stream.receive_window.receive(length):
            raise FlowControlError(f"{length} bytes of DATA beyond the window of stream {stream_id}")
        self.backlog += length

    def data_piece(self, view: memoryview) -> None:
        stream = self._current
        if stream is None:
            return
        count = len(view)
        if stream.error is not None:
            return
        stream.received += count
        self.data_received += count
        if stream.receiver is None:
            stream.consumed(count)
        else:
            stream.receiver.data(view)

    def data_ends(self) -> None:
        stream = self._current
        self._current = None
        if stream is not None and self._current_flags & http2.END_STREAM and stream.error is None:
            self._conn.streams[stream.id]._actual_content_length = stream.received
            self._tell_h2(http2.empty_data(stream.id, http2.END_STREAM))

    def control_frame(self, frame: memoryview, kind: int, flags: int, stream_id: int) -> None:
        if not self._settled.is_set() and kind != http2.SETTINGS:
            raise ProtocolError("the first frame is not SETTINGS")
        if kind == http2.WINDOW_UPDATE and len(frame) == 13 and self._open_window(frame, stream_id):
            return
        if kind == http2.DATA:
            self._padded_data(frame, flags, stream_id)
            return
        self._tell_h2(frame)

    def _padded_data(self, frame: memoryview, flags: int, stream_id: int) -> None:
        """DATA with padding (§6.1), or DATA where none may be, for which h2 has the error."""
        length = len(frame) - http2.FRAME_HEAD
        if stream_id not in self._streams or not flags & http2.PADDED or not length:
            self._tell_h2(frame)
            return
        padding = frame[http2.FRAME_HEAD]
        if padding >= length:
            raise ProtocolError("padding longer than its frame")
        self.data_begins(stream_id, length, flags)
        payload = frame[http2.FRAME_HEAD + 1 : len(frame) - padding]
        if payload:
            self.data_piece(payload)
        if self._current is not None:
            self._current.consumed(length - len(payload))
        self.data_ends()

    def _use_connection(self, count: int) -> None:
        """The connection's window stays at its maximum, so that no stream can stop the others."""
        self._connection_used += count
        if self._connection_used >= CONNECTION_CREDIT:
            self._writer.queue(http2.window_update(0, self._connection_used))
            self._connection_used = 0

    def _open_window(self, frame: memoryview, stream_id: int) -> bool:
        """A plain WINDOW_UPDATE without h2's detour; False if h2 has to see it."""
        increment = int.from_bytes(frame[9:13], "big") & 0x7FFFFFFF
        if stream_id == 0:
            window = self._conn.outbound_flow_control_window + increment
            if not increment or window > http2.MAX_WINDOW:
                return False
            self._conn.outbound_flow_control_window = window
            self._wake_blocked()
            return True
        stream, state = self._streams.get(stream_id), self._conn.streams.get(stream_id)
        if stream is None or state is None or not increment:
            return False
        window = state.outbound_flow_control_window + increment
        if window > http2.MAX_WINDOW:
            return False
        state.outbound_flow_control_window = window
        stream.wake()
        return True

    def _wake_blocked(self) -> None:
        for stream in list(self._blocked):
            stream.wake()

    def _tell_h2(self, frame: Buffer) -> None:
        for event in self._conn.receive_data(frame):
            handler = _HANDLERS.get(type(event))
            if handler is not None:
                handler(self, event)

    # -- what h2 reports ----------------------------------------------------

    def _on_request(self, event: h2_events.RequestReceived) -> None:
        stream_id = event.stream_id or 0
        if len(self._streams) >= self._max_streams or self._on_stream is None or self.goaway_sent:
            self._conn.reset_stream(stream_id, REFUSED_STREAM)
            self._conn.forget(stream_id)
            return
        stream = self._add(stream_id, list(event.headers or ()))
        self._on_stream(stream)

    def _on_response(self, event: h2_events.ResponseReceived) -> None:
        stream = self._streams.get(event.stream_id or 0)
        if stream is None:
            return
        if (b":status", b"200") in (event.headers or ()):
            stream.accepted = True
        else:
            stream.reset(CANCEL)

    def _on_stream_ended(self, event: h2_events.StreamEnded) -> None:
        stream = self._streams.get(event.stream_id or 0)
        if stream is None:
            return
        stream.remote_ended = True
        if stream.receiver is not None:
            stream.receiver.eof()
        if stream.local_ended:
            self._remove(stream)

    def _on_stream_reset(self, event: h2_events.StreamReset) -> None:
        stream = self._streams.get(event.stream_id or 0)
        if stream is not None:
            self._remove(stream)
            stream.abort(StreamResetError(int(event.error_code or 0), remote=event.remote_reset))

    def _on_window(self, event: h2_events.WindowUpdated) -> None:
        self._wake_blocked()

    def _on_settings(self, event: h2_events.RemoteSettingsChanged) -> None:
        self.peer_max_streams = min(self._conn.remote_settings.max_concurrent_streams, 2**31)
        self._settled.set()
        self._wake_blocked()
        if self.on_room is not None:
            self.on_room(self)

    def _on_ping_answer(self, event: h2_events.PingAckReceived) -> None:
        if not self._liveness.awaited:
            return
        self._liveness.answered()
        took = time.monotonic() - self._ping_sent
        self.min_rtt = min(self.min_rtt, took) if self._measured else took
        self._measured = True
        self.first_answer.set()

    def _on_terminated(self, event: h2_events.ConnectionTerminated) -> None:
        self.goaway_received = True
        last = event.last_stream_id or 0
        for stream in [s for s in self._streams.values() if self._opener and s.id > last]:
            self._remove(stream)
            stream.abort(StreamResetError(REFUSED_STREAM, remote=True))
        if self.on_goaway is not None:
            self.on_goaway(self)

    # -- keep-alive ---------------------------------------------------------

    def _ping(self) -> None:
        now = time.monotonic()
        self._ping_sent = now
        behind = self._writer.pending + self._writer.unsent + 17
        self._conn.ping(struct.pack(">d", now))
        self._liveness.pinged(now, sockets.acknowledged(self._sock), behind + sockets.queued(self._sock))
        self._writer.control(self._conn.take_output())

    def _keep_alive(self) -> None:
        """Pings a quiet peer, and ends the session with one that is dead."""
        while not self._closing:
            now = time.monotonic()
            delay = self._liveness.next_check() - now
            if self._liveness.awaited:
                delay = min(delay, 1.0)
            if delay > 0:
                self.closed.wait(delay)
                if self._liveness.awaited and not self._closing:
                    self._liveness.acknowledged(time.monotonic(), sockets.acknowledged(self._sock))
            elif self._liveness.is_dead(now):
                self.close(PeerSilentError("the peer fell silent"))
            else:
                self._ping()

    def _write_failed(self, error: OSError) -> None:
        self.close(SessionClosedError(f"the connection was lost: {error.strerror or error}"))


_HANDLERS: Final[dict[type, Callable[[Session, Any], None]]] = {
    h2_events.RequestReceived: Session._on_request,
    h2_events.ResponseReceived: Session._on_response,
    h2_events.StreamEnded: Session._on_stream_ended,
    h2_events.StreamReset: Session._on_stream_reset,
    h2_events.WindowUpdated: Session._on_window,
    h2_events.RemoteSettingsChanged: Session._on_settings,
    h2_events.PingAckReceived: Session._on_ping_answer,
    h2_events.ConnectionTerminated: Session._on_terminated,
}
