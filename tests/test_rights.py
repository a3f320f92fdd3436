"""Which names and ports are whose to take."""

from __future__ import annotations

import re
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.rights import ANYTHING, TRIES, Names, Ports, Reservations, Rights, is_pattern
from tinytun_gevent.wire.handshake import is_subdomain

names = st.from_regex(r"[a-z0-9](?:[a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
patterns = st.from_regex(r"[a-z0-9*](?:[a-z0-9*-]{0,12}[a-z0-9*])?", fullmatch=True)


@given(patterns, names)
def test_a_star_stands_for_any_characters(pattern: str, name: str) -> None:
    expression = ".*".join(map(re.escape, pattern.split("*")))
    assert is_pattern(pattern)
    assert (name in Names([pattern])) == bool(re.fullmatch(expression, name))


@given(st.text(max_size=70))
def test_every_subdomain_is_a_pattern_of_itself(text: str) -> None:
    if is_subdomain(text):
        assert is_pattern(text)
        assert text in Names([text])
    if not is_pattern(text):
        with pytest.raises(ValueError, match="no subdomain"):
            Names([text])


@given(patterns)
def test_what_is_offered_belongs_to_the_set(pattern: str) -> None:
    offered = list(islice(Names([pattern]).offers(), 20))
    assert all(name in Names([pattern]) and is_subdomain(name) for name in offered)
    if "*" not in pattern:
        assert offered == [pattern]


def test_exact_names_are_offered_first_and_the_others_are_random() -> None:
    first, second, third = islice(Names(["app-*", "app"]).offers(), 3)
    assert first == "app"
    assert second != third
    assert second.startswith("app-")


def test_many_stars_cost_no_time() -> None:
    assert "a" * 62 + "b" not in Names(["*a" * 30 + "c"])


def test_ports_are_ranges() -> None:
    ports = Ports([range(20000, 20003), range(20002, 20003), range(70, 71)])
    assert (20002 in ports, 20003 in ports, "20002" in ports) == (True, False, False)
    assert str(ports) == "20000-20002, 20002, 70"
    assert ports.within(range(20001, 30000)) == [20001, 20002]


def everybody() -> tuple[Rights, Rights, Rights]:
    """Anna is confined, Bob is not and has names of his own, a stranger has nothing; ``www`` is nobody's."""
    reservations = Reservations(Names(["www", "api*"]))
    shop, game = Names(["shop", "shop-*"]), Ports([range(25565, 25566)])
    reservations.add(shop, "bob")
    reservations.add(game, "bob")
    anna = Rights(reservations, "anna", Names(["anna", "a-*"]), Ports([range(20000, 20002)]))
    return anna, Rights(reservations, "bob", own=shop, own_ports=game), Rights(reservations)


@pytest.mark.parametrize(
    ("name", "who"),
    [
        ("www", ""),
        ("api7", ""),
        ("shop", "bob"),
        ("shop-a", "bob"),
        ("anna", "anna bob stranger"),
        ("a-x", "anna bob stranger"),
        ("other", "bob stranger"),
        (25565, "bob"),
        (20001, "anna bob stranger"),
        (20002, "bob stranger"),
    ],
)
def test_who_may_take_what(name: str | int, who: str) -> None:
    allowed = [
        label
        for label, rights in zip(("anna", "bob", "stranger"), everybody(), strict=True)
        if rights.allows(name)
    ]
    assert allowed == who.split()


def test_a_refusal_says_what_is_reserved_and_what_a_token_allows() -> None:
    anna, _, stranger = everybody()
    assert stranger.refusal("shop") == "The subdomain shop is reserved"
    assert stranger.refusal(25565) == "The port 25565 is reserved"
    assert anna.refusal("other") == "Your token does not allow the subdomain other; it allows: anna, a-*"
    assert anna.refusal(30000) == "Your token does not allow the port 30000; it allows: 20000-20001"
    assert Rights(names=Names()).refusal("x").endswith("allows: none")


def test_two_may_have_the_same_reserved() -> None:
    reservations = Reservations()
    for id in ("one", "two"):
        reservations.add(Names(["shop"]), id)
    allowed = [Rights(reservations, id).allows("shop") for id in ("one", "two", "three")]
    assert allowed == [True, True, False]


def test_whoever_wants_any_is_offered_what_he_may_have() -> None:
    anna, bob, _ = everybody()
    assert next(anna.names()) == "anna"
    assert list(anna.ports(range(20000, 30000))) == [20000, 20001]
    assert bob.ports(range(20000, 30000)) == range(20000, 30000)
    assert len(list(ANYTHING.names())) == TRIES  # an end, for when all is reserved
    confined = Rights(
        names=Names(), own=Names(["shop"]), ports=Ports(), own_ports=Ports([range(30000, 30001)])
    )
    assert (list(confined.names()), list(confined.ports(range(20000, 60000)))) == (["shop"], [30000])


ranges = st.tuples(st.integers(1, 1200), st.integers(0, 600)).map(lambda pair: range(pair[0], sum(pair) + 1))


@given(
    st.lists(st.lists(patterns, max_size=3), max_size=4),
    st.lists(st.lists(ranges, max_size=3), max_size=4),
    names,
    st.integers(1, 1900),
)
def test_a_name_is_reserved_for_all_whose_sets_it_is_in(
    texts: list[list[str]], spans: list[list[range]], name: str, port: int
) -> None:
    reservations = Reservations()
    sets: list[Names | Ports] = [*map(Names, texts), *map(Ports, spans)]
    for number, held in enumerate(sets):
        reservations.add(held, str(number))
    for wanted in (name, port, *(pattern.replace("*", "x") for text in texts for pattern in text)):
        expected = {str(number) for number, held in enumerate(sets) if wanted in held}
        assert reservations.holders(wanted) == expected


def test_what_others_have_reserved_costs_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tunnels are looked at when somebody's token changes, and nobody is served meanwhile."""
    reservations = Reservations()
    for number in range(3000):
        held = Names([f"n{number}", f"n{number}-*"]), Ports([range(20000 + number, 20001 + number)])
        for one in held:
            reservations.add(one, str(number))
    compared = 0
    for kind in (Names, Ports):
        original = kind.__contains__

        def contains(self: object, name: object, original: Any = original) -> bool:
            nonlocal compared
            compared += 1
            return bool(original(self, name))

        monkeypatch.setattr(kind, "__contains__", contains)
    for name in ("n1234", "n1234-x", 21234, "other"):
        assert reservations.holders(name) == (set() if name == "other" else {"1234"})
    assert compared <= 300
