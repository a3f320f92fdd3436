"""Log lines that peers can cause at will: single ones at an ordinary pace, one and a count in a flood."""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest
from helpers import deadline, wait_until

from tinytun_gevent import rare
from tinytun_gevent.rare import FIRST, SECONDS, Rare

PACKAGE = Path(rare.__file__).parent


class Time:
    """A clock that is set by hand."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Time]:
    clock = Time()
    monkeypatch.setattr(rare, "time", clock)
    monkeypatch.setattr(rare, "_later", lambda seconds, kind: rare._waiting.add(kind))
    yield clock
    rare._waiting.clear()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> logging.Logger:
    caplog.set_level(logging.INFO)
    return logging.getLogger("tinytun_gevent.test")


def test_at_an_ordinary_pace_each_line_is_written(
    clock: Time, log: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    lines = Rare(log)
    for number in range(100):
        lines.info("refused %d", number)
        clock.now += SECONDS / FIRST
    assert caplog.messages == [f"refused {number}" for number in range(100)]


def test_a_flood_is_some_lines_and_then_one_with_a_count_each_time(
    clock: Time, log: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    lines = Rare(log)
    for number in range(20_000):  # 2,000 a second, for 10 s; and again
        lines.info("refused %d", number)
        clock.now += 0.0005
    clock.now += 0.01
    for number in range(20_000, 40_000):
        lines.info("refused %d", number)
        clock.now += 0.0005
    clock.now += 0.01
    rare.sum_up()
    assert caplog.messages[:FIRST] == [f"refused {number}" for number in range(FIRST)]
    assert caplog.messages[FIRST:] == [
        "refused 19999, and 19,979 more like this in 10 s",
        "refused 20000",
        "refused 39999, and 19,998 more like this in 10 s",
    ]
    assert caplog.records[-1].more == 19_998  # type: ignore[attr-defined]


def test_a_calm_stretch_behind_a_flood_begins_anew(
    clock: Time, log: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    lines = Rare(log)
    for _ in range(FIRST + 5):
        lines.info("refused")
    clock.now += 2 * SECONDS
    rare.sum_up()
    caplog.clear()
    for _ in range(FIRST):
        lines.info("refused")
    assert len(caplog.records) == FIRST


def test_the_count_is_written_when_no_further_line_comes(
    log: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    lines = Rare(log, 1, 0.05)
    for number in range(5):
        lines.warning("refused %d", number, extra={"remote": number})
    assert caplog.messages == ["refused 0"]
    with deadline():
        wait_until(lambda: len(caplog.records) == 2)
    assert caplog.messages[1] == "refused 4, and 3 more like this in 0 s"
    assert caplog.records[1].remote == 4  # type: ignore[attr-defined]
    assert caplog.records[1].levelno == logging.WARNING
    assert not rare._waiting


def test_one_line_that_was_left_out_is_written_as_it_is(
    clock: Time, log: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    lines = Rare(log, 1)
    lines.info("100%")
    lines.info("100%")
    rare.sum_up()
    rare.sum_up()
    assert caplog.messages == ["100%", "100%"]


def test_kinds_do_not_hide_each_other(
    clock: Time, log: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    lines = Rare(log, 1)
    for _ in range(3):
        lines.info("refused %d", 1)
        lines.info("left %d", 1)
        for kind in (403, 409):
            lines.info("answered %d", kind, kind=kind)
    assert caplog.messages == ["refused 1", "left 1", "answered 403", "answered 409"]


def test_a_stack_trace_is_written_with_the_first_ones_only(
    clock: Time, log: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    lines = Rare(log, 1)
    for _ in range(3):
        try:
            raise ValueError("of ours")
        except ValueError:
            lines.exception("failed")
    rare.sum_up()
    assert [record.exc_info is not None for record in caplog.records] == [True, False]


def test_one_may_write_through_another(
    clock: Time, log: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    """Each tunnel has its own, and all together are rare as well."""
    both = Rare(log, 3)
    each = [Rare(both, 1, 60) for _ in range(10)]
    for one in each:
        for _ in range(5):
            one.info("a limit is reached")
    assert len(caplog.records) == 3
    rare.sum_up()
    assert not rare._waiting
    assert caplog.messages[-1].endswith(" more like this in 0 s")


def test_what_is_not_logged_is_not_counted(log: logging.Logger) -> None:
    lines = Rare(log, 1)
    for _ in range(3):
        lines.log(logging.DEBUG, "refused")
    assert not lines._kinds
    assert not rare._waiting


def test_counting_leaves_no_greenlet_behind(log: logging.Logger) -> None:
    lines = Rare(log, 1, 0.01)
    for _ in range(3):
        lines.info("refused")
    (kind,) = rare._waiting
    with deadline():
        wait_until(lambda: not rare._waiting)
    gevent.sleep(0)
    assert kind._skipped == 0


# -- which lines are ----------------------------------------------------------

OPERATOR = {
    "client/command.py": "once, when it starts",
    "client/credentials.py": "once, when it starts",
    "client/login.py": "once, by a command",
    "client/servers.py": "once, when it starts",
    "client/ui.py": "each attempt to connect waits 2 s at least; what is rare there is asserted below",
    "server/auth.py": "when AUTH_FILE has changed",
    "server/certificates.py": "when TLS_DIR has changed",
    "server/core.py": "once, when it starts or stops",
    "server/handover.py": "once for each reload",
    "server/launch.py": "signals",
    "server/leases.py": "once a second at most, when the disk fails",
    "server/peers.py": "when DNS says something else, every 5 s at most",
    "server/pem.py": "when TLS_DIR has changed",
    "server/storage.py": "once, when it starts",
    "server/strangers.py": "once for each of three kinds of addresses; what is rare there is a refusal",
    "server/tunnels.py": "when it starts, and when AUTH_FILE has changed",
    "server/worker.py": "when it starts and stops",
}
"""Modules with lines that no stranger can cause, and when those are written. Anything else is rare."""

WRITES = ("info", "warning", "error", "exception", "critical", "log")


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """What is called on a logger in a module: its name, ``log`` or ``rare``, and the call."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WRITES:
            owner = node.func.value
            name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
            if name in ("log", "logger", "_log", "rare"):
                yield name, node


def test_every_line_that_strangers_can_cause_is_rare() -> None:
    modules = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}
    del modules["rare.py"]
    plain = {name for name, path in modules.items() if any(owner == "log" for owner, _ in calls(path))}
    assert plain <= set(OPERATOR), "a line at INFO or above: rare, or only the operator's doing?"
    assert set(OPERATOR) <= plain


def test_kinds_are_constants_of_the_program() -> None:
    for path in PACKAGE.rglob("*.py"):
        for owner, call in calls(path):
            if owner == "rare":
                assert isinstance(call.func, ast.Attribute)
                text = call.args[call.func.attr == "log"]
                assert isinstance(text, ast.Constant), f"{path.name}:{call.lineno}"
