"""The same bytes in pieces, the same pieces each time; and what a function returned or raised."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


def pieces(data: bytes) -> Iterator[bytes]:
    """``data`` in pieces of a few bytes, now and then more; which ones follows from the data."""
    numbers = random.Random(zlib.crc32(data))
    at = 0
    while at < len(data):
        size = numbers.choice((1, 1, 2, 3, 7, 9, 40, 600))
        yield data[at : at + size]
        at += size


def outcome(function: Callable[[], T], *errors: type[Exception]) -> tuple[T | None, str]:
    """What ``function`` returned, and the kind, status and text of an error of ``errors`` that it raised."""
    try:
        return function(), ""
    except errors as error:
        return None, f"{type(error).__name__} {getattr(error, 'status', '')} {error}"
