"""What the user sees: the URL on standard output, everything else on standard error.

`LogUi` writes plain lines, `TerminalUi` keeps a status block up to date. Whatever comes
from a server or a visitor is made printable before it gets here (`text.clean`).
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Any

import gevent
from gevent.event import Event

from ..rare import Rare, sum_up
from ..wire.handshake import Kind
from .agent import Agent
from .events import Listener, State
from .observe import Exchange
from .text import amount, clean, clock_time, duration

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

log = logging.getLogger("tinytun_gevent.client")
rare = Rare(log)

#: The last requests that the status block shows.
RECENT = 8

#: Seconds between two updates of the block while things happen, and while nothing does.
BUSY_REFRESH = 0.2
QUIET_REFRESH = 1.0

#: Seconds for the first connection before the block appears: loading what draws it takes a
#: tenth of a second, which had better not delay the tunnel.
BLOCK_DELAY = 0.5


def print_url(url: str) -> None:
    """Write the URL as one line to standard output, at once; nobody reading it is no error."""
    try:
        sys.stdout.write(f"{url}\n")
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):  # closed by its reader, closed by us, never there
        _forget_stdout()


def _forget_stdout() -> None:
    """Point standard output to nowhere, or its last flush would end the process with an error."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):
        pass


class Ui(Listener):
    """What both have in common; a context manager that is left when the tunnel ends."""

    def __init__(self, target: str) -> None:
        self.target = clean(target)
        self.agent: Agent | None = None

    def watch(self, agent: Agent) -> None:
        """``agent`` is the one whose figures are shown."""
        self.agent = agent

    def url(self, url: str) -> None:
        print_url(clean(url, 2048))

    def close(self) -> None:
        """Leave the terminal as it was; idempotent."""

    def __enter__(self) -> Ui:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LogUi(Ui):
    """One line for each thing that happens."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self.wants_exchanges = log.isEnabledFor(logging.DEBUG)

    def url(self, url: str) -> None:
        log.info("%s leads to %s", clean(url, 2048), self.target)
        super().url(url)

    def state(self, state: State, reason: str) -> None:
        if state is State.CONNECTED:
            log.info("connected")
        elif state in (State.CONNECTING, State.RECONNECTING):
            log.warning("%s: %s", state, reason)
        elif state is State.CLOSING:
            log.info("stopping")

    def warning(self, text: str) -> None:
        log.warning("%s", text)

    def local_down(self, problem: str) -> None:
        rare.warning("the local service does not answer: %s", problem)

    def local_up(self) -> None:
        rare.info("the local service answers again")

    def close(self) -> None:
        sum_up()

    def bad_answer(self, problem: str) -> None:
        log.warning("bad answer of the local service: %s", problem)

    def exchange(self, exchange: Exchange) -> None:
        log.debug(
            "%s %s %d %s", exchange.method, exchange.path, exchange.status, duration(exchange.seconds)
        )


class TerminalUi(Ui):
    """A status block at the bottom of the terminal, drawn by rich, which is imported when first drawn."""

    wants_exchanges = True

    def __init__(self, target: str, console: Console | None = None) -> None:
        super().__init__(target)
        self.recent: deque[Exchange] = deque(maxlen=RECENT)
        #: How many requests were answered.
        self.requests = 0
        self.problem: str | None = None
        self._console = console
        self._live: Any = None
        self._changed = Event()
        self._drawer: gevent.Greenlet[[], None] | None = None
        self._closed = False

    def watch(self, agent: Agent) -> None:
        super().watch(agent)
        self._drawer = gevent.spawn(self._draw)

    def url(self, url: str) -> None:
        self._stop_live()  # both may be the same terminal: the line must not land in the block
        super().url(url)
        self._changed.set()

    def state(self, state: State, reason: str) -> None:
        self._changed.set()

    def warning(self, text: str) -> None:
        self._stop_live()
        log.warning("%s", text)
        self._changed.set()

    def local_down(self, problem: str) -> None:
        self.problem = problem
        self._changed.set()

    def local_up(self) -> None:
        self.problem = None
        self._changed.set()

    def exchange(self, exchange: Exchange) -> None:
        self.recent.append(exchange)
        self.requests += 1
        self._changed.set()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._drawer is not None:
            self._drawer.kill(block=False)
        self._stop_live()

    # -- drawing ------------------------------------------------------------

    def _draw(self) -> None:
        """Redraws when something changed, and every second for the clock; never more than 5 a second."""
        self._changed.wait(BLOCK_DELAY)
        while True:
            self._changed.clear()
            try:
                self.refresh()
            except OSError:
                return  # the terminal is gone
            gevent.sleep(BUSY_REFRESH)
            self._changed.wait(QUIET_REFRESH)

    def refresh(self) -> None:
        """Bring the block up to date, starting it if need be."""
        if self._closed or self.agent is None:
            return
        if self._live is None:
            from rich.console import Console
            from rich.live import Live

            self._console = self._console or Console(stderr=True)
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        self._live.update(self.render(), refresh=True)

    def _stop_live(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            try:
                live.stop()
            except OSError:
                pass

    def render(self) -> RenderableType:
        """The block as rich draws it."""
        from rich.console import Group
        from rich.text import Text

        assert self.agent is not None
        lines: list[Text] = [Text()]
        lines += [self._headline(), self._state_line(), self._counter_line()]
        if self.problem is not None:
            lines.append(Text(f"  The local service does not answer: {self.problem}", style="red"))
        if self.recent:
            lines += [Text(), *map(_exchange_line, self.recent)]
        lines.append(Text())
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
        return Group(*lines)

    def _headline(self) -> Any:
        from rich.text import Text

        assert self.agent is not None
        if self.agent.url is None:
            return Text.assemble("  ", (self.agent.config.server.authority, "bold"), "  →  ", self.target)
        return Text.assemble("  ", (clean(self.agent.url, 2048), "bold cyan"), "  →  ", self.target)

    def _state_line(self) -> Any:
        from rich.text import Text

        assert self.agent is not None
        state, since = self.agent.state, clock_time(time.monotonic() - self.agent.since)
        style = {State.CONNECTED: "green", State.CLOSED: "red"}.get(state, "yellow")
        reason = f": {self.agent.reason}" if self.agent.reason else ""
        return Text.assemble("  ", (f"{state} for {since}{reason}", style))

    def _counter_line(self) -> Any:
        from rich.text import Text

        assert self.agent is not None
        counters = self.agent.counters
        visitors = f"{counters.visitors} connection{'' if counters.visitors == 1 else 's'} now"
        # A connection of an HTTP tunnel carries many visitors' requests, one after the other.
        http = self.agent.config.kind is Kind.HTTP
        answered = "1 request" if self.requests == 1 else f"{self.requests} requests"
        total = answered if http else f"{counters.total} in all"
        passed = f"{amount(counters.bytes_in)} in, {amount(counters.bytes_out)} out"
        return Text(f"  {visitors}, {total}  ·  {passed}", style="dim")


def _exchange_line(exchange: Exchange) -> Any:
    from rich.text import Text

    style = "green" if exchange.status < 400 else "yellow" if exchange.status < 500 else "red"
    return Text.assemble(
        f"  {exchange.method:7} ",
        (str(exchange.status), style),
        f" {duration(exchange.seconds):>7}  {exchange.path}",
        (f"  {exchange.problem}" if exchange.problem else "", "red"),
    )
