"""The benchmark's own C programs: built once into the workspace, started, and their reports read.

They are in C because each must cost less than what is measured: a relay that plays a long
path (``native/relay.c``), a WebSocket and chunk service, and load generators (``native/messages.c``).
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .processes import BenchmarkError, Process, Workspace, clean_environment, find

COMPILER = "cc"
_SOURCES = Path(__file__).with_name("native")
_FLAGS = ("-O2", "-Wall", "-Wextra", "-std=gnu11", "-D_GNU_SOURCE")
#: The files of each program.
_PROGRAMS = {
    "relay": ("relay.c", "connection.c", "flow.c", "segments.c", "heap.c", "common.c"),
    "messages": (
        "messages.c",
        "echo.c",
        "buffer.c",
        "load.c",
        "reader.c",
        "firstbyte.c",
        "visitor.c",
        "websocket.c",
        "common.c",
    ),
}
_COMPILE_LIMIT = 60  # seconds for one program; it takes one
_ENDING = 15  # seconds a load generator may take beyond what it was asked for, before it has failed


@dataclass(frozen=True)
class Tools:
    """Where the compiled programs are."""

    relay: Path
    messages: Path


@dataclass(frozen=True)
class MessagesResult:
    """WebSocket messages, each sent when the echo of the one before had come; ``rate`` is echoes a second."""

    rate: float
    p50_ms: float
    p99_ms: float
    failures: int
    attempts: int
    reason: str = ""  # of the first failure


@dataclass(frozen=True)
class BulkResult:
    """Body bytes a second of all visitors together, what came in the skipped time left out."""

    rate_bytes_per_s: float
    failures: int
    attempts: int
    reason: str = ""


@dataclass(frozen=True)
class FirstBytes:
    """From the start of a connection to the first byte of the answer."""

    p50_ms: float
    p99_ms: float
    max_ms: float
    failures: int
    attempts: int
    reason: str = ""


def missing() -> str | None:
    """Why the programs cannot be built on this machine, or None."""
    return None if find(COMPILER) else f"no C compiler ({COMPILER}) is installed"


def build(workspace: Workspace) -> Tools:
    """Compiles the programs into the workspace; BenchmarkError without a compiler, or if one is refused."""
    reason = missing()
    if reason:
        raise BenchmarkError(reason)
    folder = workspace.folder / "tools"
    folder.mkdir()
    built = {name: _compile(folder / name, files) for name, files in _PROGRAMS.items()}
    return Tools(relay=built["relay"], messages=built["messages"])


def _compile(program: Path, files: tuple[str, ...]) -> Path:
    sources = [str(_SOURCES / name) for name in files]
    command = [str(find(COMPILER)), *_FLAGS, "-o", str(program), *sources]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_COMPILE_LIMIT,
            env=clean_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"{COMPILER} took more than {_COMPILE_LIMIT} s for {program.name}") from None
    if done.returncode:
        raise BenchmarkError(f"{program.name} does not compile: {done.stderr.strip()[-400:]}")
    return program


def start_relay(
    workspace: Workspace,
    tools: Tools,
    target_port: int,
    *,
    delay: float,
    rate: int = 0,
    window: int = 0,
    bind: str = "127.0.0.1",
    port: int = 0,
    target: str = "127.0.0.1",
) -> tuple[Process, int]:
    """A path of ``delay`` seconds each way to ``target``: its process and the port where it begins.

    ``rate`` (bytes a second each way, of all connections together) and ``window`` (bytes in flight
    of one connection each way) bound it; 0 is no bound. ``port`` 0 is the kernel's choice.
    """
    command = [str(tools.relay), "--listen", f"{bind}:{port}", "--target", f"{target}:{target_port}"]
    command += ["--delay-us", str(round(delay * 1e6)), "--rate", str(rate), "--window", str(window)]
    return _start(workspace, "relay", command)


def start_echo(workspace: Workspace, tools: Tools) -> tuple[Process, int]:
    """The service of messages and chunks: its process and its port on loopback.

    It echoes WebSocket messages on every path, answers ``/chunks`` with 200,000 chunks of 100 bytes,
    each written by itself, and ``/bytes/N`` with N bytes.
    """
    return _start(workspace, "echo", [str(tools.messages), "echo"])


def _start(workspace: Workspace, name: str, command: list[str]) -> tuple[Process, int]:
    process = workspace.start(name, command)
    return process, int(process.expect(r"^port (\d+)$")[1])


def websocket_load(
    workspace: Workspace,
    tools: Tools,
    host: str,
    port: int,
    *,
    sockets: int,
    seconds: float,
    payload: int = 100,
) -> MessagesResult:
    """Sends messages of ``payload`` bytes over ``sockets`` for ``seconds``; blocks until done.

    ``host`` is the Host field; the connections go to loopback. BenchmarkError if there is no report.
    """
    command = [str(tools.messages), "load", "127.0.0.1", str(port), host]
    report = _report(workspace, [*command, str(sockets), str(seconds), str(payload)], seconds)
    return MessagesResult(
        rate=_number(report, "rate"),
        p50_ms=_number(report, "p50_ms"),
        p99_ms=_number(report, "p99_ms"),
        failures=int(_number(report, "failures")),
        attempts=int(_number(report, "attempts")),
        reason=_reason(report),
    )


def read_bulk(
    workspace: Workspace,
    tools: Tools,
    host: str,
    port: int,
    path: str,
    *,
    visitors: int,
    seconds: float,
    skip: float = 0.0,
) -> BulkResult:
    """Downloads ``path`` again and again on a connection of each visitor; blocks for ``seconds``.

    The first ``skip`` seconds are not counted: a path that is long needs them to fill.
    """
    command = [str(tools.messages), "reader", "127.0.0.1", str(port), host, path]
    report = _report(workspace, [*command, str(visitors), str(seconds)], seconds)
    return BulkResult(
        rate_bytes_per_s=_rate_after(report, skip),
        failures=int(_number(report, "failures")),
        attempts=int(_number(report, "attempts")),
        reason=_reason(report),
    )


def _rate_after(report: str, skip: float) -> float:
    """Bytes a second of the lines ``at SECONDS BYTES`` that end after ``skip``."""
    total, since, until = 0, 0.0, 0.0
    for end, count in re.findall(r"^at ([\d.]+) (\d+)$", report, re.MULTILINE):
        if float(end) <= skip:
            since = float(end)
        else:
            total, until = total + int(count), float(end)
    if until <= since:
        raise BenchmarkError("the reader ended before what is skipped was over")
    return total / (until - since)


def first_bytes(
    workspace: Workspace, tools: Tools, host: str, port: int, path: str, *, visitors: int
) -> FirstBytes:
    """Opens ``visitors`` connections at once, with one GET on each; blocks until all have an answer."""
    command = [str(tools.messages), "firstbyte", "127.0.0.1", str(port), host, path, str(visitors)]
    report = _report(workspace, command, 0.0)
    return FirstBytes(
        p50_ms=_number(report, "p50_ms"),
        p99_ms=_number(report, "p99_ms"),
        max_ms=_number(report, "max_ms"),
        failures=int(_number(report, "failures")),
        attempts=int(_number(report, "attempts")),
        reason=_reason(report),
    )


def _report(workspace: Workspace, command: list[str], seconds: float) -> str:
    """Runs a load generator to its end; what it printed."""
    process = workspace.start(Path(command[0]).name, command)
    try:
        if not process.wait(seconds + _ENDING):
            raise BenchmarkError(f"{command[1]} did not end in {seconds + _ENDING:.0f} s")
        report = process.log.read_text(errors="replace")
        if not re.search(r"^failures \d+$", report, re.MULTILINE):
            raise BenchmarkError(f"{command[1]}: {process.last_words()}")
        return report
    finally:
        workspace.stop([process])


def _number(report: str, name: str) -> float:
    found = re.search(rf"^{name} ([\d.]+)$", report, re.MULTILINE)
    if not found:
        raise BenchmarkError(f"a report without {name}")
    return float(found[1])


def _reason(report: str) -> str:
    found = re.search(r"^reason (.*)$", report, re.MULTILINE)
    return found[1] if found else ""
