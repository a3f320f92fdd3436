"""What request and response heads have in common: limits, where one ends, its fields and their rules.

Where a ``status`` is passed in, errors have it: 400 for a visitor's request, 502 for the local
service's response.
"""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import AddressValueError, IPv6Address
from typing import Final, NamedTuple

import httptools

from tinytun_gevent.errors import MessageError

Fields = list[tuple[bytes, bytes]]
"""Field lines in order, names as sent; llhttp leaves blanks behind a value where they are."""


class HeadLimits(NamedTuple):
    """The most that a head may have: bytes in all, field lines, and bytes of a request's field line."""

    bytes: int
    fields: int
    field_bytes: int = 16 * 1024

    def of_a_peer(self) -> HeadLimits:
        """Return the limits for a request of a peer server, which has written it anew.

        It adds about 200 bytes beside the Host field, in fewer than 10 fields, and a blank to each field.
        """
        return HeadLimits(self.bytes + self.fields + 1024, self.fields + 10, self.field_bytes + 64)


REQUEST: Final = HeadLimits(32 * 1024, 100)
"""Cookies and tokens of some organisations need more than nginx's 8 KiB a field; Go takes 1 MiB."""
RESPONSE: Final = HeadLimits(64 * 1024, 200)

CHUNKED: Final = -1
"""A body's ``length``: it comes in chunks (``wire.body.ChunkedBody``)."""

DROP, NOTE = range(2)
"""What becomes of a field that is not simply passed on: ours to write; passed on and looked at."""

HOP_BY_HOP: Final = (b"connection", b"keep-alive", b"proxy-connection", b"te", b"upgrade", b"http2-settings")
"""They belong to one connection (RFC 9110 section 7.6.1)."""
FRAMING: Final = (b"content-length", b"transfer-encoding")
OWN: Final = dict.fromkeys(HOP_BY_HOP + FRAMING, DROP)

# Stripping these because Connection names them would change how the message is framed or routed.
_NOT_NAMEABLE: Final = frozenset({b"host", b"content-length", b"transfer-encoding", b"trailer"})
_HOST: Final = re.compile(rb"(\[[0-9A-Fa-f:.]{2,45}\]|[0-9A-Za-z._-]{1,255})(?::([0-9]{0,5}))?")
_BOUND_AUTH: Final = re.compile(rb"(?:^|[ \t,])(?:ntlm|negotiate)(?:$|[ \t,])", re.IGNORECASE)
_BLANK_LINES: Final = 4  # in front of a request; RFC 9112 section 2.2 asks for "at least one"
_MAX_LENGTH: Final = 2**63 - 1  # what other implementations can count to


class Options(NamedTuple):
    """A Connection field, taken apart."""

    close: bool = False
    keep_alive: bool = False
    upgrade: bool = False
    named: frozenset[bytes] = frozenset()
    """Fields that it names for removal, in lower case."""

    def persistent(self, minor: int) -> bool:
        """Whether the connection may carry another message (RFC 9112 section 9.3)."""
        return not self.close and (minor > 0 or self.keep_alive)


NO_OPTIONS: Final = Options()


class _Collector:
    """What llhttp calls back: keeps the fields."""

    __slots__ = ("fields",)

    def __init__(self) -> None:
        self.fields: Fields = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name, value))


def head_end(buffer: bytes | bytearray, start: int = 0, searched: int = 0) -> int:
    """Return the index just past the request head that begins at ``start``, or -1 if it is incomplete.

    Empty lines in front of a request are part of the result (RFC 9112 section 2.2); the
    parser drops them. A line that ends in a bare LF also ends the head: it cannot become a
    valid one, and the parser refuses it with the status that fits. ``searched`` is how much of
    the buffer an earlier call has seen, which keeps a head that arrives in drops cheap.
    """
    begin = start if buffer[start : start + 1] != b"\r" else past_blank_lines(buffer, start)
    end = buffer.find(b"\r\n\r\n", max(begin, searched - 3))
    if end >= 0:
        return end + 4
    fresh = max(begin, searched)
    if buffer.count(b"\n", fresh) != buffer.count(b"\r\n", max(begin, fresh - 1)):
        return len(buffer)
    return -1


def response_head_end(buffer: bytes | bytearray, searched: int = 0) -> int:
    """Return the index just past the response head at the beginning, or -1 if it is incomplete.

    Its lines end in CRLF or a bare LF (RFC 9112 section 2.2). ``searched`` is as for :func:`head_end`.
    """
    begin = max(0, searched - 2)
    end = buffer.find(b"\n\r\n", begin)
    bare = buffer.find(b"\n\n", begin) if end < 0 else buffer.find(b"\n\n", begin, end + 1)
    if bare >= 0:
        return bare + 2
    return end + 3 if end >= 0 else -1


def too_large(buffer: bytes | bytearray, limit: int = REQUEST.bytes) -> MessageError:
    """Return the error for a request head over ``limit``: 414 if its first line alone is, else 431."""
    if buffer.find(b"\r\n", 2, limit) < 0:
        return MessageError(f"the request line is longer than {limit} bytes", 414)
    return MessageError(f"the request head is larger than {limit} bytes", 431)


def check_lines(lines: bytes, limit: int) -> None:
    """Raise ``MessageError`` (431) if one of the field lines is longer than ``limit`` bytes."""
    if max(map(len, lines.split(b"\r\n"))) > limit:
        raise MessageError(f"a field is longer than {limit} bytes", 431)


def response_too_large(limit: int = RESPONSE.bytes) -> MessageError:
    """Return the error for a response head over ``limit`` bytes."""
    return MessageError(f"the response head is larger than {limit} bytes", 502)


def past_blank_lines(buffer: bytes | bytearray, start: int) -> int:
    """Return the index behind the empty lines at ``start``, which are skipped up to a bound."""
    limit = start + 2 * _BLANK_LINES
    while start < limit and buffer.startswith(b"\r\n", start):
        start += 2
    return start


def read_fields(
    parser: type[httptools.HttpRequestParser] | type[httptools.HttpResponseParser],
    head: bytes,
    most: int,
    status: int,
) -> Fields:
    """Let a new llhttp parser read ``head``, which is exactly one head; return all its fields.

    More than ``most`` of them raise 431 instead of 400.
    """
    count = head.count(b"\n") - 2
    if count > most:
        raise MessageError(f"the head has more than {most} fields", 431 if status == 400 else status)
    collector = _Collector()
    try:
        parser(collector).feed_data(head)
    except httptools.HttpParserUpgrade:
        pass  # it takes the wish to upgrade for the deed; the head has been read to its end
    except httptools.HttpParserError as error:
        raise MessageError(f"malformed head: {error}", status) from error
    # One line is one field and nothing follows the empty line, whatever llhttp lets pass.
    if len(collector.fields) != count or not head.endswith(b"\r\n\r\n"):
        raise MessageError("malformed head: lines and fields do not agree", status)
    return collector.fields


def sort_fields(raw: Fields, kinds: dict[bytes, int]) -> tuple[Fields, dict[bytes, bytes]]:
    """Return the fields to pass on, and the values to look at (by lower-case name).

    Lines of one name are noted as a list (RFC 9110 section 5.3), on which Host and Content-Length
    then fail.
    """
    fields: Fields = []
    noted: dict[bytes, bytes] = {}
    for pair in raw:
        name = pair[0].lower()
        kind = kinds.get(name)
        if kind is None:
            fields.append(pair)
        else:
            if kind == NOTE:
                fields.append(pair)
            value = pair[1].rstrip(b" \t")
            noted[name] = noted[name] + b", " + value if name in noted else value
    return fields, noted


def take_framing(noted: dict[bytes, bytes], minor: int, status: int, fields: Fields) -> int | None:
    """Return how long the body is (None: no field says so); appends the field that says so.

    RFC 9112 sections 6.1 to 6.3; where they let a recipient repair, this refuses.
    """
    coding = noted.get(b"transfer-encoding")
    size = noted.get(b"content-length")
    if coding is None:
        if size is None:
            return None
        if not size.isdigit() or len(size) > 19 or int(size) > _MAX_LENGTH:
            raise MessageError("Content-Length is not one number below 2**63", status)
        length = int(size)
        fields.append((b"Content-Length", b"%d" % length))
        return length
    if size is not None:
        raise MessageError("Content-Length and Transfer-Encoding exclude each other", status)
    if not minor and status == 400:  # some services answer so all the same (RFC 9112 section 6.1)
        raise MessageError("HTTP/1.0 has no Transfer-Encoding", status)
    codings = coding.lower().split(b",")
    if codings != [b"chunked"]:
        unknown = status == 400 and codings[-1].strip(b" \t") == b"chunked"
        raise MessageError("the only Transfer-Encoding understood is chunked", 501 if unknown else status)
    fields.append((b"Transfer-Encoding", b"chunked"))
    return CHUNKED


def take_options(value: bytes, status: int) -> Options:
    """Take a Connection field apart; those that everybody sends are remembered."""
    return _cached_options(value, status) if len(value) <= 64 else _options(value, status)


def _options(value: bytes, status: int) -> Options:
    names = {name.strip(b" \t") for name in value.lower().split(b",")}
    if not names.isdisjoint(_NOT_NAMEABLE):
        raise MessageError("Connection names a field that frames or routes the message", status)
    named = frozenset(names - {b"", b"close", b"keep-alive", b"upgrade"})
    return Options(b"close" in names, b"keep-alive" in names, b"upgrade" in names, named)


_cached_options = lru_cache(maxsize=256)(_options)


def is_bound_auth(value: bytes | None) -> bool:
    """Whether an Authorization or WWW-Authenticate field is about the connection: NTLM, Negotiate."""
    return value is not None and _BOUND_AUTH.search(value) is not None


def without_named(fields: Fields, names: frozenset[bytes]) -> Fields:
    """Return ``fields`` without those that Connection named."""
    return [pair for pair in fields if pair[0].lower() not in names] if names else fields


def lines(fields: Fields) -> bytes:
    """Return the field lines, each with its CRLF."""
    return b"\r\n".join(map(b": ".join, fields)) + b"\r\n" if fields else b""


@lru_cache(maxsize=1024)
def normalize_host(value: bytes) -> str:
    """Return a Host field's host for comparison: lower case, no port, no trailing dot.

    IPv6 literals keep their brackets. Raises ``MessageError`` (400) for everything but a name or
    an address with an optional port, so for a list, ``@``, ``/`` or a space, and for a blank one.
    """
    match = _HOST.fullmatch(value)
    if match is None or (match[2] and not 0 < int(match[2]) < 65536):
        raise MessageError("the Host field is malformed")
    host = match[1].decode("ascii").lower().removesuffix(".")
    try:
        if host[:1] == "[":
            IPv6Address(host[1:-1])
    except AddressValueError:
        host = ""
    if not host:
        raise MessageError("the Host field is malformed")
    return host
