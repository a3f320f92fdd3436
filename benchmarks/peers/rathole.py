"""rathole (Rust): a TCP tunnel that opens a TCP connection from client to server for each visitor."""

from __future__ import annotations

from ..processes import find, free_port
from ..way import Endpoint
from .base import LOCAL, Contender, Ground, Running, Server, three_times, with_relay

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
        text += _TRANSPORT.format(side="server")
        for name, port in ports.items():
            text += f'[server.services.{name}]\nbind_addr = "{LOCAL}:{port}"\n'
        config = ground.workspace.folder / "rathole-server.toml"
        config.write_text(text)
        server = ground.workspace.start("rathole-server", [str(find("rathole")), "--server", str(config)])
        server.expect_port(control)
        return Server([server], port=control, ports=ports)

    def start_client(self, ground: Ground, server: Server) -> Running:
        text = f'[client]\nremote_addr = "{server.host}:{server.port}"\ndefault_token = "benchmark"\n'
        text += _TRANSPORT.format(side="client")
        for name, port in ground.services.items():
            text += f'[client.services.{name}]\nlocal_addr = "{LOCAL}:{port}"\n'
        config = ground.workspace.folder / "rathole-client.toml"
        config.write_text(text)
        client = ground.workspace.start("rathole-client", [str(find("rathole")), "--client", str(config)])
        return Running([client], {name: Endpoint(port) for name, port in server.ports.items()})
