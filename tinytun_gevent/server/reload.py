"""The command ``tinytun-server reload``: asks a running server for it, and says how it went."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Final

from ..errors import UnreachableError, UsageError
from . import statedir, verdict
from .config import ServerConfig
from .statedir import Running
from .verdict import Verdict

LOOK: Final = 0.05
"""Seconds between two looks at the file."""

PATIENCE: Final = 40.0
"""Seconds that a reload takes at most, beside DRAIN_TIMEOUT, for which the master may wait for an old worker:
10 s for the worker of the reload before and 10 s for ours, and as much again on an overloaded machine."""


def run(overrides: Mapping[str, str]) -> int:
    """Reloads the server that these flags, the environment and the file are about; returns the exit code.

    Blocks. Raises UnreachableError if none runs, UsageError if the reload failed, or did not end.
    """
    try:
        config = ServerConfig.from_environ(os.environ, overrides)
    except UsageError as error:
        raise UsageError(f"{error}; nothing was reloaded, a server that runs goes on") from None
    directory = config.state_dir or statedir.default_directory(config.connection_port)
    running = statedir.find(directory)
    if running is None:
        hint = "say the options that it runs with, or its --config FILE"
        raise UnreachableError(f"no tinytun-server runs with STATE_DIR={directory}; {hint}")
    found = ask(running, PATIENCE + config.drain_timeout)
    if not found.serves:
        raise UsageError(f"the reload failed, the old worker goes on: {found.reason}")
    print("reloaded: a new worker serves")
    if found.restart:
        print(f"unchanged until the server is restarted: {', '.join(found.restart).lower()}")
    for line in found.overridden:
        print(f"{line}; it changes with a restart only")
    sys.stdout.flush()
    return 0


def ask(running: Running, timeout: float) -> Verdict:
    """How a reload went that has begun after this was called. Blocks for ``timeout`` seconds at most.

    Raises UnreachableError if the server is gone, UsageError if it may not be asked or does not answer.
    """
    directory = running.directory
    before = verdict.read(directory, running.id).number
    try:
        running.hang_up()
    except ProcessLookupError:
        raise UnreachableError(f"the server with STATE_DIR={directory} has just ended") from None
    except OSError as error:
        text = f"process {running.pid} cannot be sent HUP: {error.strerror or error}"
        raise UsageError(f"{text}; say this as the server's user, or as root") from None
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        found = verdict.read(directory, running.id)
        if found.number > before and found.is_over:
            return found
        if not running.is_there():
            raise UnreachableError(f"the server with STATE_DIR={directory} ended meanwhile; its log says why")
        time.sleep(LOOK)
    raise UsageError(f"the server has not said within {timeout:g} s how the reload went; its log may say it")
