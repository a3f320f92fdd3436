"""Asking the server for a tunnel: CONNECT out, 101 or a refusal in."""

from __future__ import annotations

from urllib.parse import urlsplit

import gevent
from gevent import socket

from ..errors import (
    HandshakeError,
    NameTakenError,
    RefusedError,
    SessionError,
    TryLaterError,
    TunnelError,
    UnreachableError,
)
from ..sockets import End
from ..wire.handshake import (
    MAX_HEAD,
    MAX_REASON,
    Kind,
    OpenReply,
    OpenRequest,
    Refusal,
    build_request,
    parse_reply,
)
from .address import bracketed
from .config import ClientConfig
from .dial import HopelessError, TrustFileError, read_head
from .text import clean, hide, unclutter

#: Seconds for the server's answer. It may have to ask a database or its peers about the name.
ANSWER_TIMEOUT = 10.0

#: Seconds for the line of reason in a refusal's body; without it the reason phrase does.
REASON_TIMEOUT = 1.0

#: Statuses that no retry mends, not even later: the request is wrong, or the user is not wanted.
FINAL = frozenset((400, 401, 403))

#: What to do about a refusal, with the server's address in it.
HINTS = {
    401: "; 'tinytun login --server {}' or TINYTUN_TOKEN gives it another token",
    403: "; whoever runs the server can allow it",
}

#: Statuses below 500 that pass by themselves (RFC 9110 §15.5.9, RFC 6585 §4, RFC 8470 §5.2).
PASSING = frozenset((408, 425, 429))


def open_tunnel(
    sock: socket.socket | End, request: OpenRequest, wish: str, timeout: float = ANSWER_TIMEOUT
) -> tuple[OpenReply, bytes]:
    """Send the CONNECT on ``sock``; returns what the server granted and the bytes behind its 101.

    Blocks for at most ``timeout`` seconds; the caller closes the socket. ``wish`` is what is asked for,
    as the error names it. Raises NameTakenError (409), TryLaterError (429, 503), RefusedError for other
    refusals, HopelessError where no tunnel server answers, and UnreachableError.
    """
    authority = request.authority
    late = UnreachableError(f"{authority} did not answer the CONNECT within {timeout:.0f} s")
    try:
        with gevent.Timeout(timeout, late):
            sock.sendall(build_request(request))
            head, rest = read_head(sock, MAX_HEAD)
    except (OSError, EOFError) as error:
        raise UnreachableError(f"{authority}: {unclutter(error)}") from None
    except ValueError as error:
        raise HopelessError(f"{authority} is no tunnel server: it {error}") from None
    try:
        reply = parse_reply(head)
    except HandshakeError as error:
        raise HopelessError(f"{authority} is no tunnel server: {clean(str(error))}") from None
    if isinstance(reply, OpenReply):
        return reply, rest
    raise refusal_error(reply, _reason(sock, reply, rest, request.token), authority, wish)


def refusal_error(refusal: Refusal, reason: str, authority: str, wish: str) -> TunnelError:
    """The exception for a server's no, in one line that names what was asked for and why not."""
    status = refusal.status
    text = f"{authority} refuses {wish}: {reason} ({status})"
    if status == 409:
        return NameTakenError(text + "; ask for another one, or leave it out to get any")
    if status in (429, 503):
        return TryLaterError(text, status, refusal.retry_after)
    if status in FINAL:
        return RefusedError(text + HINTS.get(status, "").format(authority), status)
    if status < 400:
        return HopelessError(f"{authority} is no tunnel server: it answered CONNECT with {status}")
    if status < 500 and status not in PASSING:
        return HopelessError(f"{text}; is this a tunnel server's connection port?")
    return UnreachableError(text)


def is_final(error: TunnelError, first: bool) -> bool:
    """Whether no further attempt is made after ``error``; ``first``: it was never connected.

    A wrong request and a user who is not wanted stay so. A name that is taken, something else in the
    server's place, or a file of trusted certificates without any may be for a while once the tunnel has been
    up.
    """
    if isinstance(error, TryLaterError):
        return False
    if isinstance(error, (NameTakenError, HopelessError, TrustFileError)):
        return first
    return not isinstance(error, (UnreachableError, SessionError))


def public_url(config: ClientConfig, reply: OpenReply) -> str:
    """Where the public reaches the tunnel: no trailing slash, default ports omitted.

    Raises HopelessError if the reply does not say.
    """
    if config.kind is not Kind.HTTP:
        if reply.port is None:
            raise HopelessError(f"{config.server.authority} did not say which port the tunnel got")
        return f"tcp://{bracketed(config.server.host)}:{reply.port}"
    if reply.url is not None:
        return tidy_url(reply.url)
    if reply.domain is None:
        raise HopelessError(f"{config.server.authority} did not say which name the tunnel got")
    return tidy_url(f"http://{reply.domain}")


def tidy_url(url: str) -> str:
    """``url`` without its trailing slashes and without its scheme's default port."""
    url = url.rstrip("/")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return url
    if (parts.scheme, port) in (("http", 80), ("https", 443)):
        return parts._replace(netloc=parts.netloc.removesuffix(f":{port}")).geturl()
    return url


def _reason(sock: socket.socket | End, refusal: Refusal, rest: bytes, token: str | None) -> str:
    """The first line of the refusal's body, or its reason phrase; blocks for `REASON_TIMEOUT`.

    A server that repeats the ``token`` does not bring it into our log.
    """
    length = refusal.content_length
    wanted = MAX_REASON if length is None else min(length, MAX_REASON)
    body = bytearray(rest)
    gevent.with_timeout(REASON_TIMEOUT, _read_up_to, sock, body, wanted, timeout_value=None)
    line = bytes(body[:wanted]).strip().partition(b"\n")[0].strip()
    if not line or line.startswith(b"<"):  # a front proxy's HTML page says no more than its phrase
        return clean(hide(refusal.reason.encode(), token)) or "no reason given"
    return clean(hide(line, token))


def _read_up_to(sock: socket.socket | End, body: bytearray, wanted: int) -> None:
    """Add to ``body`` until it has ``wanted`` bytes or the peer closes; blocks."""
    try:
        while len(body) < wanted:
            chunk = sock.recv(wanted - len(body))
            if not chunk:
                return
            body += chunk
    except OSError:
        pass
