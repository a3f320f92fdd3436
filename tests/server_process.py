"""A real ``tinytun-server``: master and worker, started with kernel-chosen ports and watched by its log."""

from __future__ import annotations

import atexit
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

DEADLINE = 60.0
"""Seconds for anything that is waited for; a start takes about one."""

ROOT = Path(__file__).resolve().parent.parent
COMMAND = (sys.executable, str(ROOT / "bin" / "tinytun-server"))
SERVES = re.compile(
    r"serves: clients on port (\d+), visitors on (\d+), TCP proxies on (\d+), metadata on (\d+)"
)

CHOSEN_BY_THE_KERNEL = {
    "BIND": "127.0.0.1",
    "CONNECTION_PORT": "0",
    "PROXY_PORT": "0",
    "TCP_PROXY_PORT": "0",
    "METADATA_PORT": "0",
    "BASE_DOMAIN": "localhost",
}

PATIENT = dict.fromkeys(
    (
        "HANDSHAKE_TIMEOUT",
        "HEAD_TIMEOUT",
        "PARK_SECONDS",
        "PROXY_HEADER_TIMEOUT",
        "QUEUE_TIMEOUT",
        "STREAM_TIMEOUT",
    ),
    str(DEADLINE),
)
"""What a server has a few seconds for, and a busy machine may need more for."""


STATE = Path(tempfile.mkdtemp(prefix="tinytun-"))
"""For the state of servers that are not a `ServerProcess`: nothing of a test may stay on the machine."""

atexit.register(shutil.rmtree, STATE, ignore_errors=True)


def environment(**variables: str) -> dict[str, str]:
    """This process's environment with a server's variables in it, and no others of a server."""
    ours = {"PATH", "HOME", "TMPDIR", "LANG", "VIRTUAL_ENV", "SYSTEMROOT"}
    kept = {k: v for k, v in os.environ.items() if k in ours}
    return {**kept, "STATE_DIRECTORY": str(STATE), **CHOSEN_BY_THE_KERNEL, **PATIENT, **variables}


def wait_for(condition: Callable[[], Any], what: str, timeout: float = DEADLINE) -> Any:
    """The first true value of ``condition``, asked often; fails after ``timeout`` seconds."""
    until = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < until, f"no {what} within {timeout:g} s"
        time.sleep(0.01)
    return value


class ServerProcess:
    """A server process for the length of a ``with`` block; its ports are known once it serves."""

    def __init__(
        self,
        *arguments: str,
        command: tuple[str, ...] = COMMAND,
        environ: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        self.lines: list[str] = []
        self._changed = threading.Condition()
        #: Where the server keeps its state, unless its environment says otherwise.
        self.state = Path(tempfile.mkdtemp(prefix="tinytun-"))
        self.process = subprocess.Popen(
            [*command, *arguments],
            env={"STATE_DIR": str(self.state)} | dict(environment() if environ is None else environ),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            **options,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.connection_port = self.proxy_port = self.tcp_proxy_port = self.metadata_port = 0

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line.rstrip())
                self._changed.notify_all()

    def log(self) -> str:
        with self._changed:
            return "\n".join(self.lines)

    def wait_line(self, pattern: str, count: int = 1, timeout: float = DEADLINE) -> re.Match[str]:
        """The ``count``-th line of the log that matches; fails after ``timeout`` seconds."""
        with self._changed:
            found = self._changed.wait_for(
                lambda: (
                    (m := [x for line in self.lines if (x := re.search(pattern, line))])[count - 1 :] and m
                ),
                timeout,
            )
            assert found, f"{pattern!r} is not there {count} times in:\n" + "\n".join(self.lines)
            return found[count - 1]

    def wait_serving(self, count: int = 1) -> Self:
        """Waits until the ``count``-th worker serves, and learns the ports."""
        found = self.wait_line(SERVES.pattern, count)
        ports = [int(port) for port in found.groups()]
        self.connection_port, self.proxy_port, self.tcp_proxy_port, self.metadata_port = ports
        return self

    def workers(self) -> list[int]:
        """The process ids of the master's children."""
        return [child.pid for child in psutil.Process(self.process.pid).children()]

    def worker(self) -> int:
        (pid,) = self.workers()
        return pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.connection_port}"

    def tunnels(self) -> list[dict[str, Any]]:
        """What the metadata API lists."""
        connection = http.client.HTTPConnection("127.0.0.1", self.metadata_port, timeout=DEADLINE)
        try:
            connection.request("GET", "/tunnels")
            return list(json.loads(connection.getresponse().read()))
        finally:
            connection.close()

    def wait(self, timeout: float = DEADLINE) -> int:
        """The exit code, once the process has ended and its log is complete."""
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait(DEADLINE)
        shutil.rmtree(self.state, ignore_errors=True)


def is_gone(pid: int) -> bool:
    """Whether a process has ended (one that nobody has waited for counts as ended)."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
