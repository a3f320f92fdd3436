"""This program, by its two commands from this checkout, as anybody would start them."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from ..processes import free_port
from ..way import Endpoint
from .base import (
    LOCAL,
    OPENSSL,
    Contender,
    Ground,
    Role,
    Running,
    Server,
    make_certificate,
    three_times,
    with_relay,
)

BIN = Path(__file__).resolve().parent.parent.parent / "bin"

#: Streams a tunnel of ours may have: at the default, 100, the 101st idle visitor of a tcp tunnel would wait.
CONCURRENCY = 16384


#: Limits that nobody reaches: what is left is what it costs to look.
HIGH = (
    *("--tunnel-visitors", "1000000"),
    *("--tunnel-requests", "1000000"),
    *("--tunnel-rate", "100000000000"),
    *("--connect-rate", "1000000"),
    *("--connect-burst", "1000000"),
)


class Tinytun(Contender):
    """A server, and a client for each service."""

    role = Role.OURS
    descriptors = 1

    def __init__(self, kind: str, limits: bool = False, options: tuple[str, ...] = ()) -> None:
        """``kind``: ``http`` or ``tcp``, as the command has it; ``limits``: set, and never reached.

        ``options`` are further ones of the server.
        """
        self.kind = kind
        self.name = f"tinytun {kind} limits" if limits else f"tinytun {kind}"
        self.asked_for = limits
        self._options = (*(HIGH if limits else ()), *options)

    def start_server(self, ground: Ground) -> Server:
        return with_relay(ground, three_times(lambda: self._listen(ground)))

    def _listen(self, ground: Ground) -> Server:
        ports = {which: free_port() for which in ("connection", "proxy", "tcp-proxy", "metadata")}
        command = [sys.executable, str(BIN / "tinytun-server"), "--bind", LOCAL, "--base-domain", "localhost"]
        command += ["--source-tunnels", "0"]  # all clients have one address here
        command += [*self._options, *self._server_options(ground, ports)]
        command += [word for which, port in ports.items() for word in (f"--{which}-port", str(port))]
        server = ground.workspace.start(f"tinytun-server-{self.kind}", command)
        server.expect_port(ports["connection"])
        return Server([server], port=ports["connection"], ports=ports)

    def start_client(self, ground: Ground, server: Server) -> Running:
        clients = {}
        for name, port in ground.services.items():
            command = [sys.executable, str(BIN / "tinytun"), self.kind, f"{LOCAL}:{port}"]
            command += ["-s", name] if self.kind == "http" else []
            command += ["-c", str(CONCURRENCY), "--server", *self._server_url(server)]
            variables = self._client_variables(name)
            clients[name] = ground.workspace.start(f"tinytun-{self.kind}-{name}", command, variables)
        endpoints = {}
        for name, client in clients.items():
            url = client.expect(rf"^{self.kind}s?://([^\s/:]+)(?::(\d+))?$")
            endpoints[name] = self._endpoint(server, url[1]) if self.kind == "http" else Endpoint(int(url[2]))
        return Running(list(clients.values()), endpoints)

    def _server_options(self, ground: Ground, ports: dict[str, int]) -> list[str]:
        """Further options of the server; may add to its ``ports``."""
        return []

    def _server_url(self, server: Server) -> list[str]:
        """What the client's ``--server`` is, and what goes with it."""
        return [f"http://{server.host}:{server.port}"]

    def _client_variables(self, name: str) -> dict[str, str]:
        """What is added to the environment of the client for that service."""
        return {}

    def _endpoint(self, server: Server, host: str) -> Endpoint:
        """Where the visitors of an HTTP tunnel go."""
        return Endpoint(server.ports["proxy"], host)


class TinytunToken(Tinytun):
    """All clients open their tunnels with one token."""

    _file: Path  # both are known when the server is started
    _token: str

    def _server_options(self, ground: Ground, ports: dict[str, int]) -> list[str]:
        self._file = Path(tempfile.mkdtemp(dir=ground.workspace.folder)) / "tokens.toml"
        self._token = self._new_token("benchmark")
        return ["--auth-file", str(self._file)]

    def _new_token(self, label: str) -> str:
        command = [sys.executable, str(BIN / "tinytun-server"), "token", "new", "--label", label]
        command += ["--auth-file", str(self._file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]

    def _client_variables(self, name: str) -> dict[str, str]:
        return {"TINYTUN_TOKEN": self._token}


class TinytunTls(Tinytun):
    """TLS between the two programs (``session``), between visitors and the server (``visitors``), or both."""

    encrypts = True
    programs = (OPENSSL,)

    def __init__(self, name: str, *, session: bool, visitors: bool) -> None:
        super().__init__("http")
        self.name = name
        self._session = session
        self._visitors = visitors
        self._folder = Path()

    def _server_options(self, ground: Ground, ports: dict[str, int]) -> list[str]:
        self._folder = make_certificate(ground.workspace)
        ports["proxy-tls"] = free_port()
        return ["--tls-dir", str(self._folder)]

    def _server_url(self, server: Server) -> list[str]:
        if not self._session:
            return super()._server_url(server)
        return [f"https://{server.host}:{server.port}", "--ca", str(self._folder / "cert.pem")]

    def _endpoint(self, server: Server, host: str) -> Endpoint:
        if not self._visitors:
            return super()._endpoint(server, host)
        return Endpoint(server.ports["proxy-tls"], host, tls=True)
