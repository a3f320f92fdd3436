"""What a cell brings, and how a program that makes load is run."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..processes import clean_environment


@dataclass
class Outcome:
    """Values by measure key, and how many attempts of all failed."""

    values: dict[str, float] = field(default_factory=dict)
    attempts: int = 0
    failures: int = 0
    reasons: list[str] = field(default_factory=list)

    def failed(self, reason: str, count: int = 1) -> None:
        """Counts failures; the first few reasons are kept to be shown."""
        self.failures += count
        if len(self.reasons) < 3 and reason not in self.reasons:
            self.reasons.append(reason)

    def count(self, attempts: int, failures: int, reason: str) -> None:
        """Counts several attempts at once."""
        self.attempts += attempts
        if failures:
            self.failed(reason, failures)


def call(command: Sequence[str], limit: float) -> subprocess.CompletedProcess[str]:
    """Runs a load generator to its end, ``limit`` seconds at most."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=limit, env=clean_environment(), check=False
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, -1, "", f"{command[0]} did not end in {limit:.0f} s")
