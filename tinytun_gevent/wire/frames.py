"""Splits an HTTP/2 byte stream into DATA, as it arrives, and whole control frames. No I/O.

DATA payload is handed on as views of the caller's own buffer, in pieces, before its frame
is complete; every other frame is collected and handed over whole, because h2 wants it so.
"""

from __future__ import annotations

from typing import Final, Protocol

from tinytun_gevent.wire.http2 import (
    CONTINUATION,
    CONTROL_FRAME_MAX,
    DATA,
    END_HEADERS,
    FRAME_HEAD,
    HEADERS,
    PADDED,
    PUSH_PROMISE,
    unpack_head,
)

KNOWN_TYPES: Final = CONTINUATION
"""Highest frame type of RFC 9113; later ones are ignored (§5.5), and skipped here unread."""


FRAMES_AT_ONCE: Final = 64
"""Frames after which :meth:`FrameSplitter.feed` stops: a megabyte holds a hundred thousand of one byte each,
which kept everybody else waiting for a second. In ordinary traffic it holds some dozens; 64 with a byte each
take one or two milliseconds."""


class FrameTooLongError(Exception):
    """A declared frame length is over the limit; nothing of the frame was kept."""


class FrameHandler(Protocol):
    """What a :class:`FrameSplitter` calls, in the order of the bytes."""

    def data_begins(self, stream_id: int, length: int, flags: int) -> None:
        """An unpadded DATA frame of ``length`` bytes starts."""

    def data_piece(self, view: memoryview) -> None:
        """Some payload of that frame; valid only during the call."""

    def data_ends(self) -> None:
        """That frame is complete."""

    def control_frame(self, frame: memoryview, kind: int, flags: int, stream_id: int) -> None:
        """A whole frame, its header included; padded DATA comes this way too."""


    def unknown_frame(self) -> None:
        """A frame of a type that nobody knows begins; it is skipped."""


class FrameSplitter:
    """State between two reads: at most one incomplete control frame, or a count of DATA."""

    def __init__(self, handler: FrameHandler, max_frame: int) -> None:
        """``max_frame`` is the DATA payload limit in bytes."""
        self._handler = handler
        self._max_frame = max_frame
        self._partial = bytearray()
        self._needed = FRAME_HEAD
        #: Bytes of the DATA frame under way that have not come yet.
        self.data_left = 0
        self._skip_left = 0
        self._in_headers = False
        #: Whether the frame being handed over came inside a header block (RFC 9113 §4.3).
        self.in_block = False

    def feed(self, view: memoryview) -> memoryview:
        """Takes the bytes of one read, up to :data:`FRAMES_AT_ONCE` frames of them; returns what is left.

        That has to be fed next. Raises :class:`FrameTooLongError`, and whatever the handler raises.
        """
        if self._partial:
            view = self._complete_partial(view)
        position, end, frames = 0, len(view), FRAMES_AT_ONCE
        while position < end:
            if self.data_left:
                position = self._pass_data(view, position, end)
            elif self._skip_left:
                skipped = min(self._skip_left, end - position)
                self._skip_left -= skipped
                position += skipped
            elif end - position < FRAME_HEAD:
                self._keep(view[position:], FRAME_HEAD)
                break
            elif frames:
                frames -= 1
                position = self._begin(view, position, end)
                if position < 0:
                    break
            else:
                return view[position:]
        return view[end:]

    def _begin(self, view: memoryview, position: int, end: int) -> int:
        """Starts the frame at ``position``: where to go on, or -1 if it has to be waited for."""
        length, kind, flags, stream_id = unpack_head(view, position)
        if kind == DATA and not flags & PADDED and not self._in_headers and stream_id:
            if length > self._max_frame:
                raise FrameTooLongError(f"DATA frame of {length} bytes")
            self._handler.data_begins(stream_id, length, flags)
            self.data_left = length
            if not length:
                self._handler.data_ends()
            return position + FRAME_HEAD
        if length > (self._max_frame if kind == DATA else CONTROL_FRAME_MAX):
            raise FrameTooLongError(f"frame of type {kind} and {length} bytes")
        if kind > KNOWN_TYPES and not self._in_headers:
            self._handler.unknown_frame()
            self._skip_left = length
            return position + FRAME_HEAD
        whole = FRAME_HEAD + length
        if end - position < whole:
            self._keep(view[position:], whole)
            return -1
        self._control(view[position : position + whole], kind, flags, stream_id)
        return position + whole

    def _pass_data(self, view: memoryview, position: int, end: int) -> int:
        taken = min(self.data_left, end - position)
        self.data_left -= taken
        self._handler.data_piece(view[position : position + taken])
        if not self.data_left:
            self._handler.data_ends()
        return position + taken

    def _control(self, frame: memoryview, kind: int, flags: int, stream_id: int) -> None:
        self.in_block = self._in_headers
        if kind in (HEADERS, PUSH_PROMISE, CONTINUATION):
            self._in_headers = not flags & END_HEADERS
        self._handler.control_frame(frame, kind, flags, stream_id)

    def _keep(self, rest: memoryview, needed: int) -> None:
        self._partial += rest
        self._needed = needed

    def _complete_partial(self, view: memoryview) -> memoryview:
        """Adds to the kept bytes until their frame can start; returns what is left of ``view``."""
        while True:
            taken = min(self._needed - len(self._partial), len(view))
            self._partial += view[:taken]
            view = view[taken:]
            if len(self._partial) < self._needed:
                return view
            kept = self._partial
            self._partial = bytearray()
            with memoryview(kept) as whole:
                position = self._begin(whole, 0, len(whole))
            if position >= 0 or not len(view):
                return view
