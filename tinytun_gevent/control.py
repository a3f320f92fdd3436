"""What a session's control frames do to it.

The few kinds that nearly all of them are of are understood here; the rest is h2's, whose
events change the session. Nothing here blocks or switches greenlets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import gevent
from h2 import events as h2_events
from h2.exceptions import FlowControlError, ProtocolError
from h2.settings import SettingCodes
from h2.stream import StreamClosedBy

from tinytun_gevent.errors import StreamResetError
from tinytun_gevent.flow import INITIAL_WINDOW
from tinytun_gevent.guard import is_rapid
from tinytun_gevent.sockets import Buffer
from tinytun_gevent.stream import CANCEL, REFUSED_STREAM, Stream
from tinytun_gevent.wire import http2

if TYPE_CHECKING:
    from tinytun_gevent.session import Session


WORTH_IT: Final = 16 * 1024
"""Bytes of the connection's window that all who wait for it are woken for: a frame of the usual size."""

WAKE_PAUSE: Final = 0.01
"""Seconds between two times that they are woken for less. A peer that gives a byte at a time, a thousand
times a second, would otherwise have all of them run for it each time."""

WOKEN_AT_ONCE: Final = 64
"""Streams that one WINDOW_UPDATE wakes by itself; where more wait, several frames wake them together."""


class Control:
    """Acts on the frames of one session, a part of which it is."""

    def __init__(self, session: Session) -> None:
        self._session = session
        #: When all who wait for a window were last woken, and whether that is about to happen.
        self._woken = 0.0
        self._wake_due = False

    def frame(self, frame: memoryview, kind: int, flags: int, stream_id: int, *, in_block: bool) -> None:
        """Takes a whole frame that is not DATA; ``in_block``: it came within a header block (§4.3).

        Raises ``ProtocolError`` for what ends the session.
        """
        usual = None if in_block else _USUAL.get((kind, flags if kind == http2.HEADERS else 0))
        if usual is not None and usual(self, frame, stream_id):
            return
        self._count(len(frame) - http2.FRAME_HEAD, kind, flags, in_block)
        if kind == http2.SETTINGS:  # which may change every window
            for known in self._session.conn.streams:
                if known in self._session.streams:
                    self._session.adopt(self._session.streams[known])
        self.tell_h2(frame, self._session.streams.get(stream_id))

    def tell_h2(self, frame: Buffer, stream: Stream | None = None) -> None:
        """Shows h2 a frame, on ``stream`` if there is one, and does what it reports."""
        session = self._session
        if stream is not None:
            session.adopt(stream)
        events = session.conn.receive_data(frame)
        for _ in range(session.conn.take_resets()):
            self._reset_made()
        for event in events:
            handler = _HANDLERS.get(type(event))
            if handler is not None:
                handler(self, event)

    def end(self, stream: Stream) -> None:
        """The peer has half-closed a stream."""
        stream.remote_ended = True
        stream.hears = False
        if stream.receiver is not None and stream.error is None:
            stream.receiver.eof()
        if stream.local_ended:
            self._session.remove(stream)

    # -- what is counted ----------------------------------------------------

    @property
    def _now(self) -> float:
        """When what is being dealt with was read."""
        return self._session.keep_alive.liveness.last_sign

    def unknown_frame(self) -> None:
        """A frame of a type that nobody knows."""
        self._session.guard.idle(self._now)

    def _count(self, length: int, kind: int, flags: int, in_block: bool) -> None:
        """Charges a frame that h2 is about to see."""
        guard = self._session.guard
        if kind == http2.CONTINUATION and in_block:
            guard.continuation(length)
        elif kind == http2.HEADERS:
            guard.headers(self._now, length)
        elif kind == http2.SETTINGS:
            guard.settings(self._now, length // http2.SETTING)
        elif kind == http2.PING and flags & http2.ACK:
            pass  # it may answer ours
        elif kind not in (http2.RST_STREAM, http2.WINDOW_UPDATE):  # which are charged for what they do
            guard.idle(self._now)

    def _reset_made(self) -> None:
        """The peer has made us send a RST_STREAM."""
        self._session.guard.reset(self._now)

    # The frames that nearly all others are, without h2's detour. False if h2 has to see one.

    def _open_window(self, frame: memoryview, stream_id: int) -> bool:
        """A plain WINDOW_UPDATE."""
        if len(frame) != http2.FRAME_HEAD + 4:
            return False
        increment = int.from_bytes(frame[9:13], "big") & 0x7FFFFFFF
        conn, guard = self._session.conn, self._session.guard
        guard.updates_left -= 1
        if guard.updates_left < 0:
            guard.updates(self._now, self._session.data_sent)
        if stream_id == 0:
            window = conn.outbound_flow_control_window + increment
            if not increment or window > http2.MAX_WINDOW:
                return False
            conn.outbound_flow_control_window = window
            self._wake_soon(window)
            return True
        stream = self._session.streams.get(stream_id)
        if stream is None or not increment:
            return bool(increment) and conn.is_over(stream_id)  # as when it crossed the end of its stream
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
            if stream_id in session.conn.streams or not http2.is_response(block):
                return False
            if stream is None and session.conn.was_reset_by_us(stream_id):  # before it came
                session.guard.headers(self._now, len(block))
                return True
            if stream is None or stream.accepted:
                return False
            stream.accept_at(self._now)
            return True
        fields = http2.read_request(block)
        if fields is None or stream_id in session.streams or not session.conn.begin_inbound(stream_id):
            return False
        if not self._open(stream_id, fields):
            session.conn.forget(stream_id, StreamClosedBy.SEND_RST_STREAM)
            session.writer.soon(http2.rst_stream(stream_id, REFUSED_STREAM))
            self._refused()
        return True

    def _take_reset(self, frame: memoryview, stream_id: int) -> bool:
        """A RST_STREAM."""
        session = self._session
        if len(frame) != http2.FRAME_HEAD + 4 or stream_id in session.conn.streams:
            return False
        stream = session.streams.get(stream_id)
        if stream is not None:
            self._abort(stream, int.from_bytes(frame[9:13], "big"))
        elif session.conn.is_over(stream_id):
            session.guard.stray_reset(self._now)
        else:
            raise ProtocolError("RST_STREAM on an idle stream")
        return True

    def _wake_soon(self, window: int) -> None:
        """Wakes whoever waits for the connection's window; for a small one only now and then."""
        worth_it = window >= WORTH_IT and len(self._session.blocked) <= WOKEN_AT_ONCE
        if worth_it or self._now - self._woken >= WAKE_PAUSE:
            self._wake_blocked()
        elif not self._wake_due:
            self._wake_due = True
            gevent.spawn_later(WAKE_PAUSE, self._wake_blocked)

    def _wake_blocked(self) -> None:
        self._wake_due = False
        self._woken = self._now
        for stream in list(self._session.blocked):
            stream.wake()

    # -- what happens to streams ----------------------------------------------

    def _open(self, stream_id: int, fields: list[http2.Field]) -> bool:
        """The peer opens a stream; False if that has to be refused."""
        session = self._session
        if session.on_stream is None or not session.takes_streams:
            return False
        stream = session.add(stream_id, fields)
        session.on_stream(stream)
        if stream.error is not None:  # refused after all, as one too many for all sessions together
            self._reset_made()
        return True

    def _refused(self) -> None:
        """A stream was refused, on which a window's worth of DATA may be under way."""
        self._session.guard.abandoned(INITIAL_WINDOW)
        self._session.guard.refused(self._now)

    def _abort(self, stream: Stream, code: int, remote: bool = True) -> None:
        """A stream has been reset."""
        now = self._now
        if remote and not self._session.opener and is_rapid(now, stream.accepted_at, stream.sent):
            self._session.guard.reset(now)
        if not remote:
            self._session.guard.abandoned(stream.receive_window.credit)
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
            self._refused()

    def _on_response(self, event: h2_events.ResponseReceived) -> None:
        stream = self._session.streams.get(event.stream_id or 0)
        if stream is None:
            return
        if (b":status", b"200") in (event.headers or ()):
            stream.accept_at(self._now)
        elif not stream.closed:
            stream.reset(CANCEL)
            self._reset_made()

    def _on_stream_ended(self, event: h2_events.StreamEnded) -> None:
        stream = self._session.streams.get(event.stream_id or 0)
        if stream is not None:
            self.end(stream)

    def _on_stream_reset(self, event: h2_events.StreamReset) -> None:
        stream = self._session.streams.get(event.stream_id or 0)
        if stream is not None:
            self._abort(stream, int(event.error_code or 0), event.remote_reset)

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
        if not self._session.keep_alive.answered(bytes(event.ping_data or b"")):
            self._session.guard.idle(self._now)

    def _on_terminated(self, event: h2_events.ConnectionTerminated) -> None:
        session = self._session
        session.goaway_received = True
        session.goaway_code = int(event.error_code or 0)
        session.goaway_reason = bytes(event.additional_data or b"")
        last = event.last_stream_id or 0
        refused = [s for s in session.streams.values() if session.opener and s.id > last]
        for stream in refused:
            session.remove(stream)
        session.abort_all(refused, StreamResetError(REFUSED_STREAM, remote=True))
        if session.on_goaway is not None:
            session.on_goaway(session)
        session.close_if_done()


# By type and flags; of these only HEADERS has any, and what a type does not define is ignored (§4.1).
_USUAL: Final[dict[tuple[int, int], Callable[[Control, memoryview, int], bool]]] = {
    (http2.WINDOW_UPDATE, 0): Control._open_window,
    (http2.HEADERS, http2.END_HEADERS): Control._take_headers,
    (http2.RST_STREAM, 0): Control._take_reset,
}

_HANDLERS: Final[dict[type, Callable[[Control, Any], None]]] = {
    h2_events.RequestReceived: Control._on_request,
    h2_events.ResponseReceived: Control._on_response,
    h2_events.StreamEnded: Control._on_stream_ended,
    h2_events.StreamReset: Control._on_stream_reset,
    h2_events.RemoteSettingsChanged: Control._on_settings,
    h2_events.PingAckReceived: Control._on_ping_answer,
    h2_events.ConnectionTerminated: Control._on_terminated,
}
