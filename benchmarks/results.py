"""The report as Markdown, on standard output and in a file whose hand-written end is kept; and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .measures import SECTIONS
from .peers import CONTENDERS, DIRECT, Role
from .planning import Plan
from .report import (
    DASH,
    Cell,
    Results,
    failures_table,
    figures_table,
    ratios_table,
    with_added_latency,
)
from .targets import TARGETS, judge, targets_table

#: What follows this line in a results file was written by hand.
MARKER = "<!-- From here on by hand: benchmarks/run keeps it when it writes this file again. -->"
FIRST_WORDS = f"{MARKER}\n\n## What was tried\n\nNothing is written here yet.\n"


@dataclass(frozen=True)
class Report:
    """All that a run has brought."""

    cells: Sequence[Cell]
    notes: Sequence[str]
    plan: Plan
    facts: Mapping[str, str]  # the machine and the versions
    command: str
    busy: str  # the load average, in words
    took: float  # seconds

    @property
    def results(self) -> Results:
        peers = [contender.name for contender in CONTENDERS if contender.role is Role.PEER]
        return Results(with_added_latency(self.cells, DIRECT), peers)

    @property
    def contenders(self) -> list[str]:
        """Those that were measured, in their order in the tables."""
        present = {cell.contender for cell in self.cells}
        return [contender.name for contender in CONTENDERS if contender.name in present]

    @property
    def rounds(self) -> int:
        return 1 + max(cell.round for cell in self.cells)


def markdown(report: Report) -> str:
    """The whole report but for its title and what is written by hand."""
    results, names = report.results, report.contenders
    facts = "\n".join(f"- {name}: {value}" for name, value in report.facts.items())
    pieces = [
        f"`{report.command}`: {report.rounds} round{'s' if report.rounds > 1 else ''} in "
        f"{report.took / 60:.1f} minutes; load average {report.busy}.",
        facts,
        f"Every figure is a median (lowest{DASH}highest round). A ratio is that of the medians "
        f"(lowest{DASH}highest ratio within a round). A star marks a figure beside which something failed.",
        "## Targets",
        targets_table(results),
    ]
    sections = [section for section in SECTIONS if results.measured(section)]
    pieces.append("## Figures")
    pieces += [figures_table(results, names, section) for section in sections]
    pieces.append(failures_table(results, names))
    ratios = [text for section in sections if (text := ratios_table(results, names, section))]
    if ratios:
        pieces += ["## Ratios to the best peer", *ratios]
    notes = [*report.notes, *results.reasons()]
    if notes:
        pieces += ["## Notes", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(pieces) + "\n"


def write_results(path: Path, report: Report) -> None:
    """Writes the report to ``path``; what stands there from `MARKER` on stays."""
    by_hand = FIRST_WORDS
    if path.exists():
        text = path.read_text("utf-8")
        if MARKER in text:
            by_hand = text[text.index(MARKER) :]
    title = (
        "# Results\n\nWritten by `benchmarks/run --results`; [README.md](README.md) says what is measured."
    )
    path.write_text(f"{title}\n\n{markdown(report)}\n{by_hand}", "utf-8")


def write_json(path: Path, report: Report) -> None:
    """Everything that was measured, cell by cell, and the summaries."""
    results = report.results
    medians: dict[str, object] = {}
    ratios: dict[str, object] = {}
    for measure in results.measured():
        summaries = {name: results.summary(name, measure.key) for name in report.contenders}
        medians[measure.key] = {name: asdict(summary) for name, summary in summaries.items() if summary}
        if best := results.best_peer(measure):
            found = {name: results.ratio(name, best, measure.key) for name in report.contenders}
            ratios[measure.key] = {
                "best peer": best,
                **{name: asdict(ratio) for name, ratio in found.items() if ratio},
            }
    document = {
        "command": report.command,
        "machine": dict(report.facts),
        "load_average": report.busy,
        "seconds": report.took,
        "notes": list(report.notes),
        "targets": [asdict(judge(target, results)) for target in TARGETS],
        "medians": medians,
        "ratios": ratios,
        "cells": [asdict(cell) for cell in results.cells],
    }
    path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
