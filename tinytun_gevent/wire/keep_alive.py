"""The Keep-Alive field of a response: how long, and for how many requests, a connection stays open.

RFC 2068 §19.7.1.1 defined ``timeout`` and ``max``; later ones only say that the field exists, and Apache,
Node and cpp-httplib send it as it was.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, NamedTuple

_LONGEST: Final = 256
"""Bytes of a field that is read; a longer one says nothing."""

_PARAMETER: Final = re.compile(
    rb"(?:^|,)[ \t]*(timeout|max)[ \t]*=[ \t]*\"?([0-9]{1,9})\"?[ \t]*(?=,|$)", re.IGNORECASE
)


class KeepAlive(NamedTuple):
    """What a service promises about its connection."""

    timeout: int | None = None
    """Seconds that it leaves the connection open without a request; None if it does not say."""
    max: int | None = None
    """Requests that it takes after this one; None if it does not say."""


def parse_keep_alive(value: bytes) -> KeepAlive:
    """Reads a Keep-Alive field; whatever is not understood in it is ignored. Raises nothing.

    Of a parameter that stands twice the smaller one counts.
    """
    return _parse(value) if len(value) <= _LONGEST else KeepAlive()


@lru_cache(maxsize=256)
def _parse(value: bytes) -> KeepAlive:
    said: dict[bytes, int] = {}
    for name, number in _PARAMETER.findall(value):
        key = name.lower()
        said[key] = min(int(number), said.get(key, int(number)))
    return KeepAlive(said.get(b"timeout"), said.get(b"max"))
