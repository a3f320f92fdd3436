"""The benchmark's arithmetic and what it reads from its tools; nothing here is timed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.loads import LOADS, parse_wrk  # noqa: E402
from benchmarks.processes import BenchmarkError, Workspace, cpu_seconds, memory_bytes  # noqa: E402
from benchmarks.report import (  # noqa: E402
    MEASURES,
    Cell,
    Results,
    Summary,
    figure,
    figures_table,
    ratios_table,
    rotated,
    spread,
    summarize,
)

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

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


def cells(contender: str, key: str, values: list[float]) -> list[Cell]:
    load = next(measure.load for measure in MEASURES if measure.key == key)
    return [Cell(number, contender, load, {key: value}, attempts=10) for number, value in enumerate(values)]


def test_summary_is_the_median_and_the_extremes() -> None:
    assert summarize([3.0, 100.0, 1.0]) == Summary(3.0, 1.0, 100.0, 3)
    assert summarize([1.0, 2.0]) == Summary(1.5, 1.0, 2.0, 2)
    assert summarize([]) is None


def test_ratio_is_of_the_medians_and_its_extremes_of_the_rounds() -> None:
    results = Results(
        cells("ours", "download", [2.0, 3.0, 8.0]) + cells("theirs", "download", [1.0, 2.0, 2.0])
    )
    assert results.ratio("ours", "theirs", "download") == Summary(1.5, 1.5, 4.0, 3)


def test_ratio_uses_only_rounds_that_both_have() -> None:
    both = cells("ours", "download", [2.0, 3.0, 8.0]) + cells("theirs", "download", [1.0])
    ratio = Results(both).ratio("ours", "theirs", "download")
    assert ratio == Summary(3.0, 2.0, 2.0, 1)


@pytest.mark.parametrize("theirs", [[], [0.0, 0.0]])
def test_no_ratio_without_something_to_compare_with(theirs: list[float]) -> None:
    results = Results(cells("ours", "memory", [1.0]) + cells("theirs", "memory", theirs))
    assert results.ratio("ours", "theirs", "memory") is None


def test_everybody_is_first_once_and_nobody_is_lost() -> None:
    orders = [rotated(["a", "b", "c"], number) for number in range(3)]
    assert [order[0] for order in orders] == ["a", "b", "c"]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert rotated(["a", "b", "c"], 3) == ["a", "b", "c"]
    assert rotated([], 5) == []


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
    broken = Cell(0, "ours", "download", {"download": 1.0}, attempts=4, failures=1, reasons=["cut off"])
    results = Results([broken, *cells("ours", "upload", [2.0]), *cells("theirs", "download", [1.0])])
    assert results.failures("ours") == (1, 14)
    assert results.failures("ours", "upload") == (0, 10)
    assert results.reasons() == ["round 1, download, ours: 1 of 4 failed (cut off)"]
    rows = figures_table(results, ["ours", "theirs"]).splitlines()
    assert rows[0] == "|  | ours | theirs |"
    assert rows[2] == "| bulk download, GB/s | 1.00 * | 1.00 |"
    assert rows[3] == "| bulk upload, GB/s | 2.00 | — |"
    assert rows[-1] == "| failed, of all attempts | 1 of 14 | 0 of 10 |"


def test_a_failed_cell_shows_no_figure() -> None:
    results = Results([Cell(0, "ours", "download", {}, 1, 1, ["dead"]), *cells("theirs", "download", [1.0])])
    assert "| bulk download, GB/s | — * | 1.00 |" in figures_table(results, ["ours", "theirs"])


@pytest.mark.parametrize(("ours", "verdict"), [(1.71, "kept"), (1.7, "kept"), (1.69, "MISSED")])
def test_floors(ours: float, verdict: str) -> None:
    results = Results(cells("ours", "download", [ours]) + cells("theirs", "download", [1.0]))
    rows = ratios_table(results, ["ours", "theirs"], "theirs", "ours").splitlines()
    assert rows[0] == "| times theirs | ours | floor for ours |"
    assert rows[2].endswith(f"| 1.7\N{MULTIPLICATION SIGN}: {verdict} |")


def test_less_is_better_is_said() -> None:
    results = Results(cells("ours", "memory", [1.0]) + cells("theirs", "memory", [2.0]))
    assert "(less is better) | 0.500\N{MULTIPLICATION SIGN} |  |" in ratios_table(
        results, ["ours", "theirs"], "theirs", "ours"
    )


def test_every_measure_belongs_to_a_load() -> None:
    assert {measure.load for measure in MEASURES} == {load.name for load in LOADS}
    assert len({measure.key for measure in MEASURES}) == len(MEASURES)


def test_wrk_report() -> None:
    result = parse_wrk(WRK)
    assert result is not None
    assert (result.requests, result.seconds) == (20550, 2.1)
    assert (result.wrong_status, result.socket_errors) == (0, 0)
    assert (result.p50, result.p99) == pytest.approx((0.95, 1200.0))


def test_wrk_report_with_failures() -> None:
    result = parse_wrk(
        WRK + "  Socket errors: connect 1, read 20, write 300, timeout 4000\n  Non-2xx or 3xx responses: 17\n"
    )
    assert result is not None
    assert (result.wrong_status, result.socket_errors) == (17, 4321)


def test_wrk_that_reached_nobody_is_no_report() -> None:
    assert parse_wrk("unable to connect to 127.0.0.1:1 Connection refused\n") is None


@linux_only
def test_workspace_ends_what_it_started_and_its_children() -> None:
    stubborn = "import signal; print(1, flush=True); signal.pause()"
    code = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {stubborn!r}])\n"
        "print('child', child.pid, flush=True); child.wait()\n"
    )
    with Workspace(patience=0.2) as workspace:
        process = workspace.start("parent", [sys.executable, "-c", code])
        child = int(process.expect(r"^child (\d+)$")[1])
        process.expect(r"^1$")
        assert memory_bytes([process.pid]) > memory_bytes([child]) > 0
        assert cpu_seconds([process.pid]) >= cpu_seconds([child])
    assert process.ended()
    assert memory_bytes([child]) == 0, "the child is gone with its parent"
    assert not workspace.folder.exists()


@linux_only
def test_a_program_that_ends_early_is_told_with_its_last_words() -> None:
    with Workspace() as workspace:
        process = workspace.start("hasty", [sys.executable, "-c", "raise SystemExit('no port left')"])
        with pytest.raises(BenchmarkError, match=r"hasty ended with 1: no port left"):
            process.expect("^ready$")


@pytest.mark.parametrize("words", [["--only", "nonsense"], ["--contender", ""], ["--rounds", "0"]])
def test_nonsense_on_the_command_line_is_refused(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "run"), *words],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert words[0] in done.stderr
