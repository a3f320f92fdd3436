"""Rules of the field section that requests and responses share."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytun_gevent.errors import MessageError
from tinytun_gevent.wire import fields
from tinytun_gevent.wire.fields import CHUNKED, normalize_host, take_framing, take_options


@pytest.mark.parametrize(
    ("value", "host"),
    [
        (b"a", "a"),
        (b"Demo.LocalHost:5555", "demo.localhost"),
        (b"demo.localhost.", "demo.localhost"),
        (b"demo.localhost.:1", "demo.localhost"),
        (b"demo.localhost:", "demo.localhost"),
        (b"demo.localhost..", "demo.localhost."),
        (b"127.0.0.1:65535", "127.0.0.1"),
        (b"[2001:DB8::1]:80", "[2001:db8::1]"),
        (b"[::ffff:1.2.3.4]", "[::ffff:1.2.3.4]"),
        (b"a_b-c.d", "a_b-c.d"),
    ],
)
def test_normalize_host(value: bytes, host: str) -> None:
    assert normalize_host(value) == host


@settings(deadline=None)  # a busy machine is no failure
@given(st.binary(max_size=30))
def test_normalized_host_is_plain(value: bytes) -> None:
    try:
        host = normalize_host(value)
    except MessageError as error:
        assert error.status == 400  # noqa: PT017
    else:
        assert host == host.lower()
        assert set(host) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-[]:")


@pytest.mark.parametrize("value", [b"close", b", CLOSE ,", b"x,\tclose"])
def test_options_are_taken_apart_alike_short_or_long(value: bytes) -> None:
    assert take_options(value, 400).close
    long = take_options(value + b"," * 100, 400)
    assert long == take_options(value, 400)
    assert not long.keep_alive


def test_named_fields() -> None:
    options = take_options(b"Keep-Alive, X-A ,x-b, upgrade", 400)
    assert options.named == {b"x-a", b"x-b"}
    assert options.upgrade
    pairs = [(b"X-a", b"1"), (b"X-B", b"2"), (b"X-C", b"3")]
    assert fields.without_named(pairs, options.named) == [(b"X-C", b"3")]


@pytest.mark.parametrize("name", [b"Host", b"content-LENGTH", b"Transfer-Encoding", b"trailer"])
@pytest.mark.parametrize("status", [400, 502])
def test_names_that_connection_may_not_have(name: bytes, status: int) -> None:
    for value in (name, b"close, " + name, b"x" * 100 + b"," + name):
        with pytest.raises(MessageError) as caught:
            take_options(value, status)
        assert caught.value.status == status


def test_framing_is_read_and_written_in_canonical_form() -> None:
    out: fields.Fields = []
    assert take_framing({}, 1, 400, out) is None
    assert take_framing({b"content-length": b"0042"}, 1, 400, out) == 42
    assert take_framing({b"content-length": b"9223372036854775807"}, 0, 400, out) == 2**63 - 1
    assert take_framing({b"transfer-encoding": b"ChunkeD"}, 1, 400, out) == CHUNKED
    assert out == [
        (b"Content-Length", b"42"),
        (b"Content-Length", b"9223372036854775807"),
        (b"Transfer-Encoding", b"chunked"),
    ]


@pytest.mark.parametrize(
    ("noted", "minor", "request_status"),
    [
        ({b"content-length": b"5", b"transfer-encoding": b"chunked"}, 1, 400),
        ({b"content-length": b"5, 5"}, 1, 400),
        ({b"content-length": b""}, 1, 400),
        ({b"content-length": b"\xb2"}, 1, 400),
        ({b"content-length": b"9223372036854775808"}, 1, 400),
        ({b"content-length": b"1" * 20}, 1, 400),
        ({b"transfer-encoding": b""}, 1, 400),
        ({b"transfer-encoding": b"chunked, chunked"}, 1, 501),
        ({b"transfer-encoding": b"gzip"}, 1, 400),
        ({b"transfer-encoding": b"gzip ,\tChunked"}, 1, 501),
        ({b"transfer-encoding": b"chunked\x0b"}, 1, 400),
    ],
)
def test_framing_is_refused_here_even_if_llhttp_would_let_it_pass(
    noted: dict[bytes, bytes], minor: int, request_status: int
) -> None:
    for status, expected in ((400, request_status), (502, 502)):
        with pytest.raises(MessageError) as caught:
            take_framing(noted, minor, status, [])
        assert caught.value.status == expected


def test_chunks_in_http_1_0_are_refused_from_visitors_only() -> None:
    """A service that calls its chunked answer HTTP/1.0 is understood; its connection ends with it."""
    noted = {b"transfer-encoding": b"chunked"}
    with pytest.raises(MessageError) as caught:
        take_framing(noted, 0, 400, [])
    assert caught.value.status == 400
    assert take_framing(noted, 0, 502, []) == fields.CHUNKED


def test_lines() -> None:
    assert fields.lines([]) == b""
    assert fields.lines([(b"A", b"1"), (b"B", b"")]) == b"A: 1\r\nB: \r\n"
