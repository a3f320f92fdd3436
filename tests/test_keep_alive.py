"""The Keep-Alive field: what services send, and what anybody could."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinytun_gevent.wire.keep_alive import KeepAlive, parse_keep_alive
from tinytun_gevent.wire.response import parse_response_head


@pytest.mark.parametrize(
    ("value", "timeout", "limit"),
    [
        (b"timeout=5", 5, None),  # Node
        (b"timeout=5, max=100", 5, 100),  # Apache, cpp-httplib
        (b"max=99, timeout=15", 15, 99),
        (b"Timeout=5,MAX=1", 5, 1),
        (b'timeout="5"', 5, None),
        (b" timeout = 5 ", 5, None),
        (b"timeout=0, max=0", 0, 0),
        (b"timeout=5, timeout=3", 3, None),
        (b"timeout=5, new=1, max=7", 5, 7),
        (b"300", None, None),
        (b"", None, None),
        (b"timeout", None, None),
        (b"timeout=", None, None),
        (b"timeout=-1", None, None),
        (b"timeout=5s", None, None),
        (b"timeout=1.5", None, None),
        (b"xtimeout=5", None, None),
        (b"timeout=1234567890", None, None),
        (b"timeout=5" + b" " * 300, None, None),
    ],
)
def test_what_is_understood(value: bytes, timeout: int | None, limit: int | None) -> None:
    assert parse_keep_alive(value) == KeepAlive(timeout, limit)


@given(st.binary(max_size=400))
@example(b"," * 256)
@example(b"timeout=" + b"9" * 248)
def test_anything_is_read_without_an_error(value: bytes) -> None:
    timeout, limit = parse_keep_alive(value)
    for number in (timeout, limit):
        assert number is None or 0 <= number < 10**9


@given(st.integers(0, 10**9 - 1), st.integers(0, 10**9 - 1), st.sampled_from([b",", b", ", b" ,\t"]))
def test_what_is_written_is_read(timeout: int, limit: int, between: bytes) -> None:
    assert parse_keep_alive(b"timeout=%d%bmax=%d" % (timeout, between, limit)) == (timeout, limit)


def test_it_is_the_service_s_alone() -> None:
    """Noted, and not passed on."""
    head = b"HTTP/1.1 200 OK\r\nKeep-Alive: timeout=5\r\nKeep-Alive: max=3\r\nContent-Length: 0\r\n\r\n"
    response = parse_response_head(head, b"GET", False)
    assert response.promise == KeepAlive(5, 3)
    assert [name for name, _ in response.fields] == [b"Content-Length"]
    assert parse_response_head(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"GET", False).promise is None
