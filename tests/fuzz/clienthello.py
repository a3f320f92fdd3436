"""The first record of a TLS connection, as it is looked at before OpenSSL gets it."""

from __future__ import annotations

from tinytun_gevent.wire import clienthello

CODE = (clienthello,)


def _vector(size: int, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return len(content).to_bytes(size, "big") + content


def _hello(*extensions: bytes) -> bytes:
    body = b"\x03\x03" + bytes(32) + _vector(1) + _vector(2, b"\x13\x01") + _vector(1, b"\0")
    message = b"\x01" + _vector(3, body + _vector(2, *extensions))
    return b"\x16\x03\x01" + _vector(2, message)


_ALPN = b"\x00\x10" + _vector(2, _vector(2, _vector(1, b"h2"), _vector(1, b"http/1.1")))
_NAME = b"\x00\x00" + _vector(2, _vector(2, b"\0" + _vector(2, b"app.example.com")))

SEEDS = (_hello(_NAME, _ALPN), _hello(_ALPN), _hello(_NAME), _hello(), b"\x16\x03\x01\xff\xff", b"\x16GET /")
TOKENS = (
    *(_ALPN, _NAME, b"\x16\x03\x01", b"\x16\x03\x03", b"\x01\0\0", b"\0\0"),
    *(b"\xff\xff", b"\0\x10", b"\x02h2"),
)


def one(data: bytes) -> None:
    lacks = clienthello.missing(data)
    assert 0 <= lacks <= 16 * 1024 + 5
    whole = data + bytes(lacks)  # its head, perhaps, which says how much is to follow
    assert clienthello.missing(whole + bytes(clienthello.missing(whole))) == 0
    offered = clienthello.protocols(data)
    assert offered is None or all(name in data for name in offered)
    if offered and not lacks:
        assert clienthello.protocols(data + b"whatever comes behind the record") == offered
