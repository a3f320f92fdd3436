"""Patterns of names: what fits them, and that a made-up name always does."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.server.patterns import check_pattern, fill, fits
from tinytun_gevent.wire.handshake import is_subdomain

PATTERNS = st.from_regex(r"\A(?=.{1,30}\Z)[a-z0-9*][a-z0-9*-]*\Z").filter(lambda text: text.count("*") < 4)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("shop", "shop", True),
        ("shop", "shop2", False),
        ("acme-*", "acme-1", True),
        ("acme-*", "acme", False),
        ("*-acme", "x-acme", True),
        ("a*a", "a", False),
        ("a*a", "aa", True),
        ("a*b*c", "a1b2c", True),
        ("a*b*c", "acb", False),
        ("a*bc*c", "abc", False),
        ("*", "anything", True),
        ("a.c", "abc", False),
    ],
)
def test_what_fits(pattern: str, name: str, expected: bool) -> None:
    assert fits(pattern, name) is expected


@given(PATTERNS, st.from_regex(r"\A[ab-]{0,12}\Z"))
def test_it_is_what_a_regular_expression_would_find(pattern: str, name: str) -> None:
    expected = re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), name) is not None
    assert fits(pattern, name) is expected


@given(st.text("a*b-", max_size=12), st.text("ab-", max_size=14))
def test_it_is_so_for_names_that_nearly_fit_too(pattern: str, name: str) -> None:
    expected = re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), name) is not None
    assert fits(pattern, name) is expected


@given(st.text())
def test_a_pattern_that_is_allowed_can_be_filled(text: str) -> None:
    try:
        pattern = check_pattern(text)
    except ValueError:
        return
    name = fill(pattern)
    assert is_subdomain(name)
    assert fits(pattern, name)


@pytest.mark.parametrize(
    "text", ["", "-a", "a-", "a.b", "a_b", "*-", "a" * 64, "x" * 53 + "*", "*" * 6, "\u212a"]
)
def test_what_no_name_could_fit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a-z"):
        check_pattern(text)


def test_no_pattern_takes_long() -> None:
    began = time.monotonic()
    for _ in range(1000):
        fits("*a" * 30, "a" * 29 + "b" * 34)
    assert time.monotonic() - began < 1
