"""The status block at the bottom of a terminal: its lines, and how they get there and away again.

The cursor waits at the block's first character, not below the block. So a terminal that is resized takes it
along with that line, however it wraps the others, and "erase from here on" removes the block, nothing else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..wire.handshake import Kind
from .agent import Agent
from .events import State
from .observe import Asked, Exchange
from .text import amount, clean, clock_time, duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

#: The last requests that the status block shows.
RECENT = 8


def tries_for(agent: Agent) -> str:
    """How long a server that does not answer is still tried; blank if for ever."""
    left = agent.tries_for
    return "" if left is None else f"tries for another {math.ceil(left)} s"


_HIDE_CURSOR, _SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
_WRAP_OFF, _WRAP_ON = "\x1b[?7l", "\x1b[?7h"
_ERASE_LINE_END, _ERASE_BELOW = "\x1b[K", "\x1b[J"


class Drawing:
    """Lines on a terminal that are drawn again in place."""

    def __init__(self, console: Console) -> None:
        self.console = console
        #: Whether anything is on the screen now.
        self.shown = False

    def draw(self, lines: Sequence[Text]) -> None:
        """Show ``lines`` instead of what is shown; no more than the terminal has rows. Raises OSError."""
        lines = lines[: self.console.size.height]
        with self.console.capture() as captured:
            for line in lines:
                self.console.print(line, no_wrap=True, overflow="ellipsis")
        rows = captured.get().split("\n")[: len(lines)]
        up = f"\x1b[{len(rows) - 1}A" if len(rows) > 1 else ""
        # No wrapping: the terminal may have become narrower since its size was asked for.
        self._write(
            _HIDE_CURSOR + _WRAP_OFF + "\r"
            + f"{_ERASE_LINE_END}\r\n".join(rows) + _ERASE_BELOW
            + up + "\r" + _WRAP_ON
        )  # fmt: skip
        self.shown = True

    def erase(self) -> None:
        """Leave the screen as if nothing had been drawn; idempotent."""
        if self.shown:
            self.shown = False
            try:
                self._write("\r" + _ERASE_BELOW + _SHOW_CURSOR)
            except OSError:
                pass  # the terminal is gone

    def _write(self, text: str) -> None:
        self.console.file.write(text)
        self.console.file.flush()


class Block:
    """What the block says; made fit for the height that there is."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.agent: Agent | None = None
        self.problem: str | None = None
        #: How many requests were answered.
        self.requests = 0
        #: Those that wait for their answers: at most one a stream, in the order in which they came.
        self.waiting: dict[Asked, None] = {}
        self._recent: list[tuple[str, Exchange]] = []

    def answered(self, exchange: Exchange) -> None:
        """A request got its answer, just now."""
        self._recent = [*self._recent[1 - RECENT :], (time.strftime("%H:%M:%S"), exchange)]
        self.requests += 1

    def lines(self, height: int) -> list[Text]:
        """At most ``height - 1`` lines, so that the line above the block stays in sight."""
        from rich.text import Text

        room = max(1, height - 1)
        head = [self._headline(), self._state_line()]
        if self.problem is not None:
            head.append(Text(f"  The local service does not answer: {self.problem}", style="red"))
        head += [self._counter_line(), self._server_line()]
        rows = self._rows(min(RECENT, room - len(head) - 1))
        if rows:
            head += [Text(), *rows]
        if len(head) + 2 <= room:
            return [Text(), *head, Text()]
        return head[:room]

    def _rows(self, most: int) -> list[Text]:
        """The last requests; those that wait stand below those that are over."""
        if most <= 0:
            return []
        waiting = [_waiting_line(asked) for asked in list(self.waiting)[-most:]]
        recent = [_exchange_line(*one) for one in self._recent]
        return [*recent, *waiting][-most:]

    def _headline(self) -> Text:
        from rich.text import Text

        assert self.agent is not None
        if self.agent.url is None:
            return Text.assemble("  ", (self.agent.config.server.authority, "bold"), "  →  ", self.target)
        return Text.assemble("  ", (clean(self.agent.url, 2048), "bold cyan"), "  →  ", self.target)

    def _state_line(self) -> Text:
        from rich.text import Text

        assert self.agent is not None
        state, since = self.agent.state, clock_time(time.monotonic() - self.agent.since)
        style = {State.CONNECTED: "green", State.CLOSED: "red"}.get(state, "yellow")
        left = tries_for(self.agent)
        left = f", {left}" if left else ""  # before the reason, which may be cut off
        reason = f": {self.agent.reason}" if self.agent.reason else ""
        return Text.assemble("  ", (f"{state} for {since}{left}{reason}", style))

    def _counter_line(self) -> Text:
        from rich.text import Text

        assert self.agent is not None
        counters = self.agent.counters
        if self.agent.config.kind is Kind.HTTP:
            # Not its connections: the server keeps them for the next visitor, whoever that is.
            answered = "1 request" if self.requests == 1 else f"{self.requests} requests"
            now = f"{answered} answered, {len(self.waiting)} under way"
        else:
            now = f"{counters.visitors} connection{'' if counters.visitors == 1 else 's'} now"
            now += f", {counters.total} in all"
        passed = f"{amount(counters.bytes_in)} in, {amount(counters.bytes_out)} out"
        return Text(f"  {now}  ·  {passed}", style="dim")

    def _server_line(self) -> Text:
        from rich.text import Text

        assert self.agent is not None
        # The name comes last: a narrow terminal cuts it off.
        return Text(f"  Ctrl-C ends it  ·  server {self.agent.config.server.authority}", style="dim")


def _waiting_line(asked: Asked) -> Text:
    from rich.text import Text

    took = clock_time(time.monotonic() - asked.began)
    return Text.assemble(f"  {'':8} {asked.method:7} ", ("…  ", "yellow"), f" {took:>7}  {asked.path}")


def _exchange_line(at: str, exchange: Exchange) -> Text:
    from rich.text import Text

    style = "green" if exchange.status < 400 else "yellow" if exchange.status < 500 else "red"
    return Text.assemble(
        (f"  {at} ", "dim"),
        f"{exchange.method:7} ",
        (str(exchange.status), style),
        f" {duration(exchange.seconds):>7}  {exchange.path}",
        (f"  {exchange.problem}" if exchange.problem else "", "red"),
    )
