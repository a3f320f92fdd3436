"""What the user sees: plain lines, the status block, and the one line on standard output."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import time
from typing import Any

import pytest
from rich.console import Console

from tinytun_gevent.client.agent import Agent
from tinytun_gevent.client.block import RECENT
from tinytun_gevent.client.config import make_config
from tinytun_gevent.client.events import State
from tinytun_gevent.client.observe import Exchange
from tinytun_gevent.client.text import amount, clean, clock_time, duration, unclutter
from tinytun_gevent.client.ui import LogUi, TerminalUi, print_url


def agent(kind: str = "http") -> Agent:
    """An agent that was never started, to be given figures by hand."""
    return Agent(make_config("3000", kind=kind, server="http://tunnel.example:5554", environ={}))


def terminal(width: int = 100, kind: str = "http") -> tuple[TerminalUi, io.StringIO]:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, height=40, color_system=None)
    ui = TerminalUi("localhost:3000", console)
    ui.agent = agent(kind)
    return ui, screen


def drawn(ui: TerminalUi, screen: io.StringIO) -> str:
    ui.block.agent = ui.agent
    for line in ui.block.lines(40):
        ui._console.print(line, no_wrap=True, overflow="ellipsis")  # type: ignore[union-attr]
    text = screen.getvalue()
    screen.truncate(0)
    screen.seek(0)
    return text


# -- the block ------------------------------------------------------------------


def test_the_block_before_the_first_connection() -> None:
    ui, screen = terminal()
    assert ui.agent is not None
    ui.agent.reason = "cannot connect to tunnel.example:5554: connection refused"
    ui.agent.since = time.monotonic() - 5
    text = drawn(ui, screen)
    assert "tunnel.example:5554  →  localhost:3000" in text
    assert "connecting for 5 s: cannot connect to tunnel.example:5554: connection refused" in text


def test_the_block_counts_down_while_the_server_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    ui, screen = terminal()
    assert "another" not in drawn(ui, screen)
    assert ui.agent is not None
    monkeypatch.setattr(ui.agent._patience, "left", lambda: 23.4)
    ui.agent.reason = "connection refused"
    assert "connecting for 0 s, tries for another 24 s: connection refused" in drawn(ui, screen)
    ui.agent.state = State.CONNECTED
    assert "another" not in drawn(ui, screen)


def test_a_log_says_once_for_how_long_it_is_tried(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ui = LogUi("localhost:3000")
    ui.agent = agent()
    monkeypatch.setattr(ui.agent._patience, "left", lambda: 29.9)
    with caplog.at_level("INFO", logger="tinytun_gevent.client"):
        ui.state(State.CONNECTING, "refused")
        ui.state(State.CONNECTING, "no route")
    assert caplog.messages == ["connecting: refused; tries for another 30 s", "connecting: no route"]


def test_the_block_while_connected() -> None:
    ui, screen = terminal()
    assert ui.agent is not None
    ui.agent.url, ui.agent.state = "http://app.example", State.CONNECTED
    ui.agent._crowd._finished_in, ui.agent._crowd._finished_out = 12_345, 3_400_000
    ui.exchange(Exchange("GET", "/a", 200, 0.0123))
    ui.exchange(Exchange("DELETE", "/b", 503, 2.5))
    text = drawn(ui, screen)
    assert "http://app.example  →  localhost:3000" in text
    assert "connected for 0 s\n" in text
    assert "2 requests answered, 0 under way  ·  12 kB in, 3.4 MB out" in text
    assert "GET     200   12 ms  /a" in text
    assert "DELETE  503   2.5 s  /b" in text


def test_the_block_of_a_tcp_tunnel_counts_connections() -> None:
    ui, screen = terminal(kind="tcp")
    assert ui.agent is not None
    ui.agent._crowd._total = 7
    assert "0 connections now, 7 in all" in drawn(ui, screen)


def test_the_block_says_what_is_wrong_with_the_local_service() -> None:
    ui, screen = terminal()
    ui.local_down("localhost:3000: connection refused")
    assert "The local service does not answer: localhost:3000: connection refused" in drawn(ui, screen)
    ui.local_up()
    assert "does not answer" not in drawn(ui, screen)


def test_the_block_shows_the_last_requests_only_and_never_wraps() -> None:
    ui, screen = terminal(width=40)
    for number in range(50):
        ui.exchange(Exchange("GET", f"/{number}/" + "x" * 300, 200, 0.001))
    text = drawn(ui, screen)
    assert text.count("GET") == RECENT
    assert "/49/" in text
    assert "/41/" not in text
    assert max(map(len, text.splitlines())) <= 40


def test_the_block_shows_what_was_wrong_with_an_answer() -> None:
    ui, screen = terminal()
    ui.exchange(Exchange("GET", "/", 502, 0.002, "localhost:22 does not speak HTTP; try `tinytun tcp 22`"))
    assert "502    2 ms  /  localhost:22 does not speak HTTP; try `tinytun tcp 22`" in drawn(ui, screen)


def test_the_block_does_not_read_markup() -> None:
    ui, screen = terminal()
    ui.exchange(Exchange("GET", "/[bold]x[/bold]", 200, 0.001))
    ui.local_down("[red]down[/red]")
    text = drawn(ui, screen)
    assert "/[bold]x[/bold]" in text
    assert "[red]down[/red]" in text


def test_the_url_is_not_printed_into_the_block(capsys: pytest.CaptureFixture[str]) -> None:
    ui, screen = terminal()
    ui.refresh()
    assert ui._drawing is not None
    assert ui._drawing.shown
    ui.url("http://app.example")
    assert not ui._drawing.shown
    assert capsys.readouterr().out == "http://app.example\n"
    ui.close()
    ui.refresh()
    assert not ui._drawing.shown
    assert screen.getvalue().endswith("\x1b[J\x1b[?25h")  # erased, nothing drawn after it


def test_warnings_appear_above_the_block(caplog: pytest.LogCaptureFixture) -> None:
    ui, _ = terminal()
    ui.refresh()
    with caplog.at_level(logging.WARNING, "tinytun_gevent"):
        ui.warning("mind this")
    assert "mind this" in caplog.text
    assert ui._drawing is not None
    assert not ui._drawing.shown
    ui.close()


def test_why_there_was_no_tunnel_stays_readable(caplog: pytest.LogCaptureFixture) -> None:
    ui, _ = terminal()
    ui.state(State.RECONNECTING, "the peer fell silent")
    ui.state(State.CLOSED, "")
    with caplog.at_level(logging.WARNING, "tinytun_gevent"):
        ui.close()
        ui.close()
    assert [record.getMessage() for record in caplog.records] == ["it was reconnecting: the peer fell silent"]


def test_a_trouble_that_is_over_is_not_told_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    ui, _ = terminal()
    ui.state(State.RECONNECTING, "the peer fell silent")
    ui.state(State.CONNECTED, "")
    ui.local_down("localhost:3000: connection refused")
    ui.local_up()
    with caplog.at_level(logging.WARNING, "tinytun_gevent"):
        ui.close()
    assert not caplog.records


# -- plain lines ----------------------------------------------------------------


def test_every_event_is_one_line(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG, "tinytun_gevent"):
        ui = LogUi("localhost:3000")
        assert ui.wants_exchanges
        ui.url("http://app.example")
        ui.state(State.CONNECTED, "")
        ui.state(State.RECONNECTING, "the peer fell silent")
        ui.warning("mind this")
        ui.local_down("localhost:3000: connection refused")
        ui.local_up()
        ui.exchange(Exchange("GET", "/a", 200, 0.0123))
        ui.state(State.CLOSING, "")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "http://app.example leads to localhost:3000"),
        ("INFO", "connected"),
        ("WARNING", "reconnecting: the peer fell silent"),
        ("WARNING", "mind this"),
        ("WARNING", "the local service does not answer: localhost:3000: connection refused"),
        ("INFO", "the local service answers again"),
        ("DEBUG", "GET /a 200 12 ms"),
        ("INFO", "stopping"),
    ]
    assert capsys.readouterr().out == "http://app.example\n"


def test_requests_are_not_watched_unless_they_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tinytun_gevent"):
        assert not LogUi("x").wants_exchanges


# -- standard output ------------------------------------------------------------


def test_nobody_reading_standard_output_is_no_error() -> None:
    code = """
import os, sys
from tinytun_gevent.client.ui import print_url
print_url("http://one")
sys.stdin.readline()
print_url("http://two")
print_url("http://three")
print("alive", file=sys.stderr)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"http://one\n"
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.stderr.read() == b"alive\n"
    process.stderr.close()
    assert process.wait(60) == 0


def test_a_program_without_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    print_url("http://one")


def test_a_url_with_control_characters_cannot_fake_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    LogUi("x").url("http://a\r\n\x1b[31mhttp://b")
    assert capsys.readouterr().out == "http://a???[31mhttp://b\n"


# -- words ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain", "plain"),
        (b"b\xfftes", "b\ufffdtes"),
        ("\x1b]0;x\x07", "?]0;x?"),
        ("a\nb\tc", "a?b?c"),
        ("\u202eevil", "?evil"),
        ("é ü", "é ü"),
        ("x" * 300, "x" * 199 + "…"),
        (b"x" * 3000, "x" * 199 + "…"),
    ],
)
def test_foreign_text_is_made_printable(raw: Any, shown: str) -> None:
    assert clean(raw) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (9_949, "9.9 kB"),
        (12_345, "12 kB"),
        (999_600, "1.0 MB"),
        (5 * 10**9, "5.0 GB"),
        (2 * 10**12, "2.0 TB"),
        (10**15, "1000.0 TB"),
    ],
)
def test_amounts(count: int, shown: str) -> None:
    assert amount(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0004, "0 ms"),
        (0.0123, "12 ms"),
        (0.9999, "1.0 s"),
        (9.9, "9.9 s"),
        (11, "11 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7199, "2 h"),
        (200_000, "2 d"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_running_clocks_show_whole_seconds() -> None:
    assert [clock_time(s) for s in (0.2, 1.9, 119.9, 150, 4000)] == ["0 s", "1 s", "119 s", "2 min", "67 min"]


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ConnectionRefusedError(111, "Connection refused"), "connection refused"),
        (TimeoutError(), "timed out"),
        (OSError(os.strerror(2)), "no such file or directory"),
        (OSError("EOF occurred"), "EOF occurred"),
        (EOFError(), "EOFError"),
    ],
)
def test_errors_in_words(error: Exception, shown: str) -> None:
    assert unclutter(error) == shown
