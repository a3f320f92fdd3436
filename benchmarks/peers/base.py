"""What every contender has in common: how it is started, and how a visitor reaches a service through it."""

from __future__ import annotations

import enum
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from ..processes import POLL, BenchmarkError, Process, Workspace, accepts, find
from ..services import NGINX
from ..way import Endpoint, check_way

T = TypeVar("T")

LOCAL = "127.0.0.1"
STOP = 0.5  # seconds from SIGTERM to SIGKILL for a contender that is not needed any more
READY = 15.0  # seconds for a contender to carry its first request, also over a long path


class Role(enum.Enum):
    """What a contender is to the comparison."""

    OURS = "ours"
    PEER = "peer"  # a tunnel of somebody else's
    ANCHOR = "anchor"  # no tunnel; shows what the machine and the load generators can do


@dataclass(frozen=True)
class Running:
    """A contender that is up: its processes, and the endpoint of each service."""

    processes: Sequence[Process]
    endpoints: Mapping[str, Endpoint]
    #: Processes that are not its own and end with it: the relay of a long path.
    beside: Sequence[Process] = ()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def dead(self) -> str | None:
        """Which process has ended by itself, with its last words."""
        for process in [*self.processes, *self.beside]:
            if process.ended():
                return f"{process.name} ended: {process.last_words()}"
        return None


#: Starts a relay: (workspace, target, where to listen: port 0 is any) to its process and port.
Via = Callable[[Workspace, tuple[str, int], tuple[str, int]], tuple[Process, int]]


@dataclass(frozen=True)
class Ground:
    """Where a contender is started."""

    workspace: Workspace
    services: Mapping[str, int]  # name to port
    via: Via | None = None  # the long path between its two programs, if there is one
    files: int = 1024  # descriptors that a process may have


@dataclass
class Server:
    """The public half of a contender, up and waiting for the other half."""

    processes: list[Process]
    host: str = LOCAL  # where the client finds it: itself, or the relay
    port: int = 0
    #: What else the client's half must know: public ports by service, a folder with keys.
    ports: dict[str, int] = field(default_factory=dict)
    beside: list[Process] = field(default_factory=list)


class Contender(ABC):
    """Something that carries a visitor to a service."""

    name: str
    role = Role.PEER
    #: Measured only when named on the command line.
    asked_for = False
    programs: Sequence[str] = ()
    #: Descriptors that one visitor costs the process that needs most.
    descriptors = 2

    def missing(self) -> str | None:
        """Why it cannot run on this machine, or None."""
        for program in self.programs:
            if find(program) is None:
                return f"{program} is not installed"
        return None

    @abstractmethod
    def start_server(self, ground: Ground) -> Server:
        """Starts the public half, and the relay if there is a long path."""

    @abstractmethod
    def start_client(self, ground: Ground, server: Server) -> Running:
        """Starts the half at the services; its processes only. Does not wait until it serves."""

    def start(self, ground: Ground) -> Running:
        """Starts both, with a way to every service. BenchmarkError if it does not come up."""
        before = ground.workspace.running()
        try:
            server = self.start_server(ground)
            client = self.start_client(ground, server)
            wait_until_open(client)
        except BenchmarkError:
            started = [process for process in ground.workspace.running() if process not in before]
            ground.workspace.stop(started, STOP)
            raise
        return Running([*server.processes, *client.processes], client.endpoints, server.beside)


def wait_until_open(running: Running, poll: float = POLL) -> None:
    """Blocks until nginx answers through it and every other service's port accepts."""
    deadline = time.monotonic() + READY
    for name, endpoint in running.endpoints.items():
        while True:
            try:
                if name == NGINX:
                    check_way(endpoint)
                elif not accepts(endpoint.port):
                    raise BenchmarkError(f"nobody listens on port {endpoint.port}")
                break
            except BenchmarkError as error:
                if dead := running.dead():
                    raise BenchmarkError(dead) from None
                if time.monotonic() > deadline:
                    raise BenchmarkError(f"it does not serve: {error}") from None
            time.sleep(poll)


def with_relay(ground: Ground, server: Server, bind: str = LOCAL, port: int = 0) -> Server:
    """Puts the long path in front of ``server``, if there is one; it begins at ``bind`` and ``port``."""
    if ground.via is not None:
        relay, server.port = ground.via(ground.workspace, (server.host, server.port), (bind, port))
        server.host = bind
        server.beside.append(relay)
    return server


def three_times(start: Callable[[], T]) -> T:
    """What ``start`` returns; it may fail twice: a free port may be taken by the time it is used."""
    for _ in range(2):
        try:
            return start()
        except BenchmarkError:
            pass
    return start()
