"""Where a case takes place: a server, clients and what is asked of them; all end with the case."""

from __future__ import annotations

import http.client
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..peers.ours import BIN
from ..processes import BenchmarkError, Process, Workspace, accepts, family, free_ports
from ..services import NGINX, SMALL_PAGE, Services
from ..way import Endpoint

LOCAL = "127.0.0.1"
POLL = 0.02  # seconds between two looks; what a measured time may be wrong by
PATIENCE = 20.0  # seconds for what has no promise: a first start, a service of ours
SUPERVISOR_PAUSE = 1.0  # seconds before a program that ended at once is started again, as supervisord does
SERVES = r" serves: clients on port "
FAILED = 0
"""The status of a request that had no answer."""


class Site:
    """One case's server and clients. The server keeps its ports when it is started again."""

    def __init__(self, workspace: Workspace, services: Services) -> None:
        self.workspace = workspace
        self.services = services
        names = ("connection", "proxy", "tcp-proxy", "metadata")
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.state = workspace.folder / f"state-{self.ports['connection']}"
        #: What every program of ours has for its home: nothing of a case may stay on the machine.
        self.home = workspace.folder / "home"
        for folder in (self.state, self.home):
            folder.mkdir(exist_ok=True)
        self.server: Process

    # -- programs -------------------------------------------------------------

    def start_server(
        self, *options: str, wrapper: Sequence[str] = (), bind: str = LOCAL, silent: bool = False
    ) -> Process:
        """Starts the server and waits until it serves, or with ``silent`` until its port is open.

        ``wrapper`` are words in front of the command.
        """
        command = [*wrapper, sys.executable, str(BIN / "tinytun-server"), "--base-domain", "localhost"]
        command += ["--bind", bind, "--state-dir", str(self.state)]
        command += ["--source-tunnels", "0"]  # all clients have one address here
        command += [word for which, port in self.ports.items() for word in (f"--{which}-port", str(port))]
        self.server = self.start("server", [*command, *options])
        if silent:
            self.server.expect_port(self.ports["connection"], PATIENCE)
        else:
            self.server.expect(SERVES, PATIENCE)
        return self.server

    def restart_server(self, *options: str) -> None:
        """What a supervisor does for a server that is gone: starts it until it stays."""
        for _ in range(3):
            try:
                self.start_server(*options)
                return
            except BenchmarkError:
                time.sleep(SUPERVISOR_PAUSE)
        self.start_server(*options)

    def start_client(
        self,
        name: str,
        target: int | None = None,
        *options: str,
        kind: str = "http",
        host: str = LOCAL,
        port: int | None = None,
        wrapper: Sequence[str] = (),
    ) -> Process:
        """Starts a client that leads to ``target`` (the port of the page's service if None); does not wait.

        ``name`` is the subdomain of an HTTP tunnel; ``host`` and ``port`` are a detour to the server.
        """
        command = [
            *wrapper,
            sys.executable,
            str(BIN / "tinytun"),
            kind,
            f"{LOCAL}:{target or self.page_port}",
        ]
        command += ["-s", name] if kind == "http" else []
        command += ["--server", f"http://{host}:{port or self.ports['connection']}", *options]
        return self.start(f"client-{name}", command)

    def open_tunnel(self, name: str, target: int | None = None, *options: str, **more: Any) -> Process:
        """A client, as soon as it serves."""
        client = self.start_client(name, target, *options, **more)
        client.expect(r"^(?:http|tcp)://", PATIENCE)
        return client

    def start(self, name: str, command: Sequence[str]) -> Process:
        """Starts a program of ours, which keeps what it has to keep in this case's folder."""
        return self.workspace.start(name, command, {"HOME": str(self.home), "LOG_LEVEL": "info"})

    def worker(self) -> int:
        """The process id of the server's one worker."""
        children = [
            identity.pid
            for identity, stat in family([self.server.pid]).items()
            if stat.parent == self.server.pid
        ]
        if len(children) != 1:
            raise BenchmarkError(f"the server has {len(children)} workers")
        return children[0]

    def kill_server(self) -> None:
        """SIGKILL to the whole process group."""
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait(PATIENCE)

    # -- looking --------------------------------------------------------------

    @property
    def page_port(self) -> int:
        """The port of the service that has the small page."""
        if reason := self.services.missing.get(NGINX):
            raise BenchmarkError(reason)
        return self.services.ports[NGINX]

    def endpoint(self, name: str) -> Endpoint:
        return Endpoint(self.ports["proxy"], f"{name}.localhost")

    def tunnels(self) -> list[dict[str, Any]]:
        """What the metadata API lists; an empty list while it does not answer."""
        connection = http.client.HTTPConnection(LOCAL, self.ports["metadata"], timeout=5)
        try:
            connection.request("GET", "/tunnels")
            return list(json.loads(connection.getresponse().read()))
        except (OSError, http.client.HTTPException, ValueError):
            return []
        finally:
            connection.close()

    def until_served(self, name: str, timeout: float = PATIENCE) -> float:
        """Seconds until a visitor of ``name`` gets the page; `BenchmarkError` after ``timeout``."""
        endpoint = self.endpoint(name)
        return self.until(lambda: status_of(endpoint) == 200, timeout, f"{name} is not served")

    def until(self, condition: Callable[[], object], timeout: float, what: str) -> float:
        """Seconds until ``condition`` holds; `BenchmarkError` with ``what`` after ``timeout``."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > timeout:
                raise BenchmarkError(f"{what} after {timeout:g} s")
            time.sleep(POLL)
        return time.monotonic() - began

    def until_listening(self, port: int) -> float:
        return self.until(lambda: accepts(port), PATIENCE, f"nobody listens on {port}")


def status_of(endpoint: Endpoint, path: str = SMALL_PAGE, timeout: float = PATIENCE) -> int:
    """The status of a GET on a connection of its own, read to its end; `FAILED` if there is no answer."""
    connection = http.client.HTTPConnection(LOCAL, endpoint.port, timeout=timeout)
    try:
        connection.request("GET", f"/{path}", headers={"Host": endpoint.host})
        response = connection.getresponse()
        response.read()
    except (OSError, http.client.HTTPException):
        return FAILED
    else:
        return response.status
    finally:
        connection.close()
