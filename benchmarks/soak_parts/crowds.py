"""What visitors and the ledger have to agree upon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

LARGEST: Final = 1 << 20
"""Bytes of the largest transfer: what one connection that is cut can lack, in each direction."""


@dataclass(frozen=True)
class Crowd:
    """``count`` visitors of one tunnel; with ``cut`` they leave in the middle now and then."""

    name: str
    kind: str
    port: int
    count: int
    cut: bool
    seed: int
