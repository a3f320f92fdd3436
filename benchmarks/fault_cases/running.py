"""Runs cases one after another, each with a server and clients of its own."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator, Sequence

from ..processes import BenchmarkError, Workspace
from ..runner import progress, raise_descriptor_limit
from ..services import Services, start_services
from .base import Case, Measured
from .site import Site
from .table import Row

STOP = 1.0  # seconds from SIGTERM to SIGKILL for what a case leaves behind


def run_cases(cases: Sequence[Case]) -> Iterator[Row]:
    """Yields each case's row as soon as it is measured; ends everything that was started."""
    files = raise_descriptor_limit()
    with Workspace(patience=STOP) as ground:
        services = start_services(ground, files)
        for number, case in enumerate(cases, 1):
            progress(f"[{number}/{len(cases)}] {case.name}: about {case.seconds:.0f} s")
            began = time.monotonic()
            measured = measure(case, services)
            row = Row(case, measured, time.monotonic() - began)
            progress(f"    {row.verdict}: {measured.text} ({row.seconds:.0f} s)")
            yield row


def measure(case: Case, services: Services) -> Measured:
    """Inflicts one fault; whatever goes wrong on the way is a promise that was not kept."""
    if reason := case.missing():
        return Measured(reason, None)
    with Workspace(patience=STOP) as workspace:
        try:
            return case.run(Site(workspace, services))
        except (BenchmarkError, OSError, AssertionError, http.client.HTTPException) as error:
            return Measured(f"{error}" or type(error).__name__, False)
