"""The benchmark's contenders, services and loads, once each and not timed: that they work, not how well."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import tools as native  # noqa: E402
from benchmarks.loads.curl import Curl  # noqa: E402
from benchmarks.loads.outcome import Outcome  # noqa: E402
from benchmarks.loads.streams import read_streams  # noqa: E402
from benchmarks.loads.tunnels import IdleTunnels  # noqa: E402
from benchmarks.loads.visitors import Visitors, kept_requests, knock  # noqa: E402
from benchmarks.loads.wrk import run_wrk  # noqa: E402
from benchmarks.peers import CONTENDERS, OURS, Contender, Ground, Via  # noqa: E402
from benchmarks.planning import Plan  # noqa: E402
from benchmarks.processes import BenchmarkError, Process, Workspace, cpu_seconds, find, memory_bytes  # noqa: E402
from benchmarks.runner import Run  # noqa: E402
from benchmarks.scenarios.bulk import Bulk  # noqa: E402
from benchmarks.services import NGINX, SINK, Services, start_services  # noqa: E402
from benchmarks.tools import Tools  # noqa: E402
from benchmarks.way import Endpoint, check_way  # noqa: E402

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
DELAY = 0.01  # seconds each way
#: Most peers are in no distribution: those that are here are tried, the others are no reason to skip.
PRESENT = [contender.name for contender in CONTENDERS if contender.missing() is None]


def needed(*programs: str) -> None:
    for program in programs:
        if find(program) is None:
            pytest.skip(f"{program} is not installed")


@pytest.fixture(scope="module")
def workspace() -> Iterator[Workspace]:
    with Workspace(patience=0.5) as workspace:
        yield workspace


@pytest.fixture(scope="module")
def tools(workspace: Workspace) -> Tools:
    if reason := native.missing():
        pytest.skip(reason)
    return native.build(workspace)


@pytest.fixture(scope="module")
def services(workspace: Workspace) -> Services:
    needed("nginx")
    return start_services(workspace, 1024)


def contender(name: str) -> Contender:
    return next(contender for contender in CONTENDERS if contender.name == name)


@pytest.mark.parametrize("name", PRESENT)
def test_a_contender_delivers_the_page(name: str, workspace: Workspace, services: Services) -> None:
    ports = {key: services.ports[key] for key in (NGINX, SINK)}
    running = contender(name).start(Ground(workspace, ports))
    try:
        check_way(running.endpoints[NGINX])
        assert running.dead() is None
        assert bool(running.pids) == (memory_bytes(running.pids) > 0)
        outcome = Outcome()
        sent = Curl(running.endpoints[SINK], "x", 10, upload=services.warm).result(outcome)
        assert (outcome.failures, sent is not None and sent.complete) == (0, True)
    finally:
        workspace.stop(running.processes, 0.5)


@pytest.mark.parametrize("name", [name for name in (OURS, "bore") if name in PRESENT])
def test_a_contender_over_a_relay(
    name: str, workspace: Workspace, services: Services, tools: Tools
) -> None:
    running = contender(name).start(Ground(workspace, {NGINX: services.ports[NGINX]}, via=relay_of(tools)))
    try:
        outcome = Outcome()
        took = kept_requests(running.endpoints[NGINX], 0.2, outcome)
        assert outcome.failures == 0
        assert min(took) >= 2 * DELAY, "it went round the relay"
        assert len(running.beside) == 1
    finally:
        workspace.stop([*running.beside, *running.processes], 0.5)


def relay_of(tools: Tools) -> Via:
    def start(workspace: Workspace, target: tuple[str, int], bind: tuple[str, int]) -> tuple[Process, int]:
        begin = partial(native.start_relay, workspace, tools, target[1], target=target[0], delay=DELAY)
        return begin(bind=bind[0], port=bind[1])

    return start


def test_wrk_asks_for_something_else_each_time(workspace: Workspace, services: Services) -> None:
    """nginx tells the number of each request; a plain listener shows that no two are alike."""
    needed("wrk")
    seen: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for _ in range(2):  # wrk connects once to see whether it can
            connection, _ = listener.accept()
            with connection, contextlib.suppress(ConnectionResetError):  # wrk ends in the middle
                while data := connection.recv(65536):
                    seen.append(data)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    outcome = Outcome()
    result = run_wrk(Endpoint(listener.getsockname()[1], "some.host"), 1, 1, outcome)
    listener.close()
    thread.join(60)
    assert result is not None
    assert outcome.failures == 0
    assert len(set(seen)) == len(seen) > 1
    assert all(b"GET /small?number=" in one and b"Host: some.host\r\n" in one for one in seen)


def test_loads_of_our_own(services: Services) -> None:
    endpoint, outcome = Endpoint(services.ports[NGINX]), Outcome()
    knock(endpoint, 5, 2)
    with Visitors(endpoint, outcome) as crowd:
        crowd.come(70)
        assert len(crowd.held) == len(crowd.first_bytes) == 70
    flow = read_streams(endpoint, services.warm.name, 3, 0.05, 0.2, outcome)
    assert flow.bytes > 0
    assert (outcome.attempts, outcome.failures) == (73, 0)


def test_what_is_not_there_fails(services: Services) -> None:
    endpoint, outcome = Endpoint(services.ports[NGINX]), Outcome()
    read_streams(endpoint, "no-such-file", 2, 0, 0.2, outcome)
    assert outcome.failures >= 2
    outcome = Outcome()
    assert Curl(endpoint, "no-such-file", 5).result(outcome) is None
    assert (outcome.attempts, outcome.failures) == (1, 1)


def test_idle_tunnels_are_tunnels(workspace: Workspace, services: Services) -> None:
    server = contender(OURS).start_server(Ground(workspace, {NGINX: services.ports[NGINX]}))
    try:
        with IdleTunnels(server.port) as tunnels:
            tunnels.open(5)
            tunnels.serve(0.2)
    finally:
        workspace.stop(server.processes, 0.5)


def test_a_run_from_plan_to_cells() -> None:
    needed("nginx", "curl")
    download = Bulk(upload=False)
    download.seconds = 0.2
    run = Run(Plan([contender("direct")], [download], 2, 60))
    run.run()
    assert run.notes == []
    assert [(cell.round, cell.contender, cell.failures) for cell in run.cells] == [
        (0, "direct", 0), (1, "direct", 0)]  # fmt: skip
    assert all(cell.values["download"] > 0 for cell in run.cells)


def test_workspace_ends_what_it_started_and_its_children() -> None:
    stubborn = "import signal; print(1, flush=True); signal.pause()"
    code = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {stubborn!r}])\n"
        "print('child', child.pid, flush=True); child.wait()\n"
    )
    with Workspace(patience=0.2) as workspace:
        process = workspace.start("parent", [sys.executable, "-c", code])
        child = int(process.expect(r"^child (\d+)$")[1])
        process.expect(r"^1$")
        assert memory_bytes([process.pid]) > memory_bytes([child]) > 0
        assert cpu_seconds([process.pid]) >= cpu_seconds([child])
    assert process.ended()
    assert memory_bytes([child]) == 0, "the child is gone with its parent"
    assert not workspace.folder.exists()


def test_a_program_that_ends_early_is_told_with_its_last_words() -> None:
    with Workspace() as workspace:
        process = workspace.start("hasty", [sys.executable, "-c", "raise SystemExit('no port left')"])
        with pytest.raises(BenchmarkError, match=r"hasty ended with 1: no port left"):
            process.expect("^ready$")
