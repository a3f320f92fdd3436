"""What guessing at tokens costs an address."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.server import penalties
from tinytun_gevent.server.penalties import FIRST, FORGET, FREE, LONGEST, Penalties

HERE = "192.0.2.7"


def guess(penalties: Penalties, times: int, ip: str = HERE, now: float = 0.0) -> float:
    """The wait after so many wrong tokens at once, in seconds."""
    for _ in range(times):
        penalties.guessed(ip, now)
    return penalties.wait(ip, now)


def test_each_wrong_token_doubles_the_wait_up_to_a_limit() -> None:
    penalties = Penalties()
    assert guess(penalties, int(FREE)) == 0
    assert [guess(penalties, 1) for _ in range(4)] == [FIRST, 2 * FIRST, 4 * FIRST, 8 * FIRST]
    assert guess(penalties, 100) == LONGEST
    assert penalties.wait(HERE, LONGEST - 1) == 1
    assert penalties.wait(HERE, LONGEST) == 0
    assert penalties.wait("192.0.2.8", 0) == 0


def test_it_goes_on_growing_after_a_wait_and_is_forgotten_in_the_end() -> None:
    penalties = Penalties()
    guess(penalties, 4)
    assert guess(penalties, 1, now=FIRST + 60) == 2 * FIRST
    assert guess(penalties, 1, now=FIRST + 60 + 2 * FIRST + FORGET + 1) == 0


def test_a_missing_token_makes_nobody_wait_for_long() -> None:
    penalties = Penalties()
    for _ in range(int(FREE) * 4):
        penalties.lapsed(HERE, 0)
    assert penalties.wait(HERE, 0) == 0
    for _ in range(1000):
        penalties.lapsed(HERE, 0)
    assert penalties.wait(HERE, 0) == 10
    guess(penalties, 3)
    penalties.lapsed(HERE, 0)
    assert penalties.wait(HERE, 0) > 10, "and nobody's wait gets shorter by one"


def test_one_customer_is_one_address() -> None:
    penalties = Penalties()
    for number in range(6):
        penalties.guessed(f"2001:db8:1:2::{number}", 0)
    assert penalties.wait("2001:db8:1:2:ffff::1", 0) > 0
    assert penalties.wait("2001:db8:1:3::1", 0) == 0
    assert len(penalties) == 1


def test_other_addresses_do_not_help_to_lose_a_penalty() -> None:
    penalties = Penalties(most=64)
    guess(penalties, 20)
    for number in range(1000):
        penalties.guessed(f"198.51.{number // 250}.{number % 250}", 0)
        assert len(penalties) <= 64
    assert penalties.wait(HERE, 0) == LONGEST


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1e4)), max_size=60))
def test_a_wait_is_never_negative_nor_longer_than_the_longest(steps: list[tuple[bool, float]]) -> None:
    penalties, now = Penalties(), 0.0
    for wrong, pause in steps:
        now += pause
        (penalties.guessed if wrong else penalties.lapsed)(HERE, now)
        assert 0 <= penalties.wait(HERE, now) <= LONGEST


def test_who_is_known_is_an_account_at_an_address_and_the_oldest_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(penalties, "MOST_KNOWN", 2)
    known = Penalties()
    for ip in ("192.0.2.1", "192.0.2.2", "192.0.2.1", "2001:db8::1"):
        known.welcome(ip, "anna")
    assert known.knows("192.0.2.1", "anna")
    assert known.knows("2001:db8::2", "anna")
    assert not known.knows("192.0.2.2", "anna")
    assert not known.knows("192.0.2.1", "bob")
