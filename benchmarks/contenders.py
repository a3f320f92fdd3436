"""Who is measured: how each is started, and how a visitor reaches the service through it.

To add one, write a subclass of `Contender` and put it into `CONTENDERS`.
"""

from __future__ import annotations

import enum
import getpass
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .processes import BenchmarkError, Process, Workspace, find, free_port

HERE = Path(__file__).resolve().parent
BIN = HERE.parent / "bin"

#: Streams a tunnel of ours may have: at the default, the 101st idle visitor of a tcp tunnel would wait.
CONCURRENCY = 1024


class Role(enum.Enum):
    """What a contender is to the comparison."""

    OURS = "ours"
    PEER = "peer"  # a tunnel of somebody else's
    ANCHOR = "anchor"  # no tunnel; shows what the machine and the load generators can do


@dataclass(frozen=True)
class Endpoint:
    """Where visitors go on 127.0.0.1, and the Host they ask for."""

    port: int
    host: str

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"


@dataclass(frozen=True)
class Running:
    """A contender that is up: its processes, and the endpoint of each service."""

    processes: Sequence[Process]
    endpoints: Mapping[str, Endpoint]

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def dead(self) -> str | None:
        """Which process has ended by itself, with its last words."""
        for process in self.processes:
            if process.ended():
                return f"{process.name} ended: {process.last_words()}"
        return None


class Contender(ABC):
    """Something that carries a visitor to a service."""

    name: str
    role: Role

    def missing(self) -> str | None:
        """Why it cannot run on this machine, or None."""
        return None

    @abstractmethod
    def start(self, workspace: Workspace, services: Mapping[str, int]) -> Running:
        """Starts it, with a way to every service (name to port). BenchmarkError if it does not come up."""


class Tinytun(Contender):
    """This program, by its two commands from this checkout: a server, and a client for each service."""

    role = Role.OURS

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.name = f"tinytun {kind}"

    def start(self, workspace: Workspace, services: Mapping[str, int]) -> Running:
        server, connection_port, proxy_port = self._start_server(workspace)
        processes = [server]
        endpoints = {}
        for name, port in services.items():
            command = [sys.executable, str(BIN / "tinytun"), self.kind, f"127.0.0.1:{port}"]
            command += ["-s", name] if self.kind == "http" else []
            command += ["-c", str(CONCURRENCY), "--server", f"http://127.0.0.1:{connection_port}"]
            client = workspace.start(f"tinytun-{self.kind}-{name}", command)
            processes.append(client)
            url = client.expect(rf"^{self.kind}://([^\s/:]+)(?::(\d+))?$")
            endpoints[name] = (
                Endpoint(proxy_port, url[1]) if self.kind == "http" else Endpoint(int(url[2]), "localhost")
            )
        return Running(processes, endpoints)

    def _start_server(self, workspace: Workspace) -> tuple[Process, int, int]:
        last = ""
        for _ in range(3):  # a port that was free may be taken by the time it is used
            ports = {
                f"--{which}-port": free_port() for which in ("connection", "proxy", "tcp-proxy", "metadata")
            }
            command = [sys.executable, str(BIN / "tinytun-server"), "--bind", "127.0.0.1"]
            command += ["--base-domain", "localhost"]
            command += [word for flag, port in ports.items() for word in (flag, str(port))]
            server = workspace.start(f"tinytun-server-{self.kind}", command)
            try:
                server.expect_port(ports["--connection-port"])
            except BenchmarkError as error:
                last = str(error)
                workspace.stop([server])
            else:
                return server, ports["--connection-port"], ports["--proxy-port"]
        raise BenchmarkError(last)


_SSHD_CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
AllowTcpForwarding yes
X11Forwarding no
Subsystem none /bin/false
"""

_ALLOCATED = r"^Allocated port (\d+) for remote forward to 127\.0\.0\.1:{}\s*$"


class SshReverse(Contender):
    """``ssh -R`` to an sshd of our own, as the present user, with keys made for this run."""

    name = "ssh -R"
    role = Role.PEER

    def missing(self) -> str | None:
        for program in ("sshd", "ssh", "ssh-keygen"):
            if find(program) is None:
                return f"{program} is not installed"
        if os.getuid() == 0 and not os.path.isdir("/run/sshd"):
            return "sshd wants the folder /run/sshd when root starts it"
        return None

    def start(self, workspace: Workspace, services: Mapping[str, int]) -> Running:
        folder = workspace.folder / "ssh"
        if not folder.exists():
            self._make_keys(workspace, folder)
        server, port = self._start_server(workspace, folder)
        options = {
            "UserKnownHostsFile": f"{folder}/known_hosts",
            "StrictHostKeyChecking": "no",
            "IdentityFile": f"{folder}/user_key",
            "IdentitiesOnly": "yes",
            "BatchMode": "yes",
            "ExitOnForwardFailure": "yes",
        }
        command = [str(find("ssh")), "-N", "-T", "-F", "none", "-p", str(port)]
        command += [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        for target in services.values():
            command += ["-R", f"127.0.0.1:0:127.0.0.1:{target}"]
        client = workspace.start("ssh", [*command, f"{getpass.getuser()}@127.0.0.1"])
        endpoints = {
            name: Endpoint(int(client.expect(_ALLOCATED.format(target))[1]), "localhost")
            for name, target in services.items()
        }
        return Running([server, client], endpoints)

    def _make_keys(self, workspace: Workspace, folder: Path) -> None:
        folder.mkdir()
        for name in ("host_key", "user_key"):
            keygen = [str(find("ssh-keygen")), "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            process = workspace.start("ssh-keygen", keygen)
            if not process.wait(10) or not (folder / f"{name}.pub").exists():
                raise BenchmarkError(f"ssh-keygen: {process.last_words()}")

    def _start_server(self, workspace: Workspace, folder: Path) -> tuple[Process, int]:
        last = ""
        for _ in range(3):
            port = free_port()
            config = folder / "sshd_config"
            config.write_text(_SSHD_CONFIG.format(port=port, folder=folder))
            server = workspace.start("sshd", [str(find("sshd")), "-D", "-e", "-f", str(config)])
            try:
                server.expect(rf"^Server listening on 127\.0\.0\.1 port {port}\.\s*$")
            except BenchmarkError as error:
                last = str(error)
                workspace.stop([server])
            else:
                return server, port
        raise BenchmarkError(last)


class Forwarder(Contender):
    """A plain gevent forwarder in one process."""

    name = "forwarder"
    role = Role.ANCHOR

    def start(self, workspace: Workspace, services: Mapping[str, int]) -> Running:
        command = [sys.executable, str(HERE / "forwarder.py"), *map(str, services.values())]
        process = workspace.start("forwarder", command)
        endpoints = {
            name: Endpoint(int(process.expect(rf"^(\d+) leads to {port}$")[1]), "localhost")
            for name, port in services.items()
        }
        return Running([process], endpoints)


class Direct(Contender):
    """Nothing between the visitor and the service."""

    name = "direct"
    role = Role.ANCHOR

    def start(self, workspace: Workspace, services: Mapping[str, int]) -> Running:
        return Running([], {name: Endpoint(port, "localhost") for name, port in services.items()})


CONTENDERS: tuple[Contender, ...] = (
    Tinytun("http"),
    Tinytun("tcp"),
    SshReverse(),
    Forwarder(),
    Direct(),
)
