"""Response heads: the local service's is read and checked, and written anew for the visitor."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from httptools import HttpResponseParser

from tinytun_gevent.errors import MessageError
from tinytun_gevent.wire import fields as rules
from tinytun_gevent.wire.fields import CHUNKED, DROP, NOTE, RESPONSE, Fields, HeadLimits
from tinytun_gevent.wire.keep_alive import KeepAlive, parse_keep_alive

INTERIM_MAX: Final = 64
"""1xx answers to one request; a service that sends more has gone mad."""

UNTIL_CLOSE: Final = -2
"""A response's ``length``: its body ends with the connection."""

_STATUS_LINE: Final = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]{0,512}))?")
_BARE_LF: Final = re.compile(rb"(?<!\r)\n")
_RESPONSE_KINDS: Final = {**rules.OWN, b"www-authenticate": NOTE}
_OF_CHUNKS: Final = (b"transfer-encoding", b"trailer")
_WITHHELD: Final = frozenset(name for name, kind in _RESPONSE_KINDS.items() if kind == DROP)


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
    withheld: frozenset[bytes] = _WITHHELD
    """Lower-case names of the trailer fields that may not pass: the same as in the head."""
    promise: KeepAlive | None = None
    """What the service says about how long its connection can be used."""


def parse_response_head(
    head: bytes, method: bytes, upgrade_asked: bool, limits: HeadLimits = RESPONSE
) -> ResponseHead:
    """Read one response head, interim or final, which ends with its empty line.

    A line may end in a bare LF, and a status may be any from 100 to 999, as for nginx and Go: the service
    is on the trusted side, and its head is written anew. ``method`` is the request's (HEAD has no body to
    its answer); ``upgrade_asked`` says whether a protocol was offered, because a 101 is an answer to that
    only. Raises ``MessageError`` with 502.
    """
    if len(head) > limits.bytes:
        raise rules.response_too_large(limits.bytes)
    try:
        (minor, status, reason), raw = _read_lines(head, limits.fields)
    except MessageError:
        if head.count(b"\n") == head.count(b"\r\n"):
            raise
        (minor, status, reason), raw = _read_lines(_BARE_LF.sub(b"\r\n", head), limits.fields)
    if status == 101 and not upgrade_asked:
        raise MessageError("the service switched protocols without being asked", 502)
    fields, noted = rules.sort_fields(raw, _RESPONSE_KINDS)
    options = rules.NO_OPTIONS
    if b"connection" in noted:
        options = rules.take_options(noted[b"connection"], 502)
        fields = rules.without_named(fields, options.named)

    bodiless = status < 200 or status == 204  # and no field about one (RFC 9110 section 8.6)
    declared = rules.take_framing(noted, minor, 502, [] if bodiless else fields)
    without = bodiless or status == 304 or method == b"HEAD"
    length = 0 if without else UNTIL_CLOSE if declared is None else declared
    upgrade = noted.get(b"upgrade", b"")
    if status == 101:
        if not upgrade:
            raise MessageError("the service switched protocols and does not say to which", 502)
    elif upgrade:
        if status == 426:  # an offer, which this status must carry (RFC 9110 section 15.5.22)
            fields += [(b"Connection", b"Upgrade"), (b"Upgrade", upgrade)]
        upgrade = b""
    # Chunks in HTTP/1.0 are read, and nothing behind them (RFC 9112 section 6.1).
    ends = length == UNTIL_CLOSE or status == 101 or (declared == CHUNKED and not minor)
    return ResponseHead(
        status,
        reason,
        minor,
        fields,
        options.persistent(minor) and not ends,
        length,
        upgrade,
        rules.is_bound_auth(noted.get(b"www-authenticate")),
        _WITHHELD | options.named if options.named else _WITHHELD,
        parse_keep_alive(noted[b"keep-alive"]) if b"keep-alive" in noted else None,
    )


def _read_lines(head: bytes, most: int) -> tuple[tuple[int, int, bytes], Fields]:
    """Return the parts of the status line, and the fields; every line must end in CRLF."""
    start = _status_line(head[: head.find(b"\r\n")])
    return start, rules.read_fields(HttpResponseParser, head, most, 502)


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
    close. So it does for an HTTP/1.0 visitor (RFC 9112 section 9.3), who gets a chunked body without
    the chunks (``ChunkedBody``, ``plain``).
    """
    fields = head.fields
    if minor_visitor == 0:
        fields = [pair for pair in fields if pair[0].lower() not in _OF_CHUNKS]
    connection = b""
    if head.status == 101:
        connection = b"Connection: Upgrade\r\nUpgrade: %b\r\n" % head.upgrade
    elif head.status >= 200 and (close or head.length == UNTIL_CLOSE or minor_visitor == 0):
        connection = b"Connection: close\r\n"
    return b"HTTP/1.1 %d %b\r\n%b%b\r\n" % (head.status, head.reason, rules.lines(fields), connection)
