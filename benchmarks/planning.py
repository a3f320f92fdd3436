"""What is to be measured, in which order, and how long it will take. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .peers import Contender
from .scenarios import LongPath, Processes, Scenario

START = 0.6  # seconds to start a contender and to end it, on the average


@dataclass(frozen=True)
class Part:
    """Scenarios that share processes, or (``alone``) that each have processes of their own."""

    scenarios: Sequence[Scenario]
    alone: bool = False
    path: LongPath | None = None

    @property
    def services(self) -> list[str]:
        """What contenders must lead to."""
        return list(dict.fromkeys(name for scenario in self.scenarios for name in scenario.services))


def parts(scenarios: Sequence[Scenario]) -> list[Part]:
    """The scenarios, put together by the processes that they need.

    Those that want processes of their own come first: nothing else runs then. Then what is
    measured on loopback, then each long path.
    """
    alone = [s for s in scenarios if s.processes is not Processes.SHARED]
    shared = [s for s in scenarios if s.processes is Processes.SHARED]
    paths = dict.fromkeys(scenario.path for scenario in shared)
    found = [Part(alone, alone=True)] if alone else []
    for path in sorted(paths, key=lambda path: path is not None):
        found.append(Part([s for s in shared if s.path == path], path=path))
    return found


@dataclass(frozen=True)
class Plan:
    """A run."""

    contenders: Sequence[Contender]
    scenarios: Sequence[Scenario]
    rounds: int
    limit: float  # seconds after which no further cell begins
    quick: bool = False

    def seconds(self, scenario: Scenario) -> float:
        """How long a cell of ``scenario`` measures."""
        return scenario.quick if self.quick and scenario.quick else scenario.seconds

    def cost(self, scenario: Scenario) -> float:
        """Seconds that one of its cells takes, roughly, from start to end."""
        starts = START if scenario.processes is Processes.FRESH else 0.0
        return self.seconds(scenario) + scenario.overhead + starts

    def takers(self, scenarios: Sequence[Scenario]) -> list[Contender]:
        """Those who take part in any of ``scenarios``."""
        return [
            contender
            for contender in self.contenders
            if any(scenario.takes(contender) for scenario in scenarios)
        ]

    def expected(self) -> float:
        """Seconds that the whole run takes, roughly."""
        cells = sum(len(self.takers([scenario])) * self.cost(scenario) for scenario in self.scenarios)
        starts = sum(
            len(self.takers(part.scenarios)) * START for part in parts(self.scenarios) if not part.alone
        )
        return self.rounds * (cells + starts)
