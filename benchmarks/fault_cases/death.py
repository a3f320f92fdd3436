"""Processes that die: client, worker, master, the whole server, and the server of a thousand clients."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..processes import BenchmarkError
from .base import Group, Measured
from .site import PATIENCE, Site, status_of
from .watch import Watch

group = Group("death")

CLIENT_BACK = 2.0  # seconds, promised
SERVER_BACK = 5.0
CROWD_BACK = 30.0
TIMES = 5
SOME = 10  # requests
CROWD = 1000
CROWD_PROCESSES = 4
CROWD_PROGRAM = Path(__file__).with_name("crowd.py")


@group.case(
    "`kill -9` of a client, started again with the same `-s`, while visitors come",
    f"serves within {CLIENT_BACK:g} s of the restart; visitors wait and see no error",
    seconds=8,
)
def client_killed(site: Site) -> Measured:
    site.start_server()
    client = site.open_tunnel("app")
    site.until_served("app")
    with Watch(site.endpoint("app")) as visitor:
        _some_visits(site, visitor)
        os.kill(client.pid, signal.SIGKILL)
        client.wait(PATIENCE)
        began = time.monotonic()
        site.start_client("app")
        site.until(
            lambda: any(v.began + v.seconds > began and v.status == 200 for v in visitor.visits),
            PATIENCE,
            "the tunnel is not served again",
        )
        back = time.monotonic() - began
        _some_visits(site, visitor)
    text = f"{back:.1f} s; {visitor.summary()}, the slowest took {visitor.slowest:.1f} s"
    return Measured(text, back <= CLIENT_BACK and not visitor.wrong)


def _some_visits(site: Site, visitor: Watch) -> None:
    """Lets the visitor go on for a while."""
    enough = len(visitor.visits) + SOME
    site.until(lambda: len(visitor.visits) >= enough, PATIENCE, "the visitor is stuck")


def _killed_again_and_again(site: Site, kill: Callable[[], None], *, restart: bool) -> Measured:
    """Kills `TIMES` times, restarts the server if nobody else does, and takes the times until it serves."""
    site.start_server()
    site.open_tunnel("app")
    took = []
    for _ in range(TIMES):
        site.until_served("app")
        kill()
        began = time.monotonic()
        if restart:
            site.restart_server()
        try:
            site.until_served("app", 2 * SERVER_BACK)
        except BenchmarkError as error:
            return Measured(f"time {len(took) + 1}: {error}", False)
        took.append(time.monotonic() - began)
    return Measured(f"{_seconds(took)} s", max(took) <= SERVER_BACK)


def _seconds(took: list[float]) -> str:
    return ", ".join(f"{seconds:.1f}" for seconds in took)


@group.case(
    f"`kill -9` of the server's worker, {TIMES} times",
    f"each time served again within {SERVER_BACK:g} s",
    seconds=12,
)
def worker_killed(site: Site) -> Measured:
    return _killed_again_and_again(site, lambda: os.kill(site.worker(), signal.SIGKILL), restart=False)


@group.case(
    f"`kill -9` of the server's master alone, {TIMES} times, under a supervisor",
    f"each time served again within {SERVER_BACK:g} s of the restart",
    seconds=15,
)
def master_killed(site: Site) -> Measured:
    def kill() -> None:
        os.kill(site.server.pid, signal.SIGKILL)
        site.server.wait(PATIENCE)

    return _killed_again_and_again(site, kill, restart=True)


@group.case(
    f"`kill -9` of the whole server, {TIMES} times, under a supervisor",
    f"each time served again within {SERVER_BACK:g} s of the restart",
    seconds=15,
)
def server_killed(site: Site) -> Measured:
    return _killed_again_and_again(site, site.kill_server, restart=True)


@group.case(
    f"`kill -9` of a server with {CROWD:,} clients, who all come back at once",
    f"all are served within {CROWD_BACK:g} s of the restart",
    seconds=60,
)
def thousand_clients(site: Site) -> Measured:
    site.start_server()
    each = CROWD // CROWD_PROCESSES
    server, target = f"http://127.0.0.1:{site.ports['connection']}", str(site.page_port)
    for number in range(CROWD_PROCESSES):
        words = [sys.executable, str(CROWD_PROGRAM), server, target, f"c{number}", str(each)]
        site.start(f"crowd-{number}", words)
    site.until(lambda: len(site.tunnels()) == CROWD, 60, f"there are not {CROWD} tunnels")
    site.kill_server()
    began = time.monotonic()
    site.restart_server()
    waiting = [f"c{number}-{index}" for number in range(CROWD_PROCESSES) for index in range(each)]
    while waiting and time.monotonic() - began < 2 * CROWD_BACK:
        waiting = [name for name in waiting if status_of(site.endpoint(name)) != 200]
    took = time.monotonic() - began
    if waiting:
        return Measured(f"{len(waiting)} are not served after {took:.0f} s", False)
    return Measured(f"{took:.1f} s", took <= CROWD_BACK)
