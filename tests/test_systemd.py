"""The unit for systemd: systemd's own opinion of it, and that it fits the program and the other examples."""

from __future__ import annotations

import configparser
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from local_service import LocalService
from server_process import COMMAND, DEADLINE, ROOT, ServerProcess, environment, wait_for

from tinytun_gevent import Tunnel

UNIT = ROOT / "conf" / "tinytun-server.service"
TEXT = UNIT.read_text()
EXPOSURE = 2
"""Of 10, as systemd-analyze counts; most of what remains is that it may use the network."""

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)
posix = pytest.mark.skipif(os.name != "posix", reason="gunicorn needs POSIX")

REFUSES_MACHINE_CODE = """
import ctypes, os, sys
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN
    sys.exit("no MDWE")
os.execv(sys.argv[1], sys.argv[1:])
"""


def settings(section: str) -> dict[str, list[str]]:
    """The settings of a section of the unit; one may be given several times."""
    body = TEXT.partition(f"[{section}]\n")[2].partition("\n[")[0]
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"(?m)^(\w+)=(.*)$", body):
        found.setdefault(name, []).append(value)
    return found


def setting(name: str) -> str:
    (value,) = settings("Service")[name]
    return value


def analyze(*arguments: str, unit: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *arguments, str(unit)],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


# -- what systemd says --------------------------------------------------------


@needs_systemd
def test_systemd_takes_the_unit_without_a_word(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    assert setting("ExecStart") == "/opt/tinytun/bin/tinytun-server"
    unit.write_text(TEXT.replace("/opt/tinytun/bin/tinytun-server", COMMAND[-1]))
    done = analyze("verify", "--man=no", unit=unit)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_systemd
def test_systemd_finds_a_mistake_in_a_unit(tmp_path: Path) -> None:
    """Otherwise the test above says nothing."""
    unit = tmp_path / UNIT.name
    unit.write_text(
        TEXT.replace(setting("ExecStart"), COMMAND[-1]).replace("ProtectHome=yes", "ProtectHom=yes")
    )
    done = analyze("verify", "--man=no", unit=unit)
    assert "ProtectHom" in done.stderr


@needs_systemd
def test_the_unit_is_as_little_exposed_as_the_readme_says() -> None:
    done = analyze("security", "--offline=true", f"--threshold={EXPOSURE * 10}", unit=UNIT)
    assert done.returncode == 0, done.stdout
    assert f"an exposure below {EXPOSURE} of 10" in (ROOT / "README.md").read_text()


# -- that it fits the program -------------------------------------------------


@posix
def test_the_master_tells_systemd_when_its_ports_are_bound(tmp_path: Path) -> None:
    assert setting("Type") == "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(DEADLINE)
        with ServerProcess(environ=environment(NOTIFY_SOCKET=str(tmp_path / "notify"))) as server:
            assert b"READY=1" in notified.recv(4096).split(b"\n")
            server.wait_serving()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="systemd is for Linux")
def test_the_server_serves_and_reloads_without_memory_that_is_written_and_run() -> None:
    assert setting("MemoryDenyWriteExecute") == "yes"
    command = (sys.executable, "-c", REFUSES_MACHINE_CODE, *COMMAND)
    if subprocess.run([*command[:3], "/bin/true"], capture_output=True, check=False).returncode:
        pytest.skip("this kernel cannot refuse machine code (Linux 6.3 can)")
    assert setting("ExecReload") == "/bin/kill -HUP $MAINPID"
    with ServerProcess(command=command) as server, LocalService() as service:
        server.wait_serving()
        with Tunnel(service.port, server=server.url, subdomain="app"):
            server.process.send_signal(signal.SIGHUP)
            server.wait_line("stopped")  # the old worker
            wait_for(lambda: len(server.tunnels()) == 1, "tunnel after the reload")
            visit = http.client.HTTPConnection("127.0.0.1", server.proxy_port, timeout=DEADLINE)
            visit.request("GET", "/", headers={"Host": "app.localhost"})
            assert visit.getresponse().status == 200
            visit.close()
        server.process.terminate()
        assert server.wait() == 0


def test_a_stop_is_no_failure_and_a_failure_is_tried_again() -> None:
    """0 is a signal, 1 and 2 are failures: the README has them, and test_launch."""
    assert setting("Restart") == "on-failure"
    assert not {"SuccessExitStatus", "RestartPreventExitStatus"} & set(settings("Service"))
    # all tries fit into the time in which they are counted
    unit = settings("Unit")
    assert int(unit["StartLimitBurst"][0]) * int(setting("RestartSec")) < int(
        unit["StartLimitIntervalSec"][0]
    )


# -- that it fits the other examples ------------------------------------------


def test_paths_and_times_are_those_of_the_other_examples() -> None:
    environ = dict(re.findall(r"(?m)^#?([A-Z_]+)=(.*)$", (UNIT.parent / "tinytun-server.env").read_text()))
    supervisord = configparser.RawConfigParser()
    supervisord.read(UNIT.parent / "supervisord.conf")
    program = supervisord["program:tinytun-server"]
    assert setting("EnvironmentFile") in program["command"]
    assert setting("ExecStart") in program["command"]
    assert setting("User") == setting("Group") == program["user"]
    assert setting("TimeoutStopSec") == program["stopwaitsecs"]
    assert float(setting("TimeoutStopSec")) >= float(environ["DRAIN_TIMEOUT"]) + 5
    assert int(supervisord["supervisord"]["minfds"]) <= int(setting("LimitNOFILE"))
    assert environ["STATE_DIR"] == f"/var/lib/{setting('StateDirectory')}"
    assert Path(environ["ACCESS_LOG"]).parent == Path("/var/log", setting("LogsDirectory"))


def test_the_readme_has_the_units_paths() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in (
        setting("EnvironmentFile"),
        "/etc/systemd/system",
        setting("ExecStart").rpartition("/bin/")[0],
    ):
        assert path in readme
    assert re.search(rf"(?m)^useradd --system .*\b{setting('User')}$", readme)
