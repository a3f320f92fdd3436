"""The in-process server and its core: start, stop, the seams, errors that end one connection only."""

from __future__ import annotations

import logging
import socket
import threading
import time
import urllib.request

import pytest
from local_service import DEADLINE, LocalService

from tinytun_gevent import ServerConfig, Tunnel, TunnelServer
from tinytun_gevent.background import run_in_hub
from tinytun_gevent.errors import RefusedError, TryLaterError, UsageError
from tinytun_gevent.registry import Registry
from tinytun_gevent.server.core import Observed, ServerCore
from tinytun_gevent.wire.handshake import OpenRequest

ANY_PORTS = {"connection_port": 0, "proxy_port": 0, "tcp_proxy_port": 0, "metadata_port": 0}


def local_server(**overrides: object) -> TunnelServer:
    values = {"bind": "127.0.0.1", "base_domains": "localhost"} | ANY_PORTS | overrides
    return TunnelServer(**values)


def fetch(server: TunnelServer, path: str = "/", name: str = "app") -> int:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.proxy_port}{path}", headers={"Host": f"{name}.localhost"}
    )
    with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
        answer.read()
        return int(answer.status)


def refuses(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_the_ports_are_known_once_it_has_started_and_free_when_it_has_stopped() -> None:
    server = local_server()
    assert server.connection_port == 0
    with pytest.raises(RuntimeError, match="not been started"):
        _ = server.registry
    with server:
        ports = [server.connection_port, server.proxy_port, server.tcp_proxy_port, server.metadata_port]
        assert len(set(ports)) == 4
        assert 0 not in ports
        assert not any(map(refuses, ports))
        assert server.start() is server
        assert server.connection_port == ports[0]
        assert server.url == f"http://127.0.0.1:{ports[0]}"
        assert server.metadata_url == f"http://127.0.0.1:{ports[3]}"
        assert server.url_of("app") == f"http://app.localhost:{ports[1]}"
        assert isinstance(server.registry, Registry)
    assert all(map(refuses, ports))
    server.stop()
    with server:  # again, on the same ports
        assert not any(map(refuses, ports))


def test_a_configuration_may_be_given_and_overridden() -> None:
    server = TunnelServer(ServerConfig(proxy_port=1234, base_domains=("a.org",)), proxy_port="80")
    assert (server.config.proxy_port, server.config.base_domains) == (80, ("a.org",))
    with pytest.raises(UsageError, match="PROXY_PORT"):
        TunnelServer(proxy_port=70000)
    with pytest.raises(TypeError):
        TunnelServer(nonsense=1)


def test_a_taken_port_is_an_error_with_nothing_left_bound() -> None:
    with local_server() as first:
        second = local_server(proxy_port=first.proxy_port)
        with pytest.raises(UsageError, match="in use"):
            second.start()
        with pytest.raises(RuntimeError):
            _ = second.core
        second.stop()


def test_stopping_closes_the_tunnels_and_may_wait_for_exchanges() -> None:
    server = local_server().start()
    with LocalService() as service, Tunnel(service.port, server=server.url, subdomain="app"):
        assert fetch(server) == 200
        results: list[int] = []
        visitor = threading.Thread(target=lambda: results.append(fetch(server, "/slow")), daemon=True)
        visitor.start()
        assert service.begun.wait(DEADLINE)
        stopper = threading.Thread(target=server.stop, args=(DEADLINE,), daemon=True)
        registry, port = server.registry, server.proxy_port
        stopper.start()
        until = time.monotonic() + DEADLINE
        while not refuses(port):
            assert time.monotonic() < until
        assert stopper.is_alive()
        service.finish()
        visitor.join(DEADLINE)
        stopper.join(DEADLINE)
        assert not stopper.is_alive()
        assert results == [200]
        assert registry.tunnels == {}


def test_two_servers_in_one_program_know_nothing_of_each_other() -> None:
    with (
        local_server() as first,
        local_server() as second,
        LocalService() as service,
        Tunnel(service.port, server=first.url, subdomain="app"),
        Tunnel(service.port, server=second.url, subdomain="app"),
    ):
        assert (fetch(first), fetch(second)) == (200, 200)
        assert first.registry is not second.registry


def test_one_place_decides_who_may_open_a_tunnel(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[OpenRequest, str]] = []

    def refuse(core: ServerCore, request: OpenRequest, address: tuple[str, int]) -> None:
        asked.append((request, address[0]))
        raise RefusedError("not today", 403)

    monkeypatch.setattr(ServerCore, "authorize", refuse)
    with (
        local_server() as server,
        pytest.raises(RefusedError, match="not today") as caught,
        Tunnel(1, server=server.url, subdomain="app"),
    ):
        pytest.fail("the tunnel was opened")
    assert caught.value.status == 403
    assert [(request.subdomain, ip) for request, ip in asked] == [("app", "127.0.0.1")]
    assert server.config.base_domains == ("localhost",)


def test_a_draining_server_opens_no_tunnel() -> None:
    core = run_in_hub(ServerCore, ServerConfig())
    request = OpenRequest("http", "x:1")  # type: ignore[arg-type]
    core.authorize(request, ("192.0.2.1", 1))
    assert run_in_hub(core.drain, 0.0)
    with pytest.raises(TryLaterError) as caught:
        core.authorize(request, ("192.0.2.1", 1))
    assert caught.value.status == 503


def test_one_place_observes_every_exchange_and_a_bad_observer_harms_nobody() -> None:
    seen: list[tuple[str, int]] = []
    done = threading.Event()

    def bad(exchange: Observed) -> None:
        raise ValueError("observer")

    def good(exchange: Observed) -> None:
        seen.append((exchange.tunnel_id, exchange.status))
        done.set()

    with local_server() as server, LocalService() as service:
        server.core.observers[:] = [bad, good]
        with Tunnel(service.port, server=server.url, subdomain="app"):
            (tunnel,) = server.registry.listed()
            assert fetch(server) == 200
            assert done.wait(DEADLINE)
            assert fetch(server) == 200
        assert seen[0] == (tunnel.id, 200)


def test_an_error_of_ours_ends_one_connection_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with local_server() as server:
        with monkeypatch.context() as patch:
            patch.setattr(server.core.fronts[2], "_core", None)
            with (
                caplog.at_level(logging.ERROR, "tinytun_gevent"),
                socket.create_connection(("127.0.0.1", server.tcp_proxy_port), timeout=DEADLINE) as sock,
            ):
                assert sock.recv(10) == b""
            assert "connection from 127.0.0.1 failed" in caplog.text
        assert not refuses(server.tcp_proxy_port)


def test_trust_is_for_the_configured_proxies_and_the_peers() -> None:
    core = run_in_hub(ServerCore, ServerConfig(trusted_proxies="10.0.0.0/8"))  # type: ignore[arg-type]
    assert core.is_trusted("10.1.1.1")
    assert not core.is_trusted("127.0.0.1")
    core.peers._ips = frozenset({"127.0.0.1"})
    assert core.is_trusted("127.0.0.1")
