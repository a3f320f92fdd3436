"""Scans chunked bodies (RFC 9112 §7.1), and writes anew what may not pass as it came.

The scanner is strict: whatever two implementations might read differently is an error, and no byte
that breaks a rule is ever passed on or counted as taken, not even in a line that is still incomplete.
A chunk's line that has an extension, leading zeros or blanks, or that came in parts, is held back until
it is whole and written as the bare size. All others, and nearly all bodies, pass as the bytes that came.
"""

from __future__ import annotations

import sys
from typing import Final

from tinytun_gevent.errors import MessageError
from tinytun_gevent.wire.chunk_grammar import (
    BAD,
    BARE_LINE,
    DATA_CR,
    FIELD,
    GAP,
    LENIENT_LINE,
    LENIENT_TABLE,
    LINE,
    LINE_LF,
    MAX_CHUNK,
    OVERLONG_SIZE,
    SIZE_FIRST,
    STRICT_LINE,
    STRICT_TABLE,
    TRAILER_FIRST,
)

Bytes = bytes | bytearray | memoryview

MAX_CHUNK_LINE: Final = 4096
"""Bytes of a chunk's size with its extensions; nobody sends any, so this is generous."""
MAX_TRAILER: Final = 16 * 1024
"""Bytes of a trailer section: what a request head may have."""
MAX_TRAILER_FIELDS: Final = 100

LINES_AT_ONCE: Final = 512
"""Lines that are looked at before others have a turn, half a millisecond's work: one read may hold tens of
thousands of chunks of one byte. One of ordinary traffic is to be below: with 64, answers in chunks of 2 KiB,
as Go's servers send them, cost three times as much."""
ODD_LINE: Final = 4
"""As how many lines one counts that is written anew, or that comes in parts: so much longer it takes."""

SEGMENT: Final = 256
"""Bytes of an incomplete line that are looked at in one go, a few times what is usual."""

WHOLE: Final = 16 * 1024
"""Bytes from which a part of a rewritten body is a piece of its own; shorter ones are joined by copying,
so that very many small chunks do not become as many pieces."""

_NOTHING: Final = memoryview(b"")


class ChunkedBody:
    """A body in chunks, with its trailers.

    ``response`` is for the local service's responses: blanks may follow a chunk's size, and errors
    have status 502 instead of 400. Of their trailer fields those pass whose lower-case names are not in
    ``withheld``. A request's trailers do not pass (RFC 9110 §6.5.1 allows it): some services merge
    them into the head's fields, or keep them for the next request on the connection.

    Of a ``plain`` one only the data passes: for visitors who do not know chunks (RFC 9112 §7.1).
    """

    __slots__ = (
        "_left",
        "_line",
        "_lines",
        "_passed",
        "_plain",
        "_response",
        "_state",
        "_table",
        "_trailer",
        "_trailer_fields",
        "_trailers",
        "_view",
        "_withheld",
        "done",
        "rewritten",
    )

    def __init__(
        self, response: bool = False, withheld: frozenset[bytes] = frozenset(), *, plain: bool = False
    ) -> None:
        self.done = False
        self.rewritten: list[Bytes] | None = None
        """What to forward for the bytes that the last :meth:`feed` took; None: these bytes as they are.
        Its parts of the view are good for as long as that is."""
        self._response = response
        self._withheld = withheld
        self._plain = plain
        self._table = LENIENT_TABLE if response else STRICT_TABLE
        self._lines = LENIENT_LINE if response else STRICT_LINE
        self._state = SIZE_FIRST
        self._left = 0  # bytes of the current chunk's data that are still to come
        self._line = bytearray()  # the current line as far as it has come, limited by its kind
        self._trailer = 0  # bytes of trailer lines before the current one
        self._trailer_fields = 0
        self._trailers: list[bytes] = []  # the lines that may pass
        self._view = _NOTHING  # what is being fed, and where in it begins what has not been written
        self._passed = 0

    def feed(self, view: Bytes, lines: int = sys.maxsize) -> int:
        """See ``Body``. Chunk data is skipped by arithmetic; lines are checked to the byte.

        After so many ``lines`` it stops, for others to have a turn: feed the rest of the view next.
        """
        self._view, self._passed, self.rewritten = memoryview(view), 0, None
        position, end = 0, len(view)
        try:
            while not self.done:
                if self._left >= end - position:
                    self._left -= end - position
                    position = end
                    break
                position += self._left
                self._left = 0
                if lines <= 0:
                    break
                lines -= 1
                bare = BARE_LINE.get(self._state)
                if bare is None or not (line := bare.match(view, position)):
                    position = self._feed_odd_line(position)
                    lines -= ODD_LINE - 1
                    continue
                if self._plain:
                    self._hold_back(position, line.end())
                position = line.end()
                if (size := line[1]) is None:
                    self.done = True
                else:
                    self._left = int(size, 16)
                    self._state = DATA_CR
            if self.rewritten is not None:
                self._write(self._view[self._passed : position])
        finally:
            self._view = _NOTHING
        return position

    def eof(self) -> None:
        """See ``Body``."""
        if not self.done:
            raise MessageError("the chunked body ended early", self._status)

    @property
    def _status(self) -> int:
        return 502 if self._response else 400

    # -- lines ----------------------------------------------------------------

    def _feed_odd_line(self, position: int) -> int:
        """Takes a line that cannot pass as it came, or a part of one; returns the position behind that."""
        pattern = self._lines.get(self._state)
        line = pattern.match(self._view, position) if pattern is not None else None
        if line is None or len(line[0]) > MAX_CHUNK_LINE or int(line[1], 16) > MAX_CHUNK:
            return self._feed_line(position)
        self._hold_back(position if self._plain else line.start(1), line.end())
        self._begin_chunk(line[1])
        return line.end()

    def _feed_line(self, position: int) -> int:
        """Takes bytes of the current line, up to its end; returns the position behind them."""
        begun = self._state
        room = MAX_TRAILER - self._trailer if begun >= TRAILER_FIRST else MAX_CHUNK_LINE
        segment = bytes(self._view[position : position + min(room - len(self._line), SEGMENT)])
        if not segment:
            raise self._error("a chunk line or the trailer section is too long")
        table = self._table
        state = begun
        taken = 0
        for byte in segment:
            state = table[state][byte]
            taken += 1
            if state <= GAP:
                break
        self._line += segment[:taken]
        self._state = state
        self._check_line(begun)
        if self._plain or begun >= SIZE_FIRST:  # the line end behind data may pass in parts
            self._hold_back(position, position + taken)
        if state <= GAP:
            self._end_line()
        return position + taken

    def _check_line(self, begun: int) -> None:
        """Applies to the line, complete or not, what the table cannot express."""
        if self._state == BAD:
            raise self._error("the chunked framing is malformed")
        if begun <= LINE_LF and OVERLONG_SIZE.match(self._line):
            raise self._error("a chunk size is too large")

    def _end_line(self) -> None:
        """Acts on a complete line."""
        if self._state == LINE:
            self._begin_chunk(bytes(self._line.split(b";", 1)[0].strip()))
        elif self._state == GAP:
            self._state = SIZE_FIRST
        elif self._state == FIELD:
            self._take_trailer(bytes(self._line))
        else:
            if not self._plain:
                self._write(b"".join([*self._trailers, b"\r\n"]))
            self.done = True
        self._line.clear()

    def _begin_chunk(self, size: bytes) -> None:
        """Goes on behind a chunk's line, of which the digits of the size are written anew."""
        self._left = int(size, 16)
        self._state = DATA_CR if self._left else TRAILER_FIRST
        if not self._plain:
            self._write((size.lstrip(b"0") or b"0") + b"\r\n")

    def _take_trailer(self, line: bytes) -> None:
        self._trailer += len(line)
        self._trailer_fields += 1
        if self._trailer_fields > MAX_TRAILER_FIELDS:
            raise self._error(f"the trailer section has more than {MAX_TRAILER_FIELDS} fields")
        if self._response and line[: line.index(b":")].lower() not in self._withheld:
            self._trailers.append(line)
        self._state = TRAILER_FIRST

    def _error(self, message: str) -> MessageError:
        self._state = BAD
        self._left = 0
        return MessageError(message, self._status)

    # -- what is written anew -------------------------------------------------

    def _hold_back(self, begin: int, end: int) -> None:
        """Leaves out the view's bytes from ``begin`` to ``end``: something may be written for them."""
        if self.rewritten is None:
            self.rewritten = []
        self._write(self._view[self._passed : begin])
        self._passed = end

    def _write(self, part: bytes | memoryview) -> None:
        """Adds to the rewritten bytes, which exist: long parts as they are, short ones joined."""
        pieces = self.rewritten
        assert pieces is not None
        if len(part) >= WHOLE:
            pieces.append(part)
        elif pieces and isinstance(pieces[-1], bytearray):
            pieces[-1] += part
        elif part:
            pieces.append(bytearray(part))
