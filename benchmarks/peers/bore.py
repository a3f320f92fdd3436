"""bore (Rust): a TCP tunnel that opens a TCP connection from client to server for each visitor."""

from __future__ import annotations

from ..processes import BenchmarkError, accepts, find
from ..way import Endpoint
from .base import LOCAL, Contender, Ground, Running, Server, with_relay

#: Where a bore server listens; it cannot be told otherwise.
CONTROL_PORT = 7835
#: Where the relay of a long path listens: the same port, so it must be another address.
RELAY_HOST = "127.0.0.2"


class Bore(Contender):
    """One server, and a client for each service. Only one server may run on a machine."""

    name = "bore"
    programs = ("bore",)

    def start_server(self, ground: Ground) -> Server:
        if accepts(CONTROL_PORT):
            raise BenchmarkError(f"port {CONTROL_PORT}, the only one that bore can use, is taken")
        command = [str(find("bore")), "server", "--bind-addr", LOCAL]
        server = ground.workspace.start("bore-server", command)
        server.expect_port(CONTROL_PORT)
        return with_relay(ground, Server([server], port=CONTROL_PORT), RELAY_HOST, CONTROL_PORT)

    def start_client(self, ground: Ground, server: Server) -> Running:
        clients = {}
        for name, port in ground.services.items():
            command = [str(find("bore")), "local", str(port), "--local-host", LOCAL, "--to", server.host]
            clients[name] = ground.workspace.start(f"bore-{name}", command)
        endpoints = {
            name: Endpoint(int(client.expect(r"\blistening at [\d.]+:(\d+)")[1]))
            for name, client in clients.items()
        }
        return Running(list(clients.values()), endpoints)
