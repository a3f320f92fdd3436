"""bore (Rust): a TCP tunnel that opens a TCP connection from client to server for each visitor."""

from __future__ import annotations

import random
import socket

from ..processes import BenchmarkError, find
from ..way import Endpoint
from .base import LOCAL, Contender, Ground, Running, Server, three_times, with_relay

#: Where a bore server listens; it cannot be told otherwise. The address is free, and loopback has many.
CONTROL_PORT = 7835


def free_address() -> str:
    """An address of loopback where nobody listens on `CONTROL_PORT`; BenchmarkError if there is none."""
    for _ in range(20):
        address = f"127.{random.randint(1, 254)}.{random.randint(1, 254)}.{random.randint(2, 254)}"  # nosec B311 # any
        with socket.socket() as probe:
            try:
                probe.bind((address, CONTROL_PORT))
            except OSError:
                continue
            return address
    raise BenchmarkError(f"port {CONTROL_PORT}, the only one that bore can use, is taken")


class Bore(Contender):
    """One server, and a client for each service."""

    name = "bore"
    programs = ("bore",)

    def start_server(self, ground: Ground) -> Server:
        server = three_times(lambda: self._listen(ground))
        # The client uses the same port in front of the relay, so that must be at another address.
        return with_relay(ground, server, free_address(), CONTROL_PORT)

    def _listen(self, ground: Ground) -> Server:
        address = free_address()
        command = [str(find("bore")), "server", "--bind-addr", address, "--bind-tunnels", LOCAL]
        server = ground.workspace.start("bore-server", command)
        server.expect("server listening")
        return Server([server], host=address, port=CONTROL_PORT)

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
