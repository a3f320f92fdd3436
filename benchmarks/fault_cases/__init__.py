"""Faults by group, each with its promise: ``benchmarks/faults`` inflicts them (``benchmarks/README.md``)."""

from __future__ import annotations

from collections.abc import Sequence

from . import death, framing, malice, silence, stop, upgrade, visitors
from .base import Case

GROUPS = (death.group, upgrade.group, stop.group, silence.group, malice.group, visitors.group, framing.group)
CASES: Sequence[Case] = tuple(case for group in GROUPS for case in group.cases)

__all__ = ["CASES", "GROUPS", "Case"]
