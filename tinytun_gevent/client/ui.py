"""What the user sees: the URL on standard output, everything else on standard error.

`LogUi` writes plain lines, `TerminalUi` keeps a status block up to date. Whatever comes
from a server or a visitor is made printable before it gets here (`text.clean`).
"""

from __future__ import annotations

import logging
import os
import sys
from types import TracebackType
from typing import TYPE_CHECKING

import gevent
from gevent.event import Event

from ..rare import Rare, sum_up
from .agent import Agent
from .block import Block, Drawing, tries_for
from .events import Listener, State
from .observe import Asked, Exchange
from .text import clean, duration

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger("tinytun_gevent.client")
rare = Rare(log)

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
        self._told_how_long = False

    def url(self, url: str) -> None:
        log.info("%s leads to %s", clean(url, 2048), self.target)
        super().url(url)

    def state(self, state: State, reason: str) -> None:
        if state is State.CONNECTED:
            log.info("connected")
        elif state in (State.CONNECTING, State.RECONNECTING):
            log.warning("%s: %s%s", state, reason, self._how_long())
        elif state is State.CLOSING:
            log.info("stopping")

    def _how_long(self) -> str:
        """For how long the server is tried, on the first line that can say it: a log is no countdown."""
        text = "" if self._told_how_long or self.agent is None else tries_for(self.agent)
        if not text:
            return ""
        self._told_how_long = True
        return f"; {text}"

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
        log.debug("%s %s %d %s", exchange.method, exchange.path, exchange.status, duration(exchange.seconds))


class TerminalUi(Ui):
    """A status block at the bottom of the terminal, drawn by rich, which is imported when first drawn."""

    wants_exchanges = True

    def __init__(self, target: str, console: Console | None = None) -> None:
        super().__init__(target)
        self.block = Block(self.target)
        self._console = console
        self._drawing: Drawing | None = None
        self._changed = Event()
        self._drawer: gevent.Greenlet[[], None] | None = None
        self._closed = False
        #: Why there is no tunnel, as far as is known; blank while there is one.
        self._trouble = ""

    def watch(self, agent: Agent) -> None:
        super().watch(agent)
        self._drawer = gevent.spawn(self._draw)

    def url(self, url: str) -> None:
        self._erase()  # both may be the same terminal: the line must not land in the block
        super().url(url)
        self._changed.set()

    def state(self, state: State, reason: str) -> None:
        if state is State.CONNECTED:
            self._trouble = ""
        elif reason:
            self._trouble = f"{state}: {reason}"
        self._changed.set()

    def warning(self, text: str) -> None:
        self._erase()
        log.warning("%s", text)
        self._changed.set()

    def local_down(self, problem: str) -> None:
        self.block.problem = problem
        self._changed.set()

    def local_up(self) -> None:
        self.block.problem = None
        self._changed.set()

    def asked(self, asked: Asked) -> None:
        self.block.waiting[asked] = None
        self._changed.set()

    def over(self, asked: Asked) -> None:
        self.block.waiting.pop(asked, None)
        self._changed.set()

    def exchange(self, exchange: Exchange) -> None:
        self.block.answered(exchange)
        self._changed.set()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._drawer is not None:
            self._drawer.kill(block=False)
        self._erase()
        self._say_what_was_wrong()

    def _say_what_was_wrong(self) -> None:
        """What the block said last is gone with it; an error that ended the agent is told by the command."""
        if self._trouble and (self.agent is None or self.agent.error is None):
            log.warning("it was %s", self._trouble)
        if self.block.problem is not None:
            log.warning("the local service did not answer: %s", self.block.problem)

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
        """Bring the block up to date, showing it if need be."""
        if self._closed or self.agent is None:
            return
        if self._drawing is None:
            from rich.console import Console

            self._drawing = Drawing(self._console or Console(stderr=True))
        self.block.agent = self.agent
        self._drawing.draw(self.block.lines(self._drawing.console.size.height))

    def _erase(self) -> None:
        if self._drawing is not None:
            self._drawing.erase()
