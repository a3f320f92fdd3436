"""The benchmarks of shares and of limits: their arithmetic and verdicts, and that they run at all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import limits, shares
from benchmarks.limits import Meter, Ratios, seconds_of, together
from benchmarks.peers.ours import Tinytun
from benchmarks.processes import Workspace
from benchmarks.shares import Shares, judge

NOWHERE: Workspace = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("rates", "kept"),
    [
        ((1.0,) * 8, True),
        ((1.0,) * 7 + (0.7,), False),
        ((1.0,) * 7 + (1.3,), False),
        ((1.9, 1.0), True),
        ((2.1, 1.0), False),
    ],
)
def test_shares_are_judged(rates: tuple[float, ...], kept: bool) -> None:
    assert judge(Shares(rates)).kept == kept


def meter(*notes: tuple[float, int]) -> Meter:
    made = Meter()
    for at, count in notes:
        made.times.append(at)
        made.counts.append(count)
    return made


def test_each_second_is_held_against_the_limit() -> None:
    steady = meter(*[(10 + number / 10, limits.RATE // 10) for number in range(31)])
    assert seconds_of(steady, 10.0, 13.0) == pytest.approx((1.0, 1.0), abs=0.11)
    pausing = meter((10.0, limits.RATE), (12.5, limits.RATE))
    assert seconds_of(pausing, 10.0, 13.0)[0] == 0.0


def test_meters_are_put_together_in_order() -> None:
    both = together([meter((1.0, 1), (3.0, 3)), meter((2.0, 2))])
    assert (both.times, both.counts) == ([1.0, 2.0, 3.0], [1, 2, 3])
    assert both.since(2.0) == 5


def test_a_promise_is_kept_if_it_is_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(0.5, 1.0), (0.95, 1.05), (0.0, 9.0)]

    def measure(*_: object) -> dict[str, Ratios]:
        return {"it": found.pop(0)}

    monkeypatch.setitem(limits.PROMISES, measure, (0.9, 1.1))
    assert limits.check(measure, NOWHERE, 0)
    assert len(found) == 1, "it is not measured again"
    found = [(0.0, 1.0)] * limits.ROUNDS
    assert not limits.check(measure, NOWHERE, 0)


def test_a_moment_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether bytes move, and for whom they are counted; not how many."""
    monkeypatch.setattr(limits, "SECONDS", 0.7)
    with Workspace() as workspace:
        port = shares.start_service(workspace)
        assert len(shares.measure(Tinytun("tcp"), workspace, port, [2, 1], True, 0.3, 0.1).rates) == 2
        assert len(limits.neighbours(workspace, port)) == 2
