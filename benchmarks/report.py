"""From single cells to the tables: medians, spreads, ratios, failures. Pure arithmetic, no I/O."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

MORE = "more"
LESS = "less"

DASH = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Measure:
    """One row of the table."""

    key: str
    title: str
    unit: str
    load: str  # the load that brings it
    better: str  # MORE or LESS of it
    floor: float | None = None  # what our http tunnel is to reach, as a ratio to the reference


MEASURES: tuple[Measure, ...] = (
    Measure("download", "bulk download", "GB/s", "download", MORE, floor=1.7),
    Measure("upload", "bulk upload", "GB/s", "upload", MORE, floor=1.7),
    Measure("keepalive", "requests on 32 kept connections", "a second", "keepalive", MORE, floor=1.0),
    Measure("connections", "new connections, 32 at a time", "a second", "connections", MORE, floor=1.5),
    Measure("p50", "request latency, median", "ms", "keepalive", LESS),
    Measure("p99", "request latency, 99 %", "ms", "keepalive", LESS),
    Measure("memory", "memory of an idle visitor", "KiB", "memory", LESS),
    Measure("download-cpu", "CPU for a GB down", "s", "download", LESS),
    Measure("upload-cpu", "CPU for a GB up", "s", "upload", LESS),
    Measure("keepalive-cpu", "CPU for 10,000 requests", "s", "keepalive", LESS),
    Measure("connections-cpu", "CPU for 10,000 new connections", "s", "connections", LESS),
)


@dataclass(frozen=True)
class Cell:
    """What one contender did under one load in one round."""

    round: int
    contender: str
    load: str
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


class Results:
    """All cells of a run."""

    def __init__(self, cells: Iterable[Cell]) -> None:
        self.cells = list(cells)

    def by_round(self, contender: str, key: str) -> dict[int, float]:
        """One contender's values of one measure, by round."""
        return {
            cell.round: cell.values[key]
            for cell in self.cells
            if cell.contender == contender and key in cell.values
        }

    def summary(self, contender: str, key: str) -> Summary | None:
        return summarize(list(self.by_round(contender, key).values()))

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

    def failures(self, contender: str, load: str | None = None) -> tuple[int, int]:
        """How many of how many attempts failed, under one load or all."""
        cells = [cell for cell in self.cells if cell.contender == contender and load in (None, cell.load)]
        return sum(cell.failures for cell in cells), sum(cell.attempts for cell in cells)

    def reasons(self) -> list[str]:
        """Every failure in words, with where it happened."""
        return [
            f"round {cell.round + 1}, {cell.load}, {cell.contender}: "
            f"{cell.failures} of {cell.attempts} failed ({'; '.join(cell.reasons)})"
            for cell in self.cells
            if cell.failures
        ]


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
        return "—"
    text = figure(summary.median) + suffix
    if summary.count > 1:
        text += f" ({figure(summary.low)}{DASH}{figure(summary.high)})"
    return text


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured(results: Results) -> list[Measure]:
    """The measures that any cell has, in the order of the table."""
    keys = {key for cell in results.cells for key in cell.values}
    return [measure for measure in MEASURES if measure.key in keys]


def figures_table(results: Results, contenders: Sequence[str]) -> str:
    """Medians and spreads; a figure with failures beside it carries a star. The last row counts them."""
    rows = []
    for measure in measured(results):
        row = [f"{measure.title}, {measure.unit}"]
        for contender in contenders:
            failed = results.failures(contender, measure.load)[0]
            row.append(spread(results.summary(contender, measure.key)) + (" *" if failed else ""))
        rows.append(row)
    counts = [results.failures(contender) for contender in contenders]
    rows.append(["failed, of all attempts", *[f"{failed:,} of {of:,}" for failed, of in counts]])
    return table(["", *contenders], rows)


def ratios_table(results: Results, contenders: Sequence[str], reference: str, ours: str) -> str:
    """How many times the reference; the floors are those of the contender ``ours``."""
    others = [contender for contender in contenders if contender != reference]
    rows = []
    for measure in measured(results):
        ratios = [results.ratio(contender, reference, measure.key) for contender in others]
        if not any(ratios):
            continue
        row = [measure.title if measure.better == MORE else f"{measure.title} (less is better)"]
        row += [spread(ratio, TIMES) for ratio in ratios]
        row.append(verdict(measure, results.ratio(ours, reference, measure.key)))
        rows.append(row)
    return table([f"times {reference}", *others, f"floor for {ours}"], rows)


def verdict(measure: Measure, ratio: Summary | None) -> str:
    """The floor of a measure and whether it was reached."""
    if measure.floor is None:
        return ""
    if ratio is None:
        return f"{measure.floor}{TIMES}"
    return f"{measure.floor}{TIMES}: {'kept' if ratio.median >= measure.floor else 'MISSED'}"
