"""Looking up tunnels at peers, and three servers that forward to each other."""

from __future__ import annotations

import http.client
import http.server
import json
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import gevent
import pytest
from free_ports import free_ports
from raw_client import RawClient
from support import DEADLINE, eventually, in_time

from tinytun_gevent import Tunnel, TunnelServer
from tinytun_gevent.background import run_in_hub
from tinytun_gevent.server import peers as peers_module
from tinytun_gevent.server.addresses import is_local
from tinytun_gevent.server.config import ServerConfig
from tinytun_gevent.server.peers import Peer, Peers
from tinytun_gevent.wire import proxyproto


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that is there may answer as late as the machine makes it; `brief` is for those that never do."""
    assert peers_module.ASK_TIMEOUT == 0.5
    monkeypatch.setattr(peers_module, "ASK_TIMEOUT", DEADLINE)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch, patience: None) -> None:
    """Whoever waits for a silent peer, waits for a moment."""
    monkeypatch.setattr(peers_module, "ASK_TIMEOUT", 0.1)


class FakePeer:
    """A metadata port whose answers the test chooses; counts what it is asked."""

    def __init__(self, answer: Callable[[str], bytes | None]) -> None:
        self.asked: list[str] = []
        fake = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                path = self.rfile.readline().split()[1].decode()
                while self.rfile.readline().strip():
                    pass
                fake.asked.append(path)
                reply = answer(path)
                if reply is None:
                    fake.released.wait(DEADLINE)  # silence
                else:
                    self.wfile.write(reply)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True

        self.released = threading.Event()
        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


def tunnel_json(name: dict[str, str | int]) -> bytes:
    body = json.dumps({"id": "0" * 32, "name": name, "read_bytes": 0, "written_bytes": 0}).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body)


NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


def has(*names: str | int) -> Callable[[str], bytes]:
    """A peer that has these tunnels."""

    def answer(path: str) -> bytes:
        for name in names:
            if isinstance(name, int) and path == f"/tunnels/:{name}":
                return tunnel_json({"PortNumber": name})
            if path == f"/tunnels/{name}":
                return tunnel_json({"Subdomain": name})
        return NOT_FOUND

    return answer


@contextmanager
def asking(*fakes: FakePeer, extra: str = "") -> Iterator[Peers]:
    """A `Peers` that asks the fakes; its methods must be called through `run_in_hub`."""
    entries = ",".join(f"127.0.0.1:{fake.port}:1001:1002" for fake in fakes)
    config = ServerConfig(peers=entries + extra, metadata_port=1)  # type: ignore[arg-type]
    peers = run_in_hub(Peers, config)
    run_in_hub(peers.start)
    try:
        yield peers
    finally:
        run_in_hub(peers.stop)
        for fake in fakes:
            fake.close()


def find(peers: Peers, name: str | int) -> Peer | None:
    return run_in_hub(peers.find, name)


def test_without_peers_nobody_has_anything() -> None:
    peers = run_in_hub(Peers, ServerConfig())
    assert not peers
    assert find(peers, "app") is None
    assert not peers.is_peer("127.0.0.1")


def test_the_peer_that_has_the_tunnel_is_found_by_name_and_by_port() -> None:
    one, two = FakePeer(has("app")), FakePeer(has(30000))
    with asking(one, two) as peers:
        assert find(peers, "app") == Peer("127.0.0.1", one.port, 1001, 1002)
        assert find(peers, 30000) == Peer("127.0.0.1", two.port, 1001, 1002)
        assert find(peers, "nobody") is None
        assert find(peers, "30000") is None
        assert peers.is_peer("127.0.0.1")
        assert not peers.is_peer("127.0.0.2")


def test_a_port_is_not_taken_for_a_name_of_digits() -> None:
    confused = FakePeer(lambda path: tunnel_json({"PortNumber": 30000}))
    with asking(confused) as peers:
        assert find(peers, "30000") is None
        assert find(peers, "app") is None
        assert find(peers, 30000) is not None


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense",
        b"HTTP/1.1 200 OK\r\n\r\nnot json",
        b"HTTP/1.1 200 OK\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\n\r\n\xff",
        b"HTTP/1.1 500 Oops\r\n\r\n",
        b"HTTP/1.1 421 Misdirected Request\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 100_000,
        b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 60_000,
    ],
)
def test_a_broken_peer_hides_nobody(answer: bytes) -> None:
    broken, good = FakePeer(lambda path: answer), FakePeer(has("app"))
    with asking(broken, good) as peers:
        assert find(peers, "nobody") is None  # without waiting for the rest of its answer
        assert find(peers, "app") is not None
        assert broken.asked


@pytest.mark.usefixtures("brief")
def test_a_silent_peer_is_given_up() -> None:
    silent = FakePeer(lambda path: None)
    with asking(silent) as peers:
        assert find(peers, "nobody") is None
        assert silent.asked


def test_a_peer_that_is_down_hides_nobody() -> None:
    good = FakePeer(has("app"))
    with asking(good, extra=",127.0.0.1:9") as peers:
        assert find(peers, "app") is not None
        assert find(peers, "nobody") is None


def test_the_finder_does_not_wait_for_the_silent() -> None:
    silent, good = FakePeer(lambda path: None), FakePeer(has("app"))
    with asking(silent, good) as peers:
        run_in_hub(peers._resolved.wait, DEADLINE)
        found = in_time(lambda: find(peers, "app"), DEADLINE / 2)  # the silent one has twice as long
        assert found is not None


@pytest.mark.usefixtures("brief")
def test_a_peer_that_failed_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "REST_AFTER_FAILURE", DEADLINE)
    silent = FakePeer(lambda path: None)
    with asking(silent) as peers:
        find(peers, "one")
        find(peers, "two")
        assert len(silent.asked) == 1
        monkeypatch.setattr(peers_module, "REST_AFTER_FAILURE", 0.0)
        run_in_hub(peers._resting.clear)
        find(peers, "three")
        find(peers, "four")
        assert len(silent.asked) == 3


def test_answers_are_remembered_and_many_askers_are_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakePeer(has("app"))

    def ask_at_once(peers: Peers) -> list[Peer | None]:
        askers = [gevent.spawn(peers.find, "app") for _ in range(20)]
        gevent.joinall(askers, timeout=DEADLINE)
        return [asker.value for asker in askers]

    with asking(fake) as peers:
        assert all(run_in_hub(ask_at_once, peers))
        assert find(peers, "app") is not None
        assert find(peers, "gone") is None
        assert find(peers, "gone") is None
        assert fake.asked == ["/tunnels/app", "/tunnels/gone"]
        run_in_hub(peers.forget, "app")
        assert find(peers, "app") is not None
        assert fake.asked.count("/tunnels/app") == 2


def test_answers_are_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (peers_module.KEEP_FOUND, peers_module.KEEP_MISSING) == (5.0, 1.0)
    monkeypatch.setattr(peers_module, "KEEP_FOUND", 0.0)
    monkeypatch.setattr(peers_module, "KEEP_MISSING", 0.0)
    fake = FakePeer(has("app"))
    with asking(fake) as peers:
        for name in ("app", "app", "gone", "gone"):
            find(peers, name)
        assert len(fake.asked) == 4


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "MAX_REMEMBERED", 3)
    fake = FakePeer(has())
    with asking(fake) as peers:
        for number in range(10):
            find(peers, f"name-{number}")
        assert list(peers._known) == ["name-7", "name-8", "name-9"]


def test_lookups_at_once_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "MAX_ASKING", 2)
    silent = FakePeer(lambda path: None)

    def ask_many(peers: Peers) -> None:
        first = [gevent.spawn(peers.find, name) for name in ("a", "b")]
        while peers._asking < 2:
            gevent.sleep(0)
        assert peers.find("c") is None
        assert not any(asker.ready() for asker in first), "the third one waited"
        silent.released.set()
        gevent.joinall(first, timeout=DEADLINE)

    with asking(silent) as peers:
        run_in_hub(ask_many, peers)


def resolver(table: dict[str, list[str]]) -> Callable[..., Any]:
    def getaddrinfo(host: str, *_: object) -> list[tuple[Any, ...]]:
        if host not in table:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 0)) for ip in table[host]]

    return getaddrinfo


def test_a_dns_name_stands_for_all_its_addresses_but_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"tinytun.internal": ["127.0.0.1", "203.0.113.1", "203.0.113.2", "::ffff:203.0.113.2"]}
    monkeypatch.setattr(peers_module.socket, "getaddrinfo", resolver(table))
    config = ServerConfig(peers="tinytun.internal,missing.internal", metadata_bind="::")  # type: ignore[arg-type]
    peers = run_in_hub(Peers, config)
    expected = tuple(Peer(ip, 5553, 5555, 5556) for ip in ("203.0.113.1", "203.0.113.2"))
    assert run_in_hub(peers._resolve) == expected
    del table["tinytun.internal"]
    assert run_in_hub(peers._resolve) == expected  # a name server that is away makes nobody disappear
    table["tinytun.internal"] = ["203.0.113.3"]
    assert run_in_hub(peers._resolve) == (Peer("203.0.113.3", 5553, 5555, 5556),)


def test_ourselves_is_the_address_that_we_answer_on() -> None:
    config = ServerConfig(
        peers="127.0.0.1,127.0.0.2,127.0.0.1:7",
        metadata_bind="127.0.0.1",  # type: ignore[arg-type]
    )
    peers = run_in_hub(Peers, config)
    hosts = [(peer.host, peer.metadata_port) for peer in run_in_hub(peers._resolve)]
    assert hosts == [("127.0.0.2", 5553), ("127.0.0.1", 7)]


# -- three servers ------------------------------------------------------------

BALANCER = "127.0.0.2"
"""A load balancer's address: trusted, but no peer, as all three servers are at 127.0.0.1."""


@pytest.fixture
def cluster() -> Iterator[list[TunnelServer]]:
    """Three servers on this machine that know each other."""
    ports = free_ports(12)
    quads = [ports[start : start + 4] for start in (0, 4, 8)]
    everybody = ",".join(f"127.0.0.1:{meta}:{http}:{tcp}" for meta, http, tcp, _ in quads)
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                TunnelServer(
                    bind="127.0.0.1",
                    metadata_port=meta,
                    proxy_port=http,
                    tcp_proxy_port=tcp,
                    connection_port=connection,
                    base_domains="localhost",
                    peers=everybody,
                    tcp_listen=False,
                    trusted_proxies=BALANCER,
                )
            )
            for meta, http, tcp, connection in quads
        ]


class Page(http.server.BaseHTTPRequestHandler):
    """Answers with the fields that it was sent."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"] or 0)
        body = json.dumps(
            {
                "body": self.rfile.read(length).decode(),
                "fields": {k.lower(): v for k, v in self.headers.items()},
            }
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def page() -> Iterator[int]:
    """The port of a local web service."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield int(server.server_address[1])
        server.shutdown()


def visit(
    connection: http.client.HTTPConnection, host: str, body: str | None = None, **fields: str
) -> tuple[int, Any]:
    connection.request("POST" if body else "GET", "/", body=body, headers={"Host": host} | fields)
    answer = connection.getresponse()
    text = answer.read()
    return answer.status, json.loads(text)


def test_a_visitor_is_forwarded_to_the_peer_that_has_the_tunnel(
    cluster: list[TunnelServer], page: int
) -> None:
    _, second, third = cluster
    with (
        Tunnel(page, server=second.url, subdomain="here"),
        Tunnel(page, server=third.url, subdomain="there"),
    ):
        for server in cluster:
            connection = http.client.HTTPConnection("127.0.0.1", server.proxy_port, timeout=DEADLINE)
            for name in ("here", "there", "here"):
                status, seen = visit(connection, f"{name}.localhost", f"to {name}")
                assert (status, seen["body"]) == (200, f"to {name}")
                assert seen["fields"]["x-forwarded-host"] == f"{name}.localhost"
                assert seen["fields"]["x-forwarded-for"] == "127.0.0.1"
            connection.close()


def test_a_name_that_nobody_has_is_asked_once_around_and_not_found(cluster: list[TunnelServer]) -> None:
    for server in cluster:
        connection = http.client.HTTPConnection("127.0.0.1", server.proxy_port, timeout=DEADLINE)
        assert visit(connection, "nobody.localhost", Accept="application/json")[0] == 404
        connection.close()


def test_a_forwarded_request_is_not_forwarded_again(cluster: list[TunnelServer], page: int) -> None:
    first, second, _ = cluster
    with Tunnel(page, server=first.url, subdomain="app"):
        connection = http.client.HTTPConnection("127.0.0.1", second.proxy_port, timeout=DEADLINE)
        hop = {"X-Tinytun-Hop": "1", "Accept": "application/json"}
        assert visit(connection, "app.localhost", **hop)[0] == 404  # from a peer: nobody is asked
        assert visit(connection, "app.localhost")[0] == 200
        connection.close()


def test_a_tunnel_that_has_moved_is_found_at_its_new_place(
    cluster: list[TunnelServer], page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers_module, "KEEP_FOUND", 0.1)
    monkeypatch.setattr(peers_module, "KEEP_MISSING", 0.1)
    first, second, third = cluster
    connection = http.client.HTTPConnection("127.0.0.1", first.proxy_port, timeout=DEADLINE)
    for place in (second, third):
        with Tunnel(page, server=place.url, subdomain="app"):

            def is_found() -> bool:
                status, _ = visit(connection, "app.localhost", Accept="application/json")
                assert status in (200, 404, 503)
                return status == 200

            eventually(is_found, what="the new place")
    connection.close()


def test_a_client_who_was_lost_here_is_found_at_his_new_place(cluster: list[TunnelServer], page: int) -> None:
    """The name is still leased where he was, but he has gone to another node."""
    first, second, _ = cluster
    with RawClient(first, "app", resume=b""):
        pass
    eventually(lambda: first.registry.tunnels["app"].leased_until is not None)
    connection = http.client.HTTPConnection("127.0.0.1", first.proxy_port, timeout=DEADLINE)
    with Tunnel(page, server=second.url, subdomain="app"):
        assert visit(connection, "app.localhost")[0] == 200
    connection.close()


@contextmanager
def echo_service() -> Iterator[int]:
    class Echo(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while data := self.request.recv(4096):
                self.request.sendall(data.upper())

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield int(server.server_address[1])
        server.shutdown()


@pytest.mark.skipif(not is_local(BALANCER), reason=f"{BALANCER} is no address of this machine")
@pytest.mark.parametrize("lost", [False, True], ids=["elsewhere", "lost here"])
def test_a_tcp_visitor_is_forwarded_to_the_peer_that_has_the_port(
    cluster: list[TunnelServer], lost: bool
) -> None:
    first, second, _ = cluster
    with echo_service() as target, Tunnel(target, kind="tcp", server=second.url) as tunnel:
        port = int(str(tunnel.url).rpartition(":")[2])
        if lost:
            with RawClient(first, port=port, resume=b""):
                pass
            eventually(lambda: first.registry.tunnels[port].leased_until is not None)
        header = proxyproto.build_v2(("192.0.2.9", 1234), ("198.51.100.1", port))
        for server in (first, second):
            place = ("127.0.0.1", server.tcp_proxy_port)
            with socket.create_connection(place, DEADLINE, source_address=(BALANCER, 0)) as sock:
                sock.sendall(header + b"hello")
                assert sock.recv(100) == b"HELLO"
                sock.sendall(b"again")
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(100) == b"AGAIN"
                assert sock.recv(100) == b""


def test_a_silent_peer_is_waited_for_only_where_nobody_else_has_the_name(
    page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, ExitStack() as stack:
        meta, *_ = free_ports(1)
        other = stack.enter_context(
            TunnelServer(
                bind="127.0.0.1",
                metadata_port=meta,
                connection_port=0,
                proxy_port=0,
                tcp_proxy_port=0,
                base_domains="localhost",
                peers="127.0.0.1:9",
            )
        )
        asked = stack.enter_context(
            TunnelServer(
                bind="127.0.0.1",
                metadata_port=0,
                connection_port=0,
                proxy_port=0,
                tcp_proxy_port=0,
                base_domains="localhost",
                peers=f"127.0.0.1:{silent.getsockname()[1]},127.0.0.1:{meta}:{other.proxy_port}",
            )
        )
        stack.enter_context(Tunnel(page, server=other.url, subdomain="app"))
        connection = http.client.HTTPConnection("127.0.0.1", asked.proxy_port, timeout=DEADLINE / 2)
        assert visit(connection, "app.localhost", Accept="application/json")[0] == 200
        monkeypatch.setattr(peers_module, "ASK_TIMEOUT", 0.1)
        assert visit(connection, "nobody.localhost", Accept="application/json")[0] == 404
        connection.close()
