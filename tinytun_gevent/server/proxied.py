"""PROXY protocol headers, read from a connection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tinytun_gevent.errors import ProxyHeaderError, StrangerError
from tinytun_gevent.server.addresses import plain
from tinytun_gevent.server.entrance import say_last
from tinytun_gevent.server.strangers import REASON
from tinytun_gevent.server.tally import Refusal
from tinytun_gevent.sockets import End
from tinytun_gevent.wire import handshake, proxyproto
from tinytun_gevent.wire.proxyproto import Address, ProxyHeader

if TYPE_CHECKING:
    from tinytun_gevent.server.core import ServerCore

READ_SIZE: Final = 4096
"""Bytes read at once while nobody knows whether a header comes; what follows it, or stands in its place, is a
ClientHello or a request head."""


def read(end: End, buffer: bytearray) -> ProxyHeader:
    """Reads the header that a connection must begin with; what follows it stays in ``buffer``.

    Blocks; the caller has the deadline. Raises ProxyHeaderError, or OSError.
    """
    while True:
        header = proxyproto.parse(buffer)
        if header is not None:
            del buffer[: header.length]
            return header
        data = end.recv(proxyproto.MAX_LENGTH)
        if not data:
            raise ProxyHeaderError("the connection ended inside its PROXY header")
        buffer += data


def read_optional(end: End, buffer: bytearray) -> ProxyHeader | None:
    """As :func:`read`, for a connection that may begin with a header; None if it does not."""
    return read(end, buffer) if _has_header(end, buffer) else None


def who_comes(
    core: ServerCore, end: End, early: bytearray, caller: Address, port: int, name: str
) -> tuple[Address, int]:
    """Who has connected, and to which port: ``caller`` and ``port``, unless a trusted proxy says otherwise.

    What was read beside its header stays in ``early``. ``name`` is the port's, for the log. Blocks; the
    caller has the deadline. Raises StrangerError for the header of anybody else, who has been told so,
    ProxyHeaderError for a malformed one, both counted, and OSError.
    """
    if not _has_header(end, early):
        return caller, port
    if not core.is_trusted(caller[0]):
        core.strangers.refuse(caller[0], name)
        say_last(end, handshake.build_refusal(400, REASON))
        raise StrangerError(REASON)
    try:
        header = read(end, early)
    except ProxyHeaderError:
        core.tally.refuse(Refusal.PROXY_HEADER)
        raise
    if header.source is None or header.destination is None:
        return caller, port
    return plain(header.source), header.destination[1]


def _has_header(end: End, buffer: bytearray) -> bool:
    """Whether the connection begins with a header, once that is certain or nothing more comes. Blocks."""
    while (proxied := proxyproto.starts_like_proxy(buffer)) is None:
        data = end.recv(READ_SIZE)
        if not data:
            return False
        buffer += data
    return proxied
