"""The run itself: rounds, order, warm-up, limits. Each cell ends up in `Run.cells`, whatever happened."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .contenders import Contender, Running
from .loads import Load, check_way
from .processes import BenchmarkError, Workspace
from .report import MEASURES, Cell, figure, rotated
from .services import NGINX, Services, start_services


@dataclass(frozen=True)
class Plan:
    """What is to be measured, and for how long."""

    contenders: Sequence[Contender]
    loads: Sequence[Load]
    rounds: int
    seconds: int  # of each cell
    limit: float  # seconds after which no further cell begins


def progress(text: str) -> None:
    """One line for the person who waits."""
    print(text, file=sys.stderr, flush=True)


def raise_descriptor_limit() -> int:
    """As many descriptors as we may have, for the programs that we start too. Returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


class Run:
    """One run of the benchmark. `cells` and `notes` are good to read at any time, also after Ctrl-C."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.cells: list[Cell] = []
        #: What was not measured, and why.
        self.notes: list[str] = []

    def run(self) -> None:
        """Blocks until everything is measured or the time is up; ends all that it started."""
        deadline = time.monotonic() + self.plan.limit
        files = raise_descriptor_limit()
        with Workspace() as workspace:
            services = start_services(workspace, files)
            contenders = self._present(self.plan.contenders)
            loads = self._possible(services)
            for number in range(self.plan.rounds):
                if not self._round(number, rotated(contenders, number), loads, workspace, services, deadline):
                    self._note(f"stopped in round {number + 1}: {self.plan.limit:.0f} s are over (--limit)")
                    return

    def _present(self, contenders: Sequence[Contender]) -> list[Contender]:
        present = []
        for contender in contenders:
            reason = contender.missing()
            if reason:
                self._note(f"{contender.name} was not measured: {reason}")
            else:
                present.append(contender)
        return present

    def _possible(self, services: Services) -> list[Load]:
        possible = []
        for load in self.plan.loads:
            reason = load.missing(services)
            if reason:
                self._note(f"{load.name} was not measured: {reason}")
            else:
                possible.append(load)
        return possible

    def _note(self, text: str) -> None:
        progress(f"note: {text}")
        self.notes.append(text)

    def _round(
        self,
        number: int,
        contenders: Sequence[Contender],
        loads: Sequence[Load],
        workspace: Workspace,
        services: Services,
        deadline: float,
    ) -> bool:
        """Fresh processes for everybody, then each load on all of them in turn. False if the time is up.

        Contenders take turns within a load, so that figures that are compared are taken
        within seconds of each other.
        """
        up: list[tuple[Contender, Running]] = []
        for contender in contenders:
            try:
                running = contender.start(workspace, services.ports)
                if NGINX in services.ports:
                    check_way(running.endpoints[NGINX])
            except BenchmarkError as error:
                reason = f"did not start: {error}"
                self._note(f"round {number + 1}: {contender.name} {reason}")
                for load in loads:
                    self._keep(Cell(number, contender.name, load.name, {}, 1, 1, [reason]), 0.0)
            else:
                up.append((contender, running))
        for load in loads:
            for contender, running in up:
                if time.monotonic() > deadline:
                    return False
                started = time.monotonic()
                cell = self._cell(number, contender, running, load, services)
                self._keep(cell, time.monotonic() - started)
        workspace.stop([process for _, running in up for process in reversed(running.processes)])
        return True

    def _cell(
        self, number: int, contender: Contender, running: Running, load: Load, services: Services
    ) -> Cell:
        try:
            load.warm_up(running.endpoints[load.service], services)
            outcome = load.run(running, services, self.plan.seconds)
        except (BenchmarkError, OSError) as error:
            return Cell(number, contender.name, load.name, {}, 1, 1, [str(error)])
        dead = running.dead()
        if dead:  # figures of a crash are no figures
            return Cell(number, contender.name, load.name, {}, outcome.attempts, outcome.attempts, [dead])
        return Cell(
            number,
            contender.name,
            load.name,
            outcome.values,
            outcome.attempts,
            outcome.failures,
            outcome.reasons,
        )

    def _keep(self, cell: Cell, took: float) -> None:
        self.cells.append(cell)
        known = {measure.key: measure for measure in MEASURES}
        shown = [
            f"{known[key].title}: {figure(value)} {known[key].unit}" for key, value in cell.values.items()
        ]
        trouble = f"  {cell.failures} of {cell.attempts} FAILED: " if cell.failures else ""
        progress(
            f"round {cell.round + 1}/{self.plan.rounds}  {cell.load:<11}  {cell.contender:<12}"
            f"  {took:4.1f} s  {', '.join(shown)}{trouble}{'; '.join(cell.reasons)}"
        )
