"""The Dockerfile, as far as it can be checked without Docker: what it copies, exposes and runs."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import socket
import subprocess
import sys

import pytest
from server_process import DEADLINE, ROOT, ServerProcess, environment

from tinytun_gevent.server.config import ServerConfig

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def instructions(name: str) -> list[str]:
    """What follows every instruction ``name``, in order."""
    return re.findall(rf"(?m)^{name}\s+(.+)$", DOCKERFILE)


def in_context(path: str) -> bool:
    """Whether ``.dockerignore`` lets ``path`` into the build: the last pattern that fits decides."""
    allowed = True
    for line in (ROOT / ".dockerignore").read_text().split():
        pattern = line.removeprefix("!").removeprefix("**/")
        if fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(path.split("/")[-1], pattern):
            allowed = line.startswith("!")
    return allowed


def test_all_that_is_copied_exists_and_is_in_the_context() -> None:
    copied = [word for line in instructions("COPY")[:2] for word in line.split()[:-1]]
    assert set(copied) == {"setup.py", "pyproject.toml", "README.md", "LICENSE", "tinytun_gevent"}
    for name in copied:
        assert (ROOT / name).exists()
        assert in_context(name)
    for name in (".git", "tests", ".venv", "tinytun_gevent/__pycache__", "conf"):
        assert not in_context(name)


def test_all_that_setup_reads_is_copied() -> None:
    read = re.findall(r'HERE / "([^"]+)"', (ROOT / "setup.py").read_text())
    assert "README.md" in read
    for name in read:
        assert in_context(name)


def test_the_last_stage_is_without_rights_and_has_the_ports_of_the_seed() -> None:
    last = DOCKERFILE.rpartition("FROM ")[2]
    user = re.search(r"(?m)^USER (\d+):(\d+)$", last)
    assert user is not None
    assert int(user[1]) > 0
    config = ServerConfig()
    (exposed,) = instructions("EXPOSE")
    expected = [config.connection_port, config.proxy_port, config.tcp_proxy_port, config.proxy_tls_port]
    assert [int(port) for port in exposed.split()] == expected
    (run,) = re.findall(r"(?m)^# (docker run .+)$", DOCKERFILE)
    assert run in (ROOT / "README.md").read_text()
    inside = {int(port) for port in re.findall(r"-p \d+:(\d+)", run)}
    assert inside <= set(expected)


def test_the_image_has_both_programs_and_starts_the_server() -> None:
    assert json.loads(instructions("CMD")[-1]) == ["tinytun-server"]
    commands = re.findall(r'"(tinytun[\w-]*) = ', (ROOT / "setup.py").read_text())
    assert sorted(commands) == ["tinytun", "tinytun-server"]


@pytest.mark.skipif(os.name != "posix", reason="gunicorn needs POSIX")
def test_the_health_check_tells_a_server_from_none() -> None:
    (check,) = re.findall(r"(?m)^HEALTHCHECK .* CMD (\[.+\])$", DOCKERFILE)
    python, *arguments = json.loads(check)
    assert python == "python"

    def healthy(port: int, **variables: str) -> bool:
        command = [sys.executable, *arguments]
        environ = environment(METADATA_PORT=str(port), **variables)
        done = subprocess.run(command, env=environ, capture_output=True, timeout=DEADLINE, check=False)
        return done.returncode == 0

    with ServerProcess() as server:
        server.wait_serving()
        assert healthy(server.metadata_port)
        assert healthy(server.metadata_port, METADATA_BIND="0.0.0.0")
        assert not healthy(server.proxy_port)
    with socket.socket() as silent:  # bound, so that nobody else gets the port, and not listening
        silent.bind(("127.0.0.1", 0))
        assert not healthy(silent.getsockname()[1])
