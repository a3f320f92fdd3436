"""The text of the file of tokens, changed without touching what else is in it. No I/O.

What was done is checked with TOML's own reader, so a file in a form that is not understood here is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date, datetime
from typing import Any, Final

from .. import toml
from ..errors import UsageError

# What a line of TOML is made of: strings of four kinds, comments, line ends, brackets, and the rest.
_PIECE: Final = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}(?!")'
    r"|'''.*?'{3,5}(?!')"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'"
    r"|#[^\n]*|\n|[\[{]|[\]}]|[^\"'#\n\[\]{}]+|.",
    re.DOTALL,
)
_OPENING: Final = ("[", "{")
_CLOSING: Final = ("]", "}")


def append(text: str, entry: dict[str, Any]) -> str:
    """The file's text with one more token at its end. Raises UsageError if the two do not go together."""
    lines = ["[[tokens]]", *(f"{name} = {_value(value)}" for name, value in entry.items())]
    gap = "" if not text else "\n" if text.endswith("\n") else "\n\n"
    changed = text + gap + "\n".join(lines) + "\n"
    if tokens_of(changed) != [*tokens_of(text), entry]:
        raise UsageError(
            "the file is written in a way that cannot be added to; use [[tokens]] for each token"
        )
    return changed


def remove(text: str, number: int) -> str:
    """The file's text without one of its tokens, counted from 0. Raises UsageError if that cannot be cut out.

    What stands above the next token, after the last line of this one, is taken for the next one's.
    """
    tokens, tables = tokens_of(text), list(_tables(text))
    changed = None
    if len(tables) == len(tokens):
        start, end = tables[number]
        head, tail = text[:start], text[end:]
        if head.endswith("\n\n") and (not tail or tail.startswith("\n")):
            head = head[:-1]  # one empty line between its neighbors will do
        changed = head + tail
    if changed is None or _tokens_or_none(changed) != tokens[:number] + tokens[number + 1 :]:
        raise UsageError("the file is written in a way that nothing can be cut out of; edit it by hand")
    return changed


def _tables(text: str) -> Iterator[tuple[int, int]]:
    """Where each ``[[tokens]]`` begins, and where its last line ends that is neither empty nor a comment."""
    start: int | None = None
    end = 0
    for first, last in _statements(text):
        statement = text[first:last].strip()
        if statement.startswith("[") and _is_header(statement):
            if start is not None:
                yield start, end
            start = first
        if statement and not statement.startswith("#"):
            end = last
    if start is not None:
        yield start, end


def _statements(text: str) -> Iterator[tuple[int, int]]:
    """Where each line of the text begins and ends; a value of several lines is one."""
    first = depth = 0
    for match in _PIECE.finditer(text):
        depth += (match[0] in _OPENING) - (match[0] in _CLOSING)
        if match[0] == "\n" and depth <= 0:
            yield first, match.end()
            first = match.end()
    if first < len(text):
        yield first, len(text)


def _is_header(line: str) -> bool:
    """Whether it is ``[[tokens]]``, however that is written."""
    try:
        return toml.loads(line) == {"tokens": [{}]}
    except ValueError:
        return False


def _tokens_or_none(text: str) -> list[dict[str, Any]] | None:
    try:
        return tokens_of(text)
    except UsageError:
        return None


def tokens_of(text: str) -> list[dict[str, Any]]:
    """The tokens as TOML has them. Raises UsageError for what is not TOML."""
    try:
        tokens = toml.loads(text).get("tokens", [])
    except ValueError as error:  # a number of thousands of digits is a ValueError
        raise UsageError(f"it is not TOML: {error}") from None
    return list(tokens)


def _value(value: Any) -> str:
    """A value as TOML; only what `token new` writes."""
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, (date, datetime)):
        return value.isoformat()
    if isinstance(value, int):
        return str(value)
    return '"' + str(value) + '"'
