"""Every parser of peers' bytes over its corpus and some mutations; ``tests/fuzz/run`` searches for longer."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import engine
from fuzz.engine import Arcs, Mutator, Target, search, shortened, smallest_cover, where
from fuzz.targets import TARGETS
from h2.exceptions import ProtocolError
from hypothesis import given
from hypothesis import strategies as st

#: Mutations of each parser: all together take about two seconds. A session costs ten times what others do.
MUTATIONS = dict.fromkeys(TARGETS, 2000) | {"session": 500, "proxyproto": 1000}
SEED = 20260101


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
def test_the_corpus_breaks_no_invariant(target: Target) -> None:
    assert target.kept(), "nothing is kept"
    for data in (*target.seeds, *target.kept()):
        target.one(data)


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
def test_mutations_break_no_invariant(target: Target) -> None:
    mutator = Mutator(target.tokens, random.Random(SEED))
    pool = [data for data in (*target.seeds, *target.kept()) if len(data) < 600]
    for _ in range(MUTATIONS[target.name]):
        data = mutator.mutate(pool)
        try:
            target.one(data)
        except Exception as error:
            raise AssertionError(f"{data!r}") from error


@given(st.binary(max_size=64))
def test_any_bytes_break_no_invariant(data: bytes) -> None:
    for name, target in TARGETS.items():
        if name != "session":
            target.one(data)


def test_the_corpus_is_small() -> None:
    sizes = [path.stat().st_size for path in engine.CORPUS.rglob("*") if path.is_file()]
    assert max(sizes) <= engine.MAX_INPUT
    assert sum(sizes) < 512 * 1024


# -- the search itself -------------------------------------------------------------------------------


def _fragile(data: bytes) -> None:
    """Breaks for what begins with ``ab`` and ends with ``!``; each step towards that is code of its own."""
    if data[:1] == b"a":
        if data[1:2] == b"b":  # noqa: SIM102
            if data[-1:] == b"!":
                raise ProtocolError("found")
        return


FRAGILE = Target("fragile", _fragile, (b"x",), (b"a", b"b", b"!"), frozenset({__file__}))


def test_a_search_finds_what_is_several_steps_away() -> None:
    for found in search(FRAGILE, 300, SEED):
        if found.broken or found.runs > 100_000:  # with this seed it takes 135
            break
    ((place, (data, error)),) = found.broken.items()
    assert place.startswith("ProtocolError at test_fuzz.py:")
    assert isinstance(error, ProtocolError)
    assert shortened(FRAGILE, b"ab, and much more !", place) == b"ab!"
    assert data.startswith(b"ab")


def test_arcs_are_of_the_files_asked_for_only() -> None:
    here, elsewhere = Arcs(frozenset({__file__})), Arcs(frozenset({"other.py"}))
    assert here.of(_fragile, b"x") < here.of(_fragile, b"x") | here.of(_fragile, b"ab")
    assert elsewhere.of(_fragile, b"x") == set()
    assert sys.gettrace() is None or "pydevd" in repr(sys.gettrace())


def test_a_mutator_is_repeatable_and_bounded() -> None:
    def inputs(seed: int) -> list[bytes]:
        mutator = Mutator((b"token",), random.Random(seed))
        return [mutator.mutate([b"one\r\ntwo 17", b"x" * engine.MAX_INPUT]) for _ in range(200)]

    assert inputs(1) == inputs(1) != inputs(2)
    assert max(map(len, inputs(1))) <= engine.MAX_INPUT


def test_a_cover_is_small_and_complete() -> None:
    reaching = [(b"long", frozenset({1, 2, 3})), (b"a", frozenset({1})), (b"bb", frozenset({1, 2}))]
    assert smallest_cover(reaching) == [b"a", b"bb", b"long"]
    assert smallest_cover([*reaching, (b"c", frozenset({1, 2, 3}))]) == [b"a", b"c"]


def test_a_place_is_where_an_error_came_from() -> None:
    with pytest.raises(ProtocolError) as caught:
        _fragile(b"ab!")
    assert where(caught.value).startswith("ProtocolError at test_fuzz.py:")


def test_the_command_searches_for_a_moment() -> None:
    command = [sys.executable, str(Path(engine.__file__).with_name("run")), "--minutes", "0", "--seed", "1"]
    done = subprocess.run([*command, "peers"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "peers: " in done.stdout
    assert "0 inputs kept, 0 findings" in done.stdout
    unknown = subprocess.run([*command, "nothing"], capture_output=True, text=True, timeout=60, check=False)
    assert unknown.returncode == 2
