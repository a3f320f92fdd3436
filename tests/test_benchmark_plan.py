"""The benchmark's targets, its plan and its command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.measures import LESS, MEASURES  # noqa: E402
from benchmarks.options import QUICK_LIMIT, arguments, peer_names, plan, scenario_names  # noqa: E402
from benchmarks.peers import CONTENDERS, DIRECT, HAPROXY, OURS, OURS_TCP  # noqa: E402
from benchmarks.planning import START, Plan, parts  # noqa: E402
from benchmarks.report import (  # noqa: E402
    TIMES,
    Cell,
    Results,
)
from benchmarks.scenarios import EXTRA, SCENARIOS, Processes  # noqa: E402
from benchmarks.scenarios.memory import fitting  # noqa: E402
from benchmarks.targets import KEPT, MISSED, NOT_MEASURED, TARGETS, Target, judge, targets_table  # noqa: E402

PEERS = ("bore", "rathole")
BY_KEY = {measure.key: measure for measure in MEASURES}


def cells(contender: str, key: str, values: list[float], failures: int = 0) -> list[Cell]:
    scenario = BY_KEY[key].scenario
    return [
        Cell(number, contender, scenario, {key: value}, 10, failures, ["cut off"] if failures else [])
        for number, value in enumerate(values)
    ]


def results(*some: list[Cell]) -> Results:
    return Results([cell for one in some for cell in one], PEERS)


@pytest.mark.parametrize(
    ("target", "ours", "theirs", "verdict"),
    [
        (Target("", "download", 1.5), [1.5], [1.0], KEPT),
        (Target("", "download", 1.5), [1.49], [1.0], MISSED),
        (Target("", "download-cpu", 0.7), [0.7], [1.0], KEPT),
        (Target("", "download-cpu", 0.7), [0.71], [1.0], MISSED),
        (Target("", "download", 1.5), [9.0], [], NOT_MEASURED),
        (Target("", "download", 1.5), [], [1.0], NOT_MEASURED),
        (Target("", "start", 0.25, ""), [0.25], [], KEPT),
        (Target("", "start", 0.25, ""), [0.26], [0.01], MISSED),
        (Target("", "start", 0.25, ""), [0.2], [0.01], KEPT),
        (Target("", "far-100ms-1Gbit-1", 119, ""), [118.0], [125.0], MISSED),
    ],
)
def test_targets(target: Target, ours: list[float], theirs: list[float], verdict: str) -> None:
    found = results(cells(OURS, target.measure, ours), cells("bore", target.measure, theirs))
    assert judge(target, found).verdict == verdict


def test_a_target_may_be_held_against_one_by_name() -> None:
    target = Target("", "download", 0.6, HAPROXY)
    found = results(*[cells(who, "download", [n]) for who, n in ((OURS, 0.6), ("bore", 9.0), (HAPROXY, 1.0))])
    judged = judge(target, found)
    assert (judged.verdict, judged.reference) == (KEPT, HAPROXY)
    assert judged.row()[1] == f"≥ 0.600{TIMES} {HAPROXY}"


def test_a_target_is_missed_by_what_failed() -> None:
    found = results(cells(OURS, "download", [9.0], failures=1), cells("bore", "download", [1.0]))
    assert judge(Target("", "download", 1.5), found).verdict == MISSED


def test_every_target_has_its_row_even_when_nothing_was_measured() -> None:
    rows = targets_table(results()).splitlines()[2:]
    assert len(rows) == len(TARGETS)
    assert all(row.endswith(f"| {NOT_MEASURED} |") for row in rows)
    assert {target.measure for target in TARGETS} <= set(BY_KEY)
    assert {target.contender for target in TARGETS} == {OURS, OURS_TCP}


def test_every_measure_belongs_to_a_scenario_and_every_scenario_has_one() -> None:
    assert {measure.scenario for measure in MEASURES} == {s.name for s in (*SCENARIOS, *EXTRA)}
    assert len(BY_KEY) == len(MEASURES)
    assert BY_KEY["idle-2000-memory"].better == LESS


def test_the_budget_is_cells_and_starts() -> None:
    shared = next(s for s in SCENARIOS if s.name == "keepalive-32")
    fresh = next(s for s in SCENARIOS if s.processes is Processes.FRESH and s.name == "idle-2000")
    two = [c for c in CONTENDERS if c.name in (OURS, DIRECT)]
    cost = shared.seconds + shared.overhead
    assert Plan(two, [shared], 3, 100).expected() == pytest.approx(3 * (2 * cost + 2 * START))
    # No anchor holds idle visitors: one cell, with a start of its own.
    alone = fresh.seconds + fresh.overhead + START
    assert Plan(two, [fresh], 1, 100).expected() == pytest.approx(alone)
    assert Plan(two, [shared], 1, 100, quick=True).seconds(shared) == shared.quick


def test_the_full_and_the_quick_run_fit_their_limits() -> None:
    # Peers that one machine has: frp and chisel are not in Debian.
    usual = [c for c in CONTENDERS if not c.asked_for]
    names = [c.name for c in usual if not c.name.startswith(("frp", "chisel"))]
    assert plan(arguments([])).contenders == usual
    full = plan(arguments(["--peers", ",".join(names)]))
    assert (full.rounds, full.limit) == (3, 2400)
    assert full.expected() < full.limit
    quick = plan(arguments(["--quick"]))
    assert (quick.rounds, quick.limit) == (1, QUICK_LIMIT)
    assert quick.expected() < quick.limit
    assert [contender.name for contender in quick.contenders] == [OURS, OURS_TCP, "ssh -R", HAPROXY]


def test_scenarios_are_put_together_by_the_processes_they_need() -> None:
    found = parts(SCENARIOS)
    assert [part.alone for part in found] == [True] + [False] * (len(found) - 1)
    assert [part.path is None for part in found[:2]] == [True, True]
    assert sum(len(part.scenarios) for part in found) == len(SCENARIOS)
    assert all(s.path == part.path for part in found[1:] for s in part.scenarios)


def test_names_on_the_command_line() -> None:
    options = arguments(["--peers", "TINYTUN-http,ssh-R", "--scenario", "upload,far-100ms", "--rounds", "2"])
    planned = plan(options)
    assert [contender.name for contender in planned.contenders] == [OURS, "ssh -R"]
    assert [s.name for s in planned.scenarios] == ["upload", "far-100ms-1", "far-100ms-8"]
    assert planned.rounds == 2
    assert set(peer_names()) == {contender.name for contender in CONTENDERS}
    assert {"bulk", "keepalive", "far", "memory"} <= set(scenario_names())


@pytest.mark.parametrize(
    "words", [["--scenario", "nonsense"], ["--peers", ""], ["--rounds", "0"], ["--limit", "x"]]
)
def test_nonsense_on_the_command_line_is_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        arguments(words)
    assert refused.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_visitors_fit_the_descriptors() -> None:
    bore = next(c for c in CONTENDERS if c.name == "bore")
    assert fitting(10000, bore, 65536) == 10000
    assert fitting(10000, bore, 1024) == (1024 - 100) // 2
