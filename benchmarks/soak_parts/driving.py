"""The soak itself: two servers with tunnels and visitors, kills, samples of memory, the books at the end.

At the *calm* server nothing of ours is killed but a client of its own tunnel, ``rough``; its process, and two
clients that live as long, are what memory is sampled of, and their counters must add up exactly. At the
*shaken* server the worker is killed again and again; its clients live through that.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..fault_cases.site import PATIENCE, Site
from ..processes import BenchmarkError, Process, Workspace, memory_bytes
from ..runner import progress
from ..services import Services
from .crowds import Crowd
from .ledger import Books, complaints
from .memory import Trend, trend

HERE = Path(__file__).parent
LOCAL = "127.0.0.1"
SAMPLE = 1.0  # seconds between two looks at the memory
KILLS = (4.0, 12.0)  # seconds between two kills, at least and at most
SETTLED = 10.0  # seconds that the last bytes may take to be counted by everybody
FINISH = 90.0  # seconds that visitors may take to finish what they have begun
VISITORS = 6  # of each tunnel

#: Tunnels by name, with their kind; `Soak._kill_somebody` says who is killed.
CALM = {"web": "http", "raw": "tcp"}
SHAKEN = {"shaken-web": "http", "shaken-raw": "tcp"}
ROUGH, CUT_RAW = "rough", "cut-raw"
CUT = (ROUGH, CUT_RAW)  # whose visitors leave in the middle now and then
KINDS = {**CALM, CUT_RAW: "tcp", ROUGH: "http", **SHAKEN}


@dataclass
class Verdict:
    """What the soak has found out."""

    seconds: float = 0.0
    kills: dict[str, int] = field(default_factory=dict)
    books: list[Books] = field(default_factory=list)
    memory: dict[str, Trend] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)


class Soak:
    """One soak; `run` blocks for about ``minutes``."""

    def __init__(self, workspace: Workspace, minutes: float, seed: int) -> None:
        self._workspace = workspace
        self._seconds = minutes * 60
        self._random = random.Random(seed)  # nosec B311 # repeatable
        nothing = Services({}, {}, Path(), Path(), Path())
        self._calm, self._shaken = Site(workspace, nothing), Site(workspace, nothing)
        self._ports: dict[str, int] = {}
        self._clients: dict[str, Process] = {}
        self._service: Process
        self._kills = {ROUGH: 0, "worker": 0}
        self._samples: dict[str, list[tuple[float, int]]] = {}

    def run(self) -> Verdict:
        """Starts everything, lets it run, and judges. BenchmarkError if something did not start."""
        began = time.monotonic()
        self._start()
        visitors = self._visitors()
        try:
            self._go_on(began)
        finally:
            counts = self._finish(visitors)
        verdict = Verdict(time.monotonic() - began, self._kills)
        verdict.books = self._settled_books(counts)
        verdict.memory = {name: trend(samples) for name, samples in self._samples.items()}
        for books in verdict.books:
            verdict.complaints += complaints(books)
        for name, line in verdict.memory.items():
            if not line.flat:
                verdict.complaints.append(f"{name} has grown by {line.growth / 2**20:.1f} MiB")
        return verdict

    # -- the programs ---------------------------------------------------------

    def _start(self) -> None:
        words = [f"{name}:{kind}" for name, kind in KINDS.items()]
        self._service = self._workspace.start("service", [sys.executable, str(HERE / "service.py"), *words])
        self._service.expect("^ready$", PATIENCE)
        for name in KINDS:
            self._ports[name] = int(self._service.expect(rf"^port {name} (\d+)$")[1])
        self._calm.start_server()
        self._shaken.start_server()
        for name in (*CALM, CUT_RAW):
            self._clients[name] = self._counting_client(self._calm, name)
        for name in SHAKEN:
            self._clients[name] = self._counting_client(self._shaken, name)
        self._clients[ROUGH] = self._calm.start_client(ROUGH, self._ports[ROUGH])
        for client in self._clients.values():
            client.expect(r"^(?:http|tcp)://", PATIENCE)

    def _counting_client(self, site: Site, name: str) -> Process:
        server = f"http://{LOCAL}:{site.ports['connection']}"
        words = [
            sys.executable,
            str(HERE / "client.py"),
            server,
            f"{LOCAL}:{self._ports[name]}",
            KINDS[name],
            name,
        ]
        return site.start(f"client-{name}", words)

    def _visitors(self) -> Process:
        crowds = []
        for number, (name, kind) in enumerate(KINDS.items()):
            site = self._shaken if name in SHAKEN else self._calm
            port = site.ports["proxy"]
            if kind == "tcp":
                port = int(self._clients[name].expect(r"^tcp://[^\s:]+:(\d+)$")[1])
            crowds.append(Crowd(name, kind, port, VISITORS, name in CUT, number))
        text = json.dumps([asdict(crowd) for crowd in crowds])
        visitors = self._workspace.start("visitors", [sys.executable, str(HERE / "visitors.py"), text])
        visitors.expect("^ready$", PATIENCE)
        return visitors

    # -- the time between -----------------------------------------------------

    def _go_on(self, began: float) -> None:
        watched = {"server": self._calm.server, **{f"client {name}": self._clients[name] for name in CALM}}
        watched |= {f"client {name}": self._clients[name] for name in SHAKEN}
        self._samples = {name: [] for name in watched}
        until = time.monotonic() + self._seconds
        kill_at = time.monotonic() + self._random.uniform(*KILLS)
        said = time.monotonic()
        while (now := time.monotonic()) < until:
            for name, process in watched.items():
                if process.ended():
                    raise BenchmarkError(f"{name} has ended: {process.last_words()}")
                self._samples[name].append((now - began, memory_bytes([process.pid])))
            if now >= kill_at:
                self._kill_somebody()
                kill_at = now + self._random.uniform(*KILLS)
            if now - said >= 60:
                said = now
                sizes = ", ".join(f"{name} {s[-1][1] / 2**20:.0f}" for name, s in self._samples.items())
                progress(f"{(now - began) / 60:.0f} min; {self._kills}; MiB: {sizes}")
            time.sleep(SAMPLE)

    def _kill_somebody(self) -> None:
        """SIGKILL to the rough tunnel's client, which is started again, or to the shaken server's worker."""
        if self._random.random() < 0.5:
            client = self._clients[ROUGH]
            os.kill(client.pid, signal.SIGKILL)
            client.wait(PATIENCE)
            self._clients[ROUGH] = self._calm.start_client(ROUGH, self._ports[ROUGH])
            self._kills[ROUGH] += 1
        else:
            try:
                worker = self._shaken.worker()
            except BenchmarkError:
                return  # the master is just about to start the next one
            os.kill(worker, signal.SIGKILL)
            self._kills["worker"] += 1

    # -- the books ------------------------------------------------------------

    def _finish(self, visitors: Process) -> dict[str, dict[str, int]]:
        os.kill(visitors.pid, signal.SIGTERM)
        if not visitors.wait(FINISH):
            raise BenchmarkError(f"the visitors do not come to an end: {visitors.last_words()}")
        return dict(json.loads(visitors.expect(r"^counts (.*)$", 0)[1]))

    def _settled_books(self, visitors: dict[str, dict[str, int]]) -> list[Books]:
        """The books, when they add up, at the latest after `SETTLED`: the last bytes are on their way."""
        deadline = time.monotonic() + SETTLED
        while True:
            books = list(self._books(visitors))
            if time.monotonic() > deadline or not any(complaints(book) for book in books):
                return books
            time.sleep(0.2)

    def _books(self, visitors: dict[str, dict[str, int]]) -> Iterable[Books]:
        service = _tell(self._service)
        listed = {_name(tunnel): tunnel for tunnel in self._calm.tunnels()}
        for name, kind in KINDS.items():
            client = None if name == ROUGH else _tell(self._clients[name])
            key = name if kind == "http" else str(self._tcp_port(name))
            server = listed.get(key) if name not in (ROUGH, *SHAKEN) else None
            if name not in (ROUGH, *SHAKEN) and server is None:
                raise BenchmarkError(f"the server does not list {name}")
            kills = self._kills[ROUGH] if name == ROUGH else self._kills["worker"] if name in SHAKEN else 0
            yield Books(name, kind, visitors[name], service[name], server, client, kills * VISITORS)

    def _tcp_port(self, name: str) -> int:
        return int(self._clients[name].expect(r"^tcp://[^\s:]+:(\d+)$")[1])


def _name(tunnel: dict[str, Any]) -> str:
    return str(next(iter(tunnel["name"].values())))


def _tell(process: Process) -> dict[str, Any]:
    """The counts of a program that tells them at SIGUSR1."""
    before = process.said(r"^counts ")
    os.kill(process.pid, signal.SIGUSR1)
    deadline = time.monotonic() + PATIENCE
    while process.said(r"^counts .*\}$") <= before:
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{process.name} does not tell its counts")
        time.sleep(0.01)
    lines = [line for line in process.log.read_text().splitlines() if line.startswith("counts ")]
    return dict(json.loads(lines[-1].partition(" ")[2]))


def report(verdict: Verdict) -> str:
    """The verdict in words."""
    lines = [f"{verdict.seconds / 60:.1f} minutes; killed: {verdict.kills}"]
    for books in verdict.books:
        visited = {name: books.visitors.get(name, 0) for name in ("things", "left", "failed", "wrong")}
        lines.append(f"{books.name} ({books.kind}): {visited}")
        for direction, hops in books.hops():
            lines.append(f"    {direction}: " + " → ".join(f"{who} {count:,}" for who, count in hops))
        allowed = (
            f"{books.in_flight:,} bytes of difference can be in flight" if books.in_flight else "exactly"
        )
        lines.append(f"    must be equal: {allowed}")
    for name, line in verdict.memory.items():
        start, growth, noise = (value / 2**20 for value in (line.start, line.growth, line.noise))
        lines.append(f"{name}: {start:.1f} MiB {growth:+.2f} MiB, noise {noise:.2f} MiB")
    lines += verdict.complaints or ["memory is flat, and the counters add up"]
    return "\n".join(lines)
