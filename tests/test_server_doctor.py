"""``tinytun-server doctor``: each check ok, failed with what to do, or skipped because of which."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from certificates import install, issue
from conftest import StartServer
from test_cli import TINYTUN_SERVER, run

from tinytun_gevent import TunnelServer
from tinytun_gevent.diagnosis import Chain, Result, Step
from tinytun_gevent.server import doctor

Resolve = Callable[[str], None]


@pytest.fixture(autouse=True)
def resolve(monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """Lets names below ``localhost`` have an address, loopback unless it is called with another one."""
    real, address = socket.getaddrinfo, ["127.0.0.1"]

    def look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        if str(host).startswith("doctor-"):
            if not address[0]:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            host = address[0]
        return real(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(doctor, "clock", lambda: "synchronized")

    def change(to: str) -> None:
        address[0] = to

    return change


def variables(server: TunnelServer, **more: str) -> dict[str, str]:
    config = server.core.config
    names = ("CONNECTION_PORT", "PROXY_PORT", "TCP_PROXY_PORT", "METADATA_PORT", "PROXY_TLS_PORT", "TLS_DIR")
    said = {name: str(getattr(config, name.lower())) for name in names}
    return said | {"BIND": "127.0.0.1", "BASE_DOMAIN": "localhost"} | more


def examined(environ: dict[str, str]) -> dict[str, Step]:
    return {step.name: step for step in doctor.Doctor().examine(environ, {}).steps}


def results(steps: dict[str, Step]) -> dict[str, str]:
    return {name: step.result.value for name, step in steps.items() if step.result is not Result.OK}


def test_a_server_without_tls_that_is_well(server: TunnelServer) -> None:
    steps = examined(variables(server))
    assert results(steps) == {"https port": "skipped", "certificates": "skipped"}
    assert f"127.0.0.1:{server.connection_port}" in steps["from outside: clients"].text


def test_one_with_tls(start_server: StartServer, tmp_path: Path) -> None:
    install(tmp_path, issue("*.localhost", days=40.5))
    server = start_server(
        tls_dir=str(tmp_path), proxy_tls_port=0, connection_tls="required", http_redirect="on"
    )
    environ = variables(server, CONNECTION_TLS="required", HTTP_REDIRECT="on")
    steps = examined(environ)
    assert results(steps) == {}
    assert steps["certificates"].text == "*.localhost for 40 more days"
    install(tmp_path, issue("*.localhost", days=3.5))
    steps = examined(environ)
    assert results(steps) == {"certificates": "failed"}
    assert steps["certificates"].text == "*.localhost ends in 3 days"
    install(tmp_path, issue("other.test"))
    assert "no certificate is for *.localhost" in examined(environ)["certificates"].text


def test_a_name_that_does_not_resolve(server: TunnelServer, resolve: Resolve) -> None:
    resolve("")
    steps = examined(variables(server))
    assert steps["wildcard DNS"].result is Result.FAILED
    assert "A record" in steps["wildcard DNS"].advice
    assert steps["from outside: visitors"].text == "because of: wildcard DNS"
    assert steps["proxy port"].result is Result.OK


def test_a_public_address_that_leads_elsewhere(server: TunnelServer, resolve: Resolve) -> None:
    resolve("127.0.0.77")  # where this server does not listen
    steps = examined(variables(server))
    assert steps["from outside: visitors"].result is Result.FAILED
    assert f"open port {server.proxy_port} in firewalls" in steps["from outside: visitors"].advice


def test_a_server_that_does_not_run(free_port: int) -> None:
    steps = examined({"METADATA_PORT": str(free_port), "BASE_DOMAIN": "localhost"})
    assert steps["server runs"].result is Result.FAILED
    assert "start tinytun-server" in steps["server runs"].advice
    assert steps["proxy port"].text == "because of: server runs"
    assert steps["open files"].result is Result.SKIPPED


def test_another_program_in_the_server_s_place(server: TunnelServer) -> None:
    environ = variables(
        server, PROXY_PORT=str(server.connection_port), CONNECTION_PORT=str(server.proxy_port)
    )
    steps = examined(environ)
    assert steps["proxy port"].result is Result.FAILED
    assert "is not this server" in steps["proxy port"].text


def test_few_descriptors(server: TunnelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "FEW_DESCRIPTORS", 1 << 40)
    assert examined(variables(server))["open files"].result is Result.FAILED


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def test_the_command_says_what_is_wrong_and_exits_with_2() -> None:
    done = run(TINYTUN_SERVER, "doctor", "--json", PROXY_PORT="many")
    assert done.returncode == 2
    said = json.loads(done.stdout)
    assert said["ok"] is False
    assert said["steps"][0]["text"].startswith("PROXY_PORT=many")


def test_the_clock_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    chain = Chain()
    chain.run("clock", doctor.clock)
    (step,) = chain.steps
    assert step.text.startswith("synchronized") or step.result is Result.SKIPPED or "chrony" in step.advice
