"""The table, for a terminal, for the README and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .base import Case, Measured

START, END = "<!-- faults table -->", "<!-- end of faults table -->"
HEADER = ("Fault", "Promise", "Measured", "")
KEPT = {True: "kept", False: "missed", None: "not measured here"}


@dataclass(frozen=True)
class Row:
    """A case and what it has brought."""

    case: Case
    measured: Measured
    seconds: float  # that it took

    @property
    def verdict(self) -> str:
        return KEPT[self.measured.kept]


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table, without an end of line behind it."""
    lines = [HEADER, ("---",) * len(HEADER)]
    lines += [(row.case.fault, row.case.promise, row.measured.text, row.verdict) for row in rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def write_readme(path: Path, rows: Sequence[Row], facts: Mapping[str, str]) -> None:
    """Puts the table between the two markers of the file; ValueError if they are not there."""
    before, start, rest = path.read_text("utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{path} has no {START} and {END}")
    machine = f"Machine: {facts['date']}, {facts['CPU']}; {facts['kernel']}; Python {facts['Python']}."
    path.write_text(f"{before}{start}\n{markdown(rows)}\n\n{machine}\n{end}{after}", "utf-8")


def write_json(path: Path, rows: Sequence[Row], facts: Mapping[str, str]) -> None:
    """Every row, and the machine."""
    document = {
        "machine": dict(facts),
        "rows": [
            {
                "name": row.case.name,
                "group": row.case.group,
                "fault": row.case.fault,
                "promise": row.case.promise,
                "measured": row.measured.text,
                "kept": row.measured.kept,
                "seconds": round(row.seconds, 1),
            }
            for row in rows
        ],
    }
    path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
