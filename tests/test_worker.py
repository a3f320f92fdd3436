"""The worker under gunicorn, with real clients and visitors: crashes, drains, reloads."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_service import LocalService
from server_process import DEADLINE, ROOT, ServerProcess, environment, is_gone, wait_for

from tinytun_gevent import Tunnel
from tinytun_gevent.server.addresses import has_ipv6
from tinytun_gevent.server.authfile import digest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="gunicorn needs POSIX")


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    for_long = environment(DRAIN_TIMEOUT="3600")  # whoever waits when nobody is to be waited for is noticed
    with ServerProcess(environ=for_long) as server:
        yield server.wait_serving()


@pytest.fixture
def service() -> Iterator[LocalService]:
    with LocalService() as service:
        yield service


class Visitor:
    """One keep-alive connection to the proxy port."""

    def __init__(self, server: ServerProcess, name: str, address: str = "127.0.0.1") -> None:
        self._host = f"{name}.localhost"
        self.connection = http.client.HTTPConnection(address, server.proxy_port, timeout=DEADLINE)

    def get(self, path: str = "/") -> tuple[int, dict[str, str]]:
        """The answer's status, and what its JSON says."""
        self.connection.request("GET", path, headers={"Host": self._host, "Accept": "application/json"})
        answer = self.connection.getresponse()
        return answer.status, json.loads(answer.read())


def in_background(visitor: Visitor, service: LocalService) -> tuple[threading.Thread, list[object]]:
    """Asks for the slow page, which has begun when this returns; the list gets the answer or the error."""
    results: list[object] = []

    def ask() -> None:
        try:
            results.append(visitor.get("/slow")[0])
        except (OSError, http.client.HTTPException) as error:
            results.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    assert service.begun.wait(DEADLINE)
    return thread, results


def answers(server: ServerProcess) -> bool:
    """Whether a new visitor gets the page; the worker that takes him may just be going."""
    try:
        return Visitor(server, "app").get()[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def ask_metadata(server: ServerProcess, path: str, status: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", server.metadata_port, timeout=DEADLINE)
    connection.request("GET", path)
    answer = connection.getresponse()
    assert answer.status == status
    body = answer.read().decode()
    connection.close()
    return body


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=DEADLINE).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # the port was closed while this one waited to be accepted
        return False
    return False


def test_a_tunnel_serves_and_is_listed_with_its_bytes(server: ServerProcess, service: LocalService) -> None:
    with Tunnel(service.port, server=server.url, subdomain="app") as tunnel:
        assert tunnel.url == f"http://app.localhost:{server.proxy_port}"
        status, fields = Visitor(server, "app").get()
        assert status == 200
        assert fields["x-forwarded-for"] == "127.0.0.1"
        (listed,) = server.tunnels()
        assert listed["name"] == {"Subdomain": "app"}
        assert listed["read_bytes"] > len(json.dumps(fields))
        assert listed["written_bytes"] > 0
    wait_for(lambda: server.tunnels() == [], "empty list after the client left", 3)


def test_a_killed_worker_is_replaced_and_no_connection_refused(
    server: ServerProcess, service: LocalService
) -> None:
    with Tunnel(service.port, server=server.url, subdomain="app"):
        assert Visitor(server, "app").get()[0] == 200
        os.kill(server.worker(), signal.SIGKILL)
        assert not refuses(server.proxy_port)
        assert not refuses(server.connection_port)
        server.wait_serving(2)
        wait_for(lambda: answers(server), "answer through the reconnected tunnel")


@pytest.mark.skipif(not os.path.exists("/proc"), reason="without Linux the worker takes up to a second")
def test_a_killed_master_takes_its_worker_along_at_once(server: ServerProcess) -> None:
    worker = server.worker()
    server.process.kill()
    server.process.wait(DEADLINE)
    wait_for(lambda: is_gone(worker), "end of the orphan")
    wait_for(lambda: refuses(server.proxy_port), "free port")


def test_an_idle_server_waits_for_nobody(server: ServerProcess, service: LocalService) -> None:
    """Idle means: a tunnel with a pooled stream, a keep-alive visitor, one who has sent nothing yet."""
    with Tunnel(service.port, server=server.url, subdomain="app"):
        visitor = Visitor(server, "app")
        assert visitor.get()[0] == 200
        mute = [
            socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)
            for port in (
                server.proxy_port,
                server.connection_port,
                server.tcp_proxy_port,
                server.metadata_port,
            )
        ]
        server.process.terminate()
        assert server.wait() == 0
        for sock in mute:
            sock.close()


def test_running_exchanges_finish_while_nothing_new_is_taken(
    server: ServerProcess, service: LocalService
) -> None:
    with Tunnel(service.port, server=server.url, subdomain="app"):
        idle = Visitor(server, "app")
        assert idle.get()[0] == 200
        thread, results = in_background(Visitor(server, "app"), service)
        server.process.terminate()
        server.wait_line("stopping: 1 exchanges")
        for port in (server.proxy_port, server.connection_port):
            wait_for(lambda port=port: refuses(port), "refused connection")
        for path, status in (("/ready", 503), ("/tunnels/app", 404)):
            assert "draining" in ask_metadata(server, path, status)
        assert "tinytun_draining 1.0" in ask_metadata(server, "/metrics", 200)
        assert idle.connection.sock.recv(1) == b""  # an idle visitor is not waited for
        assert server.process.poll() is None
        service.finish()
        thread.join(DEADLINE)
        assert results == [200]
        assert server.wait() == 0
        assert "cut off" not in server.log()


def test_what_does_not_finish_is_cut_off_when_the_drain_is_over(service: LocalService) -> None:
    with ServerProcess("--drain-timeout", "0.5") as server:
        server.wait_serving()
        with Tunnel(service.port, server=server.url, subdomain="app"):
            thread, results = in_background(Visitor(server, "app"), service)
            start = time.monotonic()
            server.process.terminate()
            assert server.wait() == 0
            assert time.monotonic() - start > 0.4
            thread.join(DEADLINE)
            assert isinstance(results[0], (OSError, http.client.HTTPException))
            assert "cut off" in server.log()


@pytest.mark.parametrize("sent", [(signal.SIGINT,), (signal.SIGQUIT,), (signal.SIGTERM, signal.SIGINT)])
def test_interrupting_waits_for_nobody(
    server: ServerProcess, service: LocalService, sent: tuple[signal.Signals, ...]
) -> None:
    with Tunnel(service.port, server=server.url, subdomain="app"):
        _, results = in_background(Visitor(server, "app"), service)
        for number in sent:
            server.process.send_signal(number)
            server.wait_line("stopping")
        assert server.wait() == 0
        wait_for(lambda: results, "cut exchange")


def test_a_reload_moves_the_tunnels_over_and_lets_exchanges_finish(
    server: ServerProcess, service: LocalService
) -> None:
    with Tunnel(service.port, server=server.url, subdomain="app"):
        first = server.worker()
        thread, results = in_background(Visitor(server, "app"), service)
        server.process.send_signal(signal.SIGHUP)
        server.wait_serving(2)
        wait_for(lambda: answers(server), "answer from the new worker", 5)
        assert not is_gone(first)
        service.finish()
        thread.join(DEADLINE)
        assert results == [200]
        wait_for(lambda: first not in server.workers(), "end of the old worker")


def test_a_tcp_tunnel_keeps_its_port_through_a_reload(server: ServerProcess, service: LocalService) -> None:
    with Tunnel(service.port, kind="tcp", server=server.url) as tunnel:
        port = int(str(tunnel.url).rpartition(":")[2])
        server.process.send_signal(signal.SIGHUP)
        server.wait_line("stopped")  # the old worker
        wait_for(lambda: not refuses(port), "listener in the new worker")
        wait_for(lambda: [t["name"] for t in server.tunnels()] == [{"PortNumber": port}], "tunnel")
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_one_socket_serves_both_families_and_callers_are_unmapped(service: LocalService) -> None:
    with ServerProcess(environ=environment(BIND="[::]")) as server:
        server.wait_serving()
        with Tunnel(service.port, server=server.url, subdomain="app"):
            for address in ("127.0.0.1", "::1"):
                status, fields = Visitor(server, "app", address).get()
                assert (status, fields["x-forwarded-for"].strip('[]"')) == (200, address)


NOBODY = 65534


def can_become_nobody() -> bool:
    """Whether this is root, and the interpreter is one that others may run."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return False
    try:
        done = subprocess.run(
            [sys.executable, "-c", "import tinytun_gevent.cli, gevent"],
            cwd=ROOT,
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            capture_output=True,
            check=False,
        )
    except PermissionError:
        return False
    return done.returncode == 0


@pytest.mark.skipif(not can_become_nobody(), reason="cannot run this interpreter as another user")
def test_it_runs_as_a_user_without_rights(service: LocalService) -> None:
    environ = environment(HOME="/nonexistent")
    with ServerProcess(environ=environ, user=NOBODY, group=NOBODY, extra_groups=[], cwd="/") as server:
        server.wait_serving()
        with Tunnel(service.port, server=server.url, subdomain="app"):
            assert Visitor(server, "app").get()[0] == 200
        os.kill(server.worker(), signal.SIGKILL)
        server.wait_serving(2)


def test_a_server_without_tokens_says_so_when_it_starts_and_not_again() -> None:
    with ServerProcess(environ=environment(BIND="0.0.0.0")) as server:
        server.wait_line("WARNING there are no tokens: whoever reaches port .* AUTH_FILE=")
        server.wait_serving()
        server.process.send_signal(signal.SIGHUP)
        server.wait_serving(2)
        assert server.log().count("there are no tokens") == 1


def test_tokens_hold_through_a_reload(service: LocalService, tmp_path: Path) -> None:
    token, file = "tt_of-a-worker", tmp_path / "tokens.toml"
    good = f'[[tokens]]\nlabel = "a"\nsha256 = "{digest(token)}"\nnames = ["demo"]\n'
    file.write_text(good)
    with ServerProcess(environ=environment(AUTH_FILE=str(file), LOG_LEVEL="trace")) as server:
        server.wait_serving()
        options = {"server": server.url, "proxy": "", "subdomain": "demo", "token": token}
        with Tunnel(service.port, **options):  # type: ignore[arg-type]
            (before,) = server.tunnels()
            assert before["label"] == "a"
            server.process.send_signal(signal.SIGHUP)
            server.wait_serving(2)
            wait_for(lambda: [t["id"] for t in server.tunnels()] == [before["id"]], "tunnel that moved")
            file.write_text(good.replace("names", "name"))
            server.wait_line(
                r"tokens\[0\]: Object contains unknown field `name`; what it said before goes on"
            )
            server.process.send_signal(signal.SIGHUP)
            server.wait_line(r"reload failed: AUTH_FILE=.*tokens\[0\]: ")
            server.wait_line("reload failed")
            assert [t["id"] for t in server.tunnels()] == [before["id"]], "the old worker goes on"
        assert token not in server.log()
        assert "greenlet failed" not in server.log(), "what is wrong with the file is said in one line"


def test_a_reload_with_a_damaged_token_file_fails_also_without_a_state_directory(tmp_path: Path) -> None:
    """The new worker has no way to the old one then, and still must not serve nobody in its place."""
    file = tmp_path / "tokens.toml"
    file.write_text("# nobody yet\n")
    with ServerProcess(environ=environment(AUTH_FILE=str(file), STATE_DIR="/dev/null/state")) as server:
        server.wait_serving()
        file.write_text("[[tokens]\n")
        server.process.send_signal(signal.SIGHUP)
        server.wait_line("reload failed: AUTH_FILE=.*it is not TOML")
        server.wait_line("reload failed")
        assert server.tunnels() == []


def test_a_reload_while_the_token_file_is_empty_fails_and_ends_nobody(
    service: LocalService, tmp_path: Path
) -> None:
    """A script has truncated it and has not written it yet."""
    token, file = "tt_of-a-worker", tmp_path / "tokens.toml"
    good = f'[[tokens]]\nlabel = "a"\nsha256 = "{digest(token)}"\n'
    file.write_text(good)
    with ServerProcess(environ=environment(AUTH_FILE=str(file))) as server:
        server.wait_serving()
        options = {"server": server.url, "proxy": "", "subdomain": "demo", "token": token}
        with Tunnel(service.port, **options):  # type: ignore[arg-type]
            (before,) = server.tunnels()
            os.truncate(file, 0)
            server.process.send_signal(signal.SIGHUP)
            server.wait_line("reload failed: AUTH_FILE=.* it is empty since a moment ago")
            server.wait_line("reload failed")
            assert [t["id"] for t in server.tunnels()] == [before["id"]]
            file.write_text(good)
            server.process.send_signal(signal.SIGHUP)
            server.wait_serving(2)
            wait_for(lambda: [t["id"] for t in server.tunnels()] == [before["id"]], "tunnel that moved")
