"""The cyclic garbage collector, set for a process that serves many short connections."""

from __future__ import annotations

import gc
from typing import Final

YOUNG: Final = 20_000
"""Container objects made since the last look before the youngest are searched; at Python's 700
the search comes every few visitors, and finds next to nothing: what serves them has no cycles."""


def calm() -> None:
    """Leaves what has been imported out of every search to come, and searches less often.

    For our own commands, once everything is imported; a library does not decide this.
    """
    gc.freeze()
    gc.set_threshold(YOUNG, 20, 20)
