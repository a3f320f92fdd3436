"""The options of a CONNECT: what is accepted, what is refused and how that is said."""

from __future__ import annotations

import json
from base64 import urlsafe_b64encode
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.wire.options import (
    MAX_OPTIONS,
    Options,
    Rewrite,
    build_options,
    parse_options,
)

TARGET = "http://localhost:3000"
options = st.builds(
    Options,
    rewrite=st.none() | st.builds(Rewrite, st.just(TARGET), requests=st.booleans(), links=st.booleans()),
    forwarded_host=st.booleans(),
)


def encoded(value: Any) -> str:
    """The field's value for JSON text, or for what is to become some."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return urlsafe_b64encode(text).decode().rstrip("=")


def problem(value: Any, *, http: bool = True) -> str:
    with pytest.raises(ValueError) as caught:
        parse_options(encoded(value), http=http)
    return str(caught.value)


@given(options)
def test_options_survive(asked: Options) -> None:
    assert parse_options(build_options(asked), http=True) == asked


def test_only_what_asks_for_something_is_named() -> None:
    assert Options().names == ()
    assert Options(rewrite=Rewrite(TARGET), forwarded_host=False).names == ("rewrite", "forwarded_host")
    assert parse_options(encoded({"forwarded_host": True, "rewrite": None}), http=True).names == ()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"visitors": []}, "visitors: unknown"),
        ({"rewrite": {"origin": TARGET, "body": True}}, "rewrite.body: unknown"),
        ({"rewrite": {"origin": 3}}, "rewrite.origin: Expected"),
        ({"rewrite": {"links": True}}, "rewrite: .*origin"),
        ({"rewrite": TARGET}, "rewrite: Expected"),
        ({"rewrite": {"origin": "ftp://a"}}, "rewrite.origin: not"),
        ({"rewrite": {"origin": TARGET + "/"}}, "rewrite.origin: not"),
        ({"rewrite": {"origin": "http://a\r\nX: y"}}, "rewrite.origin: not"),
        ({"forwarded_host": 0}, "forwarded_host: Expected"),
        ({"forwarded_host": "off"}, "forwarded_host: Expected"),
        ([], "Expected `object`"),
        (b"", "base64"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"{} {}", "not JSON"),
        (b"[" * 4000, "Expected"),
        (b'{"rewrite":' + b"[" * 4000, "rewrite: Expected"),
        (b'{"forwarded_host":true,"forwarded_host":false}', "forwarded_host: there twice"),
        (b'{"rewrite":{"origin":"http://a","origin":"http://b"}}', "origin: there twice"),
        (b'{"forwarded_host":true' + b" " * MAX_OPTIONS + b"}", "longer"),
    ],
)
def test_what_is_refused_and_where(value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_options(encoded(value), http=True)


@pytest.mark.parametrize("value", ["", "e30=", "e3 0", "e30\n", "e", "e31+", "é", "{}"])
def test_what_is_not_base64url_is_refused(value: str) -> None:
    with pytest.raises(ValueError):
        parse_options(value, http=True)


def test_the_longest_options_pass() -> None:
    text = b"{" + b" " * (MAX_OPTIONS - 2) + b"}"
    assert parse_options(encoded(text), http=True) == Options()
    assert "longer" in problem(text + b" ")
    assert "longer" in problem(b"x" * MAX_OPTIONS * 3)


@pytest.mark.parametrize("value", [{"rewrite": {"origin": TARGET}}, {"forwarded_host": False}])
def test_a_tcp_tunnel_has_no_fields_to_rewrite(value: Any) -> None:
    parse_options(encoded(value), http=True)
    assert "only HTTP tunnels" in problem(value, http=False)


@given(st.binary(max_size=200), st.booleans())
def test_anything_else_is_a_value_error(data: bytes, http: bool) -> None:
    for value in (data.decode("latin-1"), encoded(data)):
        try:
            asked = parse_options(value, http=http)
        except ValueError:
            continue
        assert parse_options(build_options(asked), http=http) == asked


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(TARGET),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(("rewrite", "origin", "links", "requests", "forwarded_host", "x")),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(json_values)
def test_any_json_is_refused_or_means_what_it_says(value: Any) -> None:
    try:
        asked = parse_options(encoded(value), http=True)
    except ValueError:
        return
    said = {name: part for name, part in value.items() if part is not None}
    assert asked.forwarded_host == said.get("forwarded_host", True)
    assert (asked.rewrite is not None) == ("rewrite" in said)
