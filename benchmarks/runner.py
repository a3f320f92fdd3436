"""The run itself: rounds, order, warm-up, limits. Each cell ends up in `Run.cells`, whatever happened."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from . import tools as native
from .measures import MEASURES
from .peers import Contender, Ground, Running, Via
from .peers.base import STOP
from .planning import Part, Plan, parts
from .processes import BenchmarkError, Process, Workspace
from .report import Cell, figure, rotated
from .scenarios import LongPath, Processes, Scenario, Stage
from .services import Services, start_services
from .tools import Tools

_KNOWN = {measure.key: measure for measure in MEASURES}


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


class TimeIsUp(Exception):
    """No further cell fits into the limit."""


class Run:
    """One run of the benchmark. `cells` and `notes` are good to read at any time, also after Ctrl-C."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.cells: list[Cell] = []
        #: What was not measured, and why.
        self.notes: list[str] = []
        self._deadline = 0.0
        self._tools: Tools | None = None
        self._services: Services
        self._ground: Ground

    def run(self) -> None:
        """Blocks until everything is measured or the time is up; ends all that it started."""
        self._deadline = time.monotonic() + self.plan.limit
        files = raise_descriptor_limit()
        with Workspace() as workspace:
            self._build_tools(workspace)
            long_file = any(scenario.needs_long_file for scenario in self.plan.scenarios)
            self._services = start_services(workspace, files, self._tools, long_file=long_file)
            self._ground = Ground(workspace, self._services.ports, files=files)
            self.plan = replace(self.plan, contenders=self._present(), scenarios=self._possible())
            progress(f"about {self.plan.expected() / 60:.0f} minutes ({self.plan.expected():.0f} s)")
            for number in range(self.plan.rounds):
                try:
                    for part in parts(self.plan.scenarios):
                        self._part(number, part)
                except TimeIsUp:
                    self._note(f"stopped in round {number + 1}: {self.plan.limit:.0f} s are over (--limit)")
                    return

    def _build_tools(self, workspace: Workspace) -> None:
        if not any(s.needs_tools or s.path for s in self.plan.scenarios):
            return
        try:
            self._tools = native.build(workspace)
        except BenchmarkError as error:
            self._note(str(error))

    def _present(self) -> list[Contender]:
        present = []
        for contender in self.plan.contenders:
            reason = contender.missing()
            if reason:
                self._note(f"{contender.name} was not measured: {reason}")
            else:
                present.append(contender)
        return present

    def _possible(self) -> list[Scenario]:
        possible = []
        for scenario in self.plan.scenarios:
            reason = scenario.missing(self._services, self._tools)
            if reason:
                self._note(f"{scenario.name} was not measured: {reason}")
            else:
                possible.append(scenario)
        return possible

    def _note(self, text: str) -> None:
        if text not in self.notes:
            progress(f"note: {text}")
            self.notes.append(text)

    def _part(self, number: int, part: Part) -> None:
        """One part of a round: each scenario on everybody in turn: what is compared is close in time."""
        everybody = rotated(self.plan.takers(part.scenarios), number)
        ground = replace(self._ground, via=self._via(part.path), services=self._ports(part.services))
        up: dict[str, Running] = {}
        if not part.alone:
            for contender in everybody:
                if time.monotonic() > self._deadline:
                    raise TimeIsUp
                self._start(number, contender, part.scenarios, ground, up)
        for scenario in part.scenarios:
            for contender in everybody:
                if not scenario.takes(contender):
                    continue
                if time.monotonic() + self.plan.cost(scenario) > self._deadline:
                    raise TimeIsUp
                if part.alone:
                    self._alone(number, contender, scenario, ground)
                elif contender.name in up:
                    self._cell(number, contender, up[contender.name], scenario, ground)
        for running in up.values():
            _stop(ground, running)

    def _via(self, path: LongPath | None) -> Via | None:
        """The relays of a long path."""
        tools = self._tools
        if path is None or tools is None:
            return None

        def start(
            workspace: Workspace, target: tuple[str, int], bind: tuple[str, int]
        ) -> tuple[Process, int]:
            return native.start_relay(
                workspace,
                tools,
                target[1],
                delay=path.delay,
                rate=path.rate,
                window=path.window,
                bind=bind[0],
                port=bind[1],
                target=target[0],
            )

        return start

    def _ports(self, names: Sequence[str]) -> dict[str, int]:
        return {name: port for name, port in self._services.ports.items() if name in names}

    def _start(
        self,
        number: int,
        contender: Contender,
        scenarios: Sequence[Scenario],
        ground: Ground,
        up: dict[str, Running],
    ) -> None:
        """Starts a contender; if it cannot be, it has failed in all of ``scenarios``."""
        try:
            up[contender.name] = contender.start(ground)
        except (BenchmarkError, OSError) as error:
            reason = f"did not start: {error}"
            self._note(f"round {number + 1}: {contender.name} {reason}")
            for scenario in scenarios:
                if scenario.takes(contender):
                    self._keep(Cell(number, contender.name, scenario.name, {}, 1, 1, [reason]), 0.0)

    def _alone(self, number: int, contender: Contender, scenario: Scenario, ground: Ground) -> None:
        """A cell with processes of its own."""
        ground = replace(ground, services=self._ports(scenario.services))
        before = ground.workspace.running()
        if scenario.processes is Processes.FRESH:
            up: dict[str, Running] = {}
            self._start(number, contender, [scenario], ground, up)
            if up:
                self._cell(number, contender, up[contender.name], scenario, ground)
        else:
            self._cell(number, contender, Running([], {}), scenario, ground)
        started = [process for process in ground.workspace.running() if process not in before]
        ground.workspace.stop(started, STOP)

    def _cell(
        self, number: int, contender: Contender, running: Running, scenario: Scenario, ground: Ground
    ) -> None:
        started = time.monotonic()
        stage = Stage(contender, running, self._services, ground, self.plan.seconds(scenario), self._tools)
        name = contender.name
        try:
            scenario.warm_up(stage)
            outcome = scenario.run(stage)
        except (BenchmarkError, OSError) as error:
            cell = Cell(number, name, scenario.name, {}, 1, 1, [str(error)])
        else:
            values, failures, reasons = outcome.values, outcome.failures, outcome.reasons
            if dead := running.dead():  # figures of a crash are no figures
                values, failures, reasons = {}, outcome.attempts, [dead]
            cell = Cell(number, name, scenario.name, values, outcome.attempts, failures, reasons)
        self._keep(cell, time.monotonic() - started)

    def _keep(self, cell: Cell, took: float) -> None:
        self.cells.append(cell)
        shown = [
            f"{_KNOWN[key].key} {figure(value)} {_KNOWN[key].unit}" for key, value in cell.values.items()
        ]
        trouble = f"  {cell.failures} of {cell.attempts} FAILED: " if cell.failures else ""
        progress(
            f"round {cell.round + 1}/{self.plan.rounds}  {cell.scenario:<17}  {cell.contender:<12}"
            f"  {took:4.1f} s  {', '.join(shown)}{trouble}{'; '.join(cell.reasons)}"
        )


def _stop(ground: Ground, running: Running) -> None:
    ground.workspace.stop([*running.beside, *reversed(running.processes)], STOP)
