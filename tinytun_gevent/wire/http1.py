"""HTTP/1 heads at the server's edge: bytes in, values out, bytes out again.

One exchange passes through here like this::

    end = head_end(buffer)                       # -1: read more; too_large() once over the limit
    request = parse_request_head(buffer[:end])   # then route by request.host
    build_request_head(request, forwarding)      # for the local service
    response = parse_response_head(head, request.method, bool(request.upgrade))
    build_response_head(response, close=..., minor_visitor=request.minor)

llhttp (``httptools``) reads every head with a parser of its own, which gets exactly the bytes
of that head. What it lets pass and must not be forwarded is refused here. An ambiguous message
is never repaired, because the service behind us might read it otherwise than we do (request
smuggling, RFC 9112 section 11.2). Bodies are framed by ``wire.body``.

A head is rebuilt, not copied. ``Connection`` and what it names, ``Keep-Alive``,
``Proxy-Connection``, ``TE`` and ``Upgrade`` belong to one connection (RFC 9110 section 7.6.1)
and are written anew for the next one, as are ``Host`` and the forwarding fields.

Everything malformed raises ``MessageError``, whose ``status`` answers the *visitor*.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

from httptools import HttpRequestParser, HttpResponseParser

from tinytun_gevent.errors import MessageError
from tinytun_gevent.wire import fields as rules
from tinytun_gevent.wire.fields import CHUNKED, DROP, FORWARDING, NOTE, Fields, normalize_host
from tinytun_gevent.wire.forwarded import Forwarding, client_from_forwarding

__all__ = [
    "CHUNKED",
    "IDEMPOTENT",
    "INTERIM_MAX",
    "REQUEST",
    "RESPONSE",
    "UNTIL_CLOSE",
    "Forwarding",
    "HeadLimits",
    "RequestHead",
    "ResponseHead",
    "build_request_head",
    "build_response_head",
    "client_from_forwarding",
    "head_end",
    "normalize_host",
    "parse_request_head",
    "parse_response_head",
    "response_too_large",
    "too_large",
]


class HeadLimits(NamedTuple):
    """The most that a head may have: bytes in all, and field lines."""

    bytes: int
    fields: int


REQUEST: Final = HeadLimits(16 * 1024, 100)
RESPONSE: Final = HeadLimits(64 * 1024, 200)
INTERIM_MAX: Final = 64
"""1xx answers to one request; a service that sends more has gone mad."""

UNTIL_CLOSE: Final = -2
"""A response's ``length``: its body ends with the connection."""

IDEMPOTENT: Final = frozenset({b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"})
"""Methods that may be sent once more (RFC 9110 section 9.2.2)."""

# Shown to llhttp as they are. It refuses those that it does not know, though any token is a method
# (RFC 9110 section 9.1), and has odd rules for some that it knows: instead of others it is shown POST.
_METHODS: Final = IDEMPOTENT | {b"POST", b"PATCH"}
_VERSIONS: Final = {b"HTTP/1.1": 1, b"HTTP/1.0": 0}
_VERSION: Final = re.compile(rb"HTTP/[1-9]\.[0-9]")
_TOKEN: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_ABSOLUTE: Final = re.compile(rb"https?://([^/?]+)(.*)", re.IGNORECASE)
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]{0,512}))?")
_BOUND_AUTH: Final = re.compile(rb"(?:^|[ \t,])(?:ntlm|negotiate)(?:$|[ \t,])", re.IGNORECASE)
_BLANK_LINES: Final = 4  # in front of a request; RFC 9112 section 2.2 asks for "at least one"

_REQUEST_KINDS: Final = {
    **rules.OWN,
    b"host": DROP,
    **dict.fromkeys((b"accept", b"authorization", b"expect"), NOTE),
    **dict.fromkeys(rules.FORWARDING_FIELDS, FORWARDING),
}
_RESPONSE_KINDS: Final = {**rules.OWN, b"www-authenticate": NOTE}
# WSGI and CGI read "-" as "_": these would reach a program as the fields that we replace or refuse.
_DISGUISED: Final = {name.replace(b"-", b"_"): kind for name, kind in _REQUEST_KINDS.items() if b"-" in name}


@dataclass(slots=True)
class RequestHead:
    """A visitor's request, validated, without what belongs to his own connection only."""

    method: bytes
    target: bytes
    """Origin form (``/path?query``), or ``*``; an absolute form has been taken apart."""
    minor: int
    """Minor version: HTTP/1.0 or HTTP/1.1."""
    host: str
    """For routing: lower case, without port and trailing dot; IPv6 literals in brackets."""
    host_field: bytes
    """As the visitor wrote it: the Host field, or the authority of an absolute form."""
    fields: Fields
    """To be forwarded, in order; Content-Length or Transfer-Encoding last, in canonical form."""
    forwarding: Fields
    """X-Forwarded-* and the like as received: for ``client_from_forwarding`` and nothing else."""
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


@dataclass(slots=True)
class ResponseHead:
    """The local service's response, validated, without what belongs to its own connection."""

    status: int
    reason: bytes
    minor: int
    fields: Fields
    """To be forwarded, in order; Content-Length or Transfer-Encoding last, in canonical form
    (also where ``length`` is 0 because there is no body: HEAD and 304)."""
    keep_alive: bool
    """The service lets its connection be used again once the response is complete."""
    length: int
    """Octets of the body (0: none), ``CHUNKED``, or ``UNTIL_CLOSE``."""
    upgrade: bytes = b""
    """The protocol that follows a 101; blank for every other status."""
    connection_auth: bool = False
    """NTLM or Negotiate is asked for: see ``RequestHead.connection_auth``."""


# -- finding a head ------------------------------------------------------------------------------


def head_end(buffer: bytes | bytearray, start: int = 0, searched: int = 0) -> int:
    """Return the index just past the head that begins at ``start``, or -1 if it is incomplete.

    Empty lines in front of a request are part of the result (RFC 9112 section 2.2); the
    parser drops them. A line that ends in a bare LF also ends the head: it cannot become a
    valid one, and the parser refuses it with the status that fits. ``searched`` is how much of
    the buffer an earlier call has seen, which keeps a head that arrives in drops cheap.
    """
    begin = start if buffer[start : start + 1] != b"\r" else _past_blank_lines(buffer, start)
    end = buffer.find(b"\r\n\r\n", max(begin, searched - 3))
    if end >= 0:
        return end + 4
    fresh = max(begin, searched)
    if buffer.count(b"\n", fresh) != buffer.count(b"\r\n", max(begin, fresh - 1)):
        return len(buffer)
    return -1


def too_large(buffer: bytes | bytearray, limit: int = REQUEST.bytes) -> MessageError:
    """Return the error for a request head over ``limit``: 414 if its first line alone is, else 431."""
    if buffer.find(b"\r\n", 2, limit) < 0:
        return MessageError(f"the request line is longer than {limit} bytes", 414)
    return MessageError(f"the request head is larger than {limit} bytes", 431)


def response_too_large(limit: int = RESPONSE.bytes) -> MessageError:
    """Return the error for a response head over ``limit`` bytes."""
    return MessageError(f"the response head is larger than {limit} bytes", 502)


def _past_blank_lines(buffer: bytes | bytearray, start: int) -> int:
    limit = start + 2 * _BLANK_LINES
    while start < limit and buffer.startswith(b"\r\n", start):
        start += 2
    return start


# -- requests ------------------------------------------------------------------------------------


def parse_request_head(head: bytes, limits: HeadLimits = REQUEST) -> RequestHead:
    """Read one request head, which ends with its empty line.

    ``limits`` may be wider for a peer, whose requests have grown by its own fields.
    Raises ``MessageError`` with 400, 414, 417, 431, 501 or 505.
    """
    if len(head) > limits.bytes:
        raise too_large(head)
    if head[:1] == b"\r":
        head = head[_past_blank_lines(head, 0) :]
    method, target, minor = _request_line(head[: head.find(b"\r\n")])
    probe = head if method in _METHODS else b"POST" + head[len(method) :]
    raw = rules.read_fields(HttpRequestParser, probe, 400)
    if len(raw) > limits.fields:
        raise MessageError(f"the request head has more than {limits.fields} fields", 431)
    fields, noted, forwarding = rules.sort_fields(raw, _REQUEST_KINDS)
    if 0x5F in head:  # "_"
        fields = _without_disguised(fields)

    host_field = noted.get(b"host")
    if target[0] != 0x2F:  # not "/": absolute form or "*"
        target, authority = _absolute_form(method, target)
        if host_field is not None:
            normalize_host(host_field)  # replaced (RFC 9112 section 3.2.2), but it must make sense
        elif minor:
            raise MessageError("the request has no Host field")
        host_field = authority or host_field
    if host_field is None:
        raise MessageError("the request has no Host field")
    host = normalize_host(host_field)

    options = rules.NO_OPTIONS
    if b"connection" in noted:
        options = rules.take_options(noted[b"connection"], 400)
        fields = rules.without_named(fields, options.named)
    length = rules.take_framing(noted, minor, 400, fields)
    expects = b"expect" in noted and b"expect" not in options.named
    if expects:
        fields = _check_expectation(noted[b"expect"], minor, fields)
    return RequestHead(
        method,
        target,
        minor,
        host,
        host_field,
        fields,
        forwarding,
        options.persistent(minor),
        _wanted_protocols(noted.get(b"upgrade", b"")) if options.upgrade and minor else b"",
        length or 0,
        expects and minor == 1 and bool(length),
        b"authorization" in noted and _BOUND_AUTH.search(noted[b"authorization"]) is not None,
        noted.get(b"accept", b""),
    )


def _request_line(line: bytes) -> tuple[bytes, bytes, int]:
    """Split a request line at its two spaces, exactly; llhttp takes several, or no version."""
    parts = line.split(b" ")
    if len(parts) != 3:
        raise MessageError("the request line is not 'method target version'")
    method, target, version = parts
    minor = _VERSIONS.get(version)
    if minor is None:
        if _VERSION.fullmatch(version):
            raise MessageError("only HTTP/1.0 and HTTP/1.1 are spoken here", 505)
        raise MessageError("the request line has no valid HTTP version")
    if method not in _METHODS:
        if not _TOKEN.fullmatch(method):
            raise MessageError("the method is not a token")
        if method == b"CONNECT":  # tunnels are opened elsewhere (RFC 9110 section 9.3.6)
            raise MessageError("CONNECT is not implemented here", 501)
    if not target or b"#" in target:  # RFC 9112 section 3.2 has no fragments
        raise MessageError("the request target is malformed")
    return method, target, minor


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


def _without_disguised(fields: Fields) -> Fields:
    """Treat ``Content_Length`` as what a WSGI or CGI program would make of it."""
    kept = []
    for pair in fields:
        name = pair[0].lower()
        if b"_" in name:
            name = name.replace(b"-", b"_")
            kind = _DISGUISED.get(name)
            if kind == FORWARDING:
                continue
            if name in (b"content_length", b"transfer_encoding"):
                raise MessageError("a field name imitates Content-Length or Transfer-Encoding")
        kept.append(pair)
    return kept


def build_request_head(
    head: RequestHead, forwarding: Forwarding, host_override: bytes | None = None, *, http10: bool = False
) -> bytes:
    """Return the head that the local service gets.

    ``host_override`` replaces the Host field (the tunnel's ``x-tinytun-host-header``); the
    visitor's own is in X-Forwarded-Host either way. A request of an HTTP/1.0 visitor, or any
    with ``http10``, goes out as HTTP/1.0 with ``Connection: close``.
    """
    http10 = http10 or head.minor == 0
    if http10 and head.length == CHUNKED:
        raise ValueError("a chunked request cannot be sent as HTTP/1.0")
    connection = b""
    if http10:
        connection = b"Connection: close\r\n"
    elif head.upgrade:
        connection = b"Connection: Upgrade\r\nUpgrade: %b\r\n" % head.upgrade
    return b"%b %b HTTP/1.%d\r\nHost: %b\r\n%b%b%b\r\n" % (
        head.method,
        head.target,
        0 if http10 else 1,
        host_override or head.host_field,
        rules.lines(head.fields),
        forwarding.lines(head.host_field),
        connection,
    )


# -- responses -----------------------------------------------------------------------------------


def parse_response_head(
    head: bytes, method: bytes, upgrade_asked: bool, limits: HeadLimits = RESPONSE
) -> ResponseHead:
    """Read one response head, interim or final, which ends with its empty line.

    ``method`` is the request's (HEAD has no body to its answer); ``upgrade_asked`` says whether
    a protocol was offered, because a 101 is an answer to that only.
    Raises ``MessageError`` with 502.
    """
    if len(head) > limits.bytes:
        raise response_too_large(limits.bytes)
    minor, status, reason = _status_line(head[: head.find(b"\r\n")])
    raw = rules.read_fields(HttpResponseParser, head, 502)
    if len(raw) > limits.fields:
        raise MessageError(f"the response head has more than {limits.fields} fields", 502)
    fields, noted, _ = rules.sort_fields(raw, _RESPONSE_KINDS)
    options = rules.NO_OPTIONS
    if b"connection" in noted:
        options = rules.take_options(noted[b"connection"], 502)
        fields = rules.without_named(fields, options.named)

    bodiless = status < 200 or status == 204  # and no field about one (RFC 9110 section 8.6)
    declared = rules.take_framing(noted, minor, 502, [] if bodiless else fields)
    if bodiless or status == 304 or method == b"HEAD":
        length = 0
    else:
        length = UNTIL_CLOSE if declared is None else declared
    upgrade = noted.get(b"upgrade", b"")
    if status == 101:
        if not (upgrade_asked and upgrade):
            raise MessageError("the service switched protocols without being asked", 502)
    elif upgrade:
        if status == 426:  # an offer, which this status must carry (RFC 9110 section 15.5.22)
            fields += [(b"Connection", b"Upgrade"), (b"Upgrade", upgrade)]
        upgrade = b""
    return ResponseHead(
        status,
        reason,
        minor,
        fields,
        options.persistent(minor) and length != UNTIL_CLOSE and status != 101,
        length,
        upgrade,
        b"www-authenticate" in noted and _BOUND_AUTH.search(noted[b"www-authenticate"]) is not None,
    )


@lru_cache(maxsize=256)
def _status_line(line: bytes) -> tuple[int, int, bytes]:
    """Return minor version, status and reason; llhttp takes NUL in a reason and any three digits."""
    match = _STATUS_LINE.fullmatch(line)
    if match is None:
        raise MessageError("the service's status line is malformed", 502)
    return int(match[1]), int(match[2]), match[3] or b""


def build_response_head(head: ResponseHead, *, close: bool, minor_visitor: int) -> bytes:
    """Return the head that the visitor gets, with what his connection will do next.

    ``close`` says that it ends after this response, as it must after a body that lasts until the
    close. Raises ``MessageError`` (502) for a chunked body to an HTTP/1.0 visitor, who cannot
    read it: his request was sent as HTTP/1.0, so the service should have known.
    """
    fields = head.fields
    if minor_visitor == 0:
        if head.length == CHUNKED:
            raise MessageError("the service answered HTTP/1.0 in chunks", 502)
        fields = [pair for pair in fields if pair[0] != b"Transfer-Encoding"]  # of HEAD and 304
    connection = b""
    if head.status == 101:
        connection = b"Connection: Upgrade\r\nUpgrade: %b\r\n" % head.upgrade
    elif head.status >= 200:
        if close or head.length == UNTIL_CLOSE:
            connection = b"Connection: close\r\n"
        elif minor_visitor == 0:
            connection = b"Connection: keep-alive\r\n"
    return b"HTTP/1.1 %d %b\r\n%b%b\r\n" % (head.status, head.reason, rules.lines(fields), connection)
