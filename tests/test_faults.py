"""The fault injection: its cases, its table, the README's copy of it, and one case for real."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.fault_cases import CASES, GROUPS, Case  # noqa: E402
from benchmarks.fault_cases.base import Group, Measured  # noqa: E402
from benchmarks.fault_cases.framing import Pair  # noqa: E402
from benchmarks.fault_cases.running import measure  # noqa: E402
from benchmarks.fault_cases.site import Site  # noqa: E402
from benchmarks.fault_cases.stop import idle_server  # noqa: E402
from benchmarks.fault_cases.table import END, HEADER, START, Row, markdown, write_json, write_readme  # noqa: E402
from benchmarks.fault_cases.watch import Visit, Watch  # noqa: E402
from benchmarks.processes import BenchmarkError, Workspace  # noqa: E402
from benchmarks.services import NGINX, Services  # noqa: E402
from benchmarks.way import Endpoint  # noqa: E402

FACTS = {"date": "2026-01-01", "CPU": "some", "kernel": "Linux", "Python": "3.11"}
NO_SERVICES = Services({}, {NGINX: "nginx is not installed"}, Path(), Path(), Path())


def case(run: object = None, programs: tuple[str, ...] = ()) -> Case:
    return Case("a-case", "a-group", "a fault", "a promise", run, 1.0, programs)  # type: ignore[arg-type]


def readme_rows() -> list[list[str]]:
    text = (ROOT / "README.md").read_text("utf-8").partition(START)[2].partition(END)[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [[cell.strip().replace("\\|", "|") for cell in row] for row in cells[2:]]


# -- the cases ---------------------------------------------------------------------------------------


def test_names_are_used_once_and_mean_one_thing() -> None:
    names = [case.name for case in CASES] + [
        group.name for group in GROUPS if group.name not in _only_cases()
    ]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in names)


def _only_cases() -> set[str]:
    """Groups of one case, which has the group's name."""
    return {group.name for group in GROUPS if [case.name for case in group.cases] == [group.name]}


def test_each_case_has_a_fault_and_a_promise_of_its_own() -> None:
    assert len({case.fault for case in CASES}) == len(CASES)
    assert all(case.fault and case.promise and case.seconds > 0 for case in CASES)
    assert sum(case.seconds for case in CASES) < 600, "all of it ends within 10 minutes"


def test_the_readme_has_this_programs_faults_and_promises() -> None:
    assert [(row[0], row[1]) for row in readme_rows()] == [(case.fault, case.promise) for case in CASES]


def test_the_readme_claims_nothing_that_was_not_kept() -> None:
    for fault, _, measured, verdict in readme_rows():
        assert verdict in ("kept", "missed", "not measured here"), fault
        assert measured, fault


def test_the_command_knows_every_name() -> None:
    said = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "faults"), "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    for name in [case.name for case in CASES] + [group.name for group in GROUPS]:
        assert name in re.sub(r"-\n\s+", "-", said)


def test_the_table_is_for_the_whole_run_only() -> None:
    said = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "faults"), "--readme", "--only", "stop"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert said.returncode == 2
    assert "all cases" in said.stderr


# -- the table ---------------------------------------------------------------------------------------


def rows() -> list[Row]:
    return [
        Row(case(), Measured("1 s | fine", True), 1.25),
        Row(case(), Measured("9 s", False), 9),
        Row(case(), Measured("needs root", None), 0),
    ]


def test_a_table_has_a_line_for_each_row() -> None:
    lines = markdown(rows()).splitlines()
    assert lines[0] == "| " + " | ".join(HEADER) + " |"
    assert lines[2] == "| a fault | a promise | 1 s \\| fine | kept |"
    assert lines[3].endswith("| 9 s | missed |")
    assert lines[4].endswith("| needs root | not measured here |")


def test_the_readme_is_changed_between_the_markers_only(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    write_readme(path, rows(), FACTS)
    write_readme(path, rows(), FACTS)
    text = path.read_text()
    assert text.startswith(f"before\n{START}\n| Fault |")
    assert text.endswith(f"Python 3.11.\n{END}\nafter\n")
    assert "old" not in text
    path.write_text("nothing")
    with pytest.raises(ValueError):
        write_readme(path, rows(), FACTS)


def test_the_json_has_every_row(tmp_path: Path) -> None:
    write_json(tmp_path / "rows", rows(), FACTS)
    document = json.loads((tmp_path / "rows").read_text())
    assert [row["kept"] for row in document["rows"]] == [True, False, None]
    assert document["rows"][0]["seconds"] == 1.2
    assert document["machine"] == FACTS


# -- running -----------------------------------------------------------------------------------------


def test_what_goes_wrong_on_the_way_is_a_missed_promise() -> None:
    def run(site: Site) -> Measured:
        raise BenchmarkError("no tunnel")

    assert measure(case(run), NO_SERVICES) == Measured("no tunnel", False)


def test_what_cannot_be_measured_here_says_why() -> None:
    assert measure(case(programs=("no-such-program",)), NO_SERVICES) == Measured(
        "no-such-program is not installed", None
    )


def test_a_group_names_its_cases_after_their_functions() -> None:
    group = Group("sort")

    @group.case("f", "p", seconds=2)
    def two_words(site: Site) -> Measured:
        return Measured("", True)

    (made,) = group.cases
    assert (made.name, made.group, made.run) == ("two-words", "sort", two_words)


def test_a_watch_tells_what_went_wrong() -> None:
    watch = Watch(Endpoint(1))
    watch.visits = [Visit(0, 0.1, 200), Visit(1, 3.0, 503), Visit(4, 0.1, 0)]
    assert watch.summary() == "3 requests, 2 failed (503, no answer)"
    assert watch.slowest == 3.0
    watch.visits = watch.visits[:1]
    assert watch.summary() == "1 requests, none failed"


def test_a_request_for_the_other_tunnel_is_told() -> None:
    from support import Request

    class Fake:
        def __init__(self, *heads: bytes) -> None:
            self.requests = [Request(head) for head in heads]

    pair = Pair()
    right = Fake(b"GET / HTTP/1.1\r\nHost: DEMO.localhost.:80\r\n\r\n")
    pair.services = {"demo": right, "other": Fake()}  # type: ignore[dict-item]
    assert pair.misrouted() == []
    pair.services = {"demo": Fake(b"GET /a HTTP/1.1\r\nHost: other.localhost\r\n\r\n")}  # type: ignore[dict-item]
    assert pair.misrouted() == ["demo got b'GET /a HTTP/1.1'"]
    pair.services = {"demo": Fake(b"GET /smuggled HTTP/1.1\r\nHost: demo.localhost\r\n\r\n")}  # type: ignore[dict-item]
    assert len(pair.misrouted()) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_idle_server_stops_as_promised() -> None:
    with Workspace(patience=1) as workspace:
        measured = idle_server(Site(workspace, NO_SERVICES))
    assert measured.kept, measured.text
    assert "its last process" in measured.text
