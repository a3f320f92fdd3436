"""chisel (Go): SSH inside a WebSocket; all visitors of a client share one TCP connection."""

from __future__ import annotations

from ..processes import find, free_port
from ..way import Endpoint
from .base import LOCAL, Contender, Ground, Running, Server, three_times, with_relay


class Chisel(Contender):
    """``chisel server --reverse``; one client with a reverse port for each service. It always encrypts."""

    name = "chisel"
    programs = ("chisel",)
    descriptors = 1

    def start_server(self, ground: Ground) -> Server:
        return with_relay(ground, three_times(lambda: self._listen(ground)))

    def _listen(self, ground: Ground) -> Server:
        port = free_port()
        command = [str(find("chisel")), "server", "--reverse", "--host", LOCAL, "--port", str(port)]
        server = ground.workspace.start("chisel-server", command)
        server.expect_port(port)
        return Server([server], port=port, ports={name: free_port() for name in ground.services})

    def start_client(self, ground: Ground, server: Server) -> Running:
        command = [str(find("chisel")), "client", f"http://{server.host}:{server.port}"]
        command += [
            f"R:{LOCAL}:{server.ports[name]}:{LOCAL}:{port}" for name, port in ground.services.items()
        ]
        client = ground.workspace.start("chisel-client", command)
        return Running([client], {name: Endpoint(port) for name, port in server.ports.items()})
