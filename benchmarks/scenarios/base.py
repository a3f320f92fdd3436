"""What every scenario has in common: where it takes place, what it needs, how long a cell takes."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..loads.outcome import Outcome
from ..peers import DIRECT, HAPROXY, Contender, Ground, Running
from ..processes import cpu_seconds, find
from ..services import NGINX, Services
from ..way import Endpoint

if TYPE_CHECKING:
    from ..tools import Tools

GB = 1e9
MIB = 1 << 20
ANCHORS = frozenset({DIRECT, HAPROXY})
#: Left out where the run would take more than 40 minutes with them, and where what they are made of makes
#: them no candidate for the best: an HTTP proxy that makes no use of pools, and SSH within a WebSocket.
HEAVY = frozenset({"frp http", "chisel"})
SETTLE = 0.3  # seconds between the last event and reading the memory


class Processes(enum.Enum):
    """Whose processes a cell works with."""

    SHARED = enum.auto()  # those of the round: the contender has been through the scenarios before it
    FRESH = enum.auto()  # started for this cell, while nobody else's run: memory is measured so
    OWN = enum.auto()  # the scenario starts what it needs


@dataclass(frozen=True)
class LongPath:
    """What lies between the two programs of a contender."""

    delay: float  # seconds each way
    rate: int = 0  # bytes a second, over all connections together in each direction; 0: no limit
    window: int = 0  # bytes in flight per connection and direction; 0: no limit


@dataclass(frozen=True)
class Stage:
    """One cell's surroundings."""

    contender: Contender
    running: Running
    services: Services
    ground: Ground
    seconds: float  # to measure for
    tools: Tools | None = None

    @property
    def nginx(self) -> Endpoint:
        return self.running.endpoints[NGINX]


class Cpu:
    """CPU seconds of a contender, user and system, all processes, between two moments."""

    seconds = 0.0


@contextmanager
def counted_cpu(running: Running) -> Iterator[Cpu]:
    """Counts while the context lasts; the result is there after it."""
    cpu, before = Cpu(), cpu_seconds(running.pids)
    yield cpu
    cpu.seconds = cpu_seconds(running.pids) - before


class Scenario(ABC):
    """One kind of work. `run` measures it once, after `warm_up`."""

    name: str
    #: Further names that stand for it and others on the command line.
    groups: Sequence[str] = ()
    path: LongPath | None = None
    services: Sequence[str] = (NGINX,)
    #: The programs that make the load, if it is not this one.
    programs: Sequence[str] = ()
    needs_tools = False
    needs_long_file = False
    processes = Processes.SHARED
    #: Contenders to which it would add nothing.
    absent: frozenset[str] = frozenset()
    #: Whether those take part who encrypt.
    encrypted = False
    #: Seconds that are measured, in a full run and in a quick one (0: not part of it).
    seconds: float
    quick: float = 0
    #: Seconds that a cell takes beyond that, roughly: warm-up, beginning and end of the load generators.
    overhead: float = 0.5

    def missing(self, services: Services, tools: Tools | None) -> str | None:
        """Why it cannot be run on this machine, or None."""
        for program in self.programs:
            if find(program) is None:
                return f"{program} is not installed"
        if tools is None and (self.needs_tools or self.path):
            return "its C programs could not be built"
        for name in self.services:
            if name in services.missing:
                return services.missing[name]
        return None

    def takes(self, contender: Contender) -> bool:
        """Whether it is measured."""
        return contender.name not in self.absent and (self.encrypted or not contender.encrypts)

    @abstractmethod
    def warm_up(self, stage: Stage) -> None:
        """Takes the way, so that nothing is measured that happens only the first time."""

    @abstractmethod
    def run(self, stage: Stage) -> Outcome:
        """Does the work for about ``stage.seconds``."""
