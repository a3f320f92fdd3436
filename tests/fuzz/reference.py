"""HTTP/1 read by rules of its own (RFC 9112), strictly: no code of the parsers under test is used here."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import quote

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(
    rb"(%b) (/[\x21\x22\x24-\x7e]*|\*|[Hh][Tt][Tt][Pp][Ss]?://[\x21\x22\x24-\x7e]+) HTTP/1\.([01])" % TOKEN
)
RAW_REQUEST_LINE = re.compile(REQUEST_LINE.pattern.replace(rb"\x24-\x7e", rb"\x24-\x7e\x80-\xff"))
"""The same with raw UTF-8 in the target."""
STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?")
FIELD_LINE = re.compile(rb"(%b):([\t\x20-\x7e\x80-\xff]*)" % TOKEN)
HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+)(?::[0-9]*)?")
CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,16})((?:[ \t]*;[ \t]*%b(?:[ \t]*=[ \t]*(?:%b|\"(?:[^\"\\\r\n]|\\.)*\"))?)*)([ \t]*)\r\n"
    % (TOKEN, TOKEN)
)

Fields = list[tuple[bytes, bytes]]


def head(data: bytes, first: re.Pattern[bytes]) -> tuple[re.Match[bytes], Fields]:
    """First line and fields (names in lower case) of exactly one head; AssertionError if it is none."""
    assert data.endswith(b"\r\n\r\n"), "no empty line at the end"
    lines = data[:-4].split(b"\r\n")
    start = first.fullmatch(lines[0])
    assert start, f"first line {lines[0]!r}"
    fields = []
    for line in lines[1:]:
        match = FIELD_LINE.fullmatch(line)
        assert match, f"field line {line!r}"
        fields.append((match[1].lower(), match[2].strip(b" \t")))
    return start, fields


def encoded(target: bytes) -> bytes:
    """``target`` with its UTF-8 percent-encoded; AssertionError if it is none."""
    try:
        text = target.decode()
    except UnicodeDecodeError:
        raise AssertionError("not UTF-8") from None
    return re.sub("[^\0-\x7f]+", lambda match: quote(match[0]), text).encode()


def values(fields: Fields, name: bytes) -> list[bytes]:
    return [value for key, value in fields if key == name]


def framing(fields: Fields) -> int | None:
    """Octets of the body, -1 for chunks, None where no field says; AssertionError for a contradiction."""
    lengths, codings = values(fields, b"content-length"), values(fields, b"transfer-encoding")
    assert len(lengths) + len(codings) <= 1, f"{lengths} and {codings}"
    if codings:
        assert codings[0].lower() == b"chunked", codings
        return -1
    if lengths:
        assert re.fullmatch(rb"[0-9]{1,19}", lengths[0]), lengths
        return int(lengths[0])
    return None

BARE_LINE = re.compile(rb"(0|[1-9A-Fa-f][0-9A-Fa-f]{0,7})()()\r\n")
"""A chunk's line as we write it."""


class Chunked(NamedTuple):
    """A whole chunked body: where it ends, what is in it, and the lines of its trailer fields."""

    end: int
    content: bytes
    trailers: list[bytes]


def chunked(data: bytes, lenient: bool, lines: re.Pattern[bytes] = CHUNK_LINE) -> Chunked | None:
    """The chunked body at the start of ``data``; None if it is cut short, AssertionError if it is none."""
    at, content, trailers = 0, b"", []
    while True:
        line = lines.match(data, at)
        if line is None:
            assert b"\r\n" not in data[at:], f"chunk line {data[at : at + 40]!r}"
            return None
        assert lenient or not line[3], "blanks behind a chunk line"
        size = int(line[1], 16)
        at = line.end()
        if not size:
            break
        if len(data) < at + size + 2:
            return None
        content += data[at : at + size]
        at += size
        assert data[at : at + 2] == b"\r\n", "no line end behind a chunk"
        at += 2
    while not data.startswith(b"\r\n", at):
        end = data.find(b"\r\n", at)
        if end < 0:
            return None
        trailers.append(data[at:end])
        assert FIELD_LINE.fullmatch(trailers[-1]), f"trailer {trailers[-1]!r}"
        at = end + 2
    return Chunked(at + 2, content, trailers)
