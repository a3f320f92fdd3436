"""Two network namespaces with a link between them, for tests of a path that goes dead."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FOREVER = ("sleep", "120")
AS_USER = os.geteuid() != 0


class Network:
    """Two namespaces with a link between them: ``server`` has 10.77.0.1, ``client`` 10.77.0.2."""

    def __init__(self, stack: ExitStack) -> None:
        """Raises ``OSError`` or ``CalledProcessError`` where it is not allowed."""
        self._stack = stack
        unshare = ("unshare", "-Urn") if AS_USER else ("unshare", "-n")
        subprocess.run([*unshare, "true"], check=True, capture_output=True)
        self.server = self._enter(self._hold((*unshare, *FOREVER)))
        other = self._hold((*self.server, "unshare", "-n", *FOREVER))
        self.client = self._enter(other)
        self._run(self.server, f"ip link add tt0 type veth peer name tt1 netns {other}")
        for space, name, address in ((self.server, "tt0", "10.77.0.1"), (self.client, "tt1", "10.77.0.2")):
            self._run(space, f"ip addr add {address}/24 dev {name}")
            self._run(space, f"ip link set {name} up")
            self._run(space, "ip link set lo up")

    def link(self, state: str) -> None:
        """``up`` or ``down``; nobody is told but the client's own interface."""
        self._run(self.client, f"ip link set tt1 {state}")

    def output(self, space: tuple[str, ...], code: str) -> str:
        """The first line that a Python program prints in ``space``; it runs until the test is over."""
        process = subprocess.Popen([*space, sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=HERE)
        self._stack.callback(process.wait, 10)
        self._stack.callback(process.kill)
        assert process.stdout is not None
        with process.stdout:
            return process.stdout.readline().decode().strip()

    def _hold(self, command: tuple[str, ...]) -> int:
        """A process that keeps a namespace; its id, once it is there."""
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._stack.callback(process.wait, 10)
        self._stack.callback(process.kill)
        until = time.monotonic() + 10
        while Path(f"/proc/{process.pid}/comm").read_text().strip() != FOREVER[0]:
            assert time.monotonic() < until
            time.sleep(0.005)
        return process.pid

    @staticmethod
    def _enter(pid: int) -> tuple[str, ...]:
        user = ("-U", "--preserve-credentials") if AS_USER else ()
        return ("nsenter", "-t", str(pid), *user, "-n")

    @staticmethod
    def _run(space: tuple[str, ...], command: str) -> None:
        subprocess.run([*space, *command.split()], check=True, capture_output=True)


def network(stack: ExitStack) -> Network:
    """A new one, which lives as long as ``stack``. Skips the test where none is allowed."""
    try:
        return Network(stack)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine allows no network namespaces")
