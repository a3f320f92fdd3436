"""``tinytun doctor``: each check ok, failed with what to do, or skipped because of which."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from certificates import install, issue, trust_file
from conftest import OpenTunnel, StartServer, StartService
from support import answering, echo, eventually
from test_auth import ANNA, entry
from test_cli import TINYTUN, run

from tinytun_gevent import TunnelServer, cli
from tinytun_gevent.client.doctor import Doctor
from tinytun_gevent.diagnosis import Result, Step


def examined(*words: str, **environ: str) -> tuple[dict[str, Step], int]:
    """The checks by name, and the exit code."""
    doctor = Doctor()
    arguments = cli.parse("tinytun", cli.CLIENT, ["doctor", "--proxy", "", *words])
    steps = {step.name: step for step in doctor.examine(arguments, environ).steps}
    return steps, doctor.exit_code


def results(steps: dict[str, Step]) -> dict[str, str]:
    return {name: step.result.value for name, step in steps.items() if step.result is not Result.OK}


@pytest.fixture
def nothing() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def test_all_is_well(server: TunnelServer, start_service: StartService) -> None:
    service = start_service()
    steps, code = examined(str(service.port), "-s", "app", "--server", server.url)
    assert (results(steps), code) == ({"TLS": "skipped"}, 0)
    assert "http://app.localhost:" in steps["name free"].text
    eventually(lambda: not server.registry.tunnels)  # it leaves nothing behind


def test_over_tls(start_server: StartServer, tmp_path: Path) -> None:
    install(tmp_path / "tls", issue("127.0.0.1", "*.localhost"))
    server = start_server(tls_dir=str(tmp_path / "tls"), proxy_tls_port=0)
    url = server.url.replace("http:", "https:")
    steps, code = examined("--server", url, "--ca", str(trust_file(tmp_path / "ca.pem")))
    assert (results(steps), code) == ({"target": "skipped"}, 0)
    assert steps["TLS"].text.startswith("its certificate is for 127.0.0.1, by trustme v")
    assert ", until " in steps["TLS"].text
    steps, code = examined("--server", url)
    assert results(steps)["TLS"] == "failed"
    assert "not valid" in steps["TLS"].text
    assert steps["tunnel server"].text == "because of: TLS"
    assert code == 5


def test_a_name_that_is_taken(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    open_tunnel(start_service(answering(echo)))
    steps, code = examined("-s", "demo", "--server", server.url)
    assert steps["name free"].result is Result.FAILED
    assert "it is open now" in steps["name free"].text
    assert "your own client" in steps["name free"].advice
    assert code == 4
    steps, code = examined("-p", "80", "--server", server.url)
    assert "this server gives 20000-60000" in steps["name free"].text
    assert code == 3


def test_a_token_that_is_missing_or_wrong(start_server: StartServer, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(entry("anna", ANNA))
    server = start_server(auth_file=str(file))
    steps, code = examined("--server", server.url)
    assert steps["token"].result is Result.FAILED
    assert steps["name free"].text == "because of: token"
    assert code == 3
    steps, code = examined("--server", server.url, TINYTUN_TOKEN="tt_wrong")
    assert steps["token"].result is Result.FAILED
    assert "tt_wrong" not in steps["token"].text
    steps, code = examined("--server", server.url, TINYTUN_TOKEN=ANNA)
    assert (steps["token"].text, code) == ("accepted", 0)


def test_nothing_listens(server: TunnelServer, nothing: int) -> None:
    steps, code = examined("--server", f"http://127.0.0.1:{nothing}")
    assert steps["server's port"].result is Result.FAILED
    assert "5554 unless" in steps["server's port"].advice
    assert steps["token"].text == "because of: tunnel server"
    assert code == 5
    steps, code = examined(str(nothing), "--server", server.url)
    assert results(steps) == {"TLS": "skipped", "target": "failed"}
    assert code == 5


def test_a_wrong_door(server: TunnelServer, start_service: StartService) -> None:
    for port in (server.proxy_port, start_service().port):
        steps, code = examined("--server", f"http://127.0.0.1:{port}")
        assert "no tunnel server's connection port" in steps["tunnel server"].text
        assert "port for clients" in steps["tunnel server"].advice
        assert code == 5


def test_the_command_prints_json_and_its_exit_code_says_what_failed() -> None:
    done = run(TINYTUN, "doctor", "--json", "--server", "ftp://x")
    assert done.returncode == 2
    said = json.loads(done.stdout)
    assert said["steps"][0]["result"] == "failed"
    assert {step["result"] for step in said["steps"][1:]} == {"skipped"}
