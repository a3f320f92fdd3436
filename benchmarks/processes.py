"""Programs that the benchmark starts: their output, CPU seconds and memory, and their end.

Everything is read from ``/proc``, for the process that was started and all of its
descendants together (a server with a worker, an sshd with its children). Linux only.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

TICKS = os.sysconf("SC_CLK_TCK")
_LIBC = ctypes.CDLL(None)
POLL = 0.005  # seconds between two looks at something that has no event to wait on


class BenchmarkError(Exception):
    """A program did not start, or did not do what it was started for; the text says which and why."""


class Identity(NamedTuple):
    """One process for certain: a pid is used again, with another start time."""

    pid: int
    started: int


class Stat(NamedTuple):
    """What is used of ``/proc/PID/stat`` (proc(5)); the times are in clock ticks."""

    parent: int
    cpu: int
    started: int


def read_stat(pid: int) -> Stat | None:
    """The figures of one process, or None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the program's name in parentheses and may hold anything, even ") ".
    fields = text.rpartition(")")[2].split()
    if fields[0] in "ZX":
        return None
    return Stat(parent=int(fields[1]), cpu=int(fields[11]) + int(fields[12]), started=int(fields[19]))


def family(roots: Iterable[int]) -> dict[Identity, Stat]:
    """The processes ``roots`` and all their descendants that are alive now."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    alive = {pid: stat for pid in pids if (stat := read_stat(pid))}
    members = {pid for pid in roots if pid in alive}
    grown = True
    while grown:
        children = {pid for pid, stat in alive.items() if stat.parent in members}
        grown = not children <= members
        members |= children
    return {Identity(pid, alive[pid].started): alive[pid] for pid in members}


def cpu_seconds(roots: Iterable[int]) -> float:
    """CPU seconds, user and system, that the families of ``roots`` have used so far."""
    return sum(stat.cpu for stat in family(roots).values()) / TICKS


def memory_bytes(roots: Iterable[int]) -> int:
    """Memory of the families of ``roots``: the proportional set size, resident size where that is hidden."""
    return sum(_memory_of(identity.pid) for identity in family(roots))


def _memory_of(pid: int) -> int:
    try:
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    except OSError:
        pass  # another user's, or a process that forbids it
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def free_ports(count: int) -> list[int]:
    """TCP ports on loopback that the kernel says are free; somebody may take one before it is used."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def free_port() -> int:
    """One such port."""
    return free_ports(1)[0]


def accepts(port: int) -> bool:
    """Whether something accepts connections on loopback at ``port``."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def clean_environment() -> dict[str, str]:
    """What the programs see of ours: no proxy and no setting of either tunnel program is inherited."""
    kept = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "TMPDIR", "VIRTUAL_ENV")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    # Debian keeps daemons outside an ordinary user's PATH.
    environment["PATH"] = environment.get("PATH", "/usr/bin:/bin") + ":/usr/local/sbin:/usr/sbin:/sbin"
    return environment


def _state(folder: Path) -> dict[str, str]:
    """Where our programs keep what outlives them: nothing of another run, or of the user's, may be found."""
    server, client = folder / "server-state", folder / "client-state"
    return {"STATE_DIRECTORY": str(server), "TINYTUN_STATE_DIR": str(client)}


def find(program: str) -> str | None:
    """Where ``program`` is, or None."""
    return shutil.which(program, path=clean_environment()["PATH"])


def _end_with_parent() -> None:
    """In a child: SIGTERM when the benchmark is gone without having ended it (prctl(2), PR_SET_PDEATHSIG)."""
    _LIBC.prctl(1, signal.SIGTERM)


class Process:
    """A program that runs beside us; standard output and error go to one file.

    It is in a session of its own, so that Ctrl-C reaches us only and we end it in order.
    """

    def __init__(
        self, name: str, command: Sequence[str], log: Path, variables: Mapping[str, str] | None = None
    ) -> None:
        """``variables`` are added to the environment, see `clean_environment`."""
        self.name = name
        self.log = log
        with log.open("wb") as output:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**clean_environment(), **_state(log.parent), **(variables or {})},
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        self.pid = self._child.pid

    def ended(self) -> bool:
        return self._child.poll() is not None

    def expect(self, pattern: str, timeout: float = 15.0) -> re.Match[str]:
        """Blocks until a line of the output matches ``pattern``; BenchmarkError if none does."""
        deadline = time.monotonic() + timeout
        while True:
            over = self.ended()
            found = re.search(pattern, self.log.read_text(errors="replace"), re.MULTILINE)
            if found:
                return found
            self._check_patience(over, deadline, "did not say what was expected")
            time.sleep(POLL)

    def said(self, pattern: str) -> int:
        """How many lines of the output match ``pattern`` so far."""
        return len(re.findall(pattern, self.log.read_text(errors="replace"), re.MULTILINE))

    def expect_port(self, port: int, timeout: float = 15.0) -> None:
        """Blocks until something accepts on loopback at ``port``; BenchmarkError if nothing does."""
        deadline = time.monotonic() + timeout
        while True:
            over = self.ended()
            if not over and accepts(port):
                return
            self._check_patience(over, deadline, f"did not listen on port {port}")
            time.sleep(POLL)

    def _check_patience(self, over: bool, deadline: float, what: str) -> None:
        if over:
            raise BenchmarkError(f"{self.name} ended with {self._child.returncode}: {self.last_words()}")
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{self.name} {what}: {self.last_words()}")

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return " / ".join(line.strip() for line in lines[-3:]) or "(no output)"

    def wait(self, timeout: float) -> bool:
        """Whether it ended within ``timeout`` seconds."""
        try:
            self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True


class Workspace:
    """A temporary folder and the programs started in it; leaving the context ends both, whatever happened."""

    def __init__(self, patience: float = 5.0) -> None:
        """``patience``: seconds between SIGTERM and SIGKILL."""
        self.patience = patience
        self.folder = Path(tempfile.mkdtemp(prefix="tinytun-benchmark-"))
        self._running: list[Process] = []
        self._count = 0

    def start(self, name: str, command: Sequence[str], variables: Mapping[str, str] | None = None) -> Process:
        """Starts a program; it runs until `stop`, or until the workspace is left.

        ``variables`` are added to its environment.
        """
        self._count += 1
        process = Process(name, command, self.folder / f"{self._count:03}-{name}.log", variables)
        self._running.append(process)
        return process

    def running(self) -> list[Process]:
        """All that was started and not stopped, in that order."""
        return list(self._running)

    def stop(self, processes: Sequence[Process], patience: float | None = None) -> None:
        """Ends these programs and their descendants: SIGTERM to all at once, SIGKILL to what stays.

        ``patience``, in seconds, is for this time only.
        """
        patience = self.patience if patience is None else patience
        relatives = family(process.pid for process in processes if not process.ended())
        for process in processes:
            if not process.ended():
                os.kill(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + patience
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
        while _alive(relatives) and time.monotonic() < deadline:
            time.sleep(POLL)
        deadline += 5.0  # nobody survives SIGKILL, but being gone may take a moment
        while (remaining := _alive(relatives)) and time.monotonic() < deadline:
            for identity in remaining:
                _kill(identity)
            time.sleep(POLL)
        for process in processes:
            process.wait(5.0)
            if process in self._running:
                self._running.remove(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.stop(list(reversed(self._running)))
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            for number, handler in before.items():
                signal.signal(number, handler)


def _kill(identity: Identity) -> None:
    try:
        os.kill(identity.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it ended by itself at this moment


def _alive(identities: Iterable[Identity]) -> list[Identity]:
    """Those that still run: the same process, not another one with its pid."""
    return [
        identity
        for identity in identities
        if (stat := read_stat(identity.pid)) and stat.started == identity.started
    ]
