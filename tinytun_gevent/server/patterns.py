"""Names with ``*`` in them: which there are, what they mean, and one that fits."""

from __future__ import annotations

from ..names import random_name
from ..wire.handshake import is_subdomain

ALLOWED = "1-63 of a-z, 0-9 and inner hyphens, with * for any of them (11 and more where a name is made up)"
"""What a pattern may be, as errors say it."""


def check_pattern(text: str) -> str:
    """``text`` in lower case, if names can fit it; raises ``ValueError`` with what is allowed.

    One that is filled with a random name must still be a subdomain, so that there always is such a one.
    """
    pattern = text.strip().lower()
    if not text.isascii() or not is_subdomain(fill(pattern)):
        raise ValueError(ALLOWED)
    return pattern


def fill(pattern: str) -> str:
    """A name that fits: each ``*`` becomes a random one of 11 characters."""
    first, *others = pattern.split("*")
    return first + "".join(random_name() + piece for piece in others)


def fits(pattern: str, name: str) -> bool:
    """Whether ``name`` is one of ``pattern``'s: as itself, or with any characters in place of each ``*``.

    The pieces between are looked for from the left, each once, so that no pattern takes long.
    """
    first, *others = pattern.split("*")
    if not others:
        return name == pattern
    *middle, last = others
    start, end = len(first), len(name) - len(last)
    if start > end or not name.startswith(first) or not name.endswith(last):
        return False
    for piece in middle:
        found = name.find(piece, start, end)
        if found < 0:
            return False
        start = found + len(piece)
    return True
