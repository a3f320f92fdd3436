"""Opening a tunnel: the CONNECT request and what answers it, as bytes and as values.

A client sends one HTTP/1.1 ``CONNECT`` head and the server answers ``101`` (the socket is
HTTP/2 from the next byte on) or a refusal with a plain-text reason. The usual order is:
feed bytes until `head_end` finds the end, then `parse_request` (server) or `parse_reply`
(client). Each side assumes that the other may be hostile: everything is bounded, and what
is taken from a peer is free of control characters, because it reaches logs and terminals.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from http import HTTPStatus
from ipaddress import AddressValueError, IPv6Address
from typing import TYPE_CHECKING

from tinytun_gevent.errors import HandshakeError, UsageError

if TYPE_CHECKING:
    from tinytun_gevent.wire.options import Options

MAX_HEAD = 16384  # bytes in a request or reply head; browsers and proxies stay under 8 KiB
MAX_FIELDS = 100  # the tunnel needs six; proxies in between add a dozen
MAX_REASON = 1024  # bytes of a refusal's text worth reading or sending
MAX_TOKEN = 4096  # bytes; a JWT with many claims is about 2 KiB
MAX_URL = 2048
MAX_HOST = 255  # RFC 1035 2.3.4: a name; with a port it is still enough in practice
MAX_RETRY_AFTER = 86400  # seconds; a server cannot send its clients away for longer
MAX_CONFIRMED = 64  # options that a reply may name; there are three

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}\Z")  # RFC 9110 5.6.2, methods and field names
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*\Z")  # RFC 9110 5.5
_SUBDOMAIN = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z")
_HOST = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]{2,45})\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?\Z")
_BEARER = re.compile(r"(?i:bearer) +(?P<token>[A-Za-z0-9._~+/-]+=*)\Z")  # RFC 6750 2.1
_CONNECTION_ID = re.compile(r"[\x21-\x7e]{1,64}\Z")
_JOIN_KEY = re.compile(r"[0-9A-Za-z]{16,64}\Z")  # ours are 32 hexadecimal digits, 128 bits
_RESUME = re.compile(r"[0-9A-Za-z._~+/=-]{16,256}\Z")  # ours are 64 hexadecimal digits, an HMAC-SHA256
_URL = re.compile(r"(?:https?|tcp)://[\x21-\x7e]+\Z")
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] (?P<status>[1-5][0-9]{2})(?: (?P<reason>[^\r\n]*))?\Z")
_PORT = re.compile(r"[0-9]{1,5}\Z")
_OPTION = re.compile(r"[a-z0-9_]{1,32}\Z")

_SINGLE = (b"host", b"authorization", b"content-length")  # and every x-tinytun- field


class Kind(StrEnum):
    """What a tunnel carries; `TCP_PORT` makes the server listen even where `TCP` does not."""

    HTTP = "http"
    TCP = "tcp"
    TCP_PORT = "tcp_port"


@dataclass(frozen=True, slots=True)
class Join:
    """The tunnel that a session is to be added to, and the secret that its 101 told the opener."""

    connection_id: str
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """What a client asks for: ``authority`` is CONNECT's target, ``host:port``.

    ``subdomain`` (lower case) belongs to `Kind.HTTP`, ``port`` (1-65535, the server has its
    own range) to the others; None lets the server choose. ``token`` is the opener's bearer
    token, ``host_header`` what the local service is to see as ``Host``. With ``join`` no tunnel
    is opened: the session is added to one that is there, and name and port mean nothing.
    ``resume`` shows that the name was ours a moment ago; ``""`` asks for a token that will, None for nothing.
    ``options`` is what is asked of the server's edge; a request that joins has none, its tunnel has.
    ``reset_codes`` says that the client knows `answer_codes`, on this session.
    """

    kind: Kind
    authority: str
    subdomain: str | None = None
    port: int | None = None
    token: str | None = field(default=None, repr=False)
    host_header: str | None = None
    join: Join | None = None
    resume: str | None = field(default=None, repr=False)
    options: Options | None = None
    reset_codes: bool = False


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """A request with any method other than CONNECT; `build_health` answers it.

    A GET with a ``token`` asks whether that is valid: 204, 401, or 200 where none is needed.
    """

    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class OpenReply:
    """What a 101 says. An HTTP tunnel has a ``domain``, a TCP tunnel a ``port``.

    ``url`` and ``host_header`` are None and False from a server that does not know these
    extensions; ``host_header`` acknowledges that the request's was understood. ``join_key``
    is the secret with which further sessions join the tunnel; None where they cannot. ``resume`` is what
    to show to get the name back after a loss; None where a name is anybody's then. ``options`` names those
    that the server applies, ``kind`` is the type that it opened; None from a server that does not say.
    """

    connection_id: str
    domain: str | None = None
    subdomain: str | None = None
    port: int | None = None
    url: str | None = None
    host_header: bool = False
    join_key: str | None = field(default=None, repr=False)
    resume: str | None = field(default=None, repr=False)
    options: tuple[str, ...] = ()
    kind: Kind | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Any final answer but 101. ``retry_after`` is in seconds.

    ``reason`` is the reason phrase; a better one may follow as the body, ``content_length``
    bytes of it (None: until the server closes). Read at most `MAX_REASON` bytes, pass them
    through `clean_text`.
    """

    status: int
    reason: str
    retry_after: float | None = None
    content_length: int | None = None


def head_end(buffer: bytes | bytearray, start: int = 0) -> int:
    """Return the index just past the head's CRLF CRLF, or -1 if it is not there yet.

    ``start`` is how much of ``buffer`` an earlier call has already seen.
    """
    found = buffer.find(b"\r\n\r\n", max(0, start - 3))
    return -1 if found < 0 else found + 4


def is_subdomain(text: str) -> bool:
    """Tell whether ``text``, in lower case, can name a tunnel: 1-63 of a-z, 0-9 and inner hyphens."""
    return _SUBDOMAIN.match(text) is not None


def is_resume_token(text: str) -> bool:
    """Tell whether ``text`` can be a resume token: 16-256 characters of a bearer token's."""
    return _RESUME.match(text) is not None


def is_token(text: str) -> bool:
    """Tell whether ``text`` can be a bearer token (RFC 6750 2.1)."""
    match = _BEARER.match(f"Bearer {text}")
    return len(text) <= MAX_TOKEN and match is not None and match["token"] == text


def is_host(text: str) -> bool:
    """Tell whether ``text`` is ``host`` or ``host:port``, fit to be a ``Host`` field."""
    match = _HOST.match(text)
    if match is None or len(text) > MAX_HOST:
        return False
    if match["port"] is not None and int(match["port"]) > 65535:
        return False
    if match["v6"] is None:
        return True
    try:
        IPv6Address(match["v6"])
    except AddressValueError:
        return False
    return True


def clean_text(data: bytes, limit: int = MAX_REASON) -> str:
    """Make a peer's text safe for a terminal: one line, printable, at most ``limit`` bytes of it."""
    text = data[:limit].decode("utf-8", "replace")
    visible = (char if char.isprintable() else " " for char in text)
    return " ".join("".join(visible).split())


def build_request(request: OpenRequest) -> bytes:
    """Write a CONNECT head; `UsageError` if a value of ``request`` cannot be asked for."""
    fields = [("Host", request.authority), ("x-tinytun-type", request.kind.value)]
    _want(is_host(request.authority), "server address", request.authority)
    if request.kind is Kind.HTTP and request.subdomain is not None:
        _want(is_subdomain(request.subdomain), "subdomain", request.subdomain)
        fields.append(("x-tinytun-subdomain", request.subdomain))
    if request.kind is not Kind.HTTP and request.port is not None:
        _want(1 <= request.port <= 65535, "port", str(request.port))
        fields.append(("x-tinytun-port", str(request.port)))
    if request.host_header is not None:
        _want(is_host(request.host_header), "host header", request.host_header)
        fields.append(("x-tinytun-host-header", request.host_header))
    if request.token is not None:
        if not is_token(request.token):
            raise UsageError("the token has characters that a bearer token cannot have, or is too long")
        fields.append(("Authorization", f"Bearer {request.token}"))
    if request.join is not None:
        fields.append(("x-tinytun-join", _join_value(request.join)))
    if request.resume is not None:
        if request.resume and not _RESUME.match(request.resume):
            raise UsageError("the resume token cannot be one")
        fields.append(("x-tinytun-resume", request.resume))
    if request.reset_codes:
        fields.append(("x-tinytun-reset-codes", "1"))
    if request.options is not None:
        fields.append(("x-tinytun-options", _options_value(request.options)))
    return _head(f"CONNECT {request.authority} HTTP/1.1", fields)


def build_check(authority: str, token: str) -> bytes:
    """Write the head of a GET that asks whether ``token`` is valid; `parse_reply` reads the answer."""
    _want(is_host(authority), "server address", authority)
    if not is_token(token):
        raise UsageError("the token has characters that a bearer token cannot have, or is too long")
    fields = [("Host", authority), ("Authorization", f"Bearer {token}"), ("Connection", "close")]
    return _head("GET / HTTP/1.1", fields)


def parse_request(head: bytes) -> OpenRequest | HealthCheck:
    """Read one whole head, as delimited by `head_end`.

    Raises `HandshakeError` with the status that answers it: 431 for one that is too large,
    505 for another version of HTTP, 400 for anything else that is malformed.
    """
    first, lines = _split(head)
    method, target = _request_line(first)
    fields = _fields(lines)
    _check_host(fields)
    if method != b"CONNECT":
        return HealthCheck(_token(fields) if method == b"GET" else None)
    # hyper sends the authority of the server's URL as it is, so the port may be missing.
    authority = target.decode("latin-1")
    if not is_host(authority):
        raise HandshakeError("the target of CONNECT is not host:port")
    # The bytes after this head are HTTP/2; with a body in between the two sides would disagree.
    if b"transfer-encoding" in fields or fields.get(b"content-length", "0") != "0":
        raise HandshakeError("CONNECT has no body")
    return _open_request(authority, fields)


def build_reply(reply: OpenReply) -> bytes:
    """Write the 101 head; the first byte after it is HTTP/2."""
    fields = [("x-tinytun-connection-id", reply.connection_id)]
    if reply.domain is not None:
        fields.append(("x-tinytun-domain", reply.domain))
    if reply.subdomain is not None:
        fields.append(("x-tinytun-subdomain", reply.subdomain))
    if reply.port is not None:
        fields.append(("x-tinytun-port", str(reply.port)))
    if reply.url is not None:
        fields.append(("x-tinytun-url", reply.url))
    if reply.host_header:
        fields.append(("x-tinytun-host-header", "1"))
    if reply.join_key is not None:
        fields.append(("x-tinytun-join", reply.join_key))
    if reply.resume is not None:
        fields.append(("x-tinytun-resume", reply.resume))
    if reply.options:
        fields.append(("x-tinytun-options", ", ".join(reply.options)))
    if reply.kind is not None:
        fields.append(("x-tinytun-type", reply.kind.value))
    return _head("HTTP/1.1 101 Switching Protocols", fields)


def build_refusal(status: int, reason: str, retry_after: int | None = None) -> bytes:
    """Write a whole refusal, head and plain-text body; close the connection after it.

    ``retry_after`` is in seconds.
    """
    body = clean_text(reason.encode()).encode()
    fields = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))]
    if retry_after is not None:
        fields.append(("Retry-After", str(retry_after)))
    fields.append(("Connection", "close"))
    return _head(f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", fields) + body


def build_health() -> bytes:
    """Write the answer to a health check; close the connection after it."""
    return _head("HTTP/1.1 200 OK", [("Content-Length", "0"), ("Connection", "close")])


def build_checked(*, needed: bool) -> bytes:
    """Write the answer to who asks whether a token is valid: it is, or none is ``needed``."""
    if needed:
        return _head("HTTP/1.1 204 No Content", [("Connection", "close")])
    return build_refusal(200, "This server takes no tokens: everybody may open tunnels")


def parse_reply(head: bytes) -> OpenReply | Refusal:
    """Read one whole reply head, as delimited by `head_end`.

    Fields that are not known are skipped. Raises `HandshakeError` for a reply that no
    tunnel server sends.
    """
    try:
        first, lines = _split(head)
        match = _STATUS_LINE.match(first)
        if match is None:
            raise HandshakeError("it is not HTTP")
        fields = _fields(lines)
        status = int(match["status"])
        if status == 101:
            return _open_reply(fields)
        if status < 200:
            raise HandshakeError(f"status {status} is no final answer")
        return _refusal(status, match["reason"] or b"", fields)
    except HandshakeError as error:
        raise HandshakeError(f"the server's answer is malformed: {error}", 502) from None


def _want(condition: bool, what: str, value: str) -> None:
    if not condition:
        raise UsageError(f"{value!r} is not a valid {what}")


def _head(first: str, fields: list[tuple[str, str]]) -> bytes:
    """Join a head, refusing whatever would add a line to it (a bug of ours, so ValueError)."""
    lines = [first, *(f"{name}: {value}" for name, value in fields)]
    for line in lines:
        if not line.isascii() or not line.isprintable():
            raise ValueError(f"{line!r} cannot be a line of a head")
    return "\r\n".join((*lines, "", "")).encode("ascii")


def _split(head: bytes) -> tuple[bytes, list[bytes]]:
    """Cut a head into its first line and its field lines."""
    if len(head) > MAX_HEAD:
        raise HandshakeError("the head is too large", 431)
    if head_end(head) != len(head):
        raise HandshakeError("the head does not end with its only empty line")
    first, *lines = head[:-4].split(b"\r\n")
    return first, lines


def _request_line(line: bytes) -> tuple[bytes, bytes]:
    parts = line.split(b" ")
    if len(parts) != 3 or not _TOKEN.match(parts[0]) or not re.match(rb"[\x21-\x7e]+\Z", parts[1]):
        raise HandshakeError("the request line is malformed")
    method, target, version = parts
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        known = re.match(rb"HTTP/[0-9](\.[0-9])?\Z", version)
        raise HandshakeError("only HTTP/1.1 is spoken here", 505 if known else 400)
    return method, target


def _fields(lines: list[bytes]) -> dict[bytes, str]:
    """Read field lines (RFC 9112 5); no obs-fold, no bare CR or LF, no second copy of ours.

    Of other fields only the last value is kept; nobody asks for them.
    """
    if len(lines) > MAX_FIELDS:
        raise HandshakeError("the head has too many fields", 431)
    fields: dict[bytes, str] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not _TOKEN.match(name) or not _VALUE.match(value):
            raise HandshakeError("a field line is malformed")
        name = name.lower()
        if name in fields and (name in _SINGLE or name.startswith(b"x-tinytun-")):
            raise HandshakeError(f"{name.decode()} is there twice")
        fields[name] = value.strip(b" \t").decode("latin-1")
    return fields


def _check_host(fields: dict[bytes, str]) -> None:
    """A Host need not be there, and may be empty; RFC 9112 3.2 wants 400 for an invalid one."""
    host = fields.get(b"host", "")
    if host and not is_host(host):
        raise HandshakeError("the Host field is invalid")


def _open_request(authority: str, fields: dict[bytes, str]) -> OpenRequest:
    try:
        kind = Kind(fields.get(b"x-tinytun-type", ""))
    except ValueError:
        kind = Kind.HTTP
    host_header = fields.get(b"x-tinytun-host-header")
    if host_header is not None and not is_host(host_header):
        raise HandshakeError("x-tinytun-host-header is not a host or host:port")
    join = _join(fields)
    # What belongs to another kind of tunnel is ignored, as the original does; a tunnel that
    # is joined has its name already.
    return OpenRequest(
        kind,
        authority,
        subdomain=_subdomain(fields) if kind is Kind.HTTP and join is None else None,
        port=_port(fields) if kind is not Kind.HTTP and join is None else None,
        token=_token(fields),
        host_header=host_header,
        join=join,
        resume=_resume(fields) if join is None else None,
        options=_options(fields, kind) if join is None else None,
        reset_codes=fields.get(b"x-tinytun-reset-codes") == "1",
    )


def _join(fields: dict[bytes, str]) -> Join | None:
    value = fields.get(b"x-tinytun-join")
    if value is None:
        return None
    connection_id, _, key = value.partition(" ")
    if not _CONNECTION_ID.match(connection_id) or not _JOIN_KEY.match(key):
        raise HandshakeError("x-tinytun-join is not a connection id and a key")
    return Join(connection_id, key)


def _join_value(join: Join) -> str:
    """The field's value; the error shows nothing of the key."""
    if not _CONNECTION_ID.match(join.connection_id) or not _JOIN_KEY.match(join.key):
        raise UsageError("the connection id or the key cannot be those of a tunnel")
    return f"{join.connection_id} {join.key}"


def _resume(fields: dict[bytes, str]) -> str | None:
    value = fields.get(b"x-tinytun-resume")
    if value and not _RESUME.match(value):
        raise HandshakeError("x-tinytun-resume is not a resume token")
    return value


def _options(fields: dict[bytes, str], kind: Kind) -> Options | None:
    value = fields.get(b"x-tinytun-options")
    if value is None:
        return None
    from tinytun_gevent.wire.options import parse_options  # msgspec: most processes never need it

    try:
        return parse_options(value, http=kind is Kind.HTTP)
    except ValueError as error:
        raise HandshakeError(f"option {clean_text(str(error).encode(), 200)}") from None


def _options_value(options: Options) -> str:
    from tinytun_gevent.wire.options import build_options

    return build_options(options)


def _confirmed(fields: dict[bytes, str]) -> tuple[str, ...]:
    """The options that a server says it applies."""
    names = [name.strip(" \t") for name in fields.get(b"x-tinytun-options", "").split(",")]
    if len(names) > MAX_CONFIRMED or not all(_OPTION.match(name) for name in names if name):
        raise HandshakeError("its list of options is invalid")
    return tuple(filter(None, names))


def _confirmed_kind(fields: dict[bytes, str]) -> Kind | None:
    value = fields.get(b"x-tinytun-type")
    try:
        return None if value is None else Kind(value)
    except ValueError:
        raise HandshakeError("its type of tunnel is unknown") from None


def _subdomain(fields: dict[bytes, str]) -> str | None:
    subdomain = fields.get(b"x-tinytun-subdomain", "").lower()
    if not subdomain:
        return None
    if not is_subdomain(subdomain):
        raise HandshakeError("a subdomain is 1 to 63 of a-z, 0-9 and -, with no - at either end")
    return subdomain


def _port(fields: dict[bytes, str]) -> int | None:
    value = fields.get(b"x-tinytun-port")
    if value is None:
        return None
    if not _PORT.match(value) or not 1 <= int(value) <= 65535:
        raise HandshakeError("x-tinytun-port is not a port")
    return int(value)


def _token(fields: dict[bytes, str]) -> str | None:
    """The bearer token; credentials of another scheme are not meant for us."""
    value = fields.get(b"authorization", "")
    if value.split(" ", 1)[0].lower() != "bearer":
        return None
    match = _BEARER.match(value)
    if match is None or len(match["token"]) > MAX_TOKEN:
        raise HandshakeError("the bearer token is malformed")
    return match["token"]


def _open_reply(fields: dict[bytes, str]) -> OpenReply:
    connection_id = fields.get(b"x-tinytun-connection-id", "")
    if not _CONNECTION_ID.match(connection_id):
        raise HandshakeError("its connection id is missing or invalid")
    domain = fields.get(b"x-tinytun-domain")
    if domain is not None and not is_host(domain):
        raise HandshakeError("its domain is invalid")
    url = fields.get(b"x-tinytun-url")
    if url is not None and (len(url) > MAX_URL or not _URL.match(url)):
        raise HandshakeError("its URL is invalid")
    join_key = fields.get(b"x-tinytun-join")
    if join_key is not None and not _JOIN_KEY.match(join_key):
        raise HandshakeError("its key for joining is invalid")
    return OpenReply(
        connection_id,
        domain=domain,
        subdomain=_subdomain(fields),
        port=_port(fields),
        url=url,
        host_header=b"x-tinytun-host-header" in fields,
        join_key=join_key,
        resume=_resume(fields) or None,
        options=_confirmed(fields),
        kind=_confirmed_kind(fields),
    )


def _refusal(status: int, reason: bytes, fields: dict[bytes, str]) -> Refusal:
    length = fields.get(b"content-length")
    if length is not None and not re.match(r"[0-9]{1,19}\Z", length):
        raise HandshakeError("its Content-Length is invalid")
    after = fields.get(b"retry-after", "")  # a date (RFC 9110 10.2.3) counts as absent
    seconds = float(min(int(after), MAX_RETRY_AFTER)) if re.match(r"[0-9]{1,9}\Z", after) else None
    return Refusal(status, clean_text(reason, 200), seconds, None if length is None else int(length))
