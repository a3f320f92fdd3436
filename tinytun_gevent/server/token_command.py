"""``tinytun-server token``: new, list, revoke. A token is shown once, when it is made, and kept nowhere."""

from __future__ import annotations

import json
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final

from ..errors import UsageError
from . import patterns
from .config import ServerConfig
from .token_file import appended, edit, without
from .tokens import Token, check_label, hash_of, parse_expiry, parse_ports, read_tokens

PREFIX: Final = "tt_"
"""What tokens begin with, so that programs that look for secrets in the wrong places can know them."""

TOKEN_BYTES: Final = 24
"""192 bits from the system's secure source, 32 characters: nobody will ever guess one."""

SHORTEST_HASH: Final = 4
"""Digits of a hash that say which token is meant, at least; `token list` shows 12."""

_SPAN: Final = re.compile(r"([0-9]{1,5})([hd])\Z")


def run(arguments: Mapping[str, Any], environ: Mapping[str, str]) -> int:
    """Does what docopt read, and returns the exit code. Blocks. Raises TunnelError."""
    path = ServerConfig(auth_file=arguments["--auth-file"] or environ.get("AUTH_FILE", "")).auth_file
    if not path:
        raise UsageError("which file? --auth-file FILE or the variable AUTH_FILE says it")
    if arguments["new"]:
        _new(path, arguments)
    elif arguments["list"]:
        print("\n".join(table(read_tokens(path), datetime.now(UTC))))
    else:
        _revoke(path, arguments["<which>"])
    return 0


def _new(path: str, arguments: Mapping[str, Any]) -> None:
    label = _checked("--label", check_label, arguments["--label"])
    token = PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
    entry = build_entry(label, token, arguments)

    def change(text: str, tokens: Sequence[Token]) -> str:
        if any(known.label == label for known in tokens):
            raise UsageError(f"there is a token with the label {label!r} already; 'token list' shows them")
        return appended(text, entry)

    edit(path, change)
    print(
        f"This is the token of {label}. It is shown this once: {path} has only its hash. A server that uses "
        "the file knows it within 2 seconds. Its holder says 'tinytun login --server URL' and enters it.",
        file=sys.stderr,
        flush=True,
    )
    print(token, flush=True)


def build_entry(label: str, token: str, options: Mapping[str, Any], now: datetime | None = None) -> str:
    """The lines of a new table; raises UsageError for an option that makes no sense."""
    lines = [f"label = {_quoted(label)}", f'sha256 = "{hash_of(token)}"']
    for flag, key, check in (
        ("--names", "names", patterns.check_pattern),
        ("--reserve", "reserve", patterns.check_pattern),
        ("--ports", "ports", _port_text),
        ("--reserve-ports", "reserve_ports", _port_text),
    ):
        given = options.get(flag)
        if given is not None:
            items = [_checked(flag, check, item.strip()) for item in given.split(",") if item.strip()]
            lines.append(f"{key} = [{', '.join(map(_quoted, items))}]")
    if options.get("--expires") is not None:
        until = _checked(
            "--expires", lambda text: _expiry(text, now or datetime.now(UTC)), options["--expires"]
        )
        lines.append(f"expires = {until}")
    return "\n".join(lines) + "\n"


def _revoke(path: str, which: str) -> None:
    removed: list[Token] = []

    def change(text: str, tokens: Sequence[Token]) -> str:
        token = the_one(tokens, which)
        removed.append(token)
        return without(text, tokens.index(token))

    edit(path, change)
    print(
        f"The token of {removed[0].label} is revoked. If a server runs, its tunnels end within 5 seconds.",
        file=sys.stderr,
        flush=True,
    )


def the_one(tokens: Sequence[Token], which: str) -> Token:
    """The token that a label, or the beginning of a hash, means; raises UsageError if it is not one."""
    found = [token for token in tokens if token.label == which]
    digits = which.lower()
    if not found and re.fullmatch(rf"[0-9a-f]{{{SHORTEST_HASH},64}}", digits):
        found = [token for token in tokens if token.sha256.startswith(digits)]
    if len(found) > 1:
        several = ", ".join(f"{token.label} ({token.sha256[:12]})" for token in found)
        raise UsageError(f"{which!r} may be any of {several}")
    if not found:
        raise UsageError("no token has this label, or a hash that begins so; 'token list' shows them all")
    return found[0]


def table(tokens: Sequence[Token], now: datetime) -> list[str]:
    """The tokens as lines of a table."""
    rows = [("LABEL", "NAMES", "PORTS", "EXPIRES", "SHA256")]
    for token in tokens:
        until = "never" if token.expires is None else token.expires.strftime("%Y-%m-%d %H:%M UTC")
        rows.append(
            (
                token.label,
                _which(token.names, token.reserve, str),
                _which(token.ports, token.reserve_ports, _show_range),
                "expired" if token.has_expired(now) else until,
                token.sha256[:12],
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _which(confined: Sequence[Any] | None, reserved: Sequence[Any], show: Any) -> str:
    allowed = "any" if confined is None else ",".join(map(show, confined)) or "none"
    return f"{allowed}; reserved: {','.join(map(show, reserved))}" if reserved else allowed


def _show_range(ports: range) -> str:
    return str(ports.start) if len(ports) == 1 else f"{ports.start}-{ports.stop - 1}"


def _checked(flag: str, check: Any, value: str) -> Any:
    try:
        return check(value)
    except ValueError as error:
        raise UsageError(f"{flag} {value!r}: allowed: {error}") from None


def _quoted(text: str) -> str:
    """As a basic string of TOML, of which JSON's are a part but for DEL, which is not printable anyway."""
    return json.dumps(text, ensure_ascii=False)


def _port_text(text: str) -> str:
    return _show_range(parse_ports(text))


def _expiry(text: str, now: datetime) -> str:
    """A date, a date and time, or a time from now, as TOML has it; raises ``ValueError``."""
    try:
        span = _SPAN.match(text)
        if span:
            until: date = now + timedelta(**{{"h": "hours", "d": "days"}[span[2]]: int(span[1])})
        elif len(text) == len("2030-12-31"):
            until = date.fromisoformat(text)
        else:
            until = datetime.fromisoformat(text)
        if parse_expiry(until) > now:
            whole = parse_expiry(until) if isinstance(until, datetime) else until
            return whole.strftime("%Y-%m-%dT%H:%M:%SZ") if isinstance(whole, datetime) else whole.isoformat()
    except (ValueError, OverflowError):
        pass
    raise ValueError(
        "a date or time to come, such as 2030-12-31 or 2030-12-31T18:00:00Z, or 12h or 90d from now"
    )
