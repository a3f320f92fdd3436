"""Every exception that the package raises on purpose, in one tree.

::

    TunnelError                  something a user can be told in one line
    ├── UsageError               a flag, variable or target makes no sense      exit 2
    ├── UnreachableError         the server cannot be reached                   exit 5
    ├── RefusedError             the server said no, for good                   exit 3
    │   ├── NameTakenError       … because the name or port is in use           exit 4
    │   └── TryLaterError        … for now (429, 503)                           exit 3
    ├── LocalServiceError        the client cannot reach its local service
    ├── ParseError               a peer sent bytes that break a rule
    │   ├── HandshakeError       … in the CONNECT request or its reply
    │   ├── ProxyHeaderError     … in a PROXY protocol header
    │   └── MessageError         … in an HTTP/1 message
    └── SessionError             an HTTP/2 session, or a stream on it, is over
        ├── SessionClosedError   the session has ended; nothing more can be sent
        ├── PeerSilentError      the peer answered nothing for too long
        ├── PeerProtocolError    the peer broke HTTP/2; it got GOAWAY
        ├── StreamResetError     this stream was aborted, by either side
        └── StreamLimitError     the peer takes no further stream now

Whose fault it is can be read from the type: ``UsageError`` is the local user's,
``ParseError`` and ``PeerProtocolError`` are the peer's.
"""

from __future__ import annotations

from typing import ClassVar


class TunnelError(Exception):
    """Base of the tree; ``str()`` of it is one line for a user.

    ``exit_code`` is what the command exits with when this ends it; ``status`` is the
    HTTP status that answers a peer or visitor whose request caused it.
    """

    exit_code: ClassVar[int] = 1
    status: int = 500


class UsageError(TunnelError):
    """A flag, an environment variable or an argument makes no sense."""

    exit_code = 2
    status = 400


class UnreachableError(TunnelError):
    """The server's name does not resolve, or none of its addresses answers."""

    exit_code = 5
    status = 502


class RefusedError(TunnelError):
    """The server answered the CONNECT with ``status`` instead of 101, for good."""

    exit_code = 3

    def __init__(self, message: str, status: int = 403) -> None:
        super().__init__(message)
        self.status = status


class NameTakenError(RefusedError):
    """The wanted subdomain or port is in use (409)."""

    exit_code = 4

    def __init__(self, message: str, status: int = 409) -> None:
        super().__init__(message, status)


class TryLaterError(RefusedError):
    """The server refuses for now (429, 503); ``retry_after`` is in seconds, if it said."""

    def __init__(self, message: str, status: int = 503, retry_after: float | None = None) -> None:
        super().__init__(message, status)
        self.retry_after = retry_after


class LocalServiceError(TunnelError):
    """The client cannot reach the local service that the tunnel leads to."""

    status = 502


class ParseError(TunnelError):
    """A peer sent bytes that break a rule of their protocol."""

    status = 400


class HandshakeError(ParseError):
    """A CONNECT request, or the reply to one, is malformed; ``status`` answers it."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class ProxyHeaderError(ParseError):
    """A PROXY protocol header is malformed, too long, or of an unsupported kind."""


class StrangerError(ProxyHeaderError):
    """A PROXY protocol header came from somebody who is not believed."""


class MessageError(ParseError):
    """An HTTP/1 request or response is malformed or over a limit.

    ``status`` is what a *visitor* is told: 400, 413, 414, 431, 501 or 505 for his own
    request, 502 for the local service's response.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class NotHttpError(MessageError):
    """The local service answers in another protocol; ``code`` is a number of `answer_codes`."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message, 502)
        self.code = code


class SessionError(TunnelError):
    """An HTTP/2 session, or a stream on it, has ended or cannot go on."""

    status = 502

    @property
    def is_refusal(self) -> bool:
        """REFUSED_STREAM from the peer: it has done nothing with the stream (RFC 9113 §8.7)."""
        return False


class SessionClosedError(SessionError):
    """The session has ended; nothing more can be sent or opened on it."""

    status = 503


class PeerSilentError(SessionClosedError):
    """The peer answered nothing for too long and counts as dead."""


class PeerProtocolError(SessionClosedError):
    """The peer broke HTTP/2; ``code`` is the error code that its GOAWAY carried."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class StreamResetError(SessionError):
    """A stream was aborted; ``code`` is the HTTP/2 error code, ``remote`` says by whom."""

    def __init__(self, code: int, *, remote: bool) -> None:
        super().__init__(f"stream reset by {'the peer' if remote else 'us'} (code {code})")
        self.code = code
        self.remote = remote

    @property
    def is_refusal(self) -> bool:
        return self.remote and self.code == 7


class StreamLimitError(SessionError):
    """The peer's SETTINGS_MAX_CONCURRENT_STREAMS allows no further stream now."""

    status = 503
