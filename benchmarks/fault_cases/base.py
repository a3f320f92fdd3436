"""What every case has: a fault, what is promised about it, and a function that inflicts it and measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..processes import find

if TYPE_CHECKING:
    from .site import Site


@dataclass(frozen=True)
class Measured:
    """What a case has brought, in a few words; ``kept`` is None where it could not be measured."""

    text: str
    kept: bool | None


@dataclass(frozen=True)
class Case:
    """One fault. ``seconds`` is about how long it takes."""

    name: str
    group: str
    fault: str
    promise: str
    run: Callable[[Site], Measured]
    seconds: float
    programs: Sequence[str] = ()

    def missing(self) -> str | None:
        """Why it cannot be measured on this machine, or None."""
        for program in self.programs:
            if find(program) is None:
                return f"{program} is not installed"
        return None


class Group:
    """The cases of one module, in the order they are written."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cases: list[Case] = []

    def case(
        self, fault: str, promise: str, *, seconds: float, programs: Sequence[str] = ()
    ) -> Callable[[Callable[[Site], Measured]], Callable[[Site], Measured]]:
        """Makes a case of the function below it; its name is the function's, with hyphens."""

        def add(run: Callable[[Site], Measured]) -> Callable[[Site], Measured]:
            name = run.__name__.replace("_", "-")
            self.cases.append(Case(name, self.name, fault, promise, run, seconds, programs))
            return run

        return add
