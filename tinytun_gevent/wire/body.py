"""Where a body ends: counters that look at its bytes and leave them as they are.

A body is forwarded as it arrives, chunk framing included, so nothing is decoded or copied::

    body = body_of(head.length)
    taken = body.feed(view)      # view[:taken] belongs to this message: forward it
    if body.done: ...            # what is left is the next message's (or one too many)

When the connection ends, ``eof()`` tells a whole body from a truncated one.

The chunk scanner is strict (RFC 9112 section 7.1): whatever two implementations might read
differently is an error, and no byte that breaks a rule is ever counted as taken, not even in a
line that is still incomplete. After a ``MessageError`` a body object is of no further use, and
neither are the connections at its two ends.
"""

from __future__ import annotations

import re
from typing import Final, Protocol

from tinytun_gevent.errors import MessageError
from tinytun_gevent.wire.claims import canonical, is_claim
from tinytun_gevent.wire.fields import CHUNKED, FRAMING, HOP_BY_HOP

Bytes = bytes | bytearray | memoryview

MAX_CHUNK_LINE: Final = 4096
"""Bytes of a chunk's size with its extensions; nobody sends any, so this is generous."""
MAX_TRAILER: Final = 16 * 1024
"""Bytes of a trailer section: what a request head may have."""
MAX_TRAILER_FIELDS: Final = 100

# A trailer is forwarded as it is, and some services merge trailers into the head's fields. So what the
# edge refuses, replaces or writes in a head may not come in this way (RFC 9110 section 6.5.1).
_NOT_IN_TRAILERS: Final = frozenset((b"host", b"trailer", *FRAMING, *HOP_BY_HOP))


class Body(Protocol):
    """What the three kinds of bodies have in common."""

    done: bool
    """The last byte has been taken."""

    def feed(self, view: Bytes) -> int:
        """Return how many of the leading bytes belong to this body; 0 once it is done.

        Raises ``MessageError`` if they break a rule; none of ``view`` may be forwarded then.
        """

    def eof(self) -> None:
        """Say that no more bytes come. Raises ``MessageError`` if some are missing."""


class LengthBody:
    """A body of exactly ``length`` bytes (Content-Length, or 0 for none)."""

    __slots__ = ("_status", "done", "left")

    def __init__(self, length: int, *, response: bool = False) -> None:
        self.left = length
        """Bytes that are still to come."""
        self.done = length == 0
        self._status = 502 if response else 400

    def feed(self, view: Bytes) -> int:
        """See ``Body``; raises nothing."""
        taken = min(len(view), self.left)
        self.left -= taken
        self.done = not self.left
        return taken

    def eof(self) -> None:
        """See ``Body``."""
        if self.left:
            raise MessageError(f"the body ended {self.left} bytes early", self._status)


class UntilCloseBody:
    """A response's body that lasts until the service closes the connection."""

    __slots__ = ("done",)

    def __init__(self) -> None:
        self.done = False

    def feed(self, view: Bytes) -> int:
        """See ``Body``; raises nothing."""
        return 0 if self.done else len(view)

    def eof(self) -> None:
        """Say that this was all; raises nothing."""
        self.done = True


def body_of(length: int, *, response: bool = False) -> Body:
    """Return the body for a head's ``length``."""
    if length >= 0:
        return LengthBody(length, response=response)
    return ChunkedBody(response) if length == CHUNKED else UntilCloseBody()


# -- the chunk scanner ---------------------------------------------------------------------------

# A line is read byte by byte through a table: state and byte give the next state.
(
    _BAD,  # a byte that no rule mentions
    _LINE,  # entered with the LF of a chunk line
    _FIELD,  # … of a trailer field
    _END,  # … of the empty line behind the trailer fields
    _DATA_CR,  # the line end behind a chunk's data
    _DATA_LF,
    _SIZE_FIRST,
    _SIZE,
    _SIZE_BLANK,
    _NAME_FIRST,  # of a chunk extension, as are the following
    _NAME,
    _NAME_BLANK,
    _VALUE_FIRST,
    _VALUE,
    _QUOTED,
    _QUOTED_PAIR,
    _QUOTED_END,
    _VALUE_BLANK,
    _LINE_LF,
    _TRAILER_FIRST,
    _TRAILER_NAME,
    _TRAILER_VALUE,
    _TRAILER_LF,
    _END_LF,
) = range(24)

_HEX: Final = b"0123456789abcdefABCDEF"
_BLANK: Final = b" \t"
_TOKEN: Final = b"!#$%&'*+-.^_`|~" + bytes((*range(48, 58), *range(65, 91), *range(97, 123)))
_TEXT: Final = bytes((9, *range(32, 127), *range(128, 256)))  # HTAB, SP, VCHAR, obs-text
_QUOTED_TEXT: Final = _TEXT.translate(None, b'"\\')

_RULES: Final[dict[int, dict[bytes, int]]] = {
    # chunk-data CRLF
    _DATA_CR: {b"\r": _DATA_LF},
    _DATA_LF: {b"\n": _SIZE_FIRST},
    # chunk-size *( BWS ";" BWS name [ BWS "=" BWS ( token / quoted-string ) ] ) CRLF
    _SIZE_FIRST: {_HEX: _SIZE},
    _SIZE: {_HEX: _SIZE, _BLANK: _SIZE_BLANK, b";": _NAME_FIRST, b"\r": _LINE_LF},
    _SIZE_BLANK: {_BLANK: _SIZE_BLANK, b";": _NAME_FIRST},
    _NAME_FIRST: {_BLANK: _NAME_FIRST, _TOKEN: _NAME},
    _NAME: {
        _TOKEN: _NAME,
        _BLANK: _NAME_BLANK,
        b"=": _VALUE_FIRST,
        b";": _NAME_FIRST,
        b"\r": _LINE_LF,
    },
    _NAME_BLANK: {_BLANK: _NAME_BLANK, b"=": _VALUE_FIRST, b";": _NAME_FIRST},
    _VALUE_FIRST: {_BLANK: _VALUE_FIRST, _TOKEN: _VALUE, b'"': _QUOTED},
    _VALUE: {_TOKEN: _VALUE, _BLANK: _VALUE_BLANK, b";": _NAME_FIRST, b"\r": _LINE_LF},
    _QUOTED: {_QUOTED_TEXT: _QUOTED, b"\\": _QUOTED_PAIR, b'"': _QUOTED_END},
    _QUOTED_PAIR: {_TEXT: _QUOTED},
    _QUOTED_END: {_BLANK: _VALUE_BLANK, b";": _NAME_FIRST, b"\r": _LINE_LF},
    _VALUE_BLANK: {_BLANK: _VALUE_BLANK, b";": _NAME_FIRST},
    _LINE_LF: {b"\n": _LINE},
    # *( name ":" value CRLF ) CRLF
    _TRAILER_FIRST: {_TOKEN: _TRAILER_NAME, b"\r": _END_LF},
    _TRAILER_NAME: {_TOKEN: _TRAILER_NAME, b":": _TRAILER_VALUE},
    _TRAILER_VALUE: {_TEXT: _TRAILER_VALUE, b"\r": _TRAILER_LF},
    _TRAILER_LF: {b"\n": _FIELD},
    _END_LF: {b"\n": _END},
}
# Services that pad the size with blanks are common enough; on the way to one it stays an error.
_LENIENT_RULES: Final = {
    state: {**rules, b"\r": _LINE_LF} if state in (_SIZE_BLANK, _NAME_BLANK, _VALUE_BLANK) else rules
    for state, rules in _RULES.items()
}


def _table(rules: dict[int, dict[bytes, int]]) -> tuple[bytes, ...]:
    """Return, for each state, the next state for each of the 256 bytes."""
    rows = [bytearray(256) for _ in range(_END_LF + 1)]
    for state, transitions in rules.items():
        for accepted, target in transitions.items():
            for byte in accepted:
                rows[state][byte] = target
    return tuple(map(bytes, rows))


_STRICT_TABLE: Final = _table(_RULES)
_LENIENT_TABLE: Final = _table(_LENIENT_RULES)

# The line that practically every chunk has, whole and behind the chunk before it.
_NEXT_CHUNK: Final = re.compile(rb"\r\n([0-9A-Fa-f]{1,15})\r\n")
# 17 digits, or 2**63 and more: what other implementations might cut off or wrap around.
_OVERLONG_SIZE: Final = re.compile(rb"(?:\r\n)?(?:[0-9A-Fa-f]{17}|[89A-Fa-f][0-9A-Fa-f]{15})")


class ChunkedBody:
    """A body in chunks, with its trailers.

    ``lenient`` is for the local service's responses: blanks may follow a chunk's size, a trailer
    may have any name, and errors have status 502 instead of 400.
    """

    __slots__ = ("_left", "_line", "_state", "_status", "_table", "_trailer", "_trailer_fields", "done")

    def __init__(self, lenient: bool = False) -> None:
        self.done = False
        self._status = 502 if lenient else 400
        self._table = _LENIENT_TABLE if lenient else _STRICT_TABLE
        self._state = _SIZE_FIRST
        self._left = 0  # bytes of the current chunk's data that are still to come
        self._line = bytearray()  # the current line as far as it has come, limited by its kind
        self._trailer = 0  # bytes of trailer lines before the current one
        self._trailer_fields = 0

    def feed(self, view: Bytes) -> int:
        """See ``Body``. Chunk data is skipped by arithmetic; lines are checked to the byte."""
        position = 0
        end = len(view)
        while position < end and not self.done:
            if self._left:
                step = min(self._left, end - position)
                self._left -= step
                position += step
            elif self._state == _DATA_CR and (line := _NEXT_CHUNK.match(view, position)):
                position = line.end()
                self._begin_chunk(int(line[1], 16))
            else:
                position = self._feed_line(view, position)
        return position

    def eof(self) -> None:
        """See ``Body``."""
        if not self.done:
            raise MessageError("the chunked body ended early", self._status)

    def _feed_line(self, view: Bytes, position: int) -> int:
        """Take bytes of the current line, up to its end; return the position behind them."""
        begun = self._state
        room = MAX_TRAILER - self._trailer if begun >= _TRAILER_FIRST else MAX_CHUNK_LINE
        segment = bytes(view[position : position + room - len(self._line)])
        if not segment:
            raise self._error("a chunk line or the trailer section is too long")
        table = self._table
        state = begun
        taken = 0
        for byte in segment:
            state = table[state][byte]
            taken += 1
            if state <= _END:
                break
        self._line += segment[:taken]
        self._state = state
        self._check_line(begun)
        if state <= _END:
            self._end_line()
        return position + taken

    def _check_line(self, begun: int) -> None:
        """Apply to the line, complete or not, what the table cannot express."""
        state = self._state
        if state == _BAD:
            raise self._error("the chunked framing is malformed")
        if begun <= _LINE_LF:
            if _OVERLONG_SIZE.match(self._line):
                raise self._error("a chunk size is too large")
        elif begun <= _TRAILER_NAME != state and self._status == 400:
            name = bytes(self._line.partition(b":")[0])
            if canonical(name) in _NOT_IN_TRAILERS or is_claim(name):
                raise self._error("a field is in the trailer section that belongs in the head")

    def _end_line(self) -> None:
        """Act on a complete line."""
        if self._state == _LINE:
            self._begin_chunk(int(self._line.split(b";", 1)[0].strip(), 16))
        elif self._state == _FIELD:
            self._trailer += len(self._line)
            self._trailer_fields += 1
            if self._trailer_fields > MAX_TRAILER_FIELDS:
                raise self._error(f"the trailer section has more than {MAX_TRAILER_FIELDS} fields")
            self._state = _TRAILER_FIRST
        else:
            self.done = True
        self._line.clear()

    def _begin_chunk(self, size: int) -> None:
        self._left = size
        self._state = _DATA_CR if size else _TRAILER_FIRST

    def _error(self, message: str) -> MessageError:
        self._state = _BAD
        self._left = 0
        return MessageError(message, self._status)
