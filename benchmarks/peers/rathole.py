"""rathole (Rust): a TCP tunnel that opens a TCP connection from client to server for each visitor."""

from __future__ import annotations

import subprocess

from ..processes import find, free_port
from ..way import Endpoint
from .base import (
    LOCAL,
    OPENSSL,
    Contender,
    Ground,
    Running,
    Server,
    make_certificate,
    three_times,
    with_relay,
)

_TRANSPORT = """
[{side}.transport]
type = "tcp"
[{side}.transport.tcp]
nodelay = true
"""


class Rathole(Contender):
    """Plain TCP between its programs (no TLS, no noise), without Nagle's delays."""

    name = "rathole"
    programs = ("rathole",)

    def start_server(self, ground: Ground) -> Server:
        return with_relay(ground, three_times(lambda: self._listen(ground)))

    def _listen(self, ground: Ground) -> Server:
        control = free_port()
        ports = {name: free_port() for name in ground.services}
        text = f'[server]\nbind_addr = "{LOCAL}:{control}"\ndefault_token = "benchmark"\n'
        text += self._transport(ground, "server")
        for name, port in ports.items():
            text += f'[server.services.{name}]\nbind_addr = "{LOCAL}:{port}"\n'
        config = ground.workspace.folder / f"{self.name}-server.toml"
        config.write_text(text)
        server = ground.workspace.start("rathole-server", [str(find("rathole")), "--server", str(config)])
        server.expect_port(control)
        return Server([server], port=control, ports=ports)

    def start_client(self, ground: Ground, server: Server) -> Running:
        text = f'[client]\nremote_addr = "{server.host}:{server.port}"\ndefault_token = "benchmark"\n'
        text += self._transport(ground, "client")
        for name, port in ground.services.items():
            text += f'[client.services.{name}]\nlocal_addr = "{LOCAL}:{port}"\n'
        config = ground.workspace.folder / f"{self.name}-client.toml"
        config.write_text(text)
        client = ground.workspace.start("rathole-client", [str(find("rathole")), "--client", str(config)])
        return Running([client], {name: Endpoint(port) for name, port in server.ports.items()})

    def _transport(self, ground: Ground, side: str) -> str:
        """What lies between its programs, for one of them."""
        return _TRANSPORT.format(side=side)


class RatholeTls(Rathole):
    """TLS between its programs, with a certificate of the same kind as ours."""

    name = "rathole tls"
    programs = ("rathole", OPENSSL)
    encrypts = True

    def _transport(self, ground: Ground, side: str) -> str:
        if side == "server":
            self._folder = make_certificate(ground.workspace)
            command = [str(find(OPENSSL)), "pkcs12", "-export", "-passout", "pass:benchmark"]
            command += ["-inkey", str(self._folder / "key.pem"), "-in", str(self._folder / "cert.pem")]
            command += ["-out", str(self._folder / "identity.pfx")]
            subprocess.run(command, check=True, capture_output=True)
            own = f'pkcs12 = "{self._folder}/identity.pfx"\npkcs12_password = "benchmark"\n'
        else:
            own = f'trusted_root = "{self._folder}/cert.pem"\nhostname = "localhost"\n'
        text = _TRANSPORT.format(side=side).replace('type = "tcp"', 'type = "tls"')
        return f"{text}[{side}.transport.tls]\n{own}"
