"""The status block on a screen: what it says, and that it fits, moves and vanishes."""

from __future__ import annotations

import io
import re
import time

import pyte
import pytest
from rich.console import Console

from tinytun_gevent.client.agent import Agent
from tinytun_gevent.client.block import RECENT, Block, Drawing
from tinytun_gevent.client.config import make_config
from tinytun_gevent.client.observe import Asked, Exchange

URL = "http://app.example"


class Screen:
    """A terminal of some size, with the URL on it, and a block below."""

    def __init__(self, columns: int, rows: int) -> None:
        self.written = io.StringIO()
        self.console = Console(file=self.written, force_terminal=True, width=columns, height=rows)
        self.screen = pyte.Screen(columns, rows)
        self.stream = pyte.Stream(self.screen)
        self.drawing = Drawing(self.console)
        self.block = Block("localhost:3000")
        self.block.agent = Agent(make_config("3000", server="http://tunnel.example:5554", environ={}))
        self.stream.feed(f"$ tinytun http 3000\r\n{URL}\r\n")

    def draw(self) -> list[str]:
        self.drawing.draw(self.block.lines(self.console.size.height))
        return self.shown()

    def shown(self) -> list[str]:
        self.stream.feed(self.written.getvalue())
        self.written.seek(0)
        self.written.truncate()
        return [line.rstrip() for line in self.screen.display]

    def resize(self, columns: int, rows: int) -> None:
        """As a terminal does: rows too many go from below the cursor, then from the top."""
        over = self.screen.cursor.y - (rows - 1)
        if over > 0:
            self.screen.cursor.y -= over
            y = self.screen.cursor.y
            for row in range(self.screen.lines):
                self.screen.buffer[row] = self.screen.buffer[row + over]
            saved = (self.screen.cursor.x, y)
        else:
            saved = (self.screen.cursor.x, self.screen.cursor.y)
        kept = {row: dict(self.screen.buffer[row]) for row in range(min(rows, self.screen.lines))}
        self.screen.resize(rows, columns)
        for row, cells in kept.items():
            self.screen.buffer[row].clear()
            self.screen.buffer[row].update(cells)
        self.screen.cursor.x, self.screen.cursor.y = saved
        self.console.size = (columns, rows)  # type: ignore[assignment]


def fill(block: Block) -> None:
    for number in range(20):
        block.answered(Exchange("GET", f"/{number}/" + "x" * 100, 200, 0.001))
    block.waiting[Asked("POST", "/slow", time.monotonic() - 7)] = None


def test_it_names_the_server_the_way_out_and_the_times() -> None:
    screen = Screen(100, 40)
    fill(screen.block)
    text = "\n".join(screen.draw())
    assert "Ctrl-C ends it  ·  server tunnel.example:5554" in text
    assert re.search(r"^  \d\d:\d\d:\d\d GET     200    1 ms  /19/", text, re.MULTILINE)
    assert re.search(r"^ {11}POST    … +7 s  /slow$", text, re.MULTILINE)
    assert "20 requests answered, 1 under way" in text


def test_requests_under_way_are_bounded_and_leave() -> None:
    screen = Screen(100, 40)
    for number in range(100):
        screen.block.waiting[Asked("GET", f"/{number}", time.monotonic())] = None
    text = "\n".join(screen.draw())
    assert text.count(" … ") == RECENT
    assert "100 under way" in text
    screen.block.waiting.clear()
    text = "\n".join(screen.draw())
    assert " … " not in text
    assert "0 under way" in text


@pytest.mark.parametrize("columns", [30, 80, 200])
@pytest.mark.parametrize("rows", [1, 2, 6, 8, 12, 50])
def test_it_fits_redraws_in_place_and_vanishes(columns: int, rows: int) -> None:
    screen = Screen(columns, rows)
    fill(screen.block)
    screen.block.problem = "localhost:3000: connection refused"
    first = screen.draw()
    assert sum("→" in line for line in first) == 1
    assert first.count(URL) == (rows > 1)
    assert screen.draw() == first
    screen.drawing.erase()
    left = [line for line in screen.shown() if line]
    assert left[-1:] == [URL][: rows - 1]


def test_resizing_leaves_nothing_behind_and_keeps_the_url() -> None:
    screen = Screen(200, 50)
    fill(screen.block)
    screen.draw()
    for columns, rows in ((30, 50), (30, 6), (200, 6), (200, 50), (30, 6), (80, 24)):
        screen.resize(columns, rows)
        shown = screen.draw()
        assert shown.count(URL) == 1, (columns, rows)
        assert sum("→" in line for line in shown) == 1, (columns, rows)
        assert sum("Ctrl-C" in line for line in shown) == 1, (columns, rows)
    screen.drawing.erase()
    assert [line for line in screen.shown() if line][-1] == URL
