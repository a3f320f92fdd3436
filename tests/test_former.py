"""Accounts that had access until lately."""

from __future__ import annotations

from tinytun_gevent.server.former import LATELY, Former


def test_an_account_is_remembered_for_its_time_and_from_then_on_anew() -> None:
    former = Former()
    former.add("anna", 0.0)
    assert former.has("anna", LATELY - 1)
    assert not former.has("anna", LATELY)
    assert not former.has("bob", 0.0)
    former.add("anna", LATELY - 1)
    assert former.has("anna", LATELY + 1)


def test_nobody_is_no_account() -> None:
    former = Former()
    former.add("", 0.0)
    assert not former.has("", 1.0)


def test_the_oldest_makes_room() -> None:
    former = Former(most=2)
    for account in ("anna", "bob", "anna", "eve"):
        former.add(account, 0.0)
    assert [account for account in ("anna", "bob", "eve") if former.has(account, 1.0)] == ["anna", "eve"]
