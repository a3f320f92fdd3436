"""TCP tunnels end to end: their ports, their visitors, and the front behind a load balancer."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
from conftest import FastClock, OpenTunnel, StartServer, StartService
from free_ports import free_tunnel_ports
from h2.events import RequestReceived, StreamEnded
from helpers import MIB, RawPeer, data_frame, headers_frame
from hyperframe.frame import DataFrame, HeadersFrame, RstStreamFrame, SettingsFrame
from raw_client import RawClient
from support import DEADLINE, Peer, Script, connect, eventually, read_head, read_response, request, reset

from tinytun_gevent import Tunnel, TunnelServer
from tinytun_gevent.errors import NameTakenError, RefusedError
from tinytun_gevent.server.addresses import has_ipv6
from tinytun_gevent.wire.proxyproto import build_v2

PORTS = "20000-32000"
"""What a client may ask for, and away from the ports that the kernel gives to others."""


def port_of(tunnel: Tunnel) -> int:
    scheme, _, rest = tunnel.url.partition("://")
    assert scheme == "tcp"
    return int(rest.rpartition(":")[2])


def echo(peer: Peer) -> None:
    """Every byte comes back, and the end as well."""
    while data := peer.sock.recv(65536):
        peer.sock.sendall(data)
    peer.sock.shutdown(socket.SHUT_WR)


def is_bound(port: int) -> bool:
    try:
        with socket.create_server(("127.0.0.1", port)):
            return False
    except OSError:
        return True


def read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        assert piece, f"ended after {len(data)} of {count} bytes"
        data += piece
    return data


def ends_with_reset(sock: socket.socket) -> bool:
    """Reads to the end: True if it was a reset, False if it was clean."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        return True
    return False


def read_to_the_end(port: int) -> None:
    with connect(port) as visitor:
        while visitor.recv(65536):
            pass


@pytest.fixture
def server(start_server: StartServer) -> TunnelServer:
    return start_server(tcp_ports=PORTS, trusted_proxies="127.0.0.1")


@pytest.fixture
def open_tcp(open_tunnel: OpenTunnel, start_service: StartService) -> Callable[..., Tunnel]:
    def open_it(script: Script = echo, **options: object) -> Tunnel:
        return open_tunnel(start_service(script), kind="tcp", **options)

    return open_it


# -- ports --------------------------------------------------------------------


def test_a_tunnel_gets_a_port_that_the_server_listens_on(
    server: TunnelServer, open_tcp: Callable[..., Tunnel]
) -> None:
    tunnel = open_tcp()
    assert tunnel.url == f"tcp://127.0.0.1:{port_of(tunnel)}"
    assert port_of(tunnel) in range(20_000, 32_001)
    with connect(port_of(tunnel)) as visitor:
        visitor.sendall(b"hello")
        assert read_exactly(visitor, 5) == b"hello"


def test_a_wanted_port_is_given_and_free_again_at_once(
    server: TunnelServer, open_tcp: Callable[..., Tunnel]
) -> None:
    (wanted,) = free_tunnel_ports(1)
    for _ in range(3):
        tunnel = open_tcp(port=wanted)
        assert port_of(tunnel) == wanted
        with connect(wanted) as visitor:
            visitor.sendall(b"x")
            assert read_exactly(visitor, 1) == b"x"
        tunnel.close()
        assert not is_bound(wanted), "still bound after the tunnel was closed"
        assert server.registry.find_port(wanted) is None


def test_a_port_of_another_tunnel_or_of_another_program_is_refused(
    server: TunnelServer, open_tcp: Callable[..., Tunnel]
) -> None:
    taken = port_of(open_tcp())
    with socket.create_server(("127.0.0.1", free_tunnel_ports(1)[0])) as other:
        for port in (taken, other.getsockname()[1]):
            with pytest.raises(NameTakenError) as caught:
                open_tcp(port=port)
            assert caught.value.status == 409
            assert str(port) in str(caught.value)
        assert len(server.registry.tunnels) == 1, "a refused tunnel is still registered"


def test_a_port_out_of_range_is_refused(server: TunnelServer, open_tcp: Callable[..., Tunnel]) -> None:
    with pytest.raises(RefusedError) as caught:
        open_tcp(port=60_000)
    assert caught.value.status == 400


def test_a_random_port_avoids_what_other_programs_hold(
    start_server: StartServer, open_tcp: Callable[..., Tunnel]
) -> None:
    first = next(port for port in range(21_000, 32_000) if not any(map(is_bound, range(port, port + 6))))
    server = start_server(tcp_ports=f"{first}-{first + 5}")
    held = [socket.create_server(("127.0.0.1", first + step)) for step in (0, 1, 3, 4)]
    try:
        assert {port_of(open_tcp(server=server)) for _ in range(2)} == {first + 2, first + 5}
        with connect(server.connection_port) as client:
            client.sendall(b"CONNECT x:1 HTTP/1.1\r\nx-tinytun-type: tcp\r\n\r\n")
            refusal = read_response(client)
        assert refusal.status == 503
        assert refusal.get(b"retry-after") is not None
        assert len(server.registry.tunnels) == 2
    finally:
        for sock in held:
            sock.close()


def test_visitors_that_are_there_finish_while_the_port_is_free_already(
    server: TunnelServer, open_tcp: Callable[..., Tunnel]
) -> None:
    tunnel = open_tcp()
    port = port_of(tunnel)
    with connect(port) as visitor:
        visitor.sendall(b"before")
        assert read_exactly(visitor, 6) == b"before"
        closing = threading.Thread(target=tunnel.close)
        closing.start()
        eventually(lambda: server.registry.find_port(port) is None)
        eventually(lambda: not is_bound(port))
        visitor.sendall(b"after")
        assert read_exactly(visitor, 5) == b"after"
        visitor.shutdown(socket.SHUT_WR)
        assert visitor.recv(10) == b""
        closing.join(DEADLINE)
        assert not closing.is_alive()


@pytest.mark.parametrize(("kind", "listens"), [("tcp", False), ("tcp_port", True)])
def test_listening_for_tcp_tunnels_can_be_left_to_a_load_balancer(
    start_server: StartServer, kind: str, listens: bool
) -> None:
    server = start_server(tcp_listen="off", tcp_ports=PORTS)
    (port,) = free_tunnel_ports(1)
    with connect(server.connection_port) as client:
        client.sendall(
            f"CONNECT x:1 HTTP/1.1\r\nx-tinytun-type: {kind}\r\nx-tinytun-port: {port}\r\n\r\n".encode()
        )
        assert read_head(client).status == 101
        assert is_bound(port) is listens
    eventually(lambda: not is_bound(port))


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_a_port_on_all_addresses_serves_both_families(
    start_server: StartServer, open_tcp: Callable[..., Tunnel]
) -> None:
    tunnel = open_tcp(server=start_server(bind="[::]", tcp_ports=PORTS))
    for host in ("127.0.0.1", "::1"):
        with connect(port_of(tunnel), host) as visitor:
            visitor.sendall(b"hi")
            assert read_exactly(visitor, 2) == b"hi"


# -- visitors -----------------------------------------------------------------


def test_a_service_that_speaks_first_is_heard(server: TunnelServer, open_tcp: Callable[..., Tunnel]) -> None:
    def greet(peer: Peer) -> None:
        peer.sendall(b"220 ready\r\n")
        assert peer.until(b"\r\n") == b"QUIT\r\n"
        peer.sendall(b"221 bye\r\n")

    with connect(port_of(open_tcp(greet))) as visitor:
        assert read_exactly(visitor, 11) == b"220 ready\r\n"
        visitor.sendall(b"QUIT\r\n")
        assert read_exactly(visitor, 9) == b"221 bye\r\n"
        assert visitor.recv(10) == b""


def test_half_close_travels_both_ways(server: TunnelServer, open_tcp: Callable[..., Tunnel]) -> None:
    def sum_up(peer: Peer) -> None:
        peer.sendall(hashlib.sha256(peer.rest()).digest())

    with connect(port_of(open_tcp(sum_up))) as visitor:
        visitor.sendall(b"all of it")
        visitor.shutdown(socket.SHUT_WR)
        assert read_exactly(visitor, 32) == hashlib.sha256(b"all of it").digest()
        assert visitor.recv(10) == b""

    heard: list[bytes] = []

    def talk_then_listen(peer: Peer) -> None:
        peer.sendall(b"over to you")
        peer.sock.shutdown(socket.SHUT_WR)
        heard.append(peer.rest())

    with connect(port_of(open_tcp(talk_then_listen))) as visitor:
        assert read_exactly(visitor, 11) == b"over to you"
        assert visitor.recv(10) == b""
        visitor.sendall(b"and so on")
    eventually(lambda: heard == [b"and so on"])


def test_a_reset_is_a_reset_on_the_other_side_both_ways(
    server: TunnelServer, open_tcp: Callable[..., Tunnel]
) -> None:
    clean: list[bool] = []

    def listen(peer: Peer) -> None:
        peer.sendall(b"go")
        clean.append(peer.wait_end())

    visitor = connect(port_of(open_tcp(listen)))
    assert read_exactly(visitor, 2) == b"go"
    reset(visitor)
    eventually(lambda: clean == [False], what="the service's reset")

    def abort(peer: Peer) -> None:
        peer.sendall(b"half of it")
        assert peer.take(2) == b"go"
        peer.reset()

    with connect(port_of(open_tcp(abort))) as visitor:
        assert read_exactly(visitor, 10) == b"half of it"
        visitor.sendall(b"go")
        assert ends_with_reset(visitor)


def test_a_service_that_is_away_is_a_reset(server: TunnelServer, open_tunnel: OpenTunnel) -> None:
    tunnel = open_tunnel(free_tunnel_ports(1)[0], kind="tcp")
    with pytest.raises(ConnectionResetError):  # which may come before connect() has returned
        read_to_the_end(port_of(tunnel))


def test_the_end_of_the_client_is_a_reset_for_its_visitors(
    server: TunnelServer, open_tcp: Callable[..., Tunnel]
) -> None:
    tunnel = open_tcp()
    with connect(port_of(tunnel)) as visitor:
        visitor.sendall(b"hello")
        assert read_exactly(visitor, 5) == b"hello"
        tunnel.close(grace=0)
        assert ends_with_reset(visitor)


def test_visitors_beyond_the_limit_wait_their_turn_and_not_for_ever(
    start_server: StartServer, open_tcp: Callable[..., Tunnel]
) -> None:
    patient, brief = (start_server(queue_timeout=seconds, tcp_ports=PORTS) for seconds in (DEADLINE, 0.2))
    port = port_of(open_tcp(server=patient, concurrency=1))
    with connect(port) as first, connect(port) as second:
        first.sendall(b"1")
        assert read_exactly(first, 1) == b"1"
        second.sendall(b"2")
        first.shutdown(socket.SHUT_WR)
        assert read_exactly(second, 1) == b"2"
    port = port_of(open_tcp(server=brief, concurrency=1))
    with connect(port) as first, connect(port) as second:
        first.sendall(b"1")
        assert read_exactly(first, 1) == b"1"
        assert ends_with_reset(second)
        first.sendall(b"1")
        assert read_exactly(first, 1) == b"1"


def test_a_visitor_who_has_half_closed_is_refused_and_tried_again(server: TunnelServer) -> None:
    """Nothing is read from him any more: his greenlet waits for the service's end."""
    port = free_tunnel_ports(1)[0]
    with RawClient(server, port=port) as client, connect(port) as visitor:
        visitor.shutdown(socket.SHUT_WR)
        client.reset(client.next(StreamEnded).stream_id or 0, 7)
        stream_id = client.next(RequestReceived).stream_id or 0
        client.accept(stream_id)
        client.send(stream_id, b"hello", end=True)
        assert read_exactly(visitor, 5) == b"hello"
        assert not ends_with_reset(visitor)
        eventually(lambda: server.core.busy == 0)


@pytest.mark.parametrize("early", [b"", b"said already"])
def test_a_refused_visitor_gets_another_stream_unless_his_bytes_are_gone(
    server: TunnelServer, early: bytes
) -> None:
    with connect(server.connection_port) as sock:
        sock.sendall(b"CONNECT x:1 HTTP/1.1\r\nx-tinytun-type: tcp\r\n\r\n")
        port = int(read_head(sock).get(b"x-tinytun-port") or 0)
        client = RawPeer(sock)
        client.greet(client=False, settings={3: 100})
        client.wait(SettingsFrame, ack=True)
        with connect(port) as visitor:
            visitor.sendall(early)
            client.wait(DataFrame if early else HeadersFrame, 1)
            client.send(RstStreamFrame(1, error_code=7))
            if early:
                assert ends_with_reset(visitor)
                return
            client.wait(HeadersFrame, 3)
            client.send(headers_frame(3, b"\x88"), data_frame(3, b"welcome"))
            assert read_exactly(visitor, 7) == b"welcome"


def test_an_idle_visitor_is_ended_if_a_limit_is_set_and_a_busy_one_is_not(
    fast_clock: FastClock, start_server: StartServer, open_tcp: Callable[..., Tunnel]
) -> None:
    server = start_server(tunnel_idle_timeout=300, tcp_ports=PORTS)
    port = port_of(open_tcp(server=server))
    with connect(port) as idle, connect(port) as busy:
        idle.sendall(b"x")
        assert read_exactly(idle, 1) == b"x"
        for _ in range(5):
            busy.sendall(b"x")
            assert read_exactly(busy, 1) == b"x"
            fast_clock.forward(100)
        assert ends_with_reset(idle)
        busy.sendall(b"x")
        assert read_exactly(busy, 1) == b"x"


def test_sixty_visitors_at_once_get_their_own_bytes(
    server: TunnelServer, open_tcp: Callable[..., Tunnel]
) -> None:
    port = port_of(open_tcp())
    visitors = [connect(port) for _ in range(60)]
    for number, visitor in enumerate(visitors):
        visitor.sendall(b"%05d" % number * 100)
    for number, visitor in enumerate(visitors):
        assert read_exactly(visitor, 500) == b"%05d" % number * 100
        visitor.close()
    eventually(lambda: server.core.busy == 0)


# -- 64 MiB -------------------------------------------------------------------

SIZE = 64 * MIB


def payload(seed: int) -> Iterator[bytes]:
    """64 MiB in pieces, cheap to make and never the same twice."""
    block = random.Random(seed).randbytes(MIB)
    for number in range(SIZE // MIB):
        yield struct.pack("!Q", number) + block[8:]


def digest(pieces: Iterator[bytes]) -> bytes:
    sha = hashlib.sha256()
    for piece in pieces:
        sha.update(piece)
    return sha.digest()


def received(sock: socket.socket, count: int) -> Iterator[bytes]:
    buffer = bytearray(MIB)
    while count:
        size = sock.recv_into(buffer, min(count, MIB))
        assert size, f"{count} bytes are missing"
        count -= size
        yield memoryview(buffer)[:size]  # type: ignore[misc]


def both_ways(peer: Peer) -> None:
    """The service: sends 64 MiB, reads 64 MiB at the same time, then says what it got."""
    sender = threading.Thread(target=lambda: [peer.sock.sendall(piece) for piece in payload(2)])
    sender.start()
    got = digest(received(peer.sock, SIZE))
    sender.join()
    peer.sock.sendall(got)


def test_64_mib_both_ways_at_once_through_tcp(server: TunnelServer, open_tcp: Callable[..., Tunnel]) -> None:
    with connect(port_of(open_tcp(both_ways)), timeout=60) as visitor:
        sender = threading.Thread(target=lambda: [visitor.sendall(piece) for piece in payload(1)])
        sender.start()
        assert digest(received(visitor, SIZE)) == digest(payload(2))
        sender.join()
        assert read_exactly(visitor, 32) == digest(payload(1))


def test_64_mib_each_way_through_http(
    server: TunnelServer, open_tunnel: OpenTunnel, start_service: StartService
) -> None:
    def serve(peer: Peer) -> None:
        head = peer.read_head()
        assert head is not None
        if head.method == b"GET":
            peer.sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % SIZE)
            for piece in payload(3):
                peer.sock.sendall(piece)
        else:
            got = digest(received(peer.sock, SIZE))
            peer.sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 32\r\n\r\n" + got)

    open_tunnel(start_service(serve))
    with connect(server.proxy_port, timeout=60) as visitor:
        visitor.sendall(request())
        assert read_head(visitor).status == 200
        assert digest(received(visitor, SIZE)) == digest(payload(3))
    with connect(server.proxy_port, timeout=60) as visitor:
        visitor.sendall(request("demo", "/", b"Content-Length: %d" % SIZE, method=b"PUT"))
        for piece in payload(4):
            visitor.sendall(piece)
        assert read_head(visitor).status == 200
        assert read_exactly(visitor, 32) == digest(payload(4))


# -- the front behind a load balancer -----------------------------------------


def v2(command: int, family: int, block: bytes) -> bytes:
    return b"\r\n\r\n\x00\r\nQUIT\n" + bytes([0x20 | command, family]) + struct.pack("!H", len(block)) + block


def v2_inet6(source: str, port: int, destination: int, tlvs: bytes = b"") -> bytes:
    addresses = ipaddress.ip_address(source).packed + ipaddress.ip_address("2001:db8::1").packed
    return v2(1, 0x21, addresses + struct.pack("!HH", port, destination) + tlvs)


TLVS = b"\x04\x00\x03abc" + b"\x20\x00\x05\x01\0\0\0\0" + b"\x21\x00\x00"


@pytest.fixture
def front(server: TunnelServer, open_tcp: Callable[..., Tunnel]) -> tuple[int, int]:
    """The TCP proxy port, and the port of a tunnel that echoes."""
    return server.tcp_proxy_port, port_of(open_tcp())


@pytest.mark.parametrize(
    "header",
    [
        lambda port: b"PROXY TCP4 203.0.113.7 198.51.100.1 4711 %d\r\n" % port,
        lambda port: b"PROXY TCP6 2001:db8::7 2001:db8::1 4711 %d\r\n" % port,
        lambda port: build_v2(("203.0.113.7", 4711), ("198.51.100.1", port)),
        lambda port: v2_inet6("2001:db8::7", 4711, port),
        lambda port: v2_inet6("::ffff:203.0.113.7", 4711, port, TLVS),
    ],
    ids=["v1 IPv4", "v1 IPv6", "v2 IPv4", "v2 IPv6", "v2 mapped, with TLVs"],
)
@pytest.mark.parametrize("piecewise", [False, True])
def test_a_proxy_header_names_the_tunnel_by_its_port(
    front: tuple[int, int], header: Callable[[int], bytes], piecewise: bool
) -> None:
    with connect(front[0]) as balancer:
        data = header(front[1]) + b"early bytes"
        for piece in [data[i : i + 1] for i in range(len(data))] if piecewise else [data]:
            balancer.sendall(piece)
        assert read_exactly(balancer, 11) == b"early bytes"
        balancer.sendall(b"and more")
        balancer.shutdown(socket.SHUT_WR)
        assert read_exactly(balancer, 8) == b"and more"
        assert balancer.recv(10) == b""


@pytest.mark.parametrize(
    "header",
    [
        lambda port: v2(0, 0x00, b""),
        lambda port: v2(0, 0x11, bytes(12)),
        lambda port: b"PROXY UNKNOWN\r\n",
        lambda port: v2(1, 0x00, b""),
        lambda port: v2(1, 0x31, bytes(216)),
    ],
    ids=["LOCAL", "LOCAL with addresses", "v1 UNKNOWN", "UNSPEC", "UNIX"],
)
def test_a_header_without_a_destination_is_a_health_check(
    front: tuple[int, int], header: Callable[[int], bytes]
) -> None:
    with connect(front[0]) as balancer:
        balancer.sendall(header(front[1]))
        assert not ends_with_reset(balancer)


@pytest.mark.parametrize(
    "header",
    [
        lambda port: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        lambda port: b"PROXY TCP4 203.0.113.7 198.51.100.1 4711 99999\r\n",
        lambda port: b"PROXY TCP4 203.0.113.7\r\n",
        lambda port: b"PROXY TCP4 " + b"1" * 200,
        lambda port: v2(1, 0x11, b"short"),
        lambda port: v2(1, 0x21, bytes(12)),
        lambda port: v2(3, 0x11, bytes(12)),
        lambda port: v2(1, 0x11, bytes(600)),
        lambda port: v2_inet6("2001:db8::7", 4711, port, b"\x04\x00\xff"),
        lambda port: b"\r\n\r\n\x00\r\nQUIT\n\x11\x11\x00\x0c" + bytes(12),
    ],
    ids=[
        "HTTP",
        "a port too high",
        "a short line",
        "an endless line",
        "a short block",
        "IPv6 in an IPv4 block",
        "an unknown command",
        "too long",
        "a TLV beyond the end",
        "version 1 in version 2",
    ],
)
def test_anything_else_ends_that_connection_only(
    front: tuple[int, int], header: Callable[[int], bytes]
) -> None:
    with connect(front[0]) as good:
        good.sendall(build_v2(("203.0.113.7", 1), ("198.51.100.1", front[1])) + b"hi")
        assert read_exactly(good, 2) == b"hi"
        with connect(front[0]) as bad:
            bad.sendall(header(front[1]))
            ends_with_reset(bad)
        good.sendall(b"still")
        assert read_exactly(good, 5) == b"still"


def test_a_port_without_a_tunnel_is_a_reset(front: tuple[int, int]) -> None:
    with connect(front[0]) as balancer:
        balancer.sendall(build_v2(("203.0.113.7", 1), ("198.51.100.1", 9)))
        assert ends_with_reset(balancer)


def test_who_is_not_trusted_is_not_even_read(
    start_server: StartServer, open_tcp: Callable[..., Tunnel]
) -> None:
    server = start_server(tcp_ports=PORTS, trusted_proxies="192.0.2.0/24")
    port = port_of(open_tcp(server=server))
    # The reset may come before connect() has returned.
    with contextlib.suppress(ConnectionResetError), connect(server.tcp_proxy_port) as balancer:
        balancer.sendall(build_v2(("203.0.113.7", 1), ("198.51.100.1", port)) + b"hi")
        assert balancer.recv(10) == b""
    with connect(port) as visitor:
        visitor.sendall(b"hi")
        assert read_exactly(visitor, 2) == b"hi"


def test_a_header_that_does_not_come_ends_the_connection(start_server: StartServer) -> None:
    server = start_server(proxy_header_timeout=0.5, trusted_proxies="127.0.0.1")
    with connect(server.tcp_proxy_port) as silent, connect(server.tcp_proxy_port) as slow:
        slow.sendall(b"PROXY TCP4 ")
        ends_with_reset(silent)
        ends_with_reset(slow)
