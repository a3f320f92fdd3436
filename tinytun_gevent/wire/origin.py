"""Origins of URLs: scheme, host and port (RFC 6454 §4), read from text and written again."""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import AddressValueError, IPv6Address
from typing import Final, NamedTuple

MAX_ORIGIN: Final = 270
"""Bytes: ``https://``, a name of 255 (RFC 1035 §2.3.4), a colon and five digits."""

PORTS: Final = {b"http": 80, b"https": 443}
"""The port that a URL without one means, by scheme."""

_HOST: Final = rb"\[[0-9a-f:.]{2,45}\]|[0-9a-z._-]{1,255}"
_ORIGIN: Final = re.compile(rb"(https?)://(%b)(?::([0-9]{1,5}))?" % _HOST, re.IGNORECASE)


class Origin(NamedTuple):
    """Who a URL belongs to. Two spellings of one origin are equal: case, default port, trailing dot."""

    scheme: bytes
    """``http`` or ``https``."""
    host: bytes
    """Lower case without trailing dot; an IPv6 address is in brackets and in its shortest form."""
    port: int

    def __bytes__(self) -> bytes:
        """``scheme://host[:port]``, as a browser writes an ``Origin`` field."""
        return b"%b://%b" % (self.scheme, self.authority)

    @property
    def authority(self) -> bytes:
        """``host[:port]``, without the scheme's default port."""
        return self.host if self.port == PORTS[self.scheme] else b"%b:%d" % (self.host, self.port)


def parse_origin(value: bytes) -> Origin | None:
    """Reads ``http://host[:port]`` or ``https://host[:port]`` with nothing behind it; None for anything else.

    That includes ``null``, and a list of origins.
    """
    return _parse(value) if len(value) <= MAX_ORIGIN else None


@lru_cache(maxsize=1024)
def _parse(value: bytes) -> Origin | None:
    match = _ORIGIN.fullmatch(value)
    if match is None:
        return None
    scheme, host = match[1].lower(), match[2].lower()
    port = int(match[3]) if match[3] else PORTS[scheme]
    if host[:1] == b"[":
        try:
            host = b"[%b]" % IPv6Address(host[1:-1].decode()).compressed.encode()
        except AddressValueError:
            return None
    else:
        host = host.removesuffix(b".")
    return Origin(scheme, host, port) if host and 0 < port < 65536 else None
