"""What is done to every contender, and what is counted meanwhile.

To add one, write a subclass of `Load` and put it into `LOADS`, with its measures in `report.py`.
"""

from __future__ import annotations

import http.client
import re
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from .contenders import Endpoint, Running
from .processes import BenchmarkError, clean_environment, cpu_seconds, find, memory_bytes
from .services import BULK, NGINX, SINK, SMALL, WARM, Services

GB = 1e9
CONNECTIONS = 32
VISITORS = 500
TRANSFER_LIMIT = 30  # seconds for one bulk transfer; one that takes longer has failed
SETTLE = 0.3  # seconds between opening the idle visitors and reading the memory


@dataclass
class Outcome:
    """What one cell brought: values by measure key, and how many attempts of all failed."""

    values: dict[str, float] = field(default_factory=dict)
    attempts: int = 0
    failures: int = 0
    reasons: list[str] = field(default_factory=list)

    def failed(self, reason: str, count: int = 1) -> None:
        """Counts failures; the first few reasons are kept to be shown."""
        self.failures += count
        if len(self.reasons) < 3 and reason not in self.reasons:
            self.reasons.append(reason)


class Load(ABC):
    """One kind of work. `run` measures it once, after `warm_up`."""

    name: str
    #: The service that it talks to.
    service: str
    #: The program that makes the load, if it is not this one.
    program: str | None = None

    def missing(self, services: Services) -> str | None:
        """Why it cannot be run on this machine, or None."""
        if self.program and find(self.program) is None:
            return f"{self.program} is not installed"
        return services.missing.get(self.service)

    @abstractmethod
    def warm_up(self, endpoint: Endpoint, services: Services) -> None:
        """Takes the way once, so that nothing is measured that happens only the first time."""

    @abstractmethod
    def run(self, running: Running, services: Services, seconds: int) -> Outcome:
        """Does the work for about ``seconds``."""


def check_way(endpoint: Endpoint) -> None:
    """Fetches the small page and looks at every byte; BenchmarkError if it is not that."""
    connection = http.client.HTTPConnection("127.0.0.1", endpoint.port, timeout=10)
    try:
        connection.request("GET", "/small", headers={"Host": endpoint.host})
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise BenchmarkError(f"no answer: {error}") from None
    finally:
        connection.close()
    if response.status != 200 or body != b"x" * (SMALL - 1) + b"\n":
        raise BenchmarkError(f"a wrong answer: {response.status}, {len(body)} bytes")


class Bulk(Load):
    """Whole files of 1 GiB one after another, one visitor, by curl."""

    program = "curl"

    def __init__(self, upload: bool) -> None:
        self.upload = upload
        self.name = "upload" if upload else "download"
        self.service = SINK if upload else NGINX

    def warm_up(self, endpoint: Endpoint, services: Services) -> None:
        self._transfer(endpoint, services, warm=True, outcome=Outcome())

    def run(self, running: Running, services: Services, seconds: int) -> Outcome:
        outcome = Outcome()
        endpoint = running.endpoints[self.service]
        moved, took = 0, 0.0
        cpu = cpu_seconds(running.pids)
        end = time.monotonic() + seconds
        while outcome.attempts == 0 or (time.monotonic() < end and outcome.failures == 0):
            duration = self._transfer(endpoint, services, warm=False, outcome=outcome)
            if duration is not None:
                moved, took = moved + BULK, took + duration
        cpu = cpu_seconds(running.pids) - cpu
        if moved:
            outcome.values[self.name] = moved / took / GB
            # CPU that a failed transfer used would make the figure wrong.
            if running.processes and not outcome.failures:
                outcome.values[f"{self.name}-cpu"] = cpu / (moved / GB)
        return outcome

    def _transfer(
        self, endpoint: Endpoint, services: Services, *, warm: bool, outcome: Outcome
    ) -> float | None:
        """One transfer, counted in ``outcome``; its seconds if it arrived whole."""
        size, path = (WARM, services.warm) if warm else (BULK, services.bulk)
        command = [str(find("curl")), "--silent", "--show-error", "--noproxy", "*", "--output", "/dev/null"]
        command += ["--max-time", str(TRANSFER_LIMIT), "--header", f"Host: {endpoint.host}"]
        if self.upload:
            command += ["--upload-file", str(path), "--header", "Expect:"]
        counter = "size_upload" if self.upload else "size_download"
        command += ["--write-out", f"%{{http_code}} %{{{counter}}} %{{time_total}}"]
        done = _call([*command, endpoint.url(path.name)], TRANSFER_LIMIT + 5)
        outcome.attempts += 1
        words = done.stdout.split()
        if done.returncode == 0 and words[:2] == ["200", str(size)]:
            return float(words[2])
        outcome.failed(done.stderr.strip() or f"curl saw {done.stdout.strip()}")
        return None


@dataclass(frozen=True)
class WrkResult:
    """What wrk printed."""

    requests: int  # answered, whatever the status
    seconds: float
    wrong_status: int
    socket_errors: int
    p50: float  # milliseconds
    p99: float


_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 60e3, "h": 3600e3}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


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


class Requests(Load):
    """Small requests by wrk, 32 visitors at a time, each on one connection or each request on a new one."""

    service = NGINX
    program = "wrk"

    def __init__(self, keep_alive: bool) -> None:
        self.keep_alive = keep_alive
        self.name = "keepalive" if keep_alive else "connections"

    def warm_up(self, endpoint: Endpoint, services: Services) -> None:
        self._wrk(endpoint, 1)

    def run(self, running: Running, services: Services, seconds: int) -> Outcome:
        outcome = Outcome()
        cpu = cpu_seconds(running.pids)
        done = self._wrk(running.endpoints[self.service], seconds)
        cpu = cpu_seconds(running.pids) - cpu
        result = parse_wrk(done.stdout)
        if result is None:
            outcome.attempts = 1
            outcome.failed((done.stderr or done.stdout).strip() or "wrk said nothing")
            return outcome
        outcome.attempts = result.requests + result.socket_errors
        if result.wrong_status:
            outcome.failed("status not 2xx", result.wrong_status)
        if result.socket_errors:
            outcome.failed("socket errors", result.socket_errors)
        good = result.requests - result.wrong_status
        if good:
            outcome.values[self.name] = good / result.seconds
            if running.processes:
                outcome.values[f"{self.name}-cpu"] = cpu / good * 10_000
            if self.keep_alive:
                outcome.values.update(p50=result.p50, p99=result.p99)
        return outcome

    def _wrk(self, endpoint: Endpoint, seconds: int) -> subprocess.CompletedProcess[str]:
        command = [str(find("wrk")), "-t", "1", "-c", str(CONNECTIONS), "-d", f"{seconds}s", "--latency"]
        command += ["-H", f"Host: {endpoint.host}"]
        if not self.keep_alive:
            command += ["-H", "Connection: close"]
        return _call([*command, endpoint.url("small")], seconds + 15)


class IdleVisitors(Load):
    """Visitors that made one request each, keep their connection, and do nothing: memory of each."""

    name = "memory"
    service = NGINX
    WARM_VISITORS = 50

    def warm_up(self, endpoint: Endpoint, services: Services) -> None:
        with ExitStack() as stack:
            for _ in range(self.WARM_VISITORS):
                _idle_visitor(stack, endpoint)
        time.sleep(SETTLE)

    def run(self, running: Running, services: Services, seconds: int) -> Outcome:
        outcome = Outcome()
        before = memory_bytes(running.pids)
        with ExitStack() as stack:
            for _ in range(VISITORS):
                outcome.attempts += 1
                try:
                    _idle_visitor(stack, running.endpoints[self.service])
                except (OSError, BenchmarkError) as error:
                    outcome.failed(str(error))
                    if outcome.failures >= 10:
                        break
            time.sleep(SETTLE)
            growth = memory_bytes(running.pids) - before
        held = outcome.attempts - outcome.failures
        if running.processes and held:
            outcome.values[self.name] = growth / held / 1024
        return outcome


def _idle_visitor(stack: ExitStack, endpoint: Endpoint) -> None:
    """Opens a connection, makes one request on it and leaves it open until ``stack`` ends."""
    sock = stack.enter_context(socket.create_connection(("127.0.0.1", endpoint.port), timeout=10))
    sock.sendall(f"GET /small HTTP/1.1\r\nHost: {endpoint.host}\r\n\r\n".encode())
    answer = b""
    while len(head_and_body := answer.partition(b"\r\n\r\n")[2]) < SMALL:
        data = sock.recv(65536)
        if not data:
            raise BenchmarkError("a visitor's connection was closed")
        answer += data
    if not answer.startswith(b"HTTP/1.1 200 ") or len(head_and_body) != SMALL:
        raise BenchmarkError(f"a wrong answer: {answer[:60]!r}")


def _call(command: Sequence[str], limit: float) -> subprocess.CompletedProcess[str]:
    """Runs a load generator to its end, ``limit`` seconds at most."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=limit, env=clean_environment(), check=False
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, -1, "", f"{command[0]} did not end in {limit:.0f} s")


#: In the order they are run: memory first, while a process has the heap it started with.
LOADS: tuple[Load, ...] = (
    IdleVisitors(),
    Bulk(upload=False),
    Bulk(upload=True),
    Requests(keep_alive=True),
    Requests(keep_alive=False),
)
