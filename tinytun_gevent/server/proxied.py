"""PROXY protocol headers, read from a connection."""

from __future__ import annotations

from tinytun_gevent.errors import ProxyHeaderError
from tinytun_gevent.sockets import End
from tinytun_gevent.wire import proxyproto
from tinytun_gevent.wire.proxyproto import ProxyHeader


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
    while (proxied := proxyproto.starts_like_proxy(buffer)) is None:
        data = end.recv(proxyproto.MAX_LENGTH)
        if not data:
            return None
        buffer += data
    return read(end, buffer) if proxied else None
