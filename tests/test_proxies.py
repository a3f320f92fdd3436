"""HAProxy and nginx in front, in every way that they can tell who comes, and visitors who lie to them.

One HAProxy and one nginx stand before two servers: one that believes 127.0.0.1, reached over IPv4, and
one that believes ::1, reached over IPv6.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from free_ports import free_ports, free_tunnel_ports
from h2.events import RequestReceived
from raw_client import RawClient
from support import DEADLINE, Response, Service, eventually, read_response, request
from test_real_programs import PATH, daemon, listens, told

from tinytun_gevent import Tunnel, TunnelServer
from tinytun_gevent.server.addresses import has_ipv6, is_local
from tinytun_gevent.server.tally import Refusal

VISITOR = "127.0.0.2"
"""Where visitors are: not where the proxies are, whom the servers believe."""

STREAM_MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")

pytestmark = [
    pytest.mark.skipif(not is_local(VISITOR), reason=f"{VISITOR} is no address of this machine"),
    pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6"),
]


@dataclass(frozen=True)
class Way:
    """One way through a proxy to a server."""

    program: str
    #: How it says who comes: ``fields``, or the PROXY protocol's ``v1`` or ``v2``.
    how: str
    #: The port of the server that it leads to: ``http``, ``tcp`` or ``clients``.
    to: str
    #: Over which family of addresses.
    over: int = 4

    def __str__(self) -> str:
        return f"{self.program} {self.how} {self.to} over IPv{self.over}"


WAYS = [
    *(Way("haproxy", "fields", "http", over) for over in (4, 6)),
    *(
        Way("haproxy", how, to, over)
        for how in ("v1", "v2")
        for to in ("http", "tcp", "clients")
        for over in (4, 6)
    ),
    *(Way("nginx", "fields", "http", over) for over in (4, 6)),
    *(Way("nginx", "v1", to, over) for to in ("http", "tcp", "clients") for over in (4, 6)),
]


def ways(to: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("way", [way for way in WAYS if way.to == to], ids=str)


class Stage:
    """Two servers with tunnels, and the proxies before them."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path) -> None:
        tcp_ways = [way for way in WAYS if way.to == "tcp"]
        others = [way for way in WAYS if way.to != "tcp"]
        #: Where visitors of each way come to. That of a TCP tunnel is the tunnel's own.
        self.ports = dict(zip(tcp_ways, free_tunnel_ports(len(tcp_ways)), strict=True))
        self.ports |= dict(zip(others, free_ports(len(others)), strict=True))
        service = stack.enter_context(Service(told("demo")))
        self.servers = {
            over: stack.enter_context(
                TunnelServer(
                    bind="[::]",
                    trusted_proxies=proxy,
                    tcp_listen="off",
                    base_domains="localhost",
                    connection_port=0,
                    proxy_port=0,
                    tcp_proxy_port=0,
                    metadata_port=0,
                )
            )
            for over, proxy in ((4, "127.0.0.1"), (6, "::1"))
        }
        for server in self.servers.values():
            tunnel = Tunnel(service.port, server=server.url, subdomain="demo", proxy="")
            stack.enter_context(tunnel)
        self.clients = {
            way: stack.enter_context(RawClient(self.servers[way.over], port=self.ports[way]))
            for way in tcp_ways
        }
        for start in (self._haproxy, self._nginx):
            stack.enter_context(start(folder))

    def _target(self, way: Way) -> str:
        server = self.servers[way.over]
        port = {"http": server.proxy_port, "tcp": server.tcp_proxy_port, "clients": server.connection_port}
        return f"{'127.0.0.1' if way.over == 4 else '[::1]'}:{port[way.to]}"

    def _listening(self, program: str) -> bool:
        """Whether a proxy is up. No TCP tunnel is asked, whose client would see it as a visitor."""
        return all(listens(self.ports[way]) for way in WAYS if way.program == program and way.to != "tcp")

    @contextlib.contextmanager
    def _haproxy(self, folder: Path) -> Iterator[None]:
        text = (
            "global\n maxconn 200\ndefaults\n timeout connect 5s\n timeout client 30s\n timeout server 30s\n"
        )
        for number, (way, port) in enumerate(self.ports.items()):
            if way.program == "haproxy":
                text += f"listen way{number}\n bind 127.0.0.1:{port}\n bind [::1]:{port}\n"
                text += HAPROXY[way.how].format(target=self._target(way))
        (folder / "haproxy.cfg").write_text(text)
        command = (_program("haproxy"), "-db", "-f", str(folder / "haproxy.cfg"))
        with daemon(*command, ready=lambda: self._listening("haproxy")):
            yield

    @contextlib.contextmanager
    def _nginx(self, folder: Path) -> Iterator[None]:
        blocks = {"http": "", "stream": ""}
        for way, port in self.ports.items():
            if way.program == "nginx":
                kind = "http" if way.how == "fields" else "stream"
                listening = f"listen 127.0.0.1:{port}; listen [::1]:{port};"
                blocks[kind] += f"server {{ {listening} {NGINX[kind].format(target=self._target(way))} }}\n"
        load = f"load_module {STREAM_MODULE};" if STREAM_MODULE.exists() else ""
        temporary = "".join(
            f"{kind}_temp_path {folder / kind}; "
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (folder / "nginx.conf").write_text(
            f"{load} daemon off; master_process off; pid {folder / 'pid'}; error_log stderr; events {{ }}\n"
            f"http {{ access_log off; {temporary}\n{blocks['http']} }}\nstream {{\n{blocks['stream']} }}\n"
        )
        command = (_program("nginx"), "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf"))
        with daemon(*command, ready=lambda: self._listening("nginx")):
            yield

    def connect(self, way: Way, host: str) -> socket.socket:
        """A visitor's connection to a proxy, from the address ``host``."""
        proxy = "::1" if ":" in host else "127.0.0.1"
        return socket.create_connection((proxy, self.ports[way]), DEADLINE, source_address=(host, 0))

    def refusals(self, way: Way) -> int:
        return self.servers[way.over].core.tally.refusals[Refusal.PROXY_HEADER]


HAPROXY = {
    "fields": """ mode http
 http-request del-header Forwarded
 http-request set-header X-Forwarded-For %[src]
 http-request set-header X-Forwarded-Proto %[ssl_fc,iif(https,http)]
 http-request set-header X-Forwarded-Host %[req.hdr(host)]
 http-request set-header X-Forwarded-Port %[dst_port]
 http-reuse always
 server one {target}
""",
    "v1": " mode tcp\n server one {target} send-proxy\n",
    "v2": " mode tcp\n server one {target} send-proxy-v2\n",
}

NGINX = {
    "http": """location / {{
  proxy_pass http://{target}; proxy_http_version 1.1; proxy_set_header Connection "";
  proxy_set_header Host $http_host; proxy_set_header Forwarded "";
  proxy_set_header X-Forwarded-For $remote_addr; proxy_set_header X-Forwarded-Proto $scheme;
  proxy_set_header X-Forwarded-Host $http_host; proxy_set_header X-Forwarded-Port $server_port; }}""",
    "stream": "proxy_pass {target}; proxy_protocol on;",
}


def _program(name: str) -> str:
    """Where a program is; the test is skipped if it is nowhere, or cannot do what it must."""
    found = shutil.which(name, path=PATH)
    if found is None:
        pytest.skip(f"{name} is not installed")
    if name == "nginx" and not STREAM_MODULE.exists():
        said = subprocess.run([found, "-V"], capture_output=True, text=True, check=True).stderr
        if not re.search(r"--with-stream(\s|$)", said):
            pytest.skip("nginx has no stream module")
    return found


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with contextlib.ExitStack() as stack:
        yield Stage(stack, tmp_path_factory.mktemp("proxies"))


LIES = (
    b"X-Forwarded-For: 6.6.6.6",
    b"x-forwarded-for: 6.6.6.7, 127.0.0.1",
    b"X-Forwarded-Proto: https",
    b"X-Forwarded-Host: evil.example",
    b"X-Forwarded-Port: 666",
    b"X_Forwarded_For: 6.6.6.6",
    b"X-Real-IP: 6.6.6.6",
    b"Forwarded: for=6.6.6.6;proto=https",
    b"X-Tinytun-Hop: 1",
    b"Connection: X-Forwarded-For, X-Forwarded-Port",
)

HEADERS = (
    b"PROXY TCP4 6.6.6.6 6.6.6.7 666 667\r\n",
    b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes([6] * 12),
)
"""What somebody sends who takes himself for a proxy."""


def about_the_visitor(answer: Response) -> dict[str, str]:
    """What the service was told of him; nothing of what he says himself."""
    assert answer.status == 200, answer
    fields: dict[str, str] = json.loads(answer.body)["fields"]
    assert not any("6.6.6" in value or "evil" in value or "666" in value for value in fields.values()), fields
    assert not {"x-real-ip", "forwarded", "x_forwarded_for", "x-tinytun-hop"} & set(fields)
    return {name[12:]: value for name, value in fields.items() if name.startswith("x-forwarded-")}


BOTH = [(way, visitor) for way in WAYS for visitor in (VISITOR, "::1") if (way.over, visitor) != (6, "::1")]


def matrix(to: str) -> pytest.MarkDecorator:
    """Every way to that port, with visitors of both families who are not themselves trusted."""
    cases = [pytest.param(way, visitor, id=f"{way} from {visitor}") for way, visitor in BOTH if way.to == to]
    return pytest.mark.parametrize(("way", "visitor"), cases)


@matrix("http")
def test_the_service_of_an_http_tunnel_is_told_who_comes(stage: Stage, way: Way, visitor: str) -> None:
    with stage.connect(way, visitor) as sock:
        for fields in ((), LIES, ()):  # over one connection
            sock.sendall(request("demo", "/", *fields))
            assert about_the_visitor(read_response(sock)) == {
                "for": visitor,
                "port": str(stage.ports[way]),
                "proto": "http",
                "host": "demo.localhost",
            }


@matrix("http")
@pytest.mark.parametrize("header", HEADERS, ids=["v1", "v2"])
def test_a_visitor_who_sends_a_proxy_header_himself_gets_nothing(
    stage: Stage, way: Way, visitor: str, header: bytes
) -> None:
    before = stage.refusals(way)
    with stage.connect(way, visitor) as sock:
        sock.sendall(header + request())
        assert read_response(sock).status == 400
    assert stage.refusals(way) - before == (way.how != "fields")  # else it got no further than to the proxy


@matrix("tcp")
def test_the_client_of_a_tcp_tunnel_is_told_who_comes(stage: Stage, way: Way, visitor: str) -> None:
    client = stage.clients[way]
    for first in (b"hello", *HEADERS):  # a visitor's own header is his bytes, like all others
        with stage.connect(way, visitor) as sock:
            port = sock.getsockname()[1]
            sock.sendall(first)
            event = client.next(RequestReceived)
            stream_id = event.stream_id or 0
            client.accept(stream_id)
            shown = f"[{visitor}]:{port}" if ":" in visitor else f"{visitor}:{port}"
            assert dict(event.headers)[b"x-tinytun-visitor"] == shown.encode()
            got = client.next_data(stream_id)
            while len(got) < len(first):
                got += client.next_data(stream_id)
            assert got == first
            client.send(stream_id, b"bye", end=True)
            assert sock.recv(10) == b"bye"


@matrix("clients")
def test_a_tunnel_client_is_known_by_its_own_address(stage: Stage, way: Way, visitor: str) -> None:
    registry = stage.servers[way.over].registry
    with stage.connect(way, visitor) as sock:
        sock.sendall(b"CONNECT server HTTP/1.1\r\nx-tinytun-type: http\r\nx-tinytun-subdomain: mine\r\n\r\n")
        assert sock.recv(12) == b"HTTP/1.1 101"
        shown = f"[{visitor}]" if ":" in visitor else visitor
        assert registry.tunnels["mine"].remote == f"{shown}:{sock.getsockname()[1]}"
    eventually(lambda: "mine" not in registry.tunnels)


@ways("clients")
@pytest.mark.parametrize("header", HEADERS, ids=["v1", "v2"])
def test_a_tunnel_client_cannot_say_it_himself(stage: Stage, way: Way, header: bytes) -> None:
    with stage.connect(way, VISITOR) as sock:
        sock.sendall(header + b"CONNECT server HTTP/1.1\r\nx-tinytun-type: http\r\n\r\n")
        assert read_response(sock).status == 400
    assert len(stage.servers[way.over].registry.tunnels) == 1 + len(
        [tcp for tcp in stage.clients if tcp.over == way.over]
    )


@pytest.mark.parametrize("over", [4, 6])
@pytest.mark.parametrize("header", HEADERS, ids=["v1", "v2"])
def test_whoever_goes_around_the_proxy_is_refused(stage: Stage, over: int, header: bytes) -> None:
    server = stage.servers[over]
    before = server.core.tally.refusals[Refusal.PROXY_HEADER]
    for port in (server.proxy_port, server.connection_port):
        with socket.create_connection(("127.0.0.1", port), DEADLINE, source_address=(VISITOR, 0)) as sock:
            sock.sendall(header)
            assert read_response(sock).status == 400
    assert server.core.tally.refusals[Refusal.PROXY_HEADER] == before + 2
    with socket.create_connection(
        ("127.0.0.1", server.proxy_port), DEADLINE, source_address=(VISITOR, 0)
    ) as sock:
        sock.sendall(request("demo", "/", *LIES))
        assert about_the_visitor(read_response(sock))["for"] == VISITOR
