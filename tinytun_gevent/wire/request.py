"""Request heads: a visitor's is read and checked, and written anew for the local service."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

from httptools import HttpRequestParser

from tinytun_gevent.errors import MessageError
from tinytun_gevent.wire import fields as rules
from tinytun_gevent.wire.claims import canonical, is_claim
from tinytun_gevent.wire.fields import (
    DROP,
    NOTE,
    REQUEST,
    Fields,
    HeadLimits,
    normalize_host,
)
from tinytun_gevent.wire.forwarded import Forwarding

IDEMPOTENT: Final = frozenset({b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"})
"""Methods that may be sent once more (RFC 9110 section 9.2.2)."""

_VERSIONS: Final = {b"HTTP/1.1": 1, b"HTTP/1.0": 0}
_VERSION: Final = re.compile(rb"HTTP/[1-9]\.[0-9]")
_TOKEN: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_TARGET: Final = re.compile(rb"[\x21\x22\x24-\x7e]+")  # RFC 9112 section 3.2 has no fragments
_ASCII: Final = bytes(range(0x80))
_ENCODED: Final = tuple(b"%c" % byte if byte < 0x80 else b"%%%02X" % byte for byte in range(256))
_LINES: Final = (b"POST / HTTP/1.0\r\n", b"POST / HTTP/1.1\r\n")

_REMEMBERED: Final = 2048
"""Bytes of field lines that are remembered with what was read in them: a browser sends the same lines
with one request after another, and those of a page's parts differ in few ways."""
_FRAMING_SIZES: Final = frozenset(map(len, rules.FRAMING))
_ABSOLUTE: Final = re.compile(rb"https?://([^/?]+)(.*)", re.IGNORECASE)

_REQUEST_KINDS: Final = {
    **rules.OWN,
    b"host": DROP,
    b"trailer": DROP,  # it announces what does not pass
    **dict.fromkeys((b"accept", b"authorization", b"expect"), NOTE),
}


@dataclass(slots=True)
class RequestHead:
    """A visitor's request, validated, without what belongs to his own connection only."""

    method: bytes
    target: bytes
    """Origin form (``/path?query``), or ``*``; an absolute form has been taken apart, raw UTF-8 encoded."""
    minor: int
    """Minor version: HTTP/1.0 or HTTP/1.1."""
    host: str
    """For routing: lower case, without port and trailing dot; IPv6 literals in brackets."""
    host_field: bytes
    """As the visitor wrote it: the Host field, or the authority of an absolute form."""
    fields: Fields
    """To be forwarded, in order; Content-Length or Transfer-Encoding last, in canonical form. Other
    requests may have the same list: replace it, do not change it."""
    claims: Fields
    """What nobody may say but a trusted proxy (``wire.claims``), as received: for ``client_from_forwarding``
    and ``TrustedFields``, and nothing else."""
    keep_alive: bool
    """The visitor's connection may carry another request."""
    upgrade: bytes
    """The protocols that he asks for, without HTTP/2's; blank if none."""
    length: int
    """Octets of the body (0: none), or ``CHUNKED``."""
    expect_continue: bool
    """He may wait for a 100 before he sends the body."""
    connection_auth: bool
    """NTLM or Negotiate: the stream to the service belongs to this visitor from now on."""
    accept: bytes
    """The Accept field, for the choice of an error page's format."""


def parse_request_head(head: bytes, limits: HeadLimits = REQUEST) -> RequestHead:
    """Read one request head, which ends with its empty line.

    ``limits`` may be wider for a peer, whose requests have grown by its own fields.
    Raises ``MessageError`` with 400, 414, 417, 431, 501 or 505.
    """
    if len(head) > limits.bytes:
        raise rules.too_large(head, limits.bytes)
    if head[:1] == b"\r":
        head = head[rules.past_blank_lines(head, 0) :]
    line_end = head.find(b"\r\n")
    method, target, minor = _request_line(head[:line_end], limits.bytes - len(head))
    authority = b""
    if target[0] != 0x2F:  # not "/": absolute form or "*"
        target, authority = _absolute_form(method, target)
    lines = head[line_end + 2 :]
    if len(lines) > limits.field_bytes:
        rules.check_lines(lines, limits.field_bytes)
    read = _remembered_fields if len(lines) <= _REMEMBERED else _read_fields
    return RequestHead(method, target, *read(lines, minor, authority, limits.fields))


class _RequestFields(NamedTuple):
    """What follows from the field lines of a request: see :class:`RequestHead`, whose order it has."""

    minor: int
    host: str
    host_field: bytes
    fields: Fields
    claims: Fields
    keep_alive: bool
    upgrade: bytes
    length: int
    expect_continue: bool
    connection_auth: bool
    accept: bytes


def _read_fields(lines: bytes, minor: int, authority: bytes, most: int) -> _RequestFields:
    """Read the field lines, which end with the empty line; ``authority`` is an absolute form's.

    The parser is shown them behind a request line of ours: what it thinks of the visitor's depends on
    methods that it happens to know, and ``_request_line`` is stricter about the rest.
    """
    raw = rules.read_fields(HttpRequestParser, _LINES[minor] + lines, most, 400)
    sorted_out, noted = rules.sort_fields(raw, _REQUEST_KINDS)
    fields, claims = _part_claims(sorted_out)

    host_field = noted.get(b"host")
    if authority or host_field is None:
        if host_field is not None:
            normalize_host(host_field)  # replaced (RFC 9112 section 3.2.2), but it must make sense
        elif minor or not authority:
            raise MessageError("the request has no Host field")
        host_field = authority
    host = normalize_host(host_field)

    options = rules.NO_OPTIONS
    if b"connection" in noted:
        options = rules.take_options(noted[b"connection"], 400)
        fields = rules.without_named(fields, options.named)
    length = rules.take_framing(noted, minor, 400, fields)
    expects = b"expect" in noted and b"expect" not in options.named
    if expects:
        fields = _check_expectation(noted[b"expect"], minor, fields)
    return _RequestFields(
        minor,
        host,
        host_field,
        fields,
        claims,
        options.persistent(minor),
        _wanted_protocols(noted.get(b"upgrade", b"")) if options.upgrade and minor else b"",
        length or 0,
        expects and minor == 1 and bool(length),
        rules.is_bound_auth(noted.get(b"authorization")),
        noted.get(b"accept", b""),
    )


_remembered_fields = lru_cache(maxsize=512)(_read_fields)


def _request_line(line: bytes, room: int) -> tuple[bytes, bytes, int]:
    """Split a request line at its two spaces, exactly (RFC 9112 section 3).

    The target may be ``room`` bytes longer than it came.
    """
    parts = line.split(b" ")
    if len(parts) != 3:
        raise MessageError("the request line is not 'method target version'")
    method, target, version = parts
    minor = _VERSIONS.get(version)
    if minor is None:
        if _VERSION.fullmatch(version):
            raise MessageError("only HTTP/1.0 and HTTP/1.1 are spoken here", 505)
        raise MessageError("the request line has no valid HTTP version")
    if method not in IDEMPOTENT:
        if not _TOKEN.fullmatch(method):
            raise MessageError("the method is not a token")
        if method == b"CONNECT":  # tunnels are opened elsewhere (RFC 9110 section 9.3.6)
            raise MessageError("CONNECT is not implemented here", 501)
    if not _TARGET.fullmatch(target):
        target = _percent_encoded(target, room)
    return method, target, minor


def _percent_encoded(target: bytes, room: int) -> bytes:
    """Write the raw UTF-8 of a target as RFC 3986 section 2.1 does, in the path as Go, in the query too.

    Scripts and old programs send it; nginx and Go accept it. Nothing else is changed.
    """
    growth = 2 * len(target.translate(None, _ASCII))
    try:
        target.decode()
    except UnicodeDecodeError:
        growth = 0
    if growth > room:
        raise MessageError("the request target, percent-encoded, is too long", 414)
    encoded = b"".join([_ENCODED[byte] for byte in target]) if growth else target
    if not _TARGET.fullmatch(encoded):
        raise MessageError("the request target is malformed")
    return encoded


def _absolute_form(method: bytes, target: bytes) -> tuple[bytes, bytes]:
    """Return an absolute form's origin form and authority (RFC 9112 sections 3.2.2 and 3.2.4)."""
    if target == b"*":
        if method != b"OPTIONS":
            raise MessageError("the target '*' is for OPTIONS only")
        return target, b""
    match = _ABSOLUTE.fullmatch(target)
    if match is None or not match[1]:
        raise MessageError("the request target is malformed")
    path = match[2]
    if not path:
        return b"*" if method == b"OPTIONS" else b"/", match[1]
    return path if path[:1] == b"/" else b"/" + path, match[1]


def _check_expectation(value: bytes, minor: int, fields: Fields) -> Fields:
    """Refuse what RFC 9110 section 10.1.1 does not define; HTTP/1.0 cannot expect anything."""
    if not minor:
        return [pair for pair in fields if pair[0].lower() != b"expect"]
    if value.lower() != b"100-continue":
        raise MessageError("the only expectation understood is 100-continue", 417)
    return fields


def _wanted_protocols(value: bytes) -> bytes:
    """Drop HTTP/2 from an Upgrade field: behind such a 101 requests would pass unseen."""
    wanted = [token.strip(b" \t") for token in value.split(b",")]
    return b", ".join(
        token for token in wanted if token and token.split(b"/")[0].lower() not in (b"h2c", b"h2", b"http")
    )


def _part_claims(fields: Fields) -> tuple[Fields, Fields]:
    """Return the fields to pass on and the claims, both in order.

    What a CGI or WSGI program would take for a field that frames the message is refused.
    """
    kept: Fields = []
    claims: Fields = []
    for pair in fields:
        name = pair[0]
        if is_claim(name):
            claims.append(pair)
            continue
        if len(name) in _FRAMING_SIZES and canonical(name) in rules.FRAMING:
            raise MessageError("a field name imitates Content-Length or Transfer-Encoding")
        kept.append(pair)
    return kept, claims


def build_request_head(
    head: RequestHead,
    forwarding: Forwarding,
    host_override: bytes | None = None,
    *,
    fields: Fields | None = None,
) -> bytes:
    """Return the head that the local service gets: in HTTP/1.1, whatever the visitor speaks (RFC 9112 §2.3).

    ``host_override`` replaces the Host field (the tunnel's ``x-tinytun-host-header``); the
    visitor's own is in X-Forwarded-Host either way. ``fields`` replace those of the head.
    """
    connection = b""
    if head.upgrade:
        connection = b"Connection: Upgrade\r\nUpgrade: %b\r\n" % head.upgrade
    return b"%b %b HTTP/1.1\r\nHost: %b\r\n%b%b%b\r\n" % (
        head.method,
        head.target,
        host_override or head.host_field,
        rules.lines(head.fields if fields is None else fields),
        forwarding.lines(head.host_field),
        connection,
    )
