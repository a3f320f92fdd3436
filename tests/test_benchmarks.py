"""The benchmark's arithmetic and what it reads from its tools; nothing here is timed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.loads.tunnels import ACK, GOAWAY, PING, SETTINGS, answers, frame  # noqa: E402
from benchmarks.loads.visitors import complete  # noqa: E402
from benchmarks.loads.wrk import parse_wrk  # noqa: E402
from benchmarks.measures import MEASURES  # noqa: E402
from benchmarks.options import arguments, plan  # noqa: E402
from benchmarks.peers import DIRECT, HAPROXY, OURS  # noqa: E402
from benchmarks.processes import (  # noqa: E402
    BenchmarkError,
)
from benchmarks.report import (  # noqa: E402
    DASH,
    TIMES,
    Cell,
    Results,
    Summary,
    figure,
    figures_table,
    ratios_table,
    rotated,
    spread,
    summarize,
    with_added_latency,
)
from benchmarks.results import MARKER, Report, markdown, write_json, write_results  # noqa: E402
from benchmarks.scenarios.far import percentile  # noqa: E402
from benchmarks.services import SMALL  # noqa: E402
from benchmarks.targets import KEPT, NOT_MEASURED  # noqa: E402

WRK = """\
Running 2s test @ http://127.0.0.1:8080/small
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.04ms  634.34us   8.95ms   92.09%
    Req/Sec     1.88k   167.59     2.10k    63.64%
  Latency Distribution
     50%  950.00us
     75%    1.20ms
     90%    1.50ms
     99%    1.20s
  20550 requests in 2.10s, 1.02MB read
"""
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


# Medians, spreads, ratios


def test_summary_is_the_median_and_the_extremes() -> None:
    assert summarize([3.0, 100.0, 1.0]) == Summary(3.0, 1.0, 100.0, 3)
    assert summarize([1.0, 2.0]) == Summary(1.5, 1.0, 2.0, 2)
    assert summarize([]) is None


def test_ratio_is_of_the_medians_and_its_extremes_of_the_rounds() -> None:
    found = results(cells(OURS, "download", [2.0, 3.0, 8.0]), cells("bore", "download", [1.0, 2.0, 2.0]))
    assert found.ratio(OURS, "bore", "download") == Summary(1.5, 1.5, 4.0, 3)


def test_ratio_uses_only_rounds_that_both_have() -> None:
    found = results(cells(OURS, "download", [2.0, 3.0, 8.0]), cells("bore", "download", [1.0]))
    assert found.ratio(OURS, "bore", "download") == Summary(3.0, 2.0, 2.0, 1)


@pytest.mark.parametrize("theirs", [[], [0.0, 0.0], [-1.0]])
def test_no_ratio_without_something_to_compare_with(theirs: list[float]) -> None:
    found = results(cells(OURS, "download", [1.0]), cells("bore", "download", theirs))
    assert found.ratio(OURS, "bore", "download") is None


@pytest.mark.parametrize(
    ("key", "bore", "rathole", "best"),
    [
        ("download", [1.0, 5.0, 1.0], [2.0, 2.0, 2.0], "rathole"),
        ("download", [3.0], [2.0], "bore"),
        ("keepalive-32-p99", [3.0], [2.0], "rathole"),
        ("download", [2.0], [2.0], "bore"),  # a tie: either would do, but always the same
        ("download", [], [0.5], "rathole"),
        ("download", [], [], None),
    ],
)
def test_the_best_peer(key: str, bore: list[float], rathole: list[float], best: str | None) -> None:
    found = results(cells("bore", key, bore), cells("rathole", key, rathole), cells(HAPROXY, key, [99.0]))
    assert found.best_peer(BY_KEY[key]) == best, "anchors and ours are no peers"


def test_who_fails_often_is_the_best_at_nothing() -> None:
    found = results(cells("bore", "download", [9.0], failures=1), cells("rathole", "download", [1.0]))
    assert found.best_peer(BY_KEY["download"]) == "rathole"


def test_added_latency_is_what_direct_has_less_in_the_same_round() -> None:
    some = cells(OURS, "keepalive-1-p50", [0.3, 0.5]) + cells(DIRECT, "keepalive-1-p50", [0.1])
    found = with_added_latency(some, DIRECT)
    assert [cell.values.get("added") for cell in found] == [pytest.approx(0.2), None, None]


def test_everybody_is_first_once_and_nobody_is_lost() -> None:
    orders = [rotated(["a", "b", "c"], number) for number in range(3)]
    assert [order[0] for order in orders] == ["a", "b", "c"]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert rotated(["a", "b", "c"], 3) == ["a", "b", "c"]
    assert rotated([], 5) == []


def test_percentiles_are_figures_that_were_measured() -> None:
    hundred = [float(number) for number in range(100, 0, -1)]
    assert percentile(hundred, 99) == 99.0
    assert percentile([3.0, 1.0], 99) == 3.0
    assert percentile([5.0], 1) == 5.0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.012"), (0.5, "0.500"), (1.234, "1.23"), (12.34, "12.3"), (99.96, "100.0"),
     (123.4, "123"), (12345.6, "12,346"), (-3.21, "-3.21")],
)  # fmt: skip
def test_figure(value: float, text: str) -> None:
    assert figure(value) == text


def test_spread_shows_the_extremes_of_several_rounds_only() -> None:
    assert spread(Summary(2.0, 1.0, 3.0, 3)) == "2.00 (1.00\N{EN DASH}3.00)"
    assert spread(Summary(2.0, 2.0, 2.0, 1), "x") == "2.00x"
    assert spread(None) == "—"


def test_failures_are_counted_and_starred_in_their_column_only() -> None:
    broken = Cell(0, OURS, "download", {"download": 1.0}, attempts=4, failures=1, reasons=["cut off"])
    found = results([broken], cells(OURS, "upload", [2.0]), cells("bore", "download", [1.0]))
    assert found.failures(OURS) == (1, 14)
    assert found.failures(OURS, "upload") == (0, 10)
    assert found.reasons() == [f"round 1, download, {OURS}: 1 of 4 failed (cut off)"]
    rows = figures_table(found, [OURS, "bore"], "Bulk").splitlines()
    assert rows[0] == f"| Bulk | {OURS} | bore |"
    assert rows[2:] == ["| download, GB/s | 1.00 * | 1.00 |", "| upload, GB/s | 2.00 | — |"]


def test_ratios_are_to_the_best_peer_of_each_row() -> None:
    found = results(
        cells(OURS, "keepalive-32-p99", [2.0]),
        cells("bore", "keepalive-32-p99", [8.0]),
        cells("rathole", "keepalive-32-p99", [4.0]),
    )
    table = ratios_table(found, [OURS, "bore"], "Requests")
    assert table is not None
    assert table.splitlines()[2].endswith(f"(less is better) | 0.500{TIMES} | 2.00{TIMES} | rathole |")
    assert ratios_table(results(cells(OURS, "download", [1.0])), [OURS], "Bulk") is None


# What the tools say


def test_wrk_report() -> None:
    found = parse_wrk(WRK)
    assert found is not None
    assert (found.requests, found.seconds) == (20550, 2.1)
    assert (found.wrong_status, found.socket_errors) == (0, 0)
    assert (found.p50, found.p99) == pytest.approx((0.95, 1200.0))


def test_wrk_report_with_failures() -> None:
    found = parse_wrk(
        WRK + "  Socket errors: connect 1, read 20, write 300, timeout 4000\n  Non-2xx or 3xx responses: 17\n"
    )
    assert found is not None
    assert (found.wrong_status, found.socket_errors, found.good) == (17, 4321, 20533)


def test_wrk_that_reached_nobody_is_no_report() -> None:
    assert parse_wrk("unable to connect to 127.0.0.1:1 Connection refused\n") is None


def test_an_answer_to_a_small_request() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1024\r\n\r\n"
    assert not complete(head)
    assert not complete(head + bytes(SMALL - 1))
    assert complete(head + bytes(SMALL))
    for wrong in (head + bytes(SMALL + 1), head.replace(b"200", b"502") + bytes(SMALL)):
        with pytest.raises(BenchmarkError, match="a wrong answer"):
            complete(wrong)


def test_what_an_idle_tunnel_answers() -> None:
    data = bytearray(frame(SETTINGS) + frame(PING, 0, b"12345678") + frame(SETTINGS, ACK) + b"\0\0")
    assert answers(data) == frame(SETTINGS, ACK) + frame(PING, ACK, b"12345678")
    assert data == b"\0\0", "the rest of a frame waits for more"
    with pytest.raises(BenchmarkError):
        answers(bytearray(frame(GOAWAY, 0, bytes(8))))


# The report


def report() -> Report:
    found = cells(OURS, "download", [2.0, 3.0]) + cells("bore", "download", [1.0, 1.0])
    facts = {"date": "2026-01-02", "CPU": "one"}
    return Report(found, ["frp was not there"], plan(arguments([])), facts, "benchmarks/run", "0.1", 120.0)


def test_results_keep_what_was_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    write_results(path, report())
    text = path.read_text("utf-8")
    assert text.startswith("# Results\n")
    assert "`benchmarks/run`: 2 rounds in 2.0 minutes" in text
    assert "- date: 2026-01-02" in text
    assert "- frp was not there" in text
    assert "## What was tried" in text
    path.write_text(text[: text.index(MARKER)] + MARKER + "\n\n## What was tried\n\nMuch.\n", "utf-8")
    write_results(path, replace(report(), took=600.0))
    text = path.read_text("utf-8")
    assert text.endswith("## What was tried\n\nMuch.\n")
    assert text.count(MARKER) == 1
    assert "10.0 minutes" in text


def test_the_report_has_targets_figures_and_ratios() -> None:
    text = markdown(report())
    assert f"| ≥ 1.50{TIMES} the best peer | 2.50 (2.00{DASH}3.00) | 1.00" in text
    assert "| Bulk, times the best peer |" in text


def test_every_single_figure_is_in_the_json(tmp_path: Path) -> None:
    write_json(tmp_path / "all.json", report())
    found = json.loads((tmp_path / "all.json").read_text("utf-8"))
    assert [cell["values"] for cell in found["cells"]][:2] == [{"download": 2.0}, {"download": 3.0}]
    assert found["medians"]["download"][OURS]["median"] == 2.5
    assert found["ratios"]["download"]["best peer"] == "bore"
    assert {target["verdict"] for target in found["targets"]} == {KEPT, NOT_MEASURED}
