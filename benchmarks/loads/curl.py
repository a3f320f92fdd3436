"""Bulk transfers, by curl: one or several at once, each until it is complete or its time is over."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from ..processes import clean_environment, find
from ..way import Endpoint
from .outcome import Outcome

TIMED_OUT = 28  # curl's exit code when --max-time is over
PATIENCE = 10.0  # seconds that a curl may take beyond its time


@dataclass(frozen=True)
class Transfer:
    """What one curl moved."""

    bytes: int
    seconds: float
    complete: bool


class Curl:
    """One curl that runs. Every one must be ended by `result` or `kill`."""

    def __init__(self, endpoint: Endpoint, path: str, limit: float, upload: Path | None = None) -> None:
        """Fetches ``path``, or sends the file ``upload`` there, for ``limit`` seconds at most."""
        command = [str(find("curl")), "--silent", "--show-error", "--noproxy", "*", "--output", "/dev/null"]
        command += ["--insecure"] if endpoint.tls else []
        command += ["--max-time", f"{limit:.2f}", "--header", f"Host: {endpoint.host}"]
        if upload:
            command += ["--upload-file", str(upload), "--header", "Expect:"]
        counter = "size_upload" if upload else "size_download"
        command += ["--write-out", f"%{{http_code}} %{{{counter}}} %{{time_total}}", endpoint.url(path)]
        self._upload = upload is not None
        self._end = time.monotonic() + limit + PATIENCE
        self._child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment()
        )

    def result(self, outcome: Outcome) -> Transfer | None:
        """Blocks until it has ended. The attempt is counted in ``outcome``; None if it failed.

        To be cut off by the time limit is no failure, as long as bytes had come.
        """
        outcome.attempts += 1
        try:
            said, trouble = self._child.communicate(timeout=max(0.1, self._end - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
            outcome.failed("curl did not end")
            return None
        status, size, seconds = (said.split() or ["000", "0", "0"])[:3]
        cut = self._child.returncode == TIMED_OUT
        # The answer to an upload comes after its last byte: a cut one has seen none.
        good_status = status == "200" or (cut and self._upload and status == "000")
        if good_status and int(size) > 0 and (cut or self._child.returncode == 0):
            return Transfer(int(size), float(seconds), not cut)
        outcome.failed(trouble.strip() or f"curl saw {said.strip()}")
        return None

    def running(self) -> bool:
        return self._child.poll() is None

    def kill(self) -> None:
        """Ends it now, wherever it is."""
        self._child.kill()
        self._child.communicate()


def at_once(endpoint: Endpoint, path: str, count: int, seconds: float, outcome: Outcome) -> float | None:
    """Bytes that ``count`` curls together fetched in a second; None if all failed."""
    curls = [Curl(endpoint, path, seconds) for _ in range(count)]
    done = [transfer for curl in curls if (transfer := curl.result(outcome))]
    if not done:
        return None
    return sum(transfer.bytes for transfer in done) / max(transfer.seconds for transfer in done)
