"""Processes that run out of descriptors: nobody is lost, nothing spins, and it passes."""

from __future__ import annotations

import resource
import threading

import psutil
from helpers import Process
from server_process import COMMAND, ServerProcess
from storms import Crowd, idle
from support import Peer, Service, answering, eventually, get, read_response, request, respond

FEW = 256
SCARCE = "no connection can be accepted: Too many open files"


def client(server: ServerProcess, service: Service, name: str, *options: str) -> Process:
    process = Process("tinytun", "http", service.target, "-s", name, "--server", server.url, *options)
    process.wait_line(f"http://{name}\\.", stderr=False)
    return process


def rests(pid: int) -> bool:
    """Whether a process uses less than a tenth of a processor, by a look of half a second."""
    process = psutil.Process(pid)
    before = process.cpu_times()
    threading.Event().wait(0.5)
    after = process.cpu_times()
    return after.user + after.system - before.user - before.system < 0.05


def test_a_server_out_of_descriptors() -> None:
    limited = ("sh", "-c", f'ulimit -n {FEW} && exec "$0" "$@"', *COMMAND)
    with (
        ServerProcess(command=limited).wait_serving() as server,
        Service(answering(lambda _: respond(b"here"))) as service,
        Crowd() as crowd,
    ):
        first = client(server, service, "demo")
        second = None
        try:
            with idle(server.proxy_port, 1) as kept:
                (before,) = server.tunnels()
                for _ in range(2 * FEW):
                    crowd.join(server.proxy_port)
                server.wait_line(SCARCE)
                eventually(lambda: rests(server.worker()), what="it spins")
                (visitor,) = kept.sockets
                visitor.sendall(request("demo"))
                assert read_response(visitor).body == b"here"
                second = client(server, service, "other")
                assert before["id"] in {tunnel["id"] for tunnel in server.tunnels()}
            for sock in crowd.sockets:
                sock.close()
            assert get(server.proxy_port).body == b"here"
            assert get(server.proxy_port, "other").body == b"here"
            assert server.log().count(SCARCE) == 1
            assert not any("reconnecting" in line for line in first.stderr)
        finally:
            first.kill()
            if second is not None:
                second.kill()


def test_a_client_out_of_descriptors() -> None:
    """Whoever has no connection to the service is told so; the others and the tunnel go on."""
    go_on = threading.Event()
    room = 10

    def script(peer: Peer) -> None:
        while (got := peer.read_request()) is not None:
            if got.target == b"/slow":
                go_on.wait(60)
            peer.sendall(respond(b"here"))

    with ServerProcess().wait_serving() as server, Service(script) as service, Crowd() as crowd:
        process = client(server, service, "demo", "--sessions", "1")
        try:
            assert get(server.proxy_port).status == 200
            open_now = psutil.Process(process.pid).num_fds()
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (open_now + room, open_now + room))
            for _ in range(3 * room):
                crowd.join(server.proxy_port).sendall(request("demo", "/slow"))
            eventually(lambda: len(service.peers) >= room)
            eventually(lambda: crowd.still_open() <= 2 * room)  # an answer waits to be read at the others
            eventually(lambda: rests(process.pid), what="it spins")
            go_on.set()
            statuses = [read_response(sock).status for sock in crowd.sockets]
            assert set(statuses) == {200, 502}
            assert room - 2 <= statuses.count(200) <= room + 2
            assert get(server.proxy_port).body == b"here"
            assert not any("reconnecting" in line for line in process.stderr)
        finally:
            process.kill()
