"""``ssh -R``, the tunnel that everybody has."""

from __future__ import annotations

import getpass
import os
from pathlib import Path

from ..processes import BenchmarkError, find, free_port
from ..way import Endpoint
from .base import LOCAL, Contender, Ground, Running, Server, three_times, with_relay

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
    """To an sshd of our own, as the present user, with keys made for this run; default settings."""

    name = "ssh -R"
    programs = ("sshd", "ssh", "ssh-keygen")
    descriptors = 1

    def missing(self) -> str | None:
        if os.getuid() == 0 and not os.path.isdir("/run/sshd"):
            return "sshd wants the folder /run/sshd when root starts it"
        return super().missing()

    def start_server(self, ground: Ground) -> Server:
        folder = _folder(ground)
        if not folder.exists():
            _make_keys(ground, folder)
        return with_relay(ground, three_times(lambda: self._listen(ground, folder)))

    def _listen(self, ground: Ground, folder: Path) -> Server:
        port = free_port()
        config = folder / "sshd_config"
        config.write_text(_SSHD_CONFIG.format(port=port, folder=folder))
        server = ground.workspace.start("sshd", [str(find("sshd")), "-D", "-e", "-f", str(config)])
        server.expect(rf"^Server listening on 127\.0\.0\.1 port {port}\.\s*$")
        return Server([server], port=port)

    def start_client(self, ground: Ground, server: Server) -> Running:
        folder = _folder(ground)
        options = {
            "UserKnownHostsFile": f"{folder}/known_hosts",
            "StrictHostKeyChecking": "no",
            "IdentityFile": f"{folder}/user_key",
            "IdentitiesOnly": "yes",
            "BatchMode": "yes",
            "ExitOnForwardFailure": "yes",
        }
        command = [str(find("ssh")), "-N", "-T", "-F", "none", "-p", str(server.port)]
        command += [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        for target in ground.services.values():
            command += ["-R", f"{LOCAL}:0:{LOCAL}:{target}"]
        client = ground.workspace.start("ssh", [*command, f"{getpass.getuser()}@{server.host}"])
        endpoints = {
            name: Endpoint(int(client.expect(_ALLOCATED.format(target))[1]))
            for name, target in ground.services.items()
        }
        return Running([client], endpoints)


def _folder(ground: Ground) -> Path:
    return ground.workspace.folder / "ssh"


def _make_keys(ground: Ground, folder: Path) -> None:
    folder.mkdir()
    for name in ("host_key", "user_key"):
        keygen = [str(find("ssh-keygen")), "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        process = ground.workspace.start("ssh-keygen", keygen)
        if not process.wait(10) or not (folder / f"{name}.pub").exists():
            raise BenchmarkError(f"ssh-keygen: {process.last_words()}")
