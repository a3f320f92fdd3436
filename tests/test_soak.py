"""The soak's judgement: which memory is flat, which books add up; and a soak of a few seconds for real."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.soak_parts.crowds import LARGEST  # noqa: E402
from benchmarks.soak_parts.ledger import Books, complaints  # noqa: E402
from benchmarks.soak_parts.memory import ALWAYS, trend  # noqa: E402

MIB = 1 << 20


def samples(growth: float, noise: float, seconds: int = 400) -> list[tuple[float, int]]:
    """A process of 50 MiB that grows by ``growth`` over the whole time; both in MiB."""
    numbers = random.Random(1)
    return [
        (float(at), round((50 + growth * at / seconds + numbers.gauss(0, noise)) * MIB))
        for at in range(seconds)
    ]


# -- memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("growth", "noise"), [(0, 0), (0, 3), (1, 0.1), (-20, 1)])
def test_what_is_flat(growth: float, noise: float) -> None:
    assert trend(samples(growth, noise)).flat


@pytest.mark.parametrize(("growth", "noise"), [(6, 0), (10, 1), (40, 3)])
def test_what_grows(growth: float, noise: float) -> None:
    line = trend(samples(growth, noise))
    assert not line.flat
    assert line.growth == pytest.approx(0.7 * growth * MIB, rel=0.4)


def test_the_warm_up_is_left_out() -> None:
    steep = [(float(at), (50 + min(at, 100)) * MIB) for at in range(400)]
    line = trend(steep)
    assert line.flat
    assert line.start == pytest.approx(150 * MIB, rel=0.01)


def test_of_one_look_nothing_can_be_said() -> None:
    assert trend([(0.0, 5 * MIB)]).flat


def test_one_step_up_is_growth() -> None:
    assert trend([(float(at), (50 + 10 * (at > 260)) * MIB) for at in range(400)]).growth > ALWAYS


# -- the books ---------------------------------------------------------------------------------------

EXACT = Books(
    "raw",
    "tcp",
    visitors={"sent": 700, "received": 900, "things": 3},
    service={"received": 700, "sent": 900},
    server={"written_bytes": 700, "read_bytes": 900},
    client={"bytes_in": 700, "bytes_out": 900},
)


def test_equal_numbers_add_up() -> None:
    assert complaints(EXACT) == []
    assert EXACT.in_flight == 0


@pytest.mark.parametrize("who", ["visitors", "service", "server", "client"])
def test_one_byte_of_anybody_is_told(who: str) -> None:
    counts = dict(getattr(EXACT, who))
    for name in set(counts) - {"things"}:
        for change in (1, -1):
            wrong = replace(EXACT, **{who: counts | {name: counts[name] + change}})
            assert complaints(wrong), (who, name)


def test_where_connections_were_cut_something_may_be_in_flight() -> None:
    books = replace(EXACT, visitors={"sent": 700 + LARGEST, "received": 900, "left": 1})
    assert books.in_flight == LARGEST
    assert complaints(books) == []
    assert complaints(replace(books, visitors={"sent": 701 + LARGEST, "received": 900, "left": 1}))
    assert complaints(replace(books, visitors={"sent": 699, "received": 900, "left": 1})), (
        "more than was sent"
    )


def test_failures_need_a_reason() -> None:
    failed = {"sent": 700, "received": 900, "failed": 1}
    assert complaints(replace(EXACT, visitors=failed)) == ["raw: 1 visits failed though nobody was killed"]
    assert complaints(replace(EXACT, visitors=failed, cut=1)) == []
    assert complaints(replace(EXACT, visitors={"sent": 700, "received": 900, "wrong": 2}, cut=1))


def test_bodies_of_http_are_compared_with_what_the_service_has() -> None:
    books = Books("web", "http", {"up": 5, "down": 9}, {"up": 5, "down": 9, "sent": 90, "received": 50})
    assert complaints(books) == []
    assert complaints(replace(books, visitors={"up": 5, "down": 8}))
    assert complaints(replace(books, visitors={"up": 6, "down": 9}))


# -- for real ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_moment_of_it_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.processes import Workspace
    from benchmarks.soak_parts import driving

    monkeypatch.setattr(driving, "SAMPLE", 0.05)
    monkeypatch.setattr(driving, "KILLS", (0.0, 0.0))  # somebody is killed at every look
    monkeypatch.setattr(driving, "VISITORS", 1)
    with Workspace(patience=1) as workspace:
        verdict = driving.Soak(workspace, 0.7 / 60, seed=4).run()
    assert sum(verdict.kills.values()) >= 1
    assert [books.name for books in verdict.books] == list(driving.KINDS)
    exact = {**driving.CALM, **(driving.SHAKEN if not verdict.kills["worker"] else {})}
    assert [books.name for books in verdict.books if not books.in_flight] == list(exact)
    assert all(books.visitors["things"] for books in verdict.books)
    counted = [text for text in verdict.complaints if "has grown" not in text]  # too short a time for that
    assert counted == []
    assert "client web" in driving.report(verdict)
