"""The configuration file: flat TOML, its keys are the variables in lower case. Blocks on the disk; no gevent.

A value is text as the variable would say it, or the number, boolean or list of strings that it means::

    base_domain = ["tunnel.example.com"]
    proxy_port = 80
    tcp_listen = false
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import Field
from typing import Any, Final

from .. import toml
from ..errors import UsageError
from .logs import visible

MAX_FILE: Final = 1 << 16
"""Bytes of a file; one with all variables and a comment for each has 16,000."""

MAX_SHOWN: Final = 60
"""Characters of a key or a value that an error repeats."""

_KINDS: Final[dict[str, tuple[tuple[type, ...], str]]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "range": ((int,), 'a string such as "20000-60000"'),
    "str": ((), "a string"),
    "tuple": ((list,), "a list of strings, or one string"),
}
"""By the kind of a variable: TOML's types that are taken for it, beside text; and that in words."""


def read(path: str, options: Iterable[Field[Any]]) -> dict[str, str]:
    """What the file says, by variable, as the variable's text; every value is one that is allowed.

    ``options`` are the fields of `ServerConfig`. Raises UsageError, which names the file and the key.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE + 1)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise UsageError(f"--config {visible(path)}: {getattr(error, 'strerror', None) or error}") from None
    try:
        return parse(data, options)
    except UsageError as error:
        raise UsageError(f"{visible(path)}: {error}") from None


def parse(data: bytes, options: Iterable[Field[Any]]) -> dict[str, str]:
    """The same of a file's bytes. Raises UsageError, which names the key."""
    if len(data) > MAX_FILE:
        raise UsageError(f"it is longer than {MAX_FILE} bytes")
    try:
        document = toml.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UsageError("it is not UTF-8") from None
    except ValueError as error:
        raise UsageError(f"it is not TOML: {visible(str(error))[:200]}") from None
    known = {option.metadata["variable"].lower(): option for option in options}
    return {key.upper(): _value(key, value, known) for key, value in document.items()}


def _value(key: str, value: Any, known: dict[str, Field[Any]]) -> str:
    """One value as its variable's text, checked."""
    if key not in known:
        raise UsageError(_unknown(key, value, known))
    option = known[key]
    kind = str(option.type).partition("[")[0]
    types, expected = _KINDS[kind]
    fits = isinstance(value, (str, *types)) and (kind == "bool" or not isinstance(value, bool))
    if not fits or (isinstance(value, list) and not all(isinstance(item, str) for item in value)):
        raise UsageError(f"{key}: {expected} is expected, not {_called(value)}")
    text = _text(value)
    try:
        option.metadata["form"].read(text.strip())
    except ValueError as error:
        raise UsageError(f"{key} = {_shown(text)}: allowed: {visible(str(error))}") from None
    return text


def _unknown(key: str, value: Any, known: Iterable[str]) -> str:
    """What to say of a key that is no variable's."""
    if isinstance(value, dict):
        return f"[{_shown(key)}]: there are no tables here; write each variable as key = value"
    alike = difflib.get_close_matches(key.lower().replace("-", "_"), list(known), 1)
    hint = f"did you mean {alike[0]}?" if alike else "'tinytun-server --help' lists the variables"
    return f"{_shown(key)}: there is no such key; {hint}"


def _called(value: Any) -> str:
    """What a value of a wrong type is, in words."""
    if isinstance(value, list):
        plain = all(isinstance(item, str) for item in value)
        return "a list" if plain else "a list of something else"
    names = {bool: "true or false", int: "a number", float: "a fraction", dict: "a table"}
    return names.get(type(value), "a date or a time")


def _text(value: Any) -> str:
    """A value that fits, as the variable would say it."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return ",".join(value)
    if isinstance(value, int) and value.bit_length() > 64:
        return "a very large number"  # Python refuses to write some of them
    return str(value)


def _shown(text: str) -> str:
    """A key or a value inside an error's one line."""
    shown = visible(text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…")
    return shown if shown.strip() == shown and shown else repr(shown)
