"""The lines of a chunked body (RFC 9112 §7.1) as data: a state table, and patterns for whole lines."""

from __future__ import annotations

import re
from typing import Final

MAX_CHUNK: Final = 2**31 - 1
"""Bytes of one chunk: a service that counts in 32 bits would read another message out of a longer one."""

# A line is read byte by byte through a table: state and byte give the next state.
(
    BAD,  # a byte that no rule mentions
    LINE,  # entered with the LF of a chunk line
    FIELD,  # … of a trailer field
    END,  # … of the empty line behind the trailer fields
    GAP,  # … behind a chunk's data
    DATA_CR,  # the line end behind a chunk's data
    DATA_LF,
    SIZE_FIRST,
    SIZE,
    SIZE_BLANK,
    NAME_FIRST,  # of a chunk extension, as are the following
    NAME,
    NAME_BLANK,
    VALUE_FIRST,
    VALUE,
    QUOTED,
    QUOTED_PAIR,
    QUOTED_END,
    VALUE_BLANK,
    LINE_LF,
    TRAILER_FIRST,
    TRAILER_NAME,
    TRAILER_VALUE,
    TRAILER_LF,
    END_LF,
) = range(25)

_HEX: Final = b"0123456789abcdefABCDEF"
_BLANK: Final = b" \t"
_TOKEN: Final = b"!#$%&'*+-.^_`|~" + bytes((*range(48, 58), *range(65, 91), *range(97, 123)))
_TEXT: Final = bytes((9, *range(32, 127), *range(128, 256)))  # HTAB, SP, VCHAR, obs-text
_QUOTED_TEXT: Final = _TEXT.translate(None, b'"\\')

_RULES: Final[dict[int, dict[bytes, int]]] = {
    # chunk-data CRLF
    DATA_CR: {b"\r": DATA_LF},
    DATA_LF: {b"\n": GAP},
    # chunk-size *( BWS ";" BWS name [ BWS "=" BWS ( token / quoted-string ) ] ) CRLF
    SIZE_FIRST: {_HEX: SIZE},
    SIZE: {_HEX: SIZE, _BLANK: SIZE_BLANK, b";": NAME_FIRST, b"\r": LINE_LF},
    SIZE_BLANK: {_BLANK: SIZE_BLANK, b";": NAME_FIRST},
    NAME_FIRST: {_BLANK: NAME_FIRST, _TOKEN: NAME},
    NAME: {
        _TOKEN: NAME,
        _BLANK: NAME_BLANK,
        b"=": VALUE_FIRST,
        b";": NAME_FIRST,
        b"\r": LINE_LF,
    },
    NAME_BLANK: {_BLANK: NAME_BLANK, b"=": VALUE_FIRST, b";": NAME_FIRST},
    VALUE_FIRST: {_BLANK: VALUE_FIRST, _TOKEN: VALUE, b'"': QUOTED},
    VALUE: {_TOKEN: VALUE, _BLANK: VALUE_BLANK, b";": NAME_FIRST, b"\r": LINE_LF},
    QUOTED: {_QUOTED_TEXT: QUOTED, b"\\": QUOTED_PAIR, b'"': QUOTED_END},
    QUOTED_PAIR: {_TEXT: QUOTED},
    QUOTED_END: {_BLANK: VALUE_BLANK, b";": NAME_FIRST, b"\r": LINE_LF},
    VALUE_BLANK: {_BLANK: VALUE_BLANK, b";": NAME_FIRST},
    LINE_LF: {b"\n": LINE},
    # *( name ":" value CRLF ) CRLF
    TRAILER_FIRST: {_TOKEN: TRAILER_NAME, b"\r": END_LF},
    TRAILER_NAME: {_TOKEN: TRAILER_NAME, b":": TRAILER_VALUE},
    TRAILER_VALUE: {_TEXT: TRAILER_VALUE, b"\r": TRAILER_LF},
    TRAILER_LF: {b"\n": FIELD},
    END_LF: {b"\n": END},
}
# Services that pad the size with blanks are common enough; on the way to one it stays an error.
_LENIENT_RULES: Final = {
    state: {**rules, b"\r": LINE_LF} if state in (SIZE_BLANK, NAME_BLANK, VALUE_BLANK) else rules
    for state, rules in _RULES.items()
}


def _table(rules: dict[int, dict[bytes, int]]) -> tuple[bytes, ...]:
    """Return, for each state, the next state for each of the 256 bytes."""
    rows = [bytearray(256) for _ in range(END_LF + 1)]
    for state, transitions in rules.items():
        for accepted, target in transitions.items():
            for byte in accepted:
                rows[state][byte] = target
    return tuple(map(bytes, rows))


STRICT_TABLE: Final = _table(_RULES)
LENIENT_TABLE: Final = _table(_LENIENT_RULES)


# -- lines that came whole -------------------------------------------------------------------------

_NAME_PART: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_QUOTED_PART: Final = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*+"'
_VALUE_PART: Final = rb"[ \t]*+=[ \t]*+(?:" + _NAME_PART + rb"|" + _QUOTED_PART + rb")"
_EXTENSION: Final = rb"[ \t]*+;[ \t]*+" + _NAME_PART + rb"(?:" + _VALUE_PART + rb")?+"
_ANY_SIZE: Final = rb"([0-9A-Fa-f]{1,16})(?:" + _EXTENSION + rb")*+"
_BARE_SIZE: Final = rb"([1-9A-Fa-f][0-9A-Fa-f]{0,6}|[1-7][0-9A-Fa-f]{7})"


def _lines(pattern: bytes) -> dict[int, re.Pattern[bytes]]:
    """Return the pattern of a first chunk's line, and of one behind the data of another."""
    return {SIZE_FIRST: re.compile(pattern), DATA_CR: re.compile(rb"\r\n" + pattern)}


BARE_LINE: Final = _lines(rb"(?:" + _BARE_SIZE + rb"\r\n|0\r\n\r\n)")
"""A line that nearly every chunk has, as we would write it; the last chunk's with an empty trailer section,
for which the group is None."""
STRICT_LINE: Final = _lines(_ANY_SIZE + rb"\r\n")
LENIENT_LINE: Final = _lines(_ANY_SIZE + rb"[ \t]*+\r\n")
"""Any line that the tables take, for speed; the size may be too large. What these do not match is the
tables' to judge."""

OVERLONG_SIZE: Final = re.compile(
    rb"[0-9A-Fa-f]{17}|0*(?:[89A-Fa-f][0-9A-Fa-f]{7}|[1-9A-Fa-f][0-9A-Fa-f]{8})"
)
"""How a line begins, complete or not, with 17 digits or more than ``MAX_CHUNK``: others might cut that off or
wrap it around."""
