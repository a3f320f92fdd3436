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
from .reasons import Reason, read_reason
from .servers import CONNECTION_PORT
from .text import clean, unclutter

#: Seconds for the server's answer. It may have to ask a database or its peers about the name.
ANSWER_TIMEOUT = 10.0

#: Statuses that no retry mends, not even later: the request is wrong, or the user is not wanted.
FINAL = frozenset((400, 401, 403))

#: What answers a CONNECT at a port that is not for clients: a web server, or a server's port for visitors.
WRONG_DOOR = frozenset((404, 405, 421, 501))

#: Statuses below 500 that pass by themselves (RFC 9110 §15.5.9, RFC 6585 §4, RFC 8470 §5.2).
PASSING = frozenset((408, 425, 429))


class WrongDoorError(RefusedError):
    """Something else than a tunnel server answers at this port; on the first attempt the client gives up."""


def open_tunnel(
    sock: socket.socket | End, request: OpenRequest, wish: str, timeout: float = ANSWER_TIMEOUT
) -> tuple[OpenReply, bytes]:
    """Send the CONNECT on ``sock``; returns what the server granted and the bytes behind its 101.

    Blocks for at most ``timeout`` seconds; the caller closes the socket. ``wish`` is what is asked for,
    as the error names it. Raises NameTakenError (409), TryLaterError (429, 503), RefusedError for other
    refusals (WrongDoorError where a web server answers), HopelessError where what answers is no HTTP, and
    UnreachableError.
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
    reason = read_reason(sock, reply, rest, request.token)
    raise refusal_error(reply, reason, authority, wish, has_token=request.token is not None)


def refusal_error(
    refusal: Refusal, reason: Reason, authority: str, wish: str, *, has_token: bool
) -> TunnelError:
    """The exception for a server's no, in one line that names what was asked for and why not."""
    status = refusal.status
    text = f"{authority} refuses {wish}: {reason.text} ({status})"
    if status in WRONG_DOOR or status < 400 or (reason.is_page and status < 500 and status not in PASSING):
        return WrongDoorError(wrong_door(authority, status), status)
    if status == 409:
        return NameTakenError(text + "; ask for another one, or leave it out to get any")
    if status in (429, 503):
        return TryLaterError(text, status, refusal.retry_after)
    if status in FINAL:
        return RefusedError(text + _hint(status, authority, has_token), status)
    if status < 500 and status not in PASSING:
        return HopelessError(f"{text}; is this a tunnel server's connection port?")
    return UnreachableError(text)


def wrong_door(authority: str, status: int) -> str:
    """What to say of a port whose answer is no tunnel server's."""
    text = f"{authority} is no tunnel server's connection port (it answered {status})"
    return text + port_hint(authority)


def port_hint(authority: str) -> str:
    """Which port most servers have, where ``authority`` has another one."""
    return "" if authority.endswith(f":{CONNECTION_PORT}") else f"; the usual port is {CONNECTION_PORT}"


def _hint(status: int, authority: str, has_token: bool) -> str:
    """What to do about a refusal."""
    if status == 401 and has_token:
        return (
            f"; the token was not taken: 'tinytun login --server {authority}' enters another one, and "
            "--token, --token-file and TINYTUN_TOKEN win over it"
        )
    if status == 401:
        return f"; no token was given: 'tinytun login --server {authority}' or TINYTUN_TOKEN gives one"
    if status == 403 and has_token:
        return "; ask the operator of the server to allow it for your token, or ask for something else"
    if status == 403:
        return "; ask the operator of the server to allow it, or ask for something else"
    return ""


def is_final(error: TunnelError, first: bool) -> bool:
    """Whether no further attempt is made after ``error``; ``first``: it was never connected.

    A wrong request and a user who is not wanted stay so. A name that is taken, something else in the
    server's place, or a file of trusted certificates without any may be for a while once the tunnel has been
    up.
    """
    if isinstance(error, TryLaterError):
        return False
    if isinstance(error, (NameTakenError, WrongDoorError, HopelessError, TrustFileError)):
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
