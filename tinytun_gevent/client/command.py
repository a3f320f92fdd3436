"""What ``tinytun http``, ``tcp`` and ``demo`` do once their arguments are read."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

import gevent

from .. import garbage
from ..lines import line_handler
from . import login
from .agent import Agent
from .config import check_log_level, config_from_arguments
from .credentials import TOKEN_VARIABLE
from .ui import LogUi, TerminalUi, Ui

log = logging.getLogger(__name__)

#: Exit code after a second signal, as a shell shows an interrupted program.
INTERRUPTED = 130


def run(arguments: Mapping[str, Any]) -> int:
    """Do what docopt read; blocks until stopped. Returns the exit code; raises TunnelError."""
    level = "debug" if arguments["--debug"] else check_log_level(arguments["--log-level"])
    quiet = bool(arguments["--quiet"])
    set_up_logging("warning" if quiet and level in ("debug", "info") else level)
    for name, command in (("login", login.login), ("logout", login.logout), ("server", login.show_server)):
        if arguments[name]:
            return command(arguments, os.environ)
    if arguments["doctor"]:
        from . import doctor

        return doctor.run(arguments)
    if arguments["demo"]:
        from .demo import run_demo

        return run_demo(arguments["--target"], lambda target: choose_ui(target, quiet), stop_on_signals)
    config = config_from_arguments(arguments, os.environ)
    if config.insecure:
        log.warning("--insecure: anybody on the way can read and change everything")
    if arguments["--token"] is not None:
        log.warning(
            "--token: others on this computer may see it among the processes; 'tinytun login', %s and "
            "--token-file hide it",
            TOKEN_VARIABLE,
        )
    garbage.calm()
    with choose_ui(str(config.target), quiet) as ui:
        agent = Agent(config, ui)
        stop_on_signals(agent, ui)
        ui.watch(agent)
        agent.run()
    return 0


def choose_ui(target: str, quiet: bool) -> Ui:
    """A status block where a person looks, plain lines elsewhere."""
    if quiet or not _is_terminal(sys.stderr):
        return LogUi(target)
    return TerminalUi(target)


def stop_on_signals(agent: Agent, ui: Ui) -> None:
    """The first SIGINT, SIGTERM or SIGHUP ends ``agent`` cleanly, the second one the process at once."""
    seen: list[int] = []

    def handle(number: int) -> None:
        seen.append(number)
        if len(seen) == 1:
            agent.stop()
        else:
            _leave_now(agent, ui)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if name == "SIGHUP" and number is not None and signal.getsignal(number) is signal.SIG_IGN:
            continue  # nohup: the tunnel is to outlive its terminal
        if number is not None:
            gevent.signal_handler(number, handle, number)


def set_up_logging(level: str) -> None:
    """Plain lines with the time on standard error."""
    logging.raiseExceptions = False  # a closed standard error is no reason to complain
    handler = line_handler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger = logging.getLogger("tinytun_gevent")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def _leave_now(agent: Agent, ui: Ui) -> None:
    """Second signal: say goodbye if that takes no time, and be gone."""
    gevent.with_timeout(0.2, agent.stop, 0, timeout_value=None)
    ui.close()
    os._exit(INTERRUPTED)


def _is_terminal(stream: Any) -> bool:
    try:
        return stream is not None and bool(stream.isatty()) and os.environ.get("TERM") != "dumb"
    except ValueError:
        return False
