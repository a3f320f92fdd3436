"""``tinytun login``, ``logout`` and ``server``: keep a server and its token for the commands to come."""

from __future__ import annotations

import codecs
import getpass
import logging
import sys
from collections.abc import Mapping
from typing import Any

from ..errors import UsageError
from ..wire.handshake import MAX_TOKEN
from .checking import check_with_server
from .config import make_config
from .credentials import Logins, check_token, config_directory
from .servers import SERVER_VARIABLE, KeptServers, choose_server, parse_server

log = logging.getLogger(__name__)


def login(arguments: Mapping[str, Any], environ: Mapping[str, str]) -> int:
    """Asks for a token, without showing it, or reads a line where there is no terminal; blocks.

    The server is asked whether it takes that before it is kept. Returns the exit code; raises UsageError,
    RefusedError and UnreachableError.
    """
    directory, choice = _directory(environ), choose_server(arguments["--server"], environ)
    choice.tell()
    server = choice.address.authority
    token = check_token(_ask(server), "standard input")
    config = make_config(
        "80",  # no tunnel is opened
        server=str(choice.address),
        token=token,
        ca=arguments["--ca"],
        insecure=arguments["--insecure"],
        proxy=arguments["--proxy"],
        environ=environ,
    )
    problem = check_with_server(config)
    logins, kept = Logins(directory), KeptServers(directory)
    logins.put(server, token)
    forget = f"'tinytun logout --server {server}'"
    kept.use(choice.address, arguments["--ca"])
    if problem:
        log.warning("%s; it is kept all the same", problem)
    how = "" if problem else " and is valid"
    _say(f"The token for {server} is in {logins.path} now{how}; {forget} forgets it.")
    _say(f"Later commands use {choice.address}.{_but(environ)}")
    return 0


def logout(arguments: Mapping[str, Any], environ: Mapping[str, str]) -> int:
    """Forgets a server's token, or all; returns the exit code, raises UsageError.

    Where it was the default server, it is no longer.
    """
    if arguments["--all"] and arguments["--server"] is not None:
        raise UsageError("--all and --server do not go together")
    directory = _directory(environ)
    address = None if arguments["--all"] else choose_server(arguments["--server"], environ).address
    server = None if address is None else address.authority
    found = Logins(directory).remove(server)
    was_default = KeptServers(directory).forget(address)
    of = "any server" if server is None else server
    _say(f"There is no token for {of} any more." if found else f"There was no token for {of}.")
    if was_default:
        _say("Later commands use no server of yours any more; 'tinytun server URL' names one.")
    return 0


def show_server(arguments: Mapping[str, Any], environ: Mapping[str, str]) -> int:
    """Shows which server commands use and why, or makes another one the default; raises UsageError."""
    url = arguments["<url>"]
    if url is None:
        choice = choose_server(arguments["--server"], environ)
        print(choice.address, flush=True)
        _say(f"({choice.why})")
        return 0
    if arguments["--server"] is not None:
        raise UsageError("'tinytun server URL' and --server do not go together")
    address = parse_server(url, "URL")
    KeptServers(_directory(environ)).use(address, arguments["--ca"])
    _say(f"Later commands use {address}.{_but(environ)}")
    return 0


def _but(environ: Mapping[str, str]) -> str:
    """What is to be known about the default server, if the environment names one."""
    if not environ.get(SERVER_VARIABLE, "").strip():
        return ""
    return f" But {SERVER_VARIABLE} wins while it is set."


def _directory(environ: Mapping[str, str]) -> str:
    directory = config_directory(environ)
    if directory is None:
        raise UsageError(
            "there is no place for your settings: set HOME or XDG_CONFIG_HOME"
        )
    return directory


def _ask(server: str) -> str:
    """What the user enters, or a line of standard input; blocks. Raises UsageError."""
    if sys.stdin is None or not sys.stdin.isatty():
        return _read_line()
    try:
        return getpass.getpass(f"Token for {server}: ", stream=sys.stderr)
    except (EOFError, KeyboardInterrupt):
        _say("")  # the line of the question has no end yet
        raise UsageError("no token was entered; nothing has changed") from None


def _read_line() -> str:
    """One line of standard input, which need not be text."""
    if sys.stdin is None:
        return ""
    return sys.stdin.buffer.readline(2 * MAX_TOKEN).removeprefix(codecs.BOM_UTF8).decode("ascii", "replace")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
