"""From single cells to the tables: medians, spreads, ratios, failures. Pure arithmetic, no I/O."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from .measures import LESS, MEASURES, MORE, Measure

T = TypeVar("T")

DASH = "\N{EN DASH}"
NOTHING = "\N{EM DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"

#: A contender that failed more often than this under a scenario is the best at nothing there.
TOLERATED = 0.01


@dataclass(frozen=True)
class Cell:
    """What one contender did under one scenario in one round."""

    round: int
    contender: str
    scenario: str
    values: Mapping[str, float] = field(default_factory=dict)
    attempts: int = 0
    failures: int = 0
    reasons: Sequence[str] = ()


@dataclass(frozen=True)
class Summary:
    """The middle and the extremes of some figures; nothing is averaged away."""

    median: float
    low: float
    high: float
    count: int


def summarize(figures: Sequence[float]) -> Summary | None:
    """The summary of at least one figure, None of none."""
    if not figures:
        return None
    return Summary(statistics.median(figures), min(figures), max(figures), len(figures))


def rotated(items: Sequence[T], round_number: int) -> list[T]:
    """The order of ``items`` in a round: every round begins with the next one, so nobody is always first."""
    start = round_number % len(items) if items else 0
    return [*items[start:], *items[:start]]


def with_added_latency(cells: Sequence[Cell], direct: str) -> list[Cell]:
    """The cells, with the latency that each contender adds to that of ``direct`` in the same round."""
    key = "keepalive-1-p50"
    base = {cell.round: cell.values[key] for cell in cells if cell.contender == direct and key in cell.values}
    found = []
    for cell in cells:
        if key in cell.values and cell.contender != direct and cell.round in base:
            added = {"added": cell.values[key] - base[cell.round]}
            cell = Cell(**{**vars(cell), "values": {**cell.values, **added}})
        found.append(cell)
    return found


class Results:
    """All cells of a run."""

    def __init__(self, cells: Iterable[Cell], peers: Sequence[str]) -> None:
        """``peers``: the names of those that ours are compared with."""
        self.cells = list(cells)
        self.peers = peers

    def by_round(self, contender: str, key: str) -> dict[int, float]:
        """One contender's values of one measure, by round."""
        return {
            cell.round: cell.values[key]
            for cell in self.cells
            if cell.contender == contender and key in cell.values
        }

    def summary(self, contender: str, key: str) -> Summary | None:
        return summarize(list(self.by_round(contender, key).values()))

    def best_peer(self, measure: Measure) -> str | None:
        """The peer with the best median, of those that did not fail too often; None if there is none."""
        medians = {
            peer: summary.median
            for peer in self.peers
            if (summary := self.summary(peer, measure.key)) and not self.unreliable(peer, measure.scenario)
        }
        if not medians:
            return None
        choose = max if measure.better == MORE else min
        return choose(medians, key=lambda peer: medians[peer])

    def ratio(self, contender: str, reference: str, key: str) -> Summary | None:
        """How many times the reference: the ratio of the medians.

        The extremes are those of the single rounds' ratios. None where either has no figure,
        or the reference's is not above zero.
        """
        ours, theirs = self.summary(contender, key), self.summary(reference, key)
        if ours is None or theirs is None or theirs.median <= 0:
            return None
        middle = ours.median / theirs.median
        mine, other = self.by_round(contender, key), self.by_round(reference, key)
        singles = [mine[number] / other[number] for number in mine if other.get(number, 0) > 0]
        return Summary(middle, min(singles, default=middle), max(singles, default=middle), len(singles))

    def failures(self, contender: str, scenario: str | None = None) -> tuple[int, int]:
        """How many of how many attempts failed, under one scenario or all."""
        cells = [
            cell for cell in self.cells if cell.contender == contender and scenario in (None, cell.scenario)
        ]
        return sum(cell.failures for cell in cells), sum(cell.attempts for cell in cells)

    def unreliable(self, contender: str, scenario: str) -> bool:
        """Whether it failed more often than is tolerated."""
        failed, attempts = self.failures(contender, scenario)
        return failed > TOLERATED * attempts

    def reasons(self) -> list[str]:
        """Every failure in words, with where it happened."""
        return [
            f"round {cell.round + 1}, {cell.scenario}, {cell.contender}: "
            f"{cell.failures:,} of {cell.attempts:,} failed ({'; '.join(cell.reasons)})"
            for cell in self.cells
            if cell.failures
        ]

    def measured(self, section: str | None = None) -> list[Measure]:
        """The measures that any cell has, in the order of the tables."""
        keys = {key for cell in self.cells for key in cell.values}
        return [m for m in MEASURES if m.key in keys and section in (None, m.section)]


def figure(value: float) -> str:
    """Three significant digits, thousands apart: 0.0123, 1.23, 12.3, 123, 12,345."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 2 if abs(value) >= 1 else 3
    if abs(value) >= 10:
        digits = 1
    return f"{value:.{digits}f}"


def spread(summary: Summary | None, suffix: str = "") -> str:
    """A median and its extremes as a table shows them."""
    if summary is None:
        return NOTHING
    text = figure(summary.median) + suffix
    if summary.count > 1:
        text += f" ({figure(summary.low)}{DASH}{figure(summary.high)})"
    return text


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figures_table(results: Results, contenders: Sequence[str], section: str) -> str:
    """Medians and spreads; a figure with failures beside it carries a star."""
    rows = []
    for measure in results.measured(section):
        row = [f"{measure.title}, {measure.unit}"]
        for contender in contenders:
            failed = results.failures(contender, measure.scenario)[0]
            row.append(spread(results.summary(contender, measure.key)) + (" *" if failed else ""))
        rows.append(row)
    return table([section, *contenders], rows)


def failures_table(results: Results, contenders: Sequence[str]) -> str:
    """How many of how many attempts failed."""
    counts = [results.failures(contender) for contender in contenders]
    return table(["", *contenders], [["failed, of all attempts", *[f"{f:,} of {of:,}" for f, of in counts]]])


def ratios_table(results: Results, contenders: Sequence[str], section: str) -> str | None:
    """How many times the best peer of each row; None where there is no peer to compare with."""
    rows = []
    for measure in results.measured(section):
        best = results.best_peer(measure)
        if best is None:
            continue
        row = [measure.title + (" (less is better)" if measure.better == LESS else "")]
        row += [spread(results.ratio(contender, best, measure.key), TIMES) for contender in contenders]
        rows.append([*row, best])
    return table([f"{section}, times the best peer", *contenders, "best peer"], rows) if rows else None
