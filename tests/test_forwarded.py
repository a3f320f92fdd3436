"""Who the visitor is, when a proxy stands between him and us."""

from __future__ import annotations

import pytest
from framing_corpus import request
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytun_gevent.wire.http1 import Forwarding, client_from_forwarding, parse_request_head

TRUSTED = {"10.0.0.1", "10.0.0.2", "2001:db8::1"}
DIRECT = Forwarding("10.0.0.1", 5555)


def seen(*fields: bytes, direct: Forwarding = DIRECT, host: bytes = b"demo.localhost:5555") -> Forwarding:
    head = parse_request_head(request(b"GET / HTTP/1.1", *fields, host=host))
    return client_from_forwarding(head, direct, TRUSTED.__contains__)


def client(*fields: bytes) -> str:
    return seen(*fields).client


def test_nobody_is_believed_who_is_not_trusted() -> None:
    direct = Forwarding("192.0.2.1", 5555)
    fields = (b"X-Forwarded-For: 10.0.0.1", b"X-Forwarded-Proto: https", b"X-Forwarded-Host: a.test")
    assert seen(*fields, direct=direct) is direct
    assert seen(b"Forwarded: for=10.0.0.1", direct=direct) is direct


def test_trusted_peer_that_says_nothing() -> None:
    assert seen() is DIRECT


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"192.0.2.1", "192.0.2.1"),
        (b"192.0.2.1:1234", "192.0.2.1"),
        (b"192.0.2.1, 10.0.0.2", "192.0.2.1"),
        (b"198.51.100.9, 192.0.2.1,10.0.0.2 ,10.0.0.2", "192.0.2.1"),
        (b"10.0.0.2, 192.0.2.1", "192.0.2.1"),
        (b"10.0.0.2, 10.0.0.2", "10.0.0.2"),
        (b"2001:DB8:0::9", "2001:db8::9"),
        (b"[2001:db8::9]:443", "2001:db8::9"),
        (b"[2001:db8::9]", "2001:db8::9"),
        (b"192.0.2.1, 2001:db8:0:0::1", "192.0.2.1"),
        (b"::ffff:192.0.2.1", "192.0.2.1"),
        (b"192.0.2.1, ::ffff:10.0.0.2", "192.0.2.1"),
        (b"unknown", "10.0.0.1"),
        (b"192.0.2.1, unknown", "10.0.0.1"),
        (b"192.0.2.1, unknown, 10.0.0.2", "10.0.0.2"),
        (b"192.0.2.1, 10.0.0.2.", "10.0.0.1"),
        (b"192.0.2.1, ,", "192.0.2.1"),
        (b"", "10.0.0.1"),
        (b",", "10.0.0.1"),
        (b"010.0.0.2", "10.0.0.1"),
        (b"fe80::1%eth0", "10.0.0.1"),
        (b"192.0.2.1, fe80::1%25eth0, 10.0.0.2", "10.0.0.2"),
        (b'::1%x - - [now] "forged" 200', "10.0.0.1"),
        (b"[::1%x y]:443", "10.0.0.1"),
        (b"192.0.2.1, 2001:db8::1%x", "10.0.0.1"),
        (b"192.0.2.1 10.0.0.2", "10.0.0.1"),
        (b"\xff", "10.0.0.1"),
        (b"9" * 5000, "10.0.0.1"),
    ],
)
def test_rightmost_address_that_is_not_trusted(value: bytes, expected: str) -> None:
    assert client(b"X-Forwarded-For: " + value) == expected


def test_field_lines_are_one_list() -> None:
    assert client(b"X-Forwarded-For: 198.51.100.9", b"X-Forwarded-For: 192.0.2.1, 10.0.0.2") == "192.0.2.1"


def test_a_made_up_chain_of_trusted_proxies_has_an_end() -> None:
    chain = b", ".join([b"192.0.2.1", *[b"10.0.0.2"] * 500])
    assert client(b"X-Forwarded-For: " + chain) == "10.0.0.2"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"for=192.0.2.1", ("192.0.2.1", "http", b"")),
        (b'For="[2001:db8::9]:4711";Proto=HTTPS;by=10.0.0.1', ("2001:db8::9", "https", b"")),
        (
            b"for=192.0.2.1; host=a.test;proto=https, for=10.0.0.2;proto=http",
            ("192.0.2.1", "https", b"a.test"),
        ),
        (b"for=198.51.100.9;host=evil.test, for=192.0.2.1;host=a.test", ("192.0.2.1", "http", b"a.test")),
        (b'for="198.51.100.9, for=192.0.2.1', ("192.0.2.1", "http", b"")),
        (b"for=192.0.2.1, for=unknown", ("10.0.0.1", "http", b"")),
        (b"for=192.0.2.1, for=_hidden, for=10.0.0.2", ("10.0.0.2", "http", b"")),
        (b'for="[::1%x forged]:1";proto=https', ("10.0.0.1", "http", b"")),
        (b"proto=https", ("10.0.0.1", "http", b"")),
        (b";;=;", ("10.0.0.1", "http", b"")),
        (b"", ("10.0.0.1", "http", b"")),
    ],
)
def test_forwarded(value: bytes, expected: tuple[str, str, bytes]) -> None:
    found = seen(b"Forwarded: " + value)
    assert (found.client, found.proto, found.host) == expected


def test_forwarded_is_not_read_beside_x_forwarded_for() -> None:
    assert client(b"Forwarded: for=198.51.100.9", b"X-Forwarded-For: 192.0.2.1") == "192.0.2.1"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([b"X-Forwarded-Proto: https", b"X-Forwarded-Port: 8443"], ("https", 8443, b"")),
        ([b"X-Forwarded-Proto: https"], ("https", 5555, b"")),
        ([b"X-Forwarded-Proto: https", b"X-Forwarded-Host: a.test"], ("https", 443, b"a.test")),
        ([b"X-Forwarded-Proto: http", b"X-Forwarded-Host: a.test"], ("http", 80, b"a.test")),
        ([b"X-Forwarded-Proto: https", b"X-Forwarded-Host: a.test:99"], ("https", 99, b"a.test:99")),
        ([b"X-Forwarded-Host: [::1]"], ("http", 5555, b"[::1]")),
        ([b"X-Forwarded-Host: evil.test, a.test"], ("http", 5555, b"a.test")),
        ([b"X-Forwarded-Proto: http, HTTPS", b"X-Forwarded-Port: 1, 2"], ("https", 2, b"")),
        ([b"X-Forwarded-Proto: gopher", b"X-Forwarded-Port: 0"], ("http", 5555, b"")),
        ([b"X-Forwarded-Port: 65536", b"X-Forwarded-Host: a b"], ("http", 5555, b"")),
        ([b"X-Forwarded-Port: +1", b"X-Forwarded-Host: user@a.test"], ("http", 5555, b"")),
    ],
)
def test_what_else_a_trusted_proxy_says(fields: list[bytes], expected: tuple[str, int, bytes]) -> None:
    found = seen(b"X-Forwarded-For: 192.0.2.1", *fields)
    assert (found.proto, found.port, found.host) == expected


def test_port_follows_the_scheme_where_the_host_has_none() -> None:
    found = seen(b"X-Forwarded-For: 192.0.2.1", b"X-Forwarded-Proto: https", host=b"demo.localhost")
    assert (found.proto, found.port) == ("https", 443)


def test_lines_for_the_service() -> None:
    assert Forwarding("::1", 443, "https", b"a.test").lines(b"b.test") == (
        b"X-Forwarded-For: ::1\r\nX-Forwarded-Proto: https\r\n"
        b"X-Forwarded-Host: a.test\r\nX-Forwarded-Port: 443\r\n"
    )
    assert b"\r\nX-Forwarded-Host: b.test\r\n" in Forwarding("::1", 443).lines(b"b.test")


FIELD_TEXT = st.text(
    st.characters(codec="latin-1", min_codepoint=32, exclude_characters="\x7f"), max_size=60
) | st.text('for=;,":[] 0123456789.htpsx', max_size=60)
ZONE = st.sampled_from(["::1%", "[fe80::1%", "for=[::1%", "192.0.2.1%"])
ADDRESS_TEXT = FIELD_TEXT | st.builds(str.__add__, ZONE, FIELD_TEXT)


@settings(deadline=None)  # a busy machine is no failure
@given(st.sampled_from(["X-Forwarded-For", "Forwarded"]), ADDRESS_TEXT, FIELD_TEXT)
def test_nonsense_raises_nothing_and_yields_an_address(name: str, first: str, second: str) -> None:
    found = seen(
        f"{name}: {first}".encode("latin-1"),
        f"X-Forwarded-Host: {second}".encode("latin-1"),
        f"X-Forwarded-Proto: {second}".encode("latin-1"),
        f"X-Forwarded-Port: {second}".encode("latin-1"),
    )
    assert set(found.client) <= set("0123456789abcdef.:")
    assert found.proto in ("http", "https")
    assert 0 < found.port < 65536
    head = parse_request_head(request(b"GET / HTTP/1.1"))
    assert found.lines(head.host_field).count(b"\r\n") == 4
