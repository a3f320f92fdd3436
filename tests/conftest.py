"""Fixtures of the end-to-end tests; the helpers behind them are in ``support``."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Protocol

import pytest
from hypothesis import HealthCheck, settings
from support import DEADLINE, Script, Service, connect, eventually, read_response, request, respond

from tinytun_gevent import Tunnel, TunnelServer, rare
from tinytun_gevent.client.state import DIRECTORY_VARIABLE
from tinytun_gevent.server import connects, deadlines, usage

__all__ = ["Script", "Service", "connect", "eventually", "read_response", "request", "respond"]


settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")  # how long an example takes is the machine's affair


def pytest_configure() -> None:
    """No client of the tests, in whatever process, writes into the home directory of who runs them."""
    os.environ[DIRECTORY_VARIABLE] = tempfile.mkdtemp(prefix="tinytun-state-")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ.pop(DIRECTORY_VARIABLE), ignore_errors=True)


@pytest.fixture(autouse=True)
def _no_flood_of_the_test_before() -> None:
    """Each test's log lines are the first ones of their kinds."""
    rare._waiting.clear()
    for name, module in list(sys.modules.items()):
        if name.startswith("tinytun_gevent.") and isinstance(getattr(module, "rare", None), rare.Rare):
            module.rare._kinds.clear()


@pytest.fixture
def one_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a flood takes here, the log takes it for one of a moment, summed up by ``rare.sum_up``."""
    monkeypatch.setattr(rare, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    monkeypatch.setattr(rare, "_later", lambda seconds, kind: rare._waiting.add(kind))


class StartServer(Protocol):
    def __call__(self, **overrides: Any) -> TunnelServer: ...


class StartService(Protocol):
    def __call__(self, script: Script | None = None) -> Service: ...


class OpenTunnel(Protocol):
    def __call__(
        self,
        target: Service | str | int,
        subdomain: str | None = "demo",
        *,
        server: TunnelServer | None = None,
        **options: Any,
    ) -> Tunnel: ...


PATIENT = (
    "handshake_timeout",
    "head_timeout",
    "park_seconds",
    "proxy_header_timeout",
    "queue_timeout",
    "stream_timeout",
)
"""What a server has a few seconds for, and a busy machine may need more for."""


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    """Starts servers on kernel-chosen loopback ports; ``overrides`` are fields of ServerConfig.

    They are as patient as the tests, unless they are told otherwise.
    """
    servers: list[TunnelServer] = []

    def start(**overrides: Any) -> TunnelServer:
        config: dict[str, Any] = dict.fromkeys(
            ("connection_port", "proxy_port", "tcp_proxy_port", "metadata_port"), 0
        )
        config |= (
            {"bind": "127.0.0.1", "base_domains": "localhost"} | dict.fromkeys(PATIENT, DEADLINE) | overrides
        )
        server = TunnelServer(**config)
        servers.append(server)
        return server.start()

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def server(start_server: StartServer) -> TunnelServer:
    """A server with the default configuration, but for its patience; base domain ``localhost``."""
    return start_server()


class FastClock:
    """The clock of servers' deadlines: it looks at them all the time, and a test may put it forward."""

    def __init__(self) -> None:
        self._ahead = 0.0
        #: How often each clock has looked.
        self.looks: dict[deadlines.Clock, int] = {}

    def __getattr__(self, name: str) -> Any:
        """Whatever else there is in the module ``time``."""
        return getattr(time, name)

    def monotonic(self) -> float:
        return time.monotonic() + self._ahead

    def forward(self, seconds: float) -> None:
        """Makes it so much later for the servers, and waits until all have looked at their deadlines."""
        self._ahead += seconds
        for clock, looks in list(self.looks.items()):  # one look may have begun before, so it takes two
            eventually(lambda clock=clock, looks=looks: self.looks[clock] > looks + 1 or not clock.runs)


@pytest.fixture
def fast_clock(monkeypatch: pytest.MonkeyPatch) -> FastClock:
    """Lets the servers that are started afterwards notice deadlines at once instead of within a second.

    For them only: the tunnels' sessions, and the clients, have the time that it is.
    """
    clock = FastClock()
    look = deadlines.Clock.look

    def counting(of_a_server: deadlines.Clock) -> None:
        look(of_a_server)
        clock.looks[of_a_server] = clock.looks.get(of_a_server, 0) + 1

    monkeypatch.setattr(deadlines.Clock, "look", counting)
    monkeypatch.setattr(deadlines, "TICK", 0.005)
    for name, module in list(sys.modules.items()):
        if name.startswith("tinytun_gevent.server.") and getattr(module, "time", None) is time:
            monkeypatch.setattr(module, "time", clock)
    return clock


class Standstill:
    """A clock for what is counted by the second, which goes on only when a test says so."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def standstill(monkeypatch: pytest.MonkeyPatch) -> Standstill:
    """Stops the clock by which servers count connects and requests: they come as slowly as the machine is."""
    clock = Standstill()
    for module in (connects, usage):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def start_service() -> Iterator[StartService]:
    """Starts scripted local services; see :class:`support.Service`."""
    services: list[Service] = []

    def start(script: Script | None = None) -> Service:
        services.append(Service(script))
        return services[-1]

    yield start
    _close_all(service.close for service in services)


@pytest.fixture
def open_tunnel(request: pytest.FixtureRequest) -> Iterator[OpenTunnel]:
    """Opens tunnels with the real client; ``server`` is the fixture's unless another is given."""
    tunnels: list[Tunnel] = []

    def open_tunnel(
        target: Service | str | int,
        subdomain: str | None = "demo",
        *,
        server: TunnelServer | None = None,
        **options: Any,
    ) -> Tunnel:
        server = server or request.getfixturevalue("server")
        address = target.target if isinstance(target, Service) else target
        if options.get("kind", "http") == "http":
            options["subdomain"] = subdomain
        tunnel = Tunnel(address, server=server.url, proxy="", **options)
        tunnel.open()
        tunnels.append(tunnel)
        return tunnel

    yield open_tunnel
    _close_all(lambda tunnel=tunnel: tunnel.close(grace=0) for tunnel in tunnels)


def _close_all(closers: Iterator[Callable[[], None]]) -> None:
    """Calls all of them, and raises the first error afterwards."""
    errors: list[BaseException] = []
    for close in closers:
        try:
            close()
        except BaseException as error:
            errors.append(error)
    if errors:
        raise errors[0]
