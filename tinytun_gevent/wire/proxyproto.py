"""PROXY protocol headers, versions 1 and 2: who a proxy in front says the visitor is.

The rules are those of HAProxy's ``doc/proxy-protocol.txt``. A header stands before the
first byte of a connection: feed bytes to `parse` until it answers, then go on at its
``length``. Whether the sender may be believed is the caller's business.

IPv4-mapped IPv6 addresses come out as IPv4. TLVs are checked for shape and skipped.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from tinytun_gevent.errors import ProxyHeaderError

SIGNATURE_V1 = b"PROXY "
SIGNATURE_V2 = b"\r\n\r\n\x00\r\nQUIT\n"
MAX_LENGTH = 536  # bytes; what every path carries in one segment, so senders stay within it
_CERTAIN = (b"PROXY TCP4 ", b"PROXY TCP6 ", b"PROXY UNKNOWN", SIGNATURE_V2)
_MAX_V1 = 107  # bytes with CRLF; the longest legal line, "PROXY UNKNOWN" with two full IPv6 addresses

_FIXED_V2 = len(SIGNATURE_V2) + 4  # version and command, family, length
_LOCAL, _PROXY = 0, 1
_V4 = struct.Struct("!4s4sHH")
_V6 = struct.Struct("!16s16sHH")
_UNIX_BYTES = 216
_UNSPEC, _TCP4, _TCP6, _UNIX_STREAM = 0x00, 0x11, 0x21, 0x31
_PORT = re.compile(r"(?:0|[1-9][0-9]{0,4})\Z")

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """What a header said: the visitor's address, the one he connected to, as (host, port).

    Both are None when the proxy does not know, or speaks for itself (``local``: a health
    check); the connection's own addresses count then. ``length`` is the header's, in bytes.
    """

    source: Address | None
    destination: Address | None
    local: bool
    length: int


def starts_like_proxy(data: bytes | bytearray) -> bool | None:
    """Tell whether ``data`` begins with a signature; None: too short to tell."""
    start = bytes(data[: len(SIGNATURE_V2)])
    for signature in (SIGNATURE_V1, SIGNATURE_V2):
        if start.startswith(signature):
            return True
        if signature.startswith(start):
            return None
    return False


def is_surely_proxy(data: bytes | bytearray) -> bool:
    """Whether ``data`` begins with what can only be a PROXY header, and no request of any method."""
    return data.startswith(_CERTAIN)


def parse(data: bytes | bytearray) -> ProxyHeader | None:
    """Read the header that ``data`` begins with; None: more bytes are needed.

    Raises `ProxyHeaderError` for anything else, and never looks past `MAX_LENGTH`.
    """
    start = bytes(data[:MAX_LENGTH])
    known = starts_like_proxy(start)
    if known is None:
        return None
    if not known:
        raise ProxyHeaderError("the connection does not begin with a PROXY header")
    return _parse_v1(start) if start.startswith(SIGNATURE_V1) else _parse_v2(start)


def build_v2(source: Address, destination: Address) -> bytes:
    """Write a version 2 header for a TCP connection; ValueError for what is no address.

    Addresses of two families are both written as IPv6, the IPv4 one mapped.
    """
    ends = [_numeric(host) for host, _ in (source, destination)]
    ports = (source[1], destination[1])
    if not all(0 <= port <= 65535 for port in ports):
        raise ValueError(f"no such port: {ports}")
    if all(isinstance(end, IPv4Address) for end in ends):
        family, block = _TCP4, _V4.pack(ends[0].packed, ends[1].packed, *ports)
    else:
        sixes = [end.packed if end.version == 6 else b"\0" * 10 + b"\xff\xff" + end.packed for end in ends]
        family, block = _TCP6, _V6.pack(*sixes, *ports)
    return SIGNATURE_V2 + struct.pack("!BBH", 0x20 | _PROXY, family, len(block)) + block


def _numeric(host: str) -> IPv4Address | IPv6Address:
    address = ip_address(host.partition("%")[0])  # a zone means nothing on another machine
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def _parse_v1(data: bytes) -> ProxyHeader | None:
    end = data.find(b"\r\n", 0, _MAX_V1)
    if end < 0:
        if len(data) >= _MAX_V1:
            raise ProxyHeaderError("a PROXY line is longer than 107 bytes")
        return None
    length = end + 2
    family, _, rest = data[len(SIGNATURE_V1) : end].decode("latin-1").partition(" ")
    if family == "UNKNOWN":  # whatever follows is to be ignored
        return ProxyHeader(None, None, False, length)
    parser: Callable[[str], object] | None = {"TCP4": IPv4Address, "TCP6": IPv6Address}.get(family)
    parts = rest.split(" ")
    if parser is None or len(parts) != 4 or "%" in rest:
        raise ProxyHeaderError("a PROXY line is malformed")
    try:
        hosts = [str(_numeric(str(parser(part)))) for part in parts[:2]]
    except ValueError:
        raise ProxyHeaderError("a PROXY line has an invalid address") from None
    ports = [_port(part) for part in parts[2:]]
    return ProxyHeader((hosts[0], ports[0]), (hosts[1], ports[1]), False, length)


def _port(text: str) -> int:
    if not _PORT.match(text) or int(text) > 65535:
        raise ProxyHeaderError("a PROXY line has an invalid port")
    return int(text)


def _parse_v2(data: bytes) -> ProxyHeader | None:
    if len(data) < _FIXED_V2:
        return None
    version_command, family, size = struct.unpack_from("!BBH", data, len(SIGNATURE_V2))
    length = _FIXED_V2 + size
    if version_command >> 4 != 2 or version_command & 15 not in (_LOCAL, _PROXY):
        raise ProxyHeaderError("a PROXY header has an unknown version or command")
    if length > MAX_LENGTH:
        raise ProxyHeaderError(f"a PROXY header is longer than {MAX_LENGTH} bytes")
    if len(data) < length:
        return None
    block = data[_FIXED_V2:length]
    if version_command & 15 == _LOCAL:  # the family and the block are to be ignored
        return ProxyHeader(None, None, True, length)
    return _addresses(family, block, length)


def _addresses(family: int, block: bytes, length: int) -> ProxyHeader:
    """Read the block of a PROXY command (section 2.2): addresses, then TLVs."""
    if family == _UNSPEC:  # nothing in the block can be relied on, not even where TLVs begin
        return ProxyHeader(None, None, False, length)
    sizes = {_TCP4: _V4.size, _TCP6: _V6.size, _UNIX_STREAM: _UNIX_BYTES}
    size = sizes.get(family)
    if size is None:
        raise ProxyHeaderError("a PROXY header is for something other than a stream connection")
    if len(block) < size:
        raise ProxyHeaderError("a PROXY header is too short for its addresses")
    _check_tlvs(block[size:])
    if family == _UNIX_STREAM:
        return ProxyHeader(None, None, False, length)
    layout = _V4 if family == _TCP4 else _V6
    source, destination, source_port, destination_port = layout.unpack_from(block)
    return ProxyHeader(
        (str(_numeric(str(ip_address(source)))), source_port),
        (str(_numeric(str(ip_address(destination)))), destination_port),
        False,
        length,
    )


def _check_tlvs(data: bytes) -> None:
    """Walk type, length and value triples to the end; they must fill it exactly."""
    at = 0
    while at < len(data):
        if at + 3 > len(data):
            raise ProxyHeaderError("a PROXY header ends inside a TLV")
        at += 3 + int.from_bytes(data[at + 1 : at + 3], "big")
    if at != len(data):
        raise ProxyHeaderError("a PROXY header's TLV is longer than the header")
