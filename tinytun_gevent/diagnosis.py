"""A chain of checks for ``doctor``: each is ok, failed with what to do, or skipped because of another."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum


class Result(StrEnum):
    """How a check went."""

    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"


class Trouble(Exception):
    """A check has failed: what is wrong, and what to do about it."""

    def __init__(self, text: str, advice: str = "") -> None:
        super().__init__(text)
        self.advice = advice


class NotApplicable(Exception):
    """A check means nothing here; its text says why."""


@dataclass(frozen=True, slots=True)
class Step:
    """One check that was made, or was not."""

    name: str
    result: Result
    #: What was found, what is wrong, or why it was skipped.
    text: str
    #: What to do; blank if it is ok.
    advice: str = ""


class Chain:
    """Checks in their order; those that depend on a failed one are skipped."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    @property
    def failed(self) -> bool:
        """Whether any check has failed."""
        return any(step.result is Result.FAILED for step in self.steps)

    def run(self, name: str, check: Callable[[], str], needs: Sequence[str] = ()) -> bool:
        """Makes a check unless one that it ``needs`` was not ok; whether it is ok. May block.

        ``check`` returns what it found, or raises :class:`Trouble` or :class:`NotApplicable`.
        """
        good = {step.name for step in self.steps if step.result is Result.OK}
        missing = next((need for need in needs if need not in good), None)
        if missing is not None:
            step = Step(name, Result.SKIPPED, f"because of: {missing}")
        else:
            step = _made(name, check)
        self.steps.append(step)
        return step.result is Result.OK

    def text(self, as_json: bool) -> str:
        """The chain for a terminal, or as JSON."""
        if as_json:
            steps = [{key: value for key, value in asdict(step).items() if value} for step in self.steps]
            return json.dumps({"ok": not self.failed, "steps": steps}, indent=2)
        width = max(len(step.name) for step in self.steps)
        lines = []
        for step in self.steps:
            lines.append(f"{step.result.value:7}  {step.name:{width}}  {step.text}")
            if step.advice:
                lines.append(f"{'':9}{'':{width}}  -> {step.advice}")
        return "\n".join(lines)


def _made(name: str, check: Callable[[], str]) -> Step:
    try:
        return Step(name, Result.OK, check())
    except Trouble as trouble:
        return Step(name, Result.FAILED, str(trouble), trouble.advice)
    except NotApplicable as reason:
        return Step(name, Result.SKIPPED, str(reason))
