"""What is no tunnel: what the machine, the services and the load generators can do without one."""

from __future__ import annotations

from ..processes import BenchmarkError, Process, find, free_port
from ..way import Endpoint
from .base import LOCAL, Contender, Ground, Role, Running, Server, three_times

#: Connections that each HAProxy may have; it reserves descriptors for two ends of all of them.
CONNECTIONS = 4000

_HAPROXY = """\
global
    nbthread 1
    maxconn {connections}
defaults
    mode tcp
    maxconn {connections}
    timeout connect 10s
    timeout client 300s
    timeout server 300s
"""


class ChainedHaproxy(Contender):
    """Two HAProxy in TCP mode, one behind the other: what two processes on the way cost at least."""

    name = "haproxy x2"
    role = Role.ANCHOR
    programs = ("haproxy",)

    def start_server(self, ground: Ground) -> Server:
        """The first HAProxy; the second one's ports are chosen here, since it must know them."""
        return three_times(lambda: self._listen(ground))

    def _listen(self, ground: Ground) -> Server:
        inner = {name: free_port() for name in ground.services}
        outer = {name: free_port() for name in ground.services}
        process = _start(ground, "haproxy-outer", {outer[name]: inner[name] for name in inner})
        return Server([process], ports={**outer, **{f"to {name}": port for name, port in inner.items()}})

    def start_client(self, ground: Ground, server: Server) -> Running:
        ways = {server.ports[f"to {name}"]: port for name, port in ground.services.items()}
        process = _start(ground, "haproxy-inner", ways)
        return Running([process], {name: Endpoint(server.ports[name]) for name in ground.services})


def _start(ground: Ground, name: str, ways: dict[int, int]) -> Process:
    """An HAProxy that leads from each port to another; returns when it listens."""
    text = _HAPROXY.format(connections=min(CONNECTIONS, (ground.files - 200) // 2))
    for port, target in ways.items():
        text += f"listen from{port}\n    bind {LOCAL}:{port} backlog 2048\n    server it {LOCAL}:{target}\n"
    config = ground.workspace.folder / f"{name}.cfg"
    config.write_text(text)
    process = ground.workspace.start(name, [str(find("haproxy")), "-db", "-q", "-f", str(config)])
    for port in ways:
        process.expect_port(port)
    if process.ended():
        raise BenchmarkError(process.last_words())
    return process


class Direct(Contender):
    """Nothing between the visitor and the service."""

    name = "direct"
    role = Role.ANCHOR
    descriptors = 0

    def start_server(self, ground: Ground) -> Server:
        return Server([])

    def start_client(self, ground: Ground, server: Server) -> Running:
        return Running([], {name: Endpoint(port) for name, port in ground.services.items()})
