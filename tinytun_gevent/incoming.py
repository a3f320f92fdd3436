"""The receiving half of a session: one reader greenlet, from bytes to streams.

DATA goes straight to its stream as it arrives; every other frame is for ``control.py``. Nothing
between two reads switches greenlets, so all sessions of a hub share one receive buffer.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

import gevent
from gevent.hub import Hub
from h2.exceptions import FlowControlError, ProtocolError
from hpack.exceptions import HPACKError

from tinytun_gevent import guard, sockets
from tinytun_gevent.control import Control
from tinytun_gevent.errors import PeerProtocolError, SessionClosedError
from tinytun_gevent.rare import Rare
from tinytun_gevent.shares import BULK
from tinytun_gevent.stream import Stream
from tinytun_gevent.turns import let_others_run
from tinytun_gevent.wire import http2
from tinytun_gevent.wire.frames import FrameSplitter, FrameTooLongError

if TYPE_CHECKING:
    from tinytun_gevent.session import Session

log = logging.getLogger(__name__)
rare = Rare(log)

RECEIVE_BUFFER: Final = 1024 * 1024
"""Bytes read at once; one buffer a hub, not one a session, which would make idle tunnels dear."""

MAX_FRAME: Final = 256 * 1024
"""Longest DATA frame taken, in bytes: fewer headers, and its pieces pass as they arrive."""

CONNECTION_CREDIT: Final = 64 * 1024 * 1024
"""Bytes of DATA after which the connection's window, kept at its maximum, is refilled."""

STALLED: Final = 1.0
"""Seconds after which a peer is left that takes nothing, while more than the writer's ``CONTROL_LIMIT`` waits
for it and it sends. One that is slow takes some, one that is stopped sends nothing."""

REASON: Final = 100
"""Characters of h2's own words in the log and in GOAWAY: they may quote what has come."""

INTERNAL_ERROR: Final = 2
FRAME_SIZE_ERROR: Final = 6

_buffers: WeakKeyDictionary[Hub, memoryview] = WeakKeyDictionary()


def _receive_buffer() -> memoryview:
    hub = gevent.get_hub()
    if hub not in _buffers:
        _buffers[hub] = memoryview(bytearray(RECEIVE_BUFFER))
    return _buffers[hub]


def _reason(error: Exception) -> str:
    """What the peer and the log are told: one line, without an object of ours and its address."""
    if isinstance(error.__cause__, HPACKError):
        return "a header block cannot be decoded"
    text = str(error)[:REASON]
    if text.isdecimal():  # h2 says no more than the stream's number
        return f"{type(error).__name__} on stream {text}"
    return "".join(char if char.isprintable() else "?" for char in text)


class Incoming:
    """What arrives on one session's socket; a part of that session, which it changes."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._control = Control(session)
        self._splitter = FrameSplitter(self, MAX_FRAME)
        self._preface_left = b"" if session.opener else http2.PREFACE
        #: The stream whose DATA frame is being received, if it wants it, and that frame's flags.
        self._current: Stream | None = None
        self._current_flags = 0
        #: DATA bytes since the connection's window was last refilled.
        self._used = 0
        #: Whether others run though bytes have come that were not looked at.
        self.behind = False

    def read(self, early: bytes) -> None:
        """The reader greenlet: ``early`` first, then the socket, for as long as the session lives."""
        session, buffer = self._session, _receive_buffer()
        try:
            if early:
                self._receive_all(memoryview(early))
            while not session.closing:
                session.end.wait_readable()
                if session.closing:  # by whoever ran between the bytes' arrival and this greenlet
                    break
                count = session.end.recv_now(buffer)
                if count > 0:
                    self._receive_all(buffer[:count])
                    if count >= BULK and session.share_in is not None:
                        session.share_in.took(count)
                        if session.share_in.ahead:
                            self.behind = True
                            session.share_in.wait()
                            self.behind = False
                elif count == 0:
                    self._ended_by_peer()
        except (FrameTooLongError, ProtocolError, PeerProtocolError) as error:
            self._broken_by_peer(error)
        except OSError as error:
            self._session.close(SessionClosedError(f"the connection was lost: {error.strerror or error}"))
        except Exception:
            rare.exception("a session ended by an internal error")
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
            code = guard.FLOW_CONTROL_ERROR
        else:
            code = int(getattr(error, "error_code", 1))
        if not isinstance(error, PeerProtocolError):
            error = PeerProtocolError(f"the peer broke HTTP/2: {_reason(error)}", code)
        if not self._session.closing:
            rare.warning("ended the session with %s, code %d: %s", self._session.peer, error.code, error)
        self._session.close(error, error.code)

    def _wait_drained(self) -> None:
        """Blocks while too much waits for the peer; raises ``PeerProtocolError`` if that takes nothing."""
        writer, sock = self._session.writer, self._session.end.sock
        taken, behind, self.behind = (writer.sent, sockets.acknowledged(sock)), self.behind, True
        while not writer.wait_drained(STALLED):
            before, taken = taken, (writer.sent, sockets.acknowledged(sock))
            if taken == before:
                raise PeerProtocolError("the peer does not read our answers", guard.ENHANCE_YOUR_CALM)
        self.behind = behind

    def _receive_all(self, view: memoryview) -> None:
        """Takes the bytes of one read; lets others have a turn where those are very many frames."""
        session = self._session
        rest = self._receive(view)
        if rest:
            rest = memoryview(bytes(rest))  # others read into the same buffer meanwhile
            self.behind = True
        self._let_answers_leave()
        while rest and not session.closing:
            let_others_run()
            if session.closing:
                return
            rest = self._receive(rest)
            self._let_answers_leave()
        self.behind = False

    def _let_answers_leave(self) -> None:
        if self._session.writer.pending:
            self._wait_drained()

    def _receive(self, view: memoryview) -> memoryview:
        """Takes bytes of one read, as many as are good at once; what is left. Switches no greenlets."""
        self._session.keep_alive.liveness.last_sign = time.monotonic()
        if self._preface_left:
            view = self._check_preface(view)
        rest = self._splitter.feed(view)
        if output := self._session.conn.take_output():
            self._session.writer.control(output)
        return rest

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
        if stream is None or not stream.hears:
            self._current = None
            self._unheard_data(stream_id, length, stream)
            return
        self._current = stream
        if length:
            self._session.backlog += length
            if not stream.receive_window.receive(length):
                raise FlowControlError(f"{length} bytes of DATA beyond the window of stream {stream_id}")
        elif not flags & http2.END_STREAM:
            self._empty_data()

    def _empty_data(self) -> None:
        self._session.guard.empty_data(self._session.keep_alive.liveness.last_sign)

    def _unheard_data(self, stream_id: int, length: int, stream: Stream | None) -> None:
        """DATA that no receiver gets: what was under way when we reset its stream, or a mistake."""
        session = self._session
        if stream is None and not session.conn.was_reset_by_us(stream_id):
            self._control.tell_h2(http2.empty_data(stream_id))
        elif stream is not None and stream.remote_ended:
            self._control.tell_h2(http2.empty_data(stream_id), stream)
        elif stream is not None and stream.error is None:
            raise ProtocolError("DATA before the answer")
        else:
            if stream is not None and length:
                session.pacing.heard(stream)  # resets it; its credit is for what is under way
            ends = bool(self._current_flags & http2.END_STREAM)
            session.guard.stray_data(session.keep_alive.liveness.last_sign, length, ends=ends)

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
            self._control.end(stream)
        else:
            state._actual_content_length = stream.received
            self._control.tell_h2(http2.empty_data(stream.id, http2.END_STREAM))

    def unknown_frame(self) -> None:
        if not self._session.settled.is_set():
            raise ProtocolError("the first frame is not SETTINGS")
        self._control.unknown_frame()

    def control_frame(self, frame: memoryview, kind: int, flags: int, stream_id: int) -> None:
        if not self._session.settled.is_set() and kind != http2.SETTINGS:
            raise ProtocolError("the first frame is not SETTINGS")
        if kind == http2.DATA:
            self._padded_data(frame, flags, stream_id)
        else:
            self._control.frame(frame, kind, flags, stream_id, in_block=self._splitter.in_block)

    def _padded_data(self, frame: memoryview, flags: int, stream_id: int) -> None:
        """DATA with padding (§6.1), or DATA where none may be, for which h2 has the error."""
        if self._splitter.in_block:
            raise ProtocolError("DATA inside a header block")
        length = len(frame) - http2.FRAME_HEAD
        if not stream_id or not flags & http2.PADDED or not length:
            self._control.tell_h2(frame, self._session.streams.get(stream_id))
            return
        padding = frame[http2.FRAME_HEAD]
        if padding >= length:
            raise ProtocolError("padding longer than its frame")
        self.data_begins(stream_id, length, flags)
        payload = frame[http2.FRAME_HEAD + 1 : len(frame) - padding]
        if payload:
            self.data_piece(payload)
        elif not flags & http2.END_STREAM:
            self._empty_data()
        if self._current is not None:
            self._current.consumed(length - len(payload))
        self.data_ends()

    def _use_connection(self, count: int) -> None:
        """The connection's window stays at its maximum, so that no stream can stop the others."""
        self._used += count
        if self._used >= CONNECTION_CREDIT:
            self._session.writer.control(http2.window_update(0, self._used))
            self._used = 0
