"""The receiving half of a session: one reader greenlet, from bytes to streams.

DATA goes straight to its stream as it arrives; every other frame goes to h2, whose events
change the session. Nothing between two reads switches greenlets, so all sessions of a hub
share one receive buffer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import gevent
from gevent.hub import Hub
from h2 import events as h2_events
from h2.exceptions import FlowControlError, ProtocolError
from h2.settings import SettingCodes
from h2.stream import StreamClosedBy

from tinytun_gevent.errors import PeerProtocolError, SessionClosedError, StreamResetError
from tinytun_gevent.sockets import Buffer
from tinytun_gevent.stream import CANCEL, REFUSED_STREAM, Stream
from tinytun_gevent.wire import http2
from tinytun_gevent.wire.frames import FrameSplitter, FrameTooLongError

if TYPE_CHECKING:
    from tinytun_gevent.session import Session

log = logging.getLogger(__name__)

RECEIVE_BUFFER: Final = 1024 * 1024
"""Bytes read at once; one buffer a hub, not one a session, which would make idle tunnels dear."""

MAX_FRAME: Final = 256 * 1024
"""Longest DATA frame taken, in bytes: fewer headers, and its pieces pass as they arrive."""

CONNECTION_CREDIT: Final = 64 * 1024 * 1024
"""Bytes of DATA after which the connection's window, kept at its maximum, is refilled."""

UNKNOWN_RTT: Final = 0.0
"""Round trip assumed before the first one is measured, in seconds: no window grows by a guess."""

INTERNAL_ERROR: Final = 2
FLOW_CONTROL_ERROR: Final = 3
FRAME_SIZE_ERROR: Final = 6

_buffers: WeakKeyDictionary[Hub, memoryview] = WeakKeyDictionary()


def _receive_buffer() -> memoryview:
    hub = gevent.get_hub()
    if hub not in _buffers:
        _buffers[hub] = memoryview(bytearray(RECEIVE_BUFFER))
    return _buffers[hub]


class Incoming:
    """What arrives on one session's socket; a part of that session, which it changes."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._splitter = FrameSplitter(self, MAX_FRAME)
        self._preface_left = b"" if session.opener else http2.PREFACE
        #: The stream whose DATA frame is being received, if it wants it, and that frame's flags.
        self._current: Stream | None = None
        self._current_flags = 0
        #: DATA bytes since the connection's window was last refilled.
        self._used = 0

    def read(self, early: bytes) -> None:
        """The reader greenlet: ``early`` first, then the socket, for as long as the session lives."""
        session, buffer = self._session, _receive_buffer()
        try:
            if early:
                self._receive(memoryview(early))
            while not session.closing:
                session.end.wait_readable()
                if session.closing:  # by whoever ran between the bytes' arrival and this greenlet
                    break
                count = session.end.recv_now(buffer)
                if count > 0:
                    self._receive(buffer[:count])
                    if session.writer.pending:
                        session.writer.wait_drained()
                elif count == 0:
                    self._ended_by_peer()
        except (FrameTooLongError, ProtocolError) as error:
            self._broken_by_peer(error)
        except OSError as error:
            self._session.close(SessionClosedError(f"the connection was lost: {error.strerror or error}"))
        except Exception:
            log.exception("a session ended by an internal error")
            self._session.close(SessionClosedError("internal error"), INTERNAL_ERROR)

    def coming(self, stream: Stream) -> int:
        """Bytes of a DATA frame of ``stream`` that have been charged to its window and have not come yet."""
        return self._splitter.data_left if stream is self._current else 0

    def _ended_by_peer(self) -> None:
        if self._session.goaway_received:
            self._session.close()
        else:
            self._session.close(SessionClosedError("the peer closed the connection"))

    def _broken_by_peer(self, error: Exception) -> None:
        if isinstance(error, FrameTooLongError):
            code = FRAME_SIZE_ERROR
        elif isinstance(error, FlowControlError):
            code = FLOW_CONTROL_ERROR
        else:
            code = int(getattr(error, "error_code", 1))
        self._session.close(PeerProtocolError(f"the peer broke HTTP/2: {error}", code), code)

    def _receive(self, view: memoryview) -> None:
        """Takes the bytes of one read. Nothing in here switches greenlets."""
        self._session.liveness.last_sign = time.monotonic()
        if self._preface_left:
            view = self._check_preface(view)
        self._splitter.feed(view)
        if output := self._session.conn.take_output():
            self._session.writer.control(output)

    def _check_preface(self, view: memoryview) -> memoryview:
        expected = self._preface_left[: len(view)]
        if view[: len(expected)] != expected:
            raise ProtocolError("not an HTTP/2 preface")
        self._preface_left = self._preface_left[len(expected) :]
        self._session.conn.receive_data(expected)
        return view[len(expected) :]

    # The splitter calls what follows.

    def data_begins(self, stream_id: int, length: int, flags: int) -> None:
        if not self._session.settled.is_set():
            raise ProtocolError("DATA before SETTINGS")
        self._use_connection(length)
        stream = self._session.streams.get(stream_id)
        self._current_flags = flags
        if stream is None or stream.remote_ended:
            self._current = None
            if stream is not None or not self._session.conn.was_reset_by_us(stream_id):
                self._tell_h2(http2.empty_data(stream_id), stream)
            return
        self._current = stream
        if length and not stream.receive_window.receive(length):
            raise FlowControlError(f"{length} bytes of DATA beyond the window of stream {stream_id}")
        self._session.backlog += length

    def data_piece(self, view: memoryview) -> None:
        stream = self._current
        if stream is None:
            return
        count = len(view)
        if stream.error is not None:
            return
        stream.received += count
        self._session.data_received += count
        if stream.receiver is None:
            stream.consumed(count)
        else:
            stream.receiver.data(view)

    def data_ends(self) -> None:
        stream = self._current
        self._current = None
        if stream is None or not self._current_flags & http2.END_STREAM or stream.error is not None:
            return
        state = self._session.conn.streams.get(stream.id)
        if state is None:
            self._end(stream)
        else:
            state._actual_content_length = stream.received
            self._tell_h2(http2.empty_data(stream.id, http2.END_STREAM))

    def control_frame(self, frame: memoryview, kind: int, flags: int, stream_id: int) -> None:
        if not self._session.settled.is_set() and kind != http2.SETTINGS:
            raise ProtocolError("the first frame is not SETTINGS")
        usual = None if self._splitter.in_block else _USUAL.get((kind, flags))
        if usual is not None and usual(self, frame, stream_id):
            return
        if kind == http2.SETTINGS:  # which may change every window
            for known in self._session.conn.streams:
                if known in self._session.streams:
                    self._session.adopt(self._session.streams[known])
        if kind == http2.DATA:
            self._padded_data(frame, flags, stream_id)
            return
        self._tell_h2(frame, self._session.streams.get(stream_id))

    def _padded_data(self, frame: memoryview, flags: int, stream_id: int) -> None:
        """DATA with padding (§6.1), or DATA where none may be, for which h2 has the error."""
        length = len(frame) - http2.FRAME_HEAD
        stream = self._session.streams.get(stream_id)
        if stream is None or not flags & http2.PADDED or not length:
            self._tell_h2(frame, stream)
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
        self._used += count
        if self._used >= CONNECTION_CREDIT:
            self._session.writer.control(http2.window_update(0, self._used))
            self._used = 0

    # The frames that nearly all others are, without h2's detour. False if h2 has to see one.

    def _open_window(self, frame: memoryview, stream_id: int) -> bool:
        """A plain WINDOW_UPDATE."""
        if len(frame) != http2.FRAME_HEAD + 4:
            return False
        increment = int.from_bytes(frame[9:13], "big") & 0x7FFFFFFF
        conn = self._session.conn
        if stream_id == 0:
            window = conn.outbound_flow_control_window + increment
            if not increment or window > http2.MAX_WINDOW:
                return False
            conn.outbound_flow_control_window = window
            self._wake_blocked()
            return True
        stream = self._session.streams.get(stream_id)
        if stream is None or not increment:
            return False
        window = stream.allowance + increment
        if window > http2.MAX_WINDOW:
            return False
        stream.allowance = window
        stream.wake()
        return True

    def _take_headers(self, frame: memoryview, stream_id: int) -> bool:
        """The request that opens a stream, or the answer that accepts it."""
        session = self._session
        block = bytes(frame[http2.FRAME_HEAD :])
        if session.opener:
            stream = session.streams.get(stream_id)
            if stream is None or stream.accepted or stream_id in session.conn.streams:
                return False
            if not http2.is_response(block):
                return False
            stream.accepted = True
            return True
        fields = http2.read_request(block)
        if fields is None or stream_id in session.streams or not session.conn.begin_inbound(stream_id):
            return False
        if not self._open(stream_id, fields):
            session.conn.forget(stream_id, StreamClosedBy.SEND_RST_STREAM)
            session.writer.soon(http2.rst_stream(stream_id, REFUSED_STREAM))
        return True

    def _take_reset(self, frame: memoryview, stream_id: int) -> bool:
        """A RST_STREAM."""
        stream = self._session.streams.get(stream_id)
        if stream is None or stream_id in self._session.conn.streams or len(frame) != http2.FRAME_HEAD + 4:
            return False
        self._abort(stream, int.from_bytes(frame[9:13], "big"))
        return True

    def _wake_blocked(self) -> None:
        for stream in list(self._session.blocked):
            stream.wake()

    def _tell_h2(self, frame: Buffer, stream: Stream | None = None) -> None:
        """Shows h2 a frame, on ``stream`` if there is one, and does what it reports."""
        if stream is not None:
            self._session.adopt(stream)
        for event in self._session.conn.receive_data(frame):
            handler = _HANDLERS.get(type(event))
            if handler is not None:
                handler(self, event)

    # -- what happens to streams ----------------------------------------------

    def _open(self, stream_id: int, fields: list[http2.Field]) -> bool:
        """The peer opens a stream; False if that has to be refused."""
        session = self._session
        if session.on_stream is None or not session.takes_streams:
            return False
        session.on_stream(session.add(stream_id, fields))
        return True

    def _end(self, stream: Stream) -> None:
        """The peer has half-closed a stream."""
        stream.remote_ended = True
        if stream.receiver is not None:
            stream.receiver.eof()
        if stream.local_ended:
            self._session.remove(stream)

    def _abort(self, stream: Stream, code: int, remote: bool = True) -> None:
        """A stream has been reset."""
        self._session.remove(stream, StreamClosedBy.RECV_RST_STREAM)
        error = StreamResetError(code, remote=remote)
        if error.is_refusal:
            self._session.refused()
        stream.abort(error)

    # -- what h2 reports ----------------------------------------------------

    def _on_request(self, event: h2_events.RequestReceived) -> None:
        session, stream_id = self._session, event.stream_id or 0
        if session.opener:
            raise ProtocolError("a stream opened by the side that only accepts them")
        if not self._open(stream_id, list(event.headers or ())):
            session.conn.reset_stream(stream_id, REFUSED_STREAM)
            session.conn.forget(stream_id)

    def _on_response(self, event: h2_events.ResponseReceived) -> None:
        stream = self._session.streams.get(event.stream_id or 0)
        if stream is None:
            return
        if (b":status", b"200") in (event.headers or ()):
            stream.accepted = True
        else:
            stream.reset(CANCEL)

    def _on_stream_ended(self, event: h2_events.StreamEnded) -> None:
        stream = self._session.streams.get(event.stream_id or 0)
        if stream is not None:
            self._end(stream)

    def _on_stream_reset(self, event: h2_events.StreamReset) -> None:
        stream = self._session.streams.get(event.stream_id or 0)
        if stream is not None:
            self._abort(stream, int(event.error_code or 0), event.remote_reset)

    def _on_window(self, event: h2_events.WindowUpdated) -> None:
        stream = self._session.streams.get(event.stream_id or 0)
        if stream is not None:
            stream.allowance += event.delta or 0
        self._wake_blocked()

    def _on_settings(self, event: h2_events.RemoteSettingsChanged) -> None:
        session = self._session
        session.peer_max_streams = min(session.conn.remote_settings.max_concurrent_streams, 2**31)
        changed = event.changed_settings.get(SettingCodes.INITIAL_WINDOW_SIZE)
        if changed is not None:
            self._shift_windows(changed.new_value - (changed.original_value or 0))
        session.settled.set()
        self._wake_blocked()
        if session.on_room is not None:
            session.on_room(session)

    def _shift_windows(self, change: int) -> None:
        """Another initial window is another window for every stream (RFC 9113 §6.9.2)."""
        for stream in self._session.streams.values():
            stream.allowance += change
            if stream.allowance > http2.MAX_WINDOW:
                raise FlowControlError(f"a window of {stream.allowance} bytes")

    def _on_ping_answer(self, event: h2_events.PingAckReceived) -> None:
        session = self._session
        if not session.liveness.awaited:
            return
        session.liveness.answered()
        took = time.monotonic() - session.ping_sent
        session.min_rtt = min(session.min_rtt, took) if session.first_answer.is_set() else took
        session.first_answer.set()
        if session.probes and not session.closing:
            session.probes -= 1
            session.ping()

    def _on_terminated(self, event: h2_events.ConnectionTerminated) -> None:
        session = self._session
        session.goaway_received = True
        last = event.last_stream_id or 0
        for stream in [s for s in session.streams.values() if session.opener and s.id > last]:
            session.remove(stream)
            stream.abort(StreamResetError(REFUSED_STREAM, remote=True))
        if session.on_goaway is not None:
            session.on_goaway(session)
        session.close_if_done()


_USUAL: Final[dict[tuple[int, int], Callable[[Incoming, memoryview, int], bool]]] = {
    (http2.WINDOW_UPDATE, 0): Incoming._open_window,
    (http2.HEADERS, http2.END_HEADERS): Incoming._take_headers,
    (http2.RST_STREAM, 0): Incoming._take_reset,
}

_HANDLERS: Final[dict[type, Callable[[Incoming, Any], None]]] = {
    h2_events.RequestReceived: Incoming._on_request,
    h2_events.ResponseReceived: Incoming._on_response,
    h2_events.StreamEnded: Incoming._on_stream_ended,
    h2_events.StreamReset: Incoming._on_stream_reset,
    h2_events.WindowUpdated: Incoming._on_window,
    h2_events.RemoteSettingsChanged: Incoming._on_settings,
    h2_events.PingAckReceived: Incoming._on_ping_answer,
    h2_events.ConnectionTerminated: Incoming._on_terminated,
}
