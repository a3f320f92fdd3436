"""The file of tokens on the disk: read for the server; and ``tinytun-server token``, which changes it."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime
from typing import Any, Final

from .. import files
from ..errors import TunnelError, UsageError
from ..filechange import Mark, mark_of
from ..rights import Names
from . import authfile, edit
from .authfile import Grant
from .config import ServerConfig

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PREFIX: Final = "tt_"
"""What a token begins with, so that people, and who searches for leaked ones, know one when they see it."""

TOKEN_BYTES: Final = 24
"""192 bits, 32 characters: nobody guesses one."""

NO_TOKENS: Final = "# no tokens\n"
"""What is left behind the last token: an empty file would count late, as one that may be being written."""

SHORTEST_HASH: Final = 6
"""Digits of a hash that name a token to be revoked at least; fewer could be a label by mistake."""


class UnsteadyFileError(TunnelError):
    """The file was changed while it was read, so what was found in it says nothing."""


def read_settled(config: ServerConfig, mark: Mark | None) -> list[Grant]:
    """As :func:`read`, of a file that has ``mark`` before and after it.

    Raises UnsteadyFileError if it has not, whatever was found then.
    """
    try:
        return read(config)
    finally:
        if mark_of(config.auth_file) != mark:
            raise UnsteadyFileError("it is being changed")


def read(config: ServerConfig) -> list[Grant]:
    """The tokens of ``AUTH_FILE``. Blocks on the disk; raises UsageError, which names the file."""
    path = config.auth_file
    try:
        return authfile.parse(
            _read_text(path),
            usual=config.token_limits,
            usual_each=config.tunnel_limits,
            nobody=Names(config.reserved_names),
        )
    except FileNotFoundError:
        hint = "'tinytun-server token new --label NAME' makes it"
        raise UsageError(f"AUTH_FILE={path}: there is no such file; {hint}") from None
    except UsageError as error:
        raise UsageError(f"AUTH_FILE={path}: {error}") from None


def run(config: ServerConfig, arguments: dict[str, Any]) -> int:
    """The command ``token``; returns the exit code. Raises UsageError, with the file as it was."""
    path = config.auth_file
    if not path:
        raise UsageError("say where the tokens are: AUTH_FILE=/etc/tinytun-tokens.toml, or --auth-file")
    try:
        if arguments["new"]:
            return _new(path, arguments)
        if arguments["revoke"]:
            return _revoke(path, arguments["<token>"])
        return _list(config)
    except UsageError as error:
        text = str(error)
        raise UsageError(text if text.startswith("AUTH_FILE=") else f"{path}: {text}") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}; nothing was changed") from None


def _new(path: str, arguments: dict[str, Any]) -> int:
    """Makes a token, adds its hash to the file, and shows it, this once."""
    token = PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
    entry = _entry(arguments, authfile.digest(token))
    with _changing(path) as change:
        if any(grant.account.label == entry["label"] for grant in authfile.parse(change.text)):
            raise UsageError(f"{entry['label']} has a token already; revoke it first, or use another label")
        change.text = edit.append(change.text, entry)
        authfile.parse(change.text)
    try:
        print(token, flush=True)
    except OSError as error:
        reason = f"{error.strerror or error}; revoke {entry['label']}, whose token nobody knows"
        raise UsageError(f"the token could not be shown: {reason}") from None
    print(
        f"This is the token of {entry['label']}. It is not shown again: {path} has its hash only.\n"
        "A server that runs takes it from now on. Whoever has it says 'tinytun login', once.",
        file=sys.stderr,
    )
    return 0


def _entry(arguments: dict[str, Any], sha256: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"label": arguments["--label"], "sha256": sha256}
    lists = {
        "names": "--names",
        "ports": "--ports",
        "reserved": "--reserve",
        "reserved_ports": "--reserve-ports",
    }
    for name, flag in lists.items():
        if arguments[flag] is not None:
            entry[name] = [item.strip().lower() for item in arguments[flag].split(",") if item.strip()]
    if arguments["--expires"] is not None:
        entry["expires"] = _moment(arguments["--expires"])
    return entry


def _moment(text: str) -> date | datetime:
    try:
        return date.fromisoformat(text) if len(text) == len("2027-01-31") else datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"--expires {text!r}: not a date such as 2027-01-31, or 2027-01-31T12:00Z") from None


def _revoke(path: str, which: str) -> int:
    """Takes one token out of the file, by its label or the beginning of its hash."""
    with _changing(path, make=False) as change:
        grants = authfile.parse(change.text)
        number = _number_of(grants, which)
        change.text = edit.remove(change.text, number)
        if not change.text.strip():
            change.text = NO_TOKENS
    print(f"revoked: {grants[number].account.label}; its tunnels end within 5 seconds", file=sys.stderr)
    return 0


def _number_of(grants: list[Grant], which: str) -> int:
    labels = [number for number, grant in enumerate(grants) if grant.account.label == which]
    long_enough = len(which) >= SHORTEST_HASH
    hashes = [n for n, grant in enumerate(grants) if long_enough and grant.sha256.startswith(which.lower())]
    found = labels or hashes
    if not found:
        raise UsageError("no token has this label, or a hash that begins so")  # it may be a token itself
    if len(found) > 1:
        raise UsageError(f"{which!r} fits several: " + ", ".join(grants[n].account.label for n in found))
    return found[0]


def _list(config: ServerConfig) -> int:
    """Shows what there is; of a token only the beginning of its hash."""
    rows = [("LABEL", "HASH", "NAMES", "PORTS", "EXPIRES"), *map(_row, read(config))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _row(grant: Grant) -> tuple[str, str, str, str, str]:
    return (
        grant.account.label,
        grant.sha256[:12],
        _allowed(grant.names, grant.reserved),
        _allowed(grant.ports, grant.reserved_ports),
        _when(grant.expires),
    )


def _allowed(confined: object, reserved: object) -> str:
    parts = ["any"] if confined is None else [str(confined)] if confined else []
    return "; ".join([*parts, *([f"reserved: {reserved}"] if reserved else [])]) or "none"


def _when(expires: float | None) -> str:
    if expires is None:
        return "never"
    moment = datetime.fromtimestamp(expires, UTC)
    return f"{moment:%Y-%m-%d %H:%M} UTC" + (" (expired)" if moment < datetime.now(UTC) else "")


# -- the file -----------------------------------------------------------------


def _read_text(path: str) -> str:
    """All of the file. Raises UsageError, and FileNotFoundError."""
    try:
        with open(path, "rb") as file:
            return _text(file.read(authfile.MAX_FILE + 1))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UsageError(error.strerror or str(error)) from None


def _text(data: bytes) -> str:
    if len(data) > authfile.MAX_FILE:
        raise UsageError(f"longer than {authfile.MAX_FILE} bytes")
    try:
        return data.decode("utf-8-sig")  # editors of Windows put a mark (BOM) in front
    except UnicodeDecodeError:
        raise UsageError("it is not UTF-8") from None


class _Change:
    """The file's text; what is put here is written when the block is left without an error."""

    def __init__(self, text: str) -> None:
        self.text = text


@contextlib.contextmanager
def _changing(path: str, *, make: bool = True) -> Iterator[_Change]:
    """Changes the file as one, all or nothing, and nobody else meanwhile. Raises ``OSError``, UsageError."""
    path = os.path.realpath(path)
    descriptor = _locked(path, make)
    try:
        like = os.fstat(descriptor)
        files.check_directory(os.path.dirname(path), like)  # before anything is shown that is not kept
        with open(descriptor, "rb", closefd=False) as file:
            change = _Change(_text(file.read(authfile.MAX_FILE + 1)))
        before = change.text
        yield change
        if change.text != before:
            files.replace(path, change.text.encode(), like)
    finally:
        os.close(descriptor)


def _locked(path: str, make: bool) -> int:
    """A descriptor of the file that is there, locked against others who change it."""
    if make and not os.path.exists(path):
        files.check_directory(os.path.dirname(path))
    while True:
        descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if make else 0), 0o600)
        if fcntl is None:
            return descriptor
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            same = os.path.samestat(os.stat(path), os.fstat(descriptor))
        except FileNotFoundError:
            same = False
        if same:
            return descriptor
        os.close(descriptor)  # somebody has replaced it while we waited

