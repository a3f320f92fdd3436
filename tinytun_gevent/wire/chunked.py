"""Scans chunked bodies (RFC 9112 §7.1), and writes anew what may not pass as it came.

The scanner is strict: whatever two implementations might read differently is an error, and no byte
that breaks a rule is ever passed on or counted as taken, not even in a line that is still incomplete.
Chunk data is never copied; a body whose lines are as they should be passes as the bytes that came.
"""

from __future__ import annotations

import re
import sys
from typing import Final

from tinytun_gevent.errors import MessageError

Bytes = bytes | bytearray | memoryview

MAX_CHUNK_LINE: Final = 4096
"""Bytes of a chunk's size with its extensions; nobody sends any, so this is generous."""
MAX_TRAILER: Final = 16 * 1024
"""Bytes of a trailer section: what a request head may have."""
MAX_TRAILER_FIELDS: Final = 100

WHOLE: Final = 16 * 1024
"""Bytes from which a part of a rewritten body is a piece of its own; shorter ones are joined by copying,
so that very many small chunks do not become as many pieces."""

# A line is read byte by byte through a table: state and byte give the next state.
(
    _BAD,  # a byte that no rule mentions
    _LINE,  # entered with the LF of a chunk line
    _FIELD,  # … of a trailer field
    _END,  # … of the empty line behind the trailer fields
    _GAP,  # … behind a chunk's data
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
) = range(25)

_HEX: Final = b"0123456789abcdefABCDEF"
_BLANK: Final = b" \t"
_TOKEN: Final = b"!#$%&'*+-.^_`|~" + bytes((*range(48, 58), *range(65, 91), *range(97, 123)))
_TEXT: Final = bytes((9, *range(32, 127), *range(128, 256)))  # HTAB, SP, VCHAR, obs-text
_QUOTED_TEXT: Final = _TEXT.translate(None, b'"\\')

_RULES: Final[dict[int, dict[bytes, int]]] = {
    # chunk-data CRLF
    _DATA_CR: {b"\r": _DATA_LF},
    _DATA_LF: {b"\n": _GAP},
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

# The lines that practically every chunk has: whole, without extension, written as we would; the last
# chunk's with the end of a trailer section that is empty.
_PLAIN_LINE: Final = rb"(?:([1-9A-Fa-f][0-9A-Fa-f]{0,14})\r\n|0\r\n\r\n)"
_PATTERNS: Final = {_SIZE_FIRST: re.compile(_PLAIN_LINE), _DATA_CR: re.compile(rb"\r\n" + _PLAIN_LINE)}
# 17 digits, or 2**63 and more: what other implementations might cut off or wrap around.
_OVERLONG_SIZE: Final = re.compile(rb"[0-9A-Fa-f]{17}|[89A-Fa-f][0-9A-Fa-f]{15}")


_NOTHING: Final = memoryview(b"")


class ChunkedBody:
    """A body in chunks, with its trailers.

    ``response`` is for the local service's responses: blanks may follow a chunk's size, and errors
    have status 502 instead of 400. Of their trailer fields those pass whose lower-case names are not in
    ``withheld``. A request's trailers do not pass (RFC 9110 §6.5.1 allows it): some services merge
    them into the head's fields, or keep them for the next request on the connection.
    """

    __slots__ = (
        "_left",
        "_line",
        "_passed",
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

    def __init__(self, response: bool = False, withheld: frozenset[bytes] = frozenset()) -> None:
        self.done = False
        self.rewritten: list[Bytes] | None = None
        """What to forward for the bytes that the last :meth:`feed` took; None: these bytes as they are.
        Its parts of the view are good for as long as that is."""
        self._response = response
        self._withheld = withheld
        self._table = _LENIENT_TABLE if response else _STRICT_TABLE
        self._state = _SIZE_FIRST
        self._left = 0  # bytes of the current chunk's data that are still to come
        self._line = bytearray()  # the current line as far as it has come, limited by its kind
        self._trailer = 0  # bytes of trailer lines before the current one
        self._trailer_fields = 0
        self._trailers: list[bytes] = []  # the lines that may pass
        self._view = _NOTHING  # what is being fed, and where in it begins what has not been written
        self._passed = 0

    def feed(self, view: Bytes, lines: int = sys.maxsize) -> int:
        """See ``Body``. Chunk data is skipped by arithmetic; lines are checked to the byte.

        Behind so many ``lines`` it stops, for others to have a turn: feed the rest of the view next.
        """
        self._view, self._passed, self.rewritten = memoryview(view), 0, None
        position = 0
        end = len(view)
        try:
            while position < end and not self.done:
                if self._left:
                    step = min(self._left, end - position)
                    self._left -= step
                    position += step
                    continue
                if not lines:
                    break
                lines -= 1
                pattern = _PATTERNS.get(self._state)
                if pattern is not None and (line := pattern.match(view, position)):
                    position = line.end()
                    self._begin_chunk(line[1])
                else:
                    position = self._feed_line(position)
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

    def _feed_line(self, position: int) -> int:
        """Take bytes of the current line, up to its end; return the position behind them."""
        begun = self._state
        room = MAX_TRAILER - self._trailer if begun >= _TRAILER_FIRST else MAX_CHUNK_LINE
        segment = bytes(self._view[position : position + room - len(self._line)])
        if not segment:
            raise self._error("a chunk line or the trailer section is too long")
        table = self._table
        state = begun
        taken = 0
        for byte in segment:
            state = table[state][byte]
            taken += 1
            if state <= _GAP:
                break
        self._line += segment[:taken]
        self._state = state
        self._check_line(begun)
        if begun >= _TRAILER_FIRST:  # held back until the section is complete
            self._replace(position, position + taken, b"")
        if state <= _GAP:
            self._end_line()
        return position + taken

    def _check_line(self, begun: int) -> None:
        """Apply to the line, complete or not, what the table cannot express."""
        if self._state == _BAD:
            raise self._error("the chunked framing is malformed")
        if begun <= _LINE_LF and _OVERLONG_SIZE.match(self._line):
            raise self._error("a chunk size is too large")

    def _end_line(self) -> None:
        """Act on a complete line."""
        if self._state == _LINE:
            self._begin_chunk(self._line.split(b";", 1)[0].strip())
        elif self._state == _GAP:
            self._state = _SIZE_FIRST
        elif self._state == _FIELD:
            self._take_trailer(bytes(self._line))
        else:
            self._write(b"".join([*self._trailers, b"\r\n"]))
            self.done = True
        self._line.clear()

    def _begin_chunk(self, size: bytes | bytearray | None) -> None:
        """Go on behind a chunk's line; ``size`` is None behind a last chunk without trailers."""
        if size is None:
            self.done = True
            return
        self._left = int(size, 16)
        self._state = _DATA_CR if self._left else _TRAILER_FIRST

    def _take_trailer(self, line: bytes) -> None:
        self._trailer += len(line)
        self._trailer_fields += 1
        if self._trailer_fields > MAX_TRAILER_FIELDS:
            raise self._error(f"the trailer section has more than {MAX_TRAILER_FIELDS} fields")
        if self._response and line[: line.index(b":")].lower() not in self._withheld:
            self._trailers.append(line)
        self._state = _TRAILER_FIRST

    def _error(self, message: str) -> MessageError:
        self._state = _BAD
        self._left = 0
        return MessageError(message, self._status)

    # -- what is written anew -------------------------------------------------

    def _replace(self, begin: int, end: int, new: bytes) -> None:
        """Forward ``new`` instead of the view's bytes from ``begin`` to ``end``."""
        if self.rewritten is None:
            self.rewritten = []
        self._write(self._view[self._passed : begin])
        self._write(new)
        self._passed = end

    def _write(self, part: bytes | memoryview) -> None:
        """Add to the rewritten bytes, which exist: long parts as they are, short ones joined."""
        pieces = self.rewritten
        assert pieces is not None
        if len(part) >= WHOLE:
            pieces.append(part)
        elif pieces and isinstance(pieces[-1], bytearray):
            pieces[-1] += part
        elif part:
            pieces.append(bytearray(part))
