"""Small requests, by wrk; no two of them are alike (``varied.lua``)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..processes import find
from ..services import SMALL_PAGE
from ..way import Endpoint
from .outcome import Outcome, call

#: Makes every request another one.
SCRIPT = Path(__file__).with_name("varied.lua")
PATIENCE = 15  # seconds that wrk may take beyond its time: it opens its connections first

_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 60e3, "h": 3600e3}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class WrkResult:
    """What wrk printed."""

    requests: int  # answered, whatever the status
    seconds: float
    wrong_status: int
    socket_errors: int
    p50: float  # milliseconds
    p99: float

    @property
    def good(self) -> int:
        return self.requests - self.wrong_status


def parse_wrk(text: str) -> WrkResult | None:
    """Reads the report of ``wrk --latency``; None if it is none."""
    total = re.search(r"^\s*(\d+) requests in ([\d.]+)(us|ms|s|m|h)\b", text, re.MULTILINE)
    if not total:
        return None
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    wrong = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    percent = {
        match[1]: float(match[2]) * _UNITS[match[3]]
        for match in re.finditer(r"^\s+(50|99)%\s+([\d.]+)(us|ms|s|m|h)\s*$", text, re.MULTILINE)
    }
    return WrkResult(
        requests=int(total[1]),
        seconds=float(total[2]) * _TIMES[total[3]],
        wrong_status=int(wrong[1]) if wrong else 0,
        socket_errors=sum(map(int, errors.groups())) if errors else 0,
        p50=percent.get("50", 0.0),
        p99=percent.get("99", 0.0),
    )


def run_wrk(
    endpoint: Endpoint,
    connections: int,
    seconds: int,
    outcome: Outcome,
    *,
    close: bool = False,
    page: str = SMALL_PAGE,
) -> WrkResult | None:
    """Asks for a small page on ``connections`` connections, or with ``close`` on a new one each time.

    Attempts and failures go to ``outcome``. None if there was no good answer.
    """
    command = [str(find("wrk")), "-t", "1", "-c", str(connections), "-d", f"{seconds}s", "--latency"]
    command += ["-s", str(SCRIPT)]
    command += ["-H", f"Host: {endpoint.host}"]
    if close:
        command += ["-H", "Connection: close"]
    done = call([*command, endpoint.url(page)], seconds + PATIENCE)
    result = parse_wrk(done.stdout)
    if result is None:
        outcome.count(1, 1, (done.stderr or done.stdout).strip() or "wrk said nothing")
        return None
    outcome.count(result.requests + result.socket_errors, result.socket_errors, "socket errors")
    outcome.count(0, result.wrong_status, "status not 2xx")
    return result if result.good else None
