"""Reads TOML of bounded cost: what is dear to the standard library's reader is refused before it.

``tomllib`` keeps every beginning of a dotted key, so one key of 39 kB with 20,000 dots takes 2.3 GB. A dot
that joins keys stands on the same line as they do; dots in strings and comments are counted too, because
which they are only a whole reader can tell.
"""

from __future__ import annotations

import tomllib
from typing import Any, Final

MAX_LINE: Final = 1 << 16
"""Characters of a line. A list of 256 subdomains on one has 17,000."""

LINE_DOTS: Final = 64
"""Dots in a line: the longest label of a token has 63 characters, and a number one more."""

MAX_DOTS: Final = 1 << 16
"""Dots in a file: six for each of 10,000 tokens. Each costs up to 1 KB, so these 64 MB."""


def loads(text: str) -> dict[str, Any]:
    """The content of a TOML document. Raises ``ValueError``, which says what is wrong, in which line.

    The caller bounds its length: 1 MiB takes seconds, and up to 200 MB, at the worst.
    """
    _check_lines(text)
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("brackets are nested too deep") from None


def _check_lines(text: str) -> None:
    if text.count(".") > MAX_DOTS:
        raise ValueError(f"more than {MAX_DOTS} dots")
    for number, line in enumerate(text.split("\n"), 1):
        if len(line) > MAX_LINE:
            raise ValueError(f"line {number} is longer than {MAX_LINE} characters")
        if line.count(".") > LINE_DOTS:
            raise ValueError(f"more than {LINE_DOTS} dots in line {number}")
