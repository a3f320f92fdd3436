"""What guessing costs: sums, limits, oblivion, and who does not pay for others."""

from __future__ import annotations

import pytest

from tinytun_gevent.server import penalties
from tinytun_gevent.server.penalties import MAXIMUM, MISSING, THRESHOLD, WRONG, Penalties, source_of


def test_a_mistake_or_two_cost_nothing() -> None:
    known = Penalties()
    known.add("a", WRONG, 100.0)
    known.add("a", WRONG, 100.0)
    assert known.left("a", 100.0) == 0
    known.add("a", WRONG, 100.0)
    assert known.left("a", 100.0) == 3 * WRONG
    assert known.left("b", 100.0) == 0


def test_who_is_turned_away_is_so_until_all_has_run_off() -> None:
    known = Penalties()
    for _ in range(4):
        known.add("a", WRONG, 100.0)
    assert known.left("a", 119.0) == pytest.approx(1.0)
    assert known.left("a", 120.0) == 0
    known.add("a", WRONG, 120.0)
    assert known.left("a", 120.0) == 0, "what has run off counts no more"


def test_attempts_meanwhile_make_it_longer_up_to_a_maximum() -> None:
    known = Penalties()
    waits = []
    for second in range(1000):
        known.add("a", WRONG, 100.0 + second)
        waits.append(known.left("a", 100.0 + second))
    assert waits[10] < waits[50] < waits[100]
    assert max(waits) == MAXIMUM


def test_a_mistake_now_and_then_never_adds_up() -> None:
    known = Penalties()
    for hour in range(100):
        known.add("a", WRONG, hour * 3600.0)
        assert known.left("a", hour * 3600.0) == 0


def test_none_at_all_is_cheaper_than_a_wrong_one() -> None:
    known = Penalties()
    for _ in range(int(THRESHOLD / MISSING) - 1):
        known.add("a", MISSING, 100.0)
    assert known.left("a", 100.0) == 0
    known.add("a", MISSING, 100.0)
    assert known.left("a", 100.0) == THRESHOLD


def test_many_other_sources_do_not_make_a_guessers_penalty_forgotten() -> None:
    known = Penalties(most=100)
    for _ in range(20):
        known.add("guesser", WRONG, 100.0)
    for number in range(10_000):
        known.add(f"cheap {number}", WRONG, 100.0)
        assert len(known) <= 100
    assert known.left("guesser", 100.0) == 20 * WRONG


def test_a_source_that_has_waited_is_forgotten_when_it_comes_again() -> None:
    known = Penalties()
    known.add("a", WRONG, 100.0)
    assert known.left("a", 200.0) == 0
    assert len(known) == 0


def test_friends_are_pairs_and_the_oldest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penalties, "MOST_FRIENDS", 2)
    known = Penalties()
    for source in ("a", "b", "a", "c"):
        known.befriend(source, "me")
    assert known.is_friend("a", "me")
    assert known.is_friend("c", "me")
    assert not known.is_friend("b", "me")
    assert not known.is_friend("a", "you")


def test_a_source_is_an_address_or_a_network_of_64_bits() -> None:
    assert source_of("192.0.2.1") == "192.0.2.1"
    assert source_of("2001:db8::1") == source_of("2001:db8:0:0:ffff::2")
    assert source_of("2001:db8::1") != source_of("2001:db8:0:1::1")
