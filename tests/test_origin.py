"""Origins: which texts are one, which are the same, how they are written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.wire.origin import MAX_ORIGIN, Origin, parse_origin

hosts = st.one_of(
    st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,60}[a-z0-9])?", fullmatch=True),
    st.ip_addresses(v=6).map(lambda address: f"[{address.compressed}]"),
).map(str.encode)
origins = st.builds(Origin, st.sampled_from((b"http", b"https")), hosts, st.integers(1, 65535))


@given(origins)
def test_an_origin_survives(origin: Origin) -> None:
    assert parse_origin(bytes(origin)) == origin


@given(st.binary(max_size=300))
def test_any_bytes_are_an_origin_or_none(data: bytes) -> None:
    found = parse_origin(data)
    assert found is None or parse_origin(bytes(found)) == found


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("http://LocalHost", "http://localhost"),
        ("HTTP://localhost:80", "http://localhost"),
        ("https://localhost:443", "https://localhost"),
        ("http://localhost.:3000", "http://localhost:3000"),
        ("http://[0:0::1]:3000", "http://[::1]:3000"),
        ("https://a_b.test", "https://a_b.test"),
    ],
)
def test_spellings_of_one_origin_are_equal(text: str, same: str) -> None:
    found = parse_origin(text.encode())
    assert found == parse_origin(same.encode())
    assert found is not None
    assert bytes(found) == same.encode()


@pytest.mark.parametrize(
    "text",
    [
        *("", "null", "localhost", "localhost:3000", "//localhost", "ftp://localhost", "http://", "http://."),
        *("http://localhost/", "http://localhost:3000/x", "http://localhost?x", "http://a@localhost"),
        *("http://localhost:", "http://localhost:0", "http://localhost:65536", "http://localhost:123456"),
        *("http://[::1", "http://[:::1]", "http://[1.2.3.4]", "http://ä.test", "http://a b"),
        *("http://a http://b", "http://a, http://b", " http://a", "http://a\n", "http://a\0"),
        "http://" + "a" * MAX_ORIGIN,
    ],
)
def test_what_is_no_origin(text: str) -> None:
    assert parse_origin(text.encode()) is None


def test_other_schemes_hosts_and_ports_are_other_origins() -> None:
    texts = (b"http://a", b"https://a", b"http://a:443", b"https://a:80", b"http://b", b"http://a.b")
    assert len({parse_origin(text) for text in texts}) == len(texts)
