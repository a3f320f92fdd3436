"""``tinytun login`` and ``tinytun logout``: keep a server's token for the commands to come, and forget it."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Mapping
from typing import Any

from ..errors import UsageError
from ..wire.handshake import MAX_TOKEN
from .config import server_address
from .credentials import Logins, check_token, config_directory


def login(arguments: Mapping[str, Any], environ: Mapping[str, str]) -> int:
    """Asks for a token, without showing it, or reads a line where there is no terminal; blocks.

    Returns the exit code; raises UsageError.
    """
    if arguments["--token"] is not None or arguments["--token-file"] is not None:
        raise UsageError(
            "login asks for the token, or reads it from standard input if that is no terminal"
        )
    logins, server = _logins(environ), server_address(arguments["--server"], environ).authority
    if sys.stdin is not None and sys.stdin.isatty():
        try:
            text = getpass.getpass(f"Token for {server}: ", stream=sys.stderr)
        except (EOFError, KeyboardInterrupt):
            _say("")  # the line of the question has no end yet
            raise UsageError("no token was entered; nothing has changed") from None
    else:
        text = _read_line()
    logins.put(server, check_token(text, "standard input"))
    _say(f"The token for {server} is in {logins.path} now; 'tinytun logout --server {server}' forgets it.")
    return 0


def logout(arguments: Mapping[str, Any], environ: Mapping[str, str]) -> int:
    """Forgets a server's token, or all; returns the exit code, raises UsageError."""
    if arguments["--all"] and arguments["--server"] is not None:
        raise UsageError("--all and --server do not go together")
    logins = _logins(environ)
    server = None if arguments["--all"] else server_address(arguments["--server"], environ).authority
    found = logins.remove(server)
    of = "any server" if server is None else server
    _say(f"There is no token for {of} any more." if found else f"There was no token for {of}.")
    return 0


def _logins(environ: Mapping[str, str]) -> Logins:
    directory = config_directory(environ)
    if directory is None:
        raise UsageError(
            "there is no place for your settings: set HOME or XDG_CONFIG_HOME"
        )
    return Logins(directory)


def _read_line() -> str:
    """One line of standard input, which need not be text."""
    if sys.stdin is None:
        return ""
    return sys.stdin.buffer.readline(2 * MAX_TOKEN).decode("ascii", "replace")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
