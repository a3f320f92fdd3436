"""The master: what it checks before it starts, what it imports, what its settings are, HUP and upgrades."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from certificates import install, issue, put
from free_ports import free_ports
from server_process import COMMAND, DEADLINE, ROOT, ServerProcess, environment, is_gone, wait_for

pytestmark = pytest.mark.skipif(os.name != "posix", reason="gunicorn needs POSIX")


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command, for as long as it runs by itself."""
    return subprocess.run(
        [*COMMAND, *arguments],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def test_check_only_checks() -> None:
    done = run("--check", PROXY_PORT="0", BASE_DOMAIN="a.example.com")
    assert (done.returncode, done.stderr) == (0, "")
    assert "BASE_DOMAIN=a.example.com" in done.stdout
    assert "valid" in done.stdout


def test_check_says_what_certificates_are_for(tmp_path: Path) -> None:
    install(tmp_path, issue("*.a.example.com", "a.example.com"))
    put(tmp_path / "bad.pem", b"-----BEGIN PRIVATE KEY-----\nnothing")
    done = run("--check", TLS_DIR=str(tmp_path), PROXY_TLS_PORT="0", BASE_DOMAIN="a.example.com,b.org")
    assert done.returncode == 2
    assert done.stderr == "tinytun-server: not as it should be: 1 error, 1 warning\n"
    lines = done.stdout.splitlines()
    assert any(line.startswith("certificate for *.a.example.com, a.example.com, until ") for line in lines)
    assert f"error: {tmp_path}/bad.pem cannot be used: its key is not complete" in lines
    assert "warning: no certificate is for *.b.org" in lines
    assert not any("*.a.example.com" in line for line in lines if line.startswith("warning"))


@pytest.mark.parametrize("arguments", [("--check",), ()])
def test_a_directory_that_is_not_there_is_told(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run(*arguments, TLS_DIR=str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert done.stderr.startswith(f"tinytun-server: TLS_DIR={tmp_path}/nowhere: allowed: a directory")


@pytest.mark.parametrize("arguments", [("--check",), ()])
def test_a_wrong_value_is_one_line_and_exit_code_2(arguments: tuple[str, ...]) -> None:
    done = run(*arguments, PROXY_PORT="http")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    for part in ("PROXY_PORT", "http", "1 to 65535"):
        assert part in done.stderr


def test_flags_win_over_variables() -> None:
    done = run("--check", "--proxy-port", "0", PROXY_PORT="nonsense")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [("--check",), ()])
@pytest.mark.parametrize("variable", ["CONNECTION_PORT", "PROXY_PORT", "TCP_PROXY_PORT", "METADATA_PORT"])
def test_a_taken_port_is_one_line_and_exit_code_2(variable: str, arguments: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(*arguments, **{variable: str(port)})
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert f"{variable}={port}" in done.stderr
        assert "in use" in done.stderr


def test_a_wildcard_address_notices_a_port_that_is_taken_on_one_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run(BIND="[::]", PROXY_PORT=str(taken.getsockname()[1]))
        assert (done.returncode, "in use" in done.stderr) == (2, True)


def test_the_master_imports_gunicorn_and_the_launcher_only() -> None:
    code = """
import sys
sys.argv = ["tinytun-server"]
from tinytun_gevent.server import launch
from tinytun_gevent.server.config import ServerConfig
launch.Application(launch.settings(ServerConfig(), ["127.0.0.1:0"]), {}).cfg.worker_class
print("gevent" in sys.modules, sorted(m for m in sys.modules if m.startswith("tinytun_gevent.")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE, check=True
    )
    expected = [
        "errors",
        "files",
        "lines",
        "names",
        "rare",
        "rights",
        "server",
        *(
            f"server.{name}"
            for name in (
                "account",
                "addresses",
                "config",
                "given",
                "held",
                "launch",
                "logs",
                "required",
                "settings",
                "statedir",
                "verdict",
            )
        ),
        "wire",
        "wire.claims",
        "wire.handshake",
    ]
    assert done.stdout.strip() == f"False {[f'tinytun_gevent.{name}' for name in expected]}"


def test_the_running_master_has_not_loaded_gevent() -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc here")
    with ServerProcess() as server:
        server.wait_serving()
        assert "gevent" not in Path(f"/proc/{server.process.pid}/maps").read_text()
        assert "gevent" in Path(f"/proc/{server.worker()}/maps").read_text()


def test_it_leaves_no_file_anywhere(tmp_path: Path) -> None:
    home, tmp = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    tmp.mkdir()
    with ServerProcess(environ=environment(HOME=str(home), TMPDIR=str(tmp)), cwd=home) as server:
        server.wait_serving()
        assert list(home.rglob("*")) == list(tmp.rglob("*")) == []
        server.process.terminate()
        assert server.wait() == 0
    assert list(home.rglob("*")) == list(tmp.rglob("*")) == []


def test_variables_of_gunicorn_do_not_interfere() -> None:
    extra = {"WEB_CONCURRENCY": "3", "GUNICORN_CMD_ARGS": "--workers 4 --bind 127.0.0.1:1", "PORT": "1"}
    with ServerProcess(environ=environment(**extra)) as server:
        server.wait_serving()
        assert len(server.workers()) == 1
        server.process.send_signal(signal.SIGTTIN)
        server.wait_line("number of workers stays 1")
        assert len(server.workers()) == 1


def test_the_log_is_calm() -> None:
    with ServerProcess() as server:
        server.wait_serving()
        server.process.terminate()
        assert server.wait() == 0
        messages = [line.split(maxsplit=3)[3] for line in server.lines]
        assert len(messages) == 3
        assert messages[1:] == ["stopping: idle", "stopped"]


def test_rust_log_makes_it_quiet_or_talkative() -> None:
    with ServerProcess(environ=environment(RUST_LOG="tinytun_server=debug")) as server:
        server.wait_serving()
        server.wait_line("Starting gunicorn")
    with ServerProcess(environ=environment(RUST_LOG="off")) as server:
        wait_for(server.workers, "worker")
        server.process.terminate()
        assert server.wait() == 0
        assert server.lines == []


def copy_of_the_program(folder: Path) -> tuple[str, ...]:
    """The command, run from a copy of the code that a test may change."""
    shutil.copytree(
        ROOT / "tinytun_gevent", folder / "tinytun_gevent", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(ROOT / "bin", folder / "bin")
    return (sys.executable, "-B", str(folder / "bin" / "tinytun-server"))


def test_hup_runs_new_code_and_survives_broken_code(tmp_path: Path) -> None:
    command = copy_of_the_program(tmp_path)
    package = tmp_path / "tinytun_gevent"
    with ServerProcess(command=command) as server:
        server.wait_line("tinytun-server 0.1.0 serves")
        server.wait_serving()
        first = server.worker()
        init = (package / "__init__.py").read_text()
        (package / "__init__.py").write_text(init.replace('"0.1.0"', '"9.9.9"'))
        server.process.send_signal(signal.SIGHUP)
        server.wait_line("tinytun-server 9.9.9 serves")
        wait_for(lambda: first not in server.workers(), "end of the old worker")
        second = server.workers()
        assert len(second) == 1
        assert server.tunnels() == []

        (package / "server" / "app.py").write_text("this is not Python\n")
        server.process.send_signal(signal.SIGHUP)
        server.wait_line("reload failed")
        assert server.workers() == second
        assert server.tunnels() == []
        assert server.process.poll() is None


def test_a_worker_that_cannot_start_ends_the_server(tmp_path: Path) -> None:
    command = copy_of_the_program(tmp_path)
    (tmp_path / "tinytun_gevent" / "server" / "app.py").write_text("raise RuntimeError('broken')\n")
    with ServerProcess(command=command) as server:
        assert server.wait() == 1
        assert "broken" in server.log()


def test_hup_closes_no_port() -> None:
    """Connections made all through a reload are all accepted and answered."""
    with ServerProcess() as server:
        server.wait_serving()
        server.process.send_signal(signal.SIGHUP)
        answered = 0
        while len([line for line in server.lines if "stopped" in line]) < 1:
            assert server.tunnels() == []
            answered += 1
        assert answered > 5
        server.wait_serving(2)


def test_usr2_starts_a_second_master_on_the_same_sockets() -> None:
    with ServerProcess() as server:
        server.wait_serving()
        ports = (server.proxy_port, server.metadata_port)
        server.process.send_signal(signal.SIGUSR2)
        server.wait_serving(2)
        assert (server.proxy_port, server.metadata_port) == ports
        (new,) = [pid for pid in server.workers() if not is_worker_of(pid, server)]
        server.process.terminate()
        assert server.process.wait(DEADLINE) == 0
        try:
            assert server.tunnels() == []
        finally:
            os.kill(new, signal.SIGTERM)
            wait_for(lambda: is_gone(new), "end of the new master")


def is_worker_of(pid: int, server: ServerProcess) -> bool:
    """A worker has no children of its own."""
    import psutil

    return not psutil.Process(pid).children()


def test_the_ports_are_those_that_were_asked_for() -> None:
    connection, proxy = free_ports(2)
    with ServerProcess(
        "--connection-port", str(connection), environ=environment(PROXY_PORT=str(proxy))
    ) as server:
        server.wait_serving()
        assert (server.connection_port, server.proxy_port) == (connection, proxy)
        for port in (connection, proxy):
            socket.create_connection(("127.0.0.1", port), timeout=DEADLINE).close()


def test_two_servers_do_not_share_a_state_directory(tmp_path: Path) -> None:
    environ = environment(STATE_DIR=str(tmp_path))
    with ServerProcess(environ=environ) as server:
        server.wait_serving()
        done = run(STATE_DIR=str(tmp_path))
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"STATE_DIR={tmp_path}: another tinytun-server uses it" in done.stderr
        server.process.kill()
        server.wait()
    with ServerProcess(environ=environ) as server:
        server.wait_serving()


def test_a_state_directory_that_everybody_may_fill_is_told_of(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    with ServerProcess(environ=environment(STATE_DIR=str(tmp_path))) as server:
        server.wait_serving()
        server.wait_line("everybody may write in the directory")
    assert not os.listdir(tmp_path)
