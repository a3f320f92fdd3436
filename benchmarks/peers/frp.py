"""frp (Go): all visitors of a client share one TCP connection (its default, ``tcpMux``)."""

from __future__ import annotations

from ..processes import find, free_port
from ..way import Endpoint
from .base import LOCAL, Contender, Ground, Running, Server, three_times, with_relay


class Frp(Contender):
    """Its ``tcp`` or its ``http`` proxies; TLS between its programs with ``tls``, all else by default."""

    programs = ("frps", "frpc")
    descriptors = 1

    def __init__(self, kind: str, tls: bool = False) -> None:
        """``kind``: ``http`` or ``tcp``, as its configuration has it."""
        self.kind = kind
        self.encrypts = tls
        self.name = "frp tls" if tls else f"frp {kind}"

    def start_server(self, ground: Ground) -> Server:
        return with_relay(ground, three_times(lambda: self._listen(ground)))

    def _listen(self, ground: Ground) -> Server:
        control, vhost = free_port(), free_port()
        text = f'bindAddr = "{LOCAL}"\nproxyBindAddr = "{LOCAL}"\nbindPort = {control}\n'
        text += f"vhostHTTPPort = {vhost}\n" if self.kind == "http" else ""
        # At its default level it writes a line for each visitor.
        text += 'log.level = "warn"\n'
        config = ground.workspace.folder / f"{self.name}-server.toml"
        config.write_text(text)
        server = ground.workspace.start(f"frps-{self.kind}", [str(find("frps")), "-c", str(config)])
        server.expect_port(control)
        ports = {name: vhost if self.kind == "http" else free_port() for name in ground.services}
        return Server([server], port=control, ports=ports)

    def start_client(self, ground: Ground, server: Server) -> Running:
        text = f'serverAddr = "{server.host}"\nserverPort = {server.port}\n'
        text += f"transport.tls.enable = {str(self.encrypts).lower()}\n"
        for name, port in ground.services.items():
            text += f'[[proxies]]\nname = "{name}"\ntype = "{self.kind}"\n'
            text += f'localIP = "{LOCAL}"\nlocalPort = {port}\n'
            if self.kind == "http":
                text += f'customDomains = ["{name}.localhost"]\n'
            else:
                text += f"remotePort = {server.ports[name]}\n"
        config = ground.workspace.folder / f"{self.name}-client.toml"
        config.write_text(text)
        client = ground.workspace.start(f"frpc-{self.kind}", [str(find("frpc")), "-c", str(config)])
        for name in ground.services:
            # Its ports say nothing about a proxy of type http: they are open before it is.
            client.expect(rf"\[{name}\] start proxy success")
        endpoints = {
            name: Endpoint(port, f"{name}.localhost" if self.kind == "http" else "localhost")
            for name, port in server.ports.items()
        }
        return Running([client], endpoints)
