"""Who the visitor is: what the local service is told, and what a trusted proxy may tell us.

``Forwarding`` is first made from the socket (or a PROXY header). Only if its ``client`` is a
trusted proxy may the fields that this proxy sent replace it: ``client_from_forwarding``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, Final

from tinytun_gevent.errors import MessageError
from tinytun_gevent.wire.fields import normalize_host

if TYPE_CHECKING:
    from tinytun_gevent.wire.request import RequestHead

_MAX_HOPS: Final = 32
"""Trusted proxies that are believed in a row; a longer chain is made up."""
_LINES: Final = (
    b"X-Forwarded-For: %b\r\nX-Forwarded-Proto: %b\r\nX-Forwarded-Host: %b\r\nX-Forwarded-Port: %d\r\n"
)
_SCHEME_PORTS: Final = {b"http": 80, b"https": 443}


@dataclass(slots=True)
class Forwarding:
    """What X-Forwarded-For, -Port, -Proto and -Host will say."""

    client: str
    """The visitor's IP address, IPv4-mapped ones as IPv4."""
    port: int
    """The public port that he used."""
    proto: str = "http"
    host: bytes = b""
    """The host that he asked for; blank: what his request says."""
    tells_origin: bool = True
    """Whether the service is told the public scheme, host and port: those of one make sense together only."""

    def lines(self, host_field: bytes) -> bytes:
        """Return the field lines; ``host_field`` is used where ``host`` is blank."""
        if not self.tells_origin:
            return b"X-Forwarded-For: %b\r\n" % self.client.encode()
        return _LINES % (
            self.client.encode(),
            self.proto.encode(),
            self.host or host_field,
            self.port,
        )


def client_from_forwarding(
    head: RequestHead, direct: Forwarding, trusted: Callable[[str], bool]
) -> Forwarding:
    """Return what is known of the visitor, given who is at the other end of the socket.

    Unless ``trusted(direct.client)``, that is ``direct``. Otherwise the client is the rightmost
    address in X-Forwarded-For that is not trusted; Forwarded (RFC 7239) is read where there is
    no X-Forwarded-For. Reading stops at anything that is no address (``unknown``, ``_hidden``):
    the last address before it is the answer. Values that make no sense count as absent, so
    this raises nothing. A trusted proxy must itself set or remove every field read here.
    """
    if not head.claims or not trusted(direct.client):
        return direct
    said: dict[bytes, bytes] = {}
    for name, value in head.claims:
        key = name.lower()
        said[key] = said[key] + b"," + value if key in said else value
    if b"x-forwarded-for" in said:
        hops: Iterator[dict[bytes, bytes]] = ({b"for": hop} for hop in _from_right(said[b"x-forwarded-for"]))
        client, _ = _rightmost_untrusted(hops, direct.client, trusted)
        proto, host, port = (
            next(_from_right(said.get(b"x-forwarded-" + what, b"")), b"")
            for what in (b"proto", b"host", b"port")
        )
    else:
        hops = map(_pairs, _from_right(said.get(b"forwarded", b"")))
        client, pairs = _rightmost_untrusted(hops, direct.client, trusted)
        proto, host, port = pairs.get(b"proto", b""), pairs.get(b"host", b""), b""
    return _merged(head, direct, client, proto.lower(), host, port)


def _merged(
    head: RequestHead, direct: Forwarding, client: str, proto: bytes, host: bytes, port: bytes
) -> Forwarding:
    """Put together what was said, each part only if it is valid."""
    if proto not in _SCHEME_PORTS:
        proto = b""
    if host:
        try:
            normalize_host(host)
        except MessageError:
            host = b""
    number = _port(port) or _port_of(host or head.host_field)
    if not number and proto:
        number = _SCHEME_PORTS[proto]
    return Forwarding(client, number or direct.port, proto.decode() or direct.proto, host or direct.host)


def _rightmost_untrusted(
    hops: Iterator[dict[bytes, bytes]], client: str, trusted: Callable[[str], bool]
) -> tuple[str, dict[bytes, bytes]]:
    """Walk from the nearest hop outwards; return the address to believe and what was said with it."""
    believed: dict[bytes, bytes] = {}
    for hop, _ in zip(hops, range(_MAX_HOPS), strict=False):
        address = _address(hop.get(b"for", b"")[:64])
        if not address:
            break
        client, believed = address, hop
        if not trusted(address):
            break
    return client, believed


def _from_right(value: bytes) -> Iterator[bytes]:
    """Yield a list's members from its right end.

    Commas are taken as they are even inside quotes: an opening quote that a visitor planted
    must not swallow what the proxies wrote behind it (RFC 7239 section 8.1).
    """
    for member in reversed(value.split(b",")):
        if member := member.strip(b" \t"):
            yield member


def _pairs(member: bytes) -> dict[bytes, bytes]:
    """Read ``for=192.0.2.60;proto=http`` (RFC 7239 section 4)."""
    pairs = {}
    for pair in member.split(b";"):
        name, _, value = pair.partition(b"=")
        pairs[name.strip(b" \t").lower()] = value.strip(b' \t"')
    return pairs


@lru_cache(maxsize=4096)
def _address(text: bytes) -> str:
    """Return the IP address in ``1.2.3.4``, ``1.2.3.4:5``, ``::1`` or ``[::1]:5``; blank if there is none.

    One with a zone (``fe80::1%eth0``, RFC 4007 §11) is none: a zone may hold any text at all, and means
    nothing on another machine.
    """
    text = text.strip(b'"')
    if text[:1] == b"[":
        text = text[1:].partition(b"]")[0]
    elif text.count(b":") == 1:
        text = text.partition(b":")[0]
    if b"%" in text:
        return ""
    try:
        address = ip_address(text.decode("ascii"))
    except ValueError:
        return ""
    if isinstance(address, IPv6Address):
        address = address.ipv4_mapped or address
    return str(address)


def _port_of(host: bytes) -> int:
    return _port(host.rpartition(b":")[2]) if b":" in host and host[-1:] != b"]" else 0


def _port(text: bytes) -> int:
    """Return a port number, 0 if ``text`` is none."""
    return int(text) if text.isdigit() and len(text) <= 5 and int(text) < 65536 else 0
