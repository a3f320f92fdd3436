"""``tinytun-server reload`` and the configuration file of a server that runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_process import COMMAND, DEADLINE, ServerProcess, environment, wait_for

pytestmark = pytest.mark.skipif(os.name != "posix", reason="gunicorn needs POSIX")

BASE = """
bind = "127.0.0.1"
connection_port = 0
proxy_port = 0
tcp_proxy_port = 0
metadata_port = 0
base_domain = "localhost"
"""


class Configured(ServerProcess):
    """A server with a configuration file, and no variables but the one of its directory."""

    def __init__(self, folder: Path, *arguments: str, text: str = "", **variables: str) -> None:
        self.file = folder / "server.toml"
        self.write(text)
        bare = {name: value for name, value in environment().items() if name in ("PATH", "HOME", "LANG")}
        self.environ = {**bare, "STATE_DIR": str(folder / "state"), **variables}
        super().__init__("--config", str(self.file), *arguments, environ=self.environ)

    def write(self, text: str) -> None:
        self.file.write_text(BASE + text)

    def reload(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, "reload", *(arguments or ("--config", str(self.file)))],
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=2 * DEADLINE,
            check=False,
        )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Configured]:
    with Configured(tmp_path, text="max_tunnels = 7\n") as server:
        server.wait_serving()
        yield server


def test_a_reload_reads_the_file_again_and_says_what_waits(server: Configured, tmp_path: Path) -> None:
    first = server.worker()
    server.write(f"access_log = '{tmp_path}/access.log'\nbacklog = 100\ndrain_timeout = 3\n")
    done = server.reload()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "reloaded: a new worker serves",
        "unchanged until the server is restarted: backlog, drain_timeout",
    ]
    server.wait_line("WARNING unchanged until the server is restarted: backlog, drain_timeout")
    assert (tmp_path / "access.log").exists()
    wait_for(lambda: first not in server.workers(), "end of the old worker")
    assert server.tunnels() == []


def test_a_wrong_file_fails_the_reload_and_the_old_worker_goes_on(server: Configured) -> None:
    first = server.workers()
    server.write("max_tunnels = 'many'\n")
    said = f"{server.file}: max_tunnels = many: allowed: a whole number from 1 to 1000000"
    server.process.send_signal(signal.SIGHUP)
    server.wait_line(f"reload failed: {said}; the old worker goes on")
    assert server.workers() == first
    assert server.tunnels() == []
    done = server.reload()
    expected = f"tinytun-server: {said}; nothing was reloaded, a server that runs goes on\n"
    assert (done.returncode, done.stderr) == (2, expected)
    asked = server.reload("--connection-port", "0")  # whoever does not read the file hears it from the server
    assert (asked.returncode, asked.stdout) == (2, "")
    text = f"tinytun-server: the reload failed, the old worker goes on: {said}\n"
    assert asked.stderr == text
    assert server.workers() == first
    assert "Traceback" not in server.log()


def test_a_worker_that_died_is_replaced_by_one_with_the_configuration_that_was_good(
    server: Configured,
) -> None:
    first = server.worker()
    server.write("max_tunnels = 'many'\n")
    os.kill(first, signal.SIGKILL)
    server.wait_serving(2)
    assert server.tunnels() == []
    server.write("max_tunnels = 8\n")
    assert server.reload().returncode == 0


def test_what_the_environment_says_wins_and_is_told(tmp_path: Path) -> None:
    with Configured(tmp_path, "--max-tunnels", "5", text="", HEAD_TIMEOUT="9") as server:
        server.wait_serving()
        server.write("head_timeout = 8\nmax_tunnels = 6\nidle_timeout = 70\n")
        done = server.reload()
        assert done.stdout.splitlines() == [
            "reloaded: a new worker serves",
            "head_timeout of the file does not count: the environment's HEAD_TIMEOUT wins; "
            "it changes with a restart only",
            "max_tunnels of the file does not count: the option --max-tunnels wins; "
            "it changes with a restart only",
        ]
        server.wait_line("WARNING head_timeout of the file does not count")


def test_what_kubernetes_sets_is_told_at_the_start(tmp_path: Path) -> None:
    with Configured(tmp_path, PROXY_PORT="tcp://10.0.0.1:5555") as server:
        server.wait_line("WARNING PROXY_PORT=tcp://10.0.0.1:5555 is ignored: Kubernetes sets it")
        server.wait_serving()


def test_every_one_of_several_who_ask_gets_a_verdict(server: Configured) -> None:
    done: list[subprocess.CompletedProcess[str]] = []
    asking = [threading.Thread(target=lambda: done.append(server.reload())) for _ in range(3)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join(2 * DEADLINE)
    assert [(one.returncode, one.stderr) for one in done] == [(0, "")] * 3


def test_where_no_server_runs_the_exit_code_is_5(tmp_path: Path) -> None:
    with Configured(tmp_path) as server:
        server.wait_serving()
        server.process.kill()
        server.wait()
        assert (tmp_path / "state" / "lock").exists()
        done = server.reload()
        assert (done.returncode, done.stderr.count("\n")) == (5, 1)
        said = f"tinytun-server: no tinytun-server runs with STATE_DIR={tmp_path / 'state'}; say the options"
        assert done.stderr.startswith(said)


def test_files_that_cannot_be_read_any_more_fail_the_reload(server: Configured, tmp_path: Path) -> None:
    server.write(f"auth_file = '{tmp_path}/none.toml'\n")
    done = server.reload()
    assert done.returncode == 2
    assert f"AUTH_FILE={tmp_path}/none.toml: there is no such file" in done.stderr
    assert server.tunnels() == []


def test_the_new_master_of_an_upgrade_is_found(server: Configured, tmp_path: Path) -> None:
    server.process.send_signal(signal.SIGUSR2)
    server.wait_serving(2)
    server.process.terminate()
    assert server.process.wait(DEADLINE) == 0

    def holder() -> int:
        pid = json.loads((tmp_path / "state" / "lock").read_text())["pid"]
        return 0 if pid == server.process.pid else int(pid)

    new = wait_for(holder, "new master with the lock")
    try:
        assert server.reload().returncode == 0
    finally:
        os.kill(new, signal.SIGKILL)


def test_broken_code_is_the_reason_that_is_told(tmp_path: Path) -> None:
    from server_process import ROOT

    shutil.copytree(
        ROOT / "tinytun_gevent", tmp_path / "tinytun_gevent", ignore=shutil.ignore_patterns("__py*")
    )
    shutil.copytree(ROOT / "bin", tmp_path / "bin")
    command = (sys.executable, "-B", str(tmp_path / "bin" / "tinytun-server"))
    with ServerProcess(command=command) as server:
        server.wait_serving()
        (tmp_path / "tinytun_gevent" / "server" / "app.py").write_text("raise RuntimeError('broken')\n")
        server.process.send_signal(signal.SIGHUP)
        server.wait_line("reload failed: RuntimeError: broken; the old worker goes on")
