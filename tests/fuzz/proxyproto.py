"""PROXY headers, versions 1 and 2."""

from __future__ import annotations

import re
from ipaddress import IPv6Address, ip_address

from tinytun_gevent.errors import ProxyHeaderError
from tinytun_gevent.wire import proxyproto

from .splitting import outcome

CODE = (proxyproto,)
V2 = proxyproto.SIGNATURE_V2
SEEDS = (
    b"PROXY TCP4 192.0.2.1 198.51.100.2 50000 443\r\nGET /",
    b"PROXY TCP6 2001:db8::1 ::ffff:192.0.2.1 1 65535\r\n",
    b"PROXY UNKNOWN ffff:ffff::1 x 1 2\r\n",
    proxyproto.build_v2(("192.0.2.1", 50000), ("198.51.100.2", 443)) + b"GET /",
    proxyproto.build_v2(("2001:db8::1", 50000), ("192.0.2.1", 443)),
    V2 + b"\x20\x00\x00\x00",
    V2 + b"\x21\x00\x00\x00",
    V2 + b"\x21\x11\x00\x13" + bytes(12) + b"\x04\x00\x04abcd",
    V2 + b"\x21\x31\x00\xd8" + bytes(216),
    V2 + b"\x21\x12\x00\x0c" + bytes(12),
)
TOKENS = (
    *(
        b"PROXY ",
        b"TCP4",
        b"TCP6",
        b"UNKNOWN",
        b" ",
        b"\r\n",
        b"192.0.2.1",
        b"::1",
        b"::ffff:192.0.2.1",
        b"%1",
    ),
    *(
        V2,
        b"\x21",
        b"\x20",
        b"\x11",
        b"\x21",
        b"\x31",
        b"\x00\x0c",
        b"\x00\x24",
        b"\x02\x04",
        b"0",
        b"65535",
        b"256",
    ),
)
_V1 = re.compile(rb"PROXY (UNKNOWN(?: .*)?|TCP([46]) (\S+) (\S+) (0|[1-9]\d*) (0|[1-9]\d*))\r\n", re.DOTALL)


def one(data: bytes) -> None:
    header, error = outcome(lambda: proxyproto.parse(data), ProxyHeaderError)
    _check_prefixes(data, header, error)
    if header is None:
        assert error or len(data) < proxyproto.MAX_LENGTH, "it waits for more than a header may have"
        return
    assert 0 < header.length <= min(len(data), proxyproto.MAX_LENGTH)
    assert (header.source is None) == (header.destination is None)
    assert not header.local or header.source is None
    if data.startswith(b"PROXY"):
        _check_v1(data[: header.length], header)
    else:
        assert header.length == 16 + int.from_bytes(data[14:16], "big")
    if header.source is not None and header.destination is not None:
        for host, port in (header.source, header.destination):
            address = ip_address(host)
            assert str(address) == host
            assert not isinstance(address, IPv6Address) or address.ipv4_mapped is None
            assert 0 <= port <= 65535
        again = proxyproto.parse(proxyproto.build_v2(header.source, header.destination) + b"rest")
        assert again is not None
        assert (again.source, again.destination) == (header.source, header.destination)


def _check_prefixes(data: bytes, header: proxyproto.ProxyHeader | None, error: str) -> None:
    """A prefix says the same as the whole, or nothing yet: nobody's verdict changes with more bytes."""
    spoken = False
    end = min(len(data), proxyproto.MAX_LENGTH)
    for size in (*range(min(end, 20)), *range(20, end, 9), max(0, end - 1), end):
        part, wrong = outcome(lambda size=size: proxyproto.parse(data[:size]), ProxyHeaderError)  # type: ignore[misc]
        if part is None and not wrong:
            assert not spoken, "a verdict was taken back"
            continue
        spoken = True
        assert part == header
        assert bool(wrong) == bool(error)


def _check_v1(line: bytes, header: proxyproto.ProxyHeader) -> None:
    match = _V1.fullmatch(line)
    assert match, line
    assert len(line) <= 107
    if match[2]:
        assert all(ip_address(host.decode()).version == int(match[2]) for host in (match[3], match[4]))
        assert header.source is not None
        assert header.destination is not None
        assert (header.source[1], header.destination[1]) == (int(match[5]), int(match[6]))
    else:
        assert header.source is None
