"""Reaching the local service, and the page a visitor gets when it does not answer."""

from __future__ import annotations

import html
import json
import re
import socket as native
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import gevent
from gevent import socket, ssl
from gevent.lock import BoundedSemaphore

from ..errors import LocalServiceError, UnreachableError
from ..sockets import End, Socket
from ..tls import TlsEnd
from .dial import Address, connect, connect_bare, make_context, resolve, shake_hands, why_not_valid
from .target import Target
from .text import clean, unclutter

T = TypeVar("T")

#: Seconds for connecting to the local service, TLS included.
DIAL_TIMEOUT = 5.0

#: Seconds for which a resolved name is believed: a restarted container gets a new address.
RESOLVED_FOR = 30.0

_WANTS_HTML = re.compile(rb"\nAccept:[^\r\n]*(?:text/html|application/xhtml\+xml)", re.IGNORECASE)


class LocalDialer:
    """Opens connections to one target; remembers its addresses and which of them answered.

    Safe to use from many greenlets at once.
    """

    def __init__(self, target: Target, timeout: float = DIAL_TIMEOUT) -> None:
        self.target = target
        self.timeout = timeout
        self._context = _context(target) if target.tls else None
        #: Where to try, in order: what worked last comes first.
        self._addresses: list[Address] = _fixed_addresses(target)
        #: When names in `_addresses` must be resolved again; None for never.
        self._expires: float | None = None if self._addresses else 0.0
        self._resolving = BoundedSemaphore()
        #: Called when the service has first accepted a connection; must not block.
        self.on_answer: Callable[[], None] | None = None

    def dial(self) -> Socket | End:
        """A new connection, for ``sockets.end_of``; blocks for at most ``timeout`` seconds.

        Raises LocalServiceError, whose text says what is wrong with the service.
        """
        late = LocalServiceError(f"{self.target} did not answer within {self.timeout:.0f} s")
        try:
            with gevent.Timeout(self.timeout, late):
                if self._context is None:
                    return self._connect(connect_bare)
                return self._start_tls(self._connect(connect), self._context)
        except LocalServiceError as error:
            if error is late:
                self._demote_first()
            raise

    @property
    def first(self) -> str:
        """The address, or path, that is tried first now; blank while a name is not resolved."""
        if not self._addresses:
            return ""
        _, address = self._addresses[0]
        return str(address if isinstance(address, str) else address[0])

    def _connect(self, connect_to: Callable[[Address], T]) -> T:
        failures: list[OSError] = []
        for address in list(self._current_addresses()):
            try:
                sock = connect_to(address)
            except OSError as error:
                failures.append(error)
                continue
            if failures:
                self._prefer(address)
            if self.on_answer is not None:
                notify, self.on_answer = self.on_answer, None
                notify()
            return sock
        self._forget()
        raise LocalServiceError(f"{self.target}: {_most_telling(failures)}")

    def _prefer(self, address: Address) -> None:
        if address in self._addresses:
            self._addresses.remove(address)
            self._addresses.insert(0, address)

    def _demote_first(self) -> None:
        """After a silence, begin with another address the next time."""
        self._addresses = self._addresses[1:] + self._addresses[:1]

    def _current_addresses(self) -> list[Address]:
        """The addresses to try; resolves a name that is not fresh, once for all who wait."""
        if self._is_fresh():
            return self._addresses
        with self._resolving:
            if not self._is_fresh():
                try:
                    self._addresses = resolve(self.target.host, self.target.port)
                except UnreachableError as error:
                    raise LocalServiceError(f"{self.target}: {error}") from None
                self._expires = time.monotonic() + RESOLVED_FOR
        return self._addresses

    def _is_fresh(self) -> bool:
        return self._expires is None or time.monotonic() < self._expires

    def _forget(self) -> None:
        if self._expires is not None:
            self._expires = 0.0

    def _start_tls(self, sock: socket.socket, context: ssl.SSLContext) -> TlsEnd:
        try:
            return shake_hands(sock, context, self.target.host)
        except ssl.SSLCertVerificationError as error:
            reason = why_not_valid(error, self.target.host)
            raise LocalServiceError(
                f"{self.target}: its certificate is not valid: {reason} (--verify-target never accepts it)"
            ) from None
        except (OSError, EOFError) as error:
            raise LocalServiceError(f"{self.target}: TLS failed: {unclutter(error)}") from None


def error_page(problem: str, request: bytes = b"", request_id: str = "") -> bytes:
    """A whole HTTP/1.1 502 response that tells a visitor that the local service is away.

    ``request_id`` is what he can name when he asks about it. It is JSON, as the server's own
    answers are, unless the head that ``request`` begins with asks for HTML.
    """
    if _WANTS_HTML.search(request.partition(b"\r\n\r\n")[0]):
        kind = "text/html; charset=utf-8"
        body = _PAGE.replace("REQUEST", request_id).replace("PROBLEM", html.escape(clean(problem))).encode()
    else:
        kind = "application/json"
        reason = f"The local service does not answer: {clean(problem)}."
        fields = {"status": 502, "error": "Bad Gateway", "reason": reason, "request_id": request_id}
        body = json.dumps(fields).encode()
    head = (
        "HTTP/1.1 502 Bad Gateway\r\n"
        f"Content-Type: {kind}\r\n"
        f"Content-Length: {len(body)}\r\n"
        f"X-Request-Id: {request_id}\r\n"
        "Cache-Control: no-store\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode("ascii") + body


_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>502 The local service does not answer</title>
<style>
body { font: 1.05rem/1.6 system-ui, sans-serif; max-width: 34rem; margin: 15vh auto; padding: 0 1.5rem;
  color: #222; background: #fafafa }
h1 { font-size: 1.5rem; line-height: 1.3 }
code { background: #eee; padding: .1em .35em; border-radius: .25em; overflow-wrap: anywhere }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #161616 } code { background: #2a2a2a } }
</style>
<h1>The tunnel is up, but the service behind it does not answer</h1>
<p><code>PROBLEM</code></p>
<p>If this is your tunnel: start the service, then reload this page.</p>
<p><small>tinytun · request REQUEST</small></p>
</html>
"""


def _context(target: Target) -> ssl.SSLContext:
    return make_context(None, insecure=not target.verify)


def _fixed_addresses(target: Target) -> list[Address]:
    """The addresses that need no name service: a Unix path, an IP literal, ``localhost``."""
    if target.path:
        return [(int(native.AF_UNIX), target.path)]
    if target.host.lower() == "localhost":
        return [
            (int(native.AF_INET6), ("::1", target.port, 0, 0)),
            (int(native.AF_INET), ("127.0.0.1", target.port)),
        ]
    try:
        found = native.getaddrinfo(
            target.host, target.port, type=native.SOCK_STREAM, flags=native.AI_NUMERICHOST
        )
    except OSError:
        return []
    return [(int(family), sockaddr) for family, _, _, _, sockaddr in found]


def _most_telling(failures: Sequence[OSError]) -> str:
    """Of several failures, the one to show: a refusal rather than "no IPv6 here"."""
    for failure in failures:
        if isinstance(failure, ConnectionRefusedError):
            return unclutter(failure)
    return unclutter(failures[-1]) if failures else "no address"
