"""How TLS begins, by OpenSSL's own hellos and by ones that no client sends."""

from __future__ import annotations

import ssl

from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.wire import clienthello


def hello(*protocols: str) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if protocols:
        context.set_alpn_protocols(list(protocols))
    out = ssl.MemoryBIO()
    connection = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname="x.test")
    try:
        connection.do_handshake()
    except ssl.SSLWantReadError:
        pass
    return out.read()


def test_what_openssl_offers_is_seen() -> None:
    assert clienthello.protocols(hello("h2", "http/1.1")) == [b"h2", b"http/1.1"]
    assert clienthello.protocols(hello()) is None


def test_it_is_known_when_a_record_is_whole() -> None:
    whole = hello("h2")
    assert clienthello.missing(b"") == 5
    for length in range(len(whole)):
        assert clienthello.missing(whole[:length]) > 0
    assert clienthello.missing(whole) == clienthello.missing(whole + b"more") == 0


def test_what_is_no_record_is_not_waited_for() -> None:
    assert clienthello.missing(b"\x16GET ") == 0
    assert clienthello.missing(b"\x16\x03\x01\xff\xff") == 0


@given(st.data())
def test_broken_hellos_are_left_to_openssl(data: st.DataObject) -> None:
    whole = bytearray(hello("h2", "http/1.1"))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    offered = clienthello.protocols(cut)
    assert offered is None or all(isinstance(name, bytes) for name in offered)
    assert 0 <= clienthello.missing(cut) <= 16 * 1024 + 5


@given(st.binary(max_size=300))
def test_anything_else_is_no_hello(data: bytes) -> None:
    assert clienthello.protocols(b"\x16\x03\x01" + len(data).to_bytes(2, "big") + data) in (None, [])
