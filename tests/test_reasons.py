"""Why a server said no, in one line."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinytun_gevent.client.reasons import Reason, reason_in, without_ids


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"Not you\nmore", "Not you"),
        (b"", "Forbidden"),
        (b'{"message": "Not you\\nmore", "request_id": "4bf92f3577b34da6"}', "Not you"),
        (b'\xef\xbb\xbf{"error": {"code": 7, "message": "Not you"}}', "Not you"),
        (b'{"errors": [{"title": "Not you"}]}', "Not you"),
        (b'{"error": "denied", "error_description": "Not you"}', "Not you"),
        (b'["Not you"]', "Not you"),
        (b'{"code": 7}', "Forbidden"),
        (b'{"message": "Not y', "Forbidden"),
        (b'{"message": "the token s3cret is not valid"}', "the token … is not valid"),
        (b"[" * 1024, "Forbidden"),
    ],
)
def test_what_of_a_body_is_for_people(body: bytes, expected: str) -> None:
    assert reason_in(body, "Forbidden", "s3cret") == Reason(expected)


def test_a_page_is_known_as_one() -> None:
    assert reason_in(b"\r\n<!doctype html><h1>x</h1>", "") == Reason("no reason given", is_page=True)


@given(st.binary(max_size=100), st.text(max_size=20))
@example(b'{"message": "\\ud800"}', "")
@example(b'{"message": "\\u001b[2J"}', "")
def test_whatever_a_body_is_the_reason_is_one_printable_line(body: bytes, phrase: str) -> None:
    reason = reason_in(body, phrase).text
    assert reason
    assert reason.isprintable()


@given(st.recursive(st.text(max_size=9), lambda inner: st.dictionaries(st.sampled_from("ab"), inner)))
def test_an_object_never_reaches_a_terminal(value: object) -> None:
    assert reason_in(json.dumps({"x": value}).encode(), "Phrase").text == "Phrase"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Full (request 4bf92f3577b34da6)", "Full (request 00f067aa0ba902b7)", True),
        ("id=0d5e7c1a-93f2-4a63-9a65-4ee3c4b7a001", "id=9d5e7c1a-93f2-4a63-9a65-4ee3c4b7a0ff", True),
        ("Full, ray 8c1f2e3d4a5b6c7d-FRA", "Full, ray 1c1f2e3d4a5b6c7e-FRA", True),
        ("request 12345678", "request 12345679", True),
        ("a.example:5554 refuses", "b.example:5554 refuses", False),
        ("host1-of-many.example", "host2-of-many.example", False),
        ("Full (503)", "Full (502)", False),
    ],
)
def test_what_differs_by_an_id_is_the_same(one: str, other: str, same: bool) -> None:
    assert (without_ids(one) == without_ids(other)) is same
