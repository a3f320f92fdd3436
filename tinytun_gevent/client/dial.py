"""Reaching the server: name, addresses, proxy, TLS. What comes out is a connected socket.

::

    resolve ──► first_to_connect ──► [CONNECT through a proxy] ──► [TLS] ──► socket

Nothing is remembered between attempts: a server that has moved is found at its new address.
"""

from __future__ import annotations

import errno
import os
import socket as native
from collections import deque
from collections.abc import Sequence
from typing import Any

import gevent
from gevent import socket, ssl
from gevent.queue import Empty, Queue

from ..errors import UnreachableError, UsageError
from ..sockets import BareSocket, End, PlainEnd, tune
from ..tls import TlsEnd
from .address import bracketed
from .config import ClientConfig
from .credentials import PLAIN, must_hide
from .proxies import Proxy
from .text import clean, unclutter

#: Seconds for everything up to a usable socket: resolving, connecting, proxy and TLS.
DIAL_TIMEOUT = 10.0

#: Seconds an address has to itself before the next one is tried beside it (RFC 8305 §5).
STAGGER = 0.25

#: A name's owner decides how many addresses it has; this many are tried.
MAX_ADDRESSES = 16

#: A proxy's answer to CONNECT is a few lines; more is nonsense.
MAX_PROXY_HEAD = 16384

#: How OpenSSL, in its several versions, says that the answer was no TLS at all.
_NOT_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL")

#: X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH of OpenSSL.
_OTHER_NAME = frozenset((62, 64))

#: A socket address with what ``socket()`` needs for it: family, and what ``connect`` takes.
Address = tuple[int, Any]


class HopelessError(UnreachableError):
    """The server cannot be reached in a way that waiting does not mend.

    A certificate that is not trusted, a proxy that says no, something that is no tunnel
    server: on the first attempt the client gives up.
    """


class TrustFileError(UsageError):
    """The file of ``--ca`` has no certificates; once it had, it is being replaced, which passes."""


def dial_server(
    config: ClientConfig, timeout: float = DIAL_TIMEOUT, address: Address | None = None
) -> End:
    """Connect to the server of ``config``; the caller closes what is returned, plain or TLS.

    With ``address`` that is where it, or the proxy, is reached: a name may have several.
    Blocks for at most ``timeout`` seconds. Raises UnreachableError (HopelessError where trying
    again is no use), TrustFileError, and UsageError for a token that would go in the clear.
    """
    context = make_context(config.ca, config.insecure) if config.server.tls else None
    late = UnreachableError(f"{config.server.authority} did not answer within {timeout:.0f} s")
    with gevent.Timeout(timeout, late):
        return _dial(config, context, address)


def address_of(sock: socket.socket) -> Address:
    """Where ``sock`` is connected to. Raises OSError if it is not any more."""
    return int(sock.family), sock.getpeername()


def check_hidden(config: ClientConfig, addresses: Sequence[Address]) -> None:
    """Raises UsageError if a token would go to one of ``addresses`` in the clear, unless that is allowed.

    A name says nothing about where it leads, so both what it resolves to and what was connected to count.
    """
    if config.token is None or config.server.tls or config.insecure:
        return
    if config.proxy is not None or any(must_hide(str(sockaddr[0])) for _, sockaddr in addresses):
        raise UsageError(f"{config.server} {PLAIN}")


def make_context(ca: str | None, insecure: bool) -> ssl.SSLContext:
    """A TLS client's settings: the system's trust store, ``ca`` instead, or no check at all.

    A name counts only as one of the certificate's alternative names, never as its common name
    (RFC 9110 §4.3.4, RFC 9525).

    Made of gevent's own class, because the standard ``create_default_context`` makes sockets that block the
    whole thread in a program that is not patched. Raises TrustFileError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.hostname_checks_common_name = False
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        try:
            context.load_verify_locations(cafile=ca)
        except OSError as error:  # ssl.SSLError is one
            reason = unclutter(error)
            raise TrustFileError(f"--ca {ca!r}: not a PEM file of certificates ({reason})") from None
    return context


def resolve(host: str, port: int) -> list[Address]:
    """All stream addresses of ``host``, in the system's order, families alternating (RFC 8305 §4).

    Blocks on the name service. Raises UnreachableError.
    """
    try:
        found = socket.getaddrinfo(host, port, type=native.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UnreachableError(f"cannot resolve {host}: {unclutter(error)}") from None
    addresses = list(dict.fromkeys((int(family), sockaddr) for family, _, _, _, sockaddr in found))
    first_family = addresses[0][0] if addresses else 0
    preferred = deque(address for address in addresses if address[0] == first_family)
    others = deque(address for address in addresses if address[0] != first_family)
    mixed: list[Address] = []
    while (preferred or others) and len(mixed) < MAX_ADDRESSES:
        for queue in (preferred, others):
            if queue:
                mixed.append(queue.popleft())
    return mixed


def first_to_connect(addresses: Sequence[Address], stagger: float = STAGGER) -> socket.socket:
    """A socket connected to the first of ``addresses`` that answers; the caller closes it.

    Each gets ``stagger`` seconds alone, less if it fails before; then the next is tried beside it,
    so a dead address delays little. Blocks as long as the kernel tries: set a timeout around it.
    Raises OSError, the first one met.
    """
    results: Queue[tuple[socket.socket | None, OSError | None]] = Queue()
    waiting = deque(addresses)
    attempts: list[gevent.Greenlet[..., None]] = []
    failure: OSError | None = None
    failed = 0
    try:
        while waiting or failed < len(attempts):
            if waiting:
                attempts.append(gevent.spawn(_attempt, waiting.popleft(), results))
            try:
                sock, error = results.get(timeout=stagger if waiting else None)
            except Empty:
                continue
            if sock is not None:
                return sock
            failure = failure or error
            failed += 1
    finally:
        gevent.killall(attempts)
        while not results.empty():
            also_connected, _ = results.get_nowait()
            if also_connected is not None:
                also_connected.close()
    raise failure or OSError("no address")


def connect(address: Address) -> socket.socket:
    """A socket connected to one numeric (or Unix) address; the caller closes it. Raises OSError.

    ``create_connection`` would resolve even a numeric address, in a thread.
    """
    family, sockaddr = address
    sock = socket.socket(family, native.SOCK_STREAM)
    try:
        sock.connect(sockaddr)
        tune(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def connect_bare(address: Address) -> BareSocket:
    """As `connect`, but the socket has none of gevent's methods and is non-blocking: made quicker.

    A connection on this machine stands when the first call returns, though that does not say so:
    the second one does, and nothing needs to be waited for.
    """
    family, sockaddr = address
    sock = BareSocket(family, native.SOCK_STREAM)
    try:
        sock.setblocking(False)
        error = sock.connect_ex(sockaddr)
        if error == errno.EINPROGRESS:
            error = sock.connect_ex(sockaddr)
        if error == errno.EALREADY:
            hub = gevent.get_hub()
            hub.wait(hub.loop.io(sock.fileno(), 2))
            error = sock.getsockopt(native.SOL_SOCKET, native.SO_ERROR)
        if error and error != errno.EISCONN:
            raise OSError(error, os.strerror(error))
        tune(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def read_head(sock: socket.socket | End, limit: int) -> tuple[bytes, bytes]:
    """Read an HTTP head; returns it with its blank line, and the bytes that came behind it.

    Blocks: set a timeout around it. Raises OSError, EOFError when the peer closes before
    the head is complete, and ValueError when it exceeds ``limit`` bytes.
    """
    received = bytearray()
    while True:
        chunk = sock.recv(4096)
        if not chunk:
            raise EOFError("closed the connection without an answer")
        start = max(0, len(received) - 3)
        received += chunk
        end = received.find(b"\r\n\r\n", start)
        if end >= 0 and end + 4 <= limit:
            return bytes(received[: end + 4]), bytes(received[end + 4 :])
        if len(received) >= limit:
            raise ValueError(f"answered with more than {limit} bytes of head")


def _attempt(address: Address, results: Queue[tuple[socket.socket | None, OSError | None]]) -> None:
    try:
        results.put((connect(address), None))
    except OSError as error:
        results.put((None, error))


def _dial(config: ClientConfig, context: ssl.SSLContext | None, address: Address | None) -> End:
    server, proxy = config.server, config.proxy
    host, port = (proxy.host, proxy.port) if proxy else (server.host, server.port)
    addresses = resolve(host, port) if address is None else [address]
    check_hidden(config, addresses)
    try:
        sock = first_to_connect(addresses)
    except OSError as error:
        what = f"proxy {proxy}" if proxy else server.authority
        raise UnreachableError(f"cannot connect to {what}: {unclutter(error)}") from None
    try:
        check_hidden(config, [address_of(sock)])
        if proxy is not None:
            connect_through(sock, proxy, server.authority)
        return PlainEnd(sock) if context is None else start_tls(sock, context, server.host, server.authority)
    except BaseException:
        sock.close()
        raise


def connect_through(sock: socket.socket, proxy: Proxy, authority: str) -> None:
    """Ask the proxy on ``sock`` for a tunnel to ``authority`` (RFC 9110 §9.3.6).

    Blocks. Raises UnreachableError, HopelessError where the proxy said no for good. The
    caller closes the socket then.
    """
    lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}"]
    if proxy.credentials is not None:
        lines.append(f"Proxy-Authorization: {proxy.credentials}")
    try:
        sock.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
        head, rest = read_head(sock, MAX_PROXY_HEAD)
    except (OSError, EOFError) as error:
        raise UnreachableError(f"proxy {proxy}: {unclutter(error)}") from None
    except ValueError as error:
        raise HopelessError(f"proxy {proxy} {error}") from None
    status, reason = _status_line(head, proxy)
    if status == 407:
        hint = "wrong user or password" if proxy.credentials else "it wants a user and password"
        raise HopelessError(f"proxy {proxy} says 407: {hint} (--proxy http://USER:PASSWORD@HOST:PORT)")
    if not 200 <= status <= 299:
        lasting = 400 <= status <= 499 and status not in (408, 429)
        kind = HopelessError if lasting else UnreachableError
        raise kind(f"proxy {proxy} cannot reach {authority}: {status} {reason}".rstrip())
    if rest:  # the server never speaks first, so these bytes are the proxy's
        raise HopelessError(f"proxy {proxy} sent a body with its answer to CONNECT")


def start_tls(sock: socket.socket, context: ssl.SSLContext, host: str, authority: str) -> TlsEnd:
    """TLS over ``sock``, with SNI; blocks for the handshake. The result owns the connection.

    Raises HopelessError for a certificate that is not trusted and for a peer that does not
    speak TLS, UnreachableError for the rest; the connection is closed then.
    """
    try:
        return shake_hands(sock, context, host)
    except ssl.SSLCertVerificationError as error:
        hint = "" if error.verify_code in _OTHER_NAME else " (--ca FILE trusts its issuer)"
        reason = why_not_valid(error, host)
        raise HopelessError(f"the certificate of {authority} is not valid: {reason}{hint}") from None
    except ssl.SSLError as error:
        if error.reason in _NOT_TLS:
            hint = f"if its port is plain, say http://{bracketed(host)}:…"
            raise HopelessError(f"{authority} does not speak TLS ({hint})") from None
        raise UnreachableError(f"TLS with {authority} failed: {clean(error.reason or 'closed')}") from None
    except (OSError, EOFError, ValueError) as error:
        raise UnreachableError(f"TLS with {authority} failed: {unclutter(error)}") from None


def why_not_valid(error: ssl.SSLCertVerificationError, host: str) -> str:
    """What is wrong with the certificate of ``host``, for people."""
    if error.verify_code in _OTHER_NAME:
        return f"none of its alternative names (SAN) is {clean(host)}; its common name does not count"
    return clean(error.verify_message or "untrusted")


def shake_hands(sock: socket.socket, context: ssl.SSLContext, host: str) -> TlsEnd:
    """The bare TLS handshake: blocks; closes ``sock`` on whatever goes wrong, timeouts included."""
    plain = PlainEnd(sock)
    try:
        end = TlsEnd(plain, context, host=host)
    except BaseException:
        sock.close()
        raise
    try:
        end.handshake()
    except BaseException:
        end.close()
        raise
    return end


def _status_line(head: bytes, proxy: Proxy) -> tuple[int, str]:
    version, _, rest = head.partition(b"\r\n")[0].partition(b" ")
    code, _, reason = rest.partition(b" ")
    if not version.startswith(b"HTTP/1.") or len(code) != 3 or not code.isdigit():
        raise HopelessError(f"proxy {proxy} does not speak HTTP")
    return int(code), clean(reason)
