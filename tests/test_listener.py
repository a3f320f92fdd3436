"""The connection port: what a CONNECT may say, what it is answered, and how long anything may take."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import gevent
import pytest
from conftest import FastClock, OpenTunnel, StartServer, StartService
from free_ports import free_tunnel_ports
from h2.events import ConnectionTerminated, RequestReceived
from helpers import RawPeer, socket_pair, wait_until
from raw_client import RawClient
from support import (
    DEADLINE,
    Response,
    connect,
    eventually,
    get,
    read_head,
    read_response,
    request,
    reset,
    respond,
)

from tinytun_gevent import TunnelServer
from tinytun_gevent.server.config import ServerConfig
from tinytun_gevent.server.core import ServerCore
from tinytun_gevent.server.entrance import Entrance
from tinytun_gevent.server.listener import Listener
from tinytun_gevent.server.tunnels import Tunnels
from tinytun_gevent.session import Session
from tinytun_gevent.wire.http2 import PREFACE
from tinytun_gevent.wire.options import Options, Rewrite, build_options

CONNECT = b"CONNECT 127.0.0.1:5554 HTTP/1.1\r\n"
SETTINGS = bytes.fromhex("000006 04 00 00000000 0003 00000064".replace(" ", ""))
"""A client's first frame: it takes 100 streams."""
OPTIONS = (
    b"x-tinytun-options: "
    + build_options(Options(rewrite=Rewrite("http://localhost:3000"), forwarded_host=False)).encode()
)


def ask(server: TunnelServer, *fields: bytes, line: bytes = CONNECT) -> tuple[socket.socket, Response]:
    """Sends a CONNECT with ``fields``; the connection and the head that answers."""
    sock = connect(server.connection_port)
    sock.sendall(line + b"".join(field + b"\r\n" for field in fields) + b"\r\n")
    return sock, read_head(sock)


def refused(server: TunnelServer, *fields: bytes, line: bytes = CONNECT) -> tuple[int, bytes]:
    """Status and plain-text reason of a CONNECT that is refused; nothing may be left of it."""
    with connect(server.connection_port) as sock:
        sock.sendall(line + b"".join(field + b"\r\n" for field in fields) + b"\r\n")
        answer = read_response(sock)
        assert (answer.get(b"content-type") or b"").startswith(b"text/plain")
        assert answer.get(b"connection") == b"close"
        assert sock.recv(10) == b""
    assert not server.registry.tunnels
    return answer.status, answer.body


def listed(server: TunnelServer) -> list[dict[str, object]]:
    with connect(server.metadata_port) as sock:
        sock.sendall(b"GET /tunnels HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        return json.loads(read_response(sock).body)  # type: ignore[no-any-return]


# -- what is granted ----------------------------------------------------------


@pytest.mark.parametrize("kind", [b"http", b"HTTP-ish", None])
def test_an_http_tunnel_is_granted_with_its_name_and_url(server: TunnelServer, kind: bytes | None) -> None:
    fields = [b"x-tinytun-subdomain: Demo"] + ([b"X-TinyTun-Type: " + kind] if kind else [])
    sock, answer = ask(server, *fields)
    with sock:
        assert answer.start == b"HTTP/1.1 101 Switching Protocols"
        assert re.fullmatch(rb"[0-9a-f]{32}", answer.get(b"x-tinytun-connection-id") or b"")
        assert answer.get(b"x-tinytun-subdomain") == b"demo"
        assert answer.get(b"x-tinytun-domain") == b"demo.localhost"
        assert answer.get(b"x-tinytun-url") == server.url_of("demo").encode()
        assert answer.get(b"x-tinytun-port") is None
        assert answer.get(b"upgrade") is None
        assert answer.get(b"connection") is None
        assert sock.recv(len(PREFACE)) == PREFACE, "the server is HTTP/2's client"


@pytest.mark.parametrize("kind", [b"tcp", b"tcp_port"])
def test_a_tcp_tunnel_is_granted_with_its_port(start_server: StartServer, kind: bytes) -> None:
    server = start_server(tcp_ports="20000-32000")
    (port,) = free_tunnel_ports(1)
    sock, answer = ask(server, b"x-tinytun-type: " + kind, b"x-tinytun-port: %d" % port)
    with sock:
        assert answer.status == 101
        assert answer.get(b"x-tinytun-port") == b"%d" % port
        assert answer.get(b"x-tinytun-subdomain") is None
        assert answer.get(b"x-tinytun-domain") is None


@pytest.mark.parametrize("blank", [[], [b"x-tinytun-subdomain:"], [b"x-tinytun-subdomain:   "]])
def test_without_a_wish_the_name_is_random(server: TunnelServer, blank: list[bytes]) -> None:
    names = set()
    for _ in range(3):
        sock, answer = ask(server, *blank)
        sock.close()
        names.add(answer.get(b"x-tinytun-subdomain"))
    assert len(names) == 3
    assert all(re.fullmatch(rb"[a-z0-9][a-z0-9-]*[a-z0-9]", name or b"") for name in names)


def test_the_host_header_is_confirmed_only_if_it_was_asked_for(server: TunnelServer) -> None:
    for fields, expected in (([], None), ([b"x-tinytun-host-header: localhost:3000"], b"localhost:3000")):
        sock, answer = ask(server, *fields)
        sock.close()
        confirmed = answer.get(b"x-tinytun-host-header")
        assert (confirmed is None) == (expected is None)


def test_options_are_confirmed_and_the_type_always_is(server: TunnelServer) -> None:
    sock, answer = ask(server, OPTIONS)
    with sock:
        assert answer.get(b"x-tinytun-options") == b"rewrite, forwarded_host"
        assert answer.get(b"x-tinytun-type") == b"http"
        (tunnel,) = server.registry.tunnels.values()
        assert tunnel.options == Options(rewrite=Rewrite("http://localhost:3000"), forwarded_host=False)
    sock, answer = ask(server, b"x-tinytun-options: e30", b"x-tinytun-type: nonsense")
    sock.close()
    assert answer.get(b"x-tinytun-options") is None
    assert answer.get(b"x-tinytun-type") == b"http"


@pytest.mark.parametrize("field", [b"x-tinytun-options: e30=", b"x-tinytun-options:"])
def test_bad_options_open_nothing(server: TunnelServer, field: bytes) -> None:
    status, reason = refused(server, field)
    assert status == 400
    assert reason.startswith(b"option ")


def test_options_of_http_are_refused_to_tcp(server: TunnelServer) -> None:
    status, reason = refused(server, OPTIONS, b"x-tinytun-type: tcp")
    assert (status, reason) == (400, b"option rewrite: only HTTP tunnels have it")


def test_unknown_fields_and_a_head_in_pieces_are_fine(server: TunnelServer) -> None:
    with connect(server.connection_port) as sock:
        for piece in (
            b"CONN",
            b"ECT x:1 HT",
            b"TP/1.1\r\nX-Later: yes\r",
            b"\nx-tinytun-subdomain: demo\r\n",
            b"\r\n",
        ):
            sock.sendall(piece)
        assert read_head(sock).get(b"x-tinytun-subdomain") == b"demo"


def test_bytes_right_behind_the_head_belong_to_the_session(
    server: TunnelServer, start_service: StartService
) -> None:
    """A client may send its SETTINGS without waiting for the 101."""
    with connect(server.connection_port) as sock:
        sock.sendall(CONNECT + b"x-tinytun-subdomain: demo\r\n\r\n" + SETTINGS)
        assert read_head(sock).status == 101
        eventually(lambda: [tunnel["name"] for tunnel in listed(server)] == [{"Subdomain": "demo"}])


# -- what is refused ----------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [b"-demo", b"demo-", b"de_mo", b"de.mo", b"a" * 64, "d\u00e9mo".encode(), b"de mo", b"..", b"xn--\x00"],
)
def test_what_is_no_subdomain_is_refused(server: TunnelServer, name: bytes) -> None:
    status, _ = refused(server, b"x-tinytun-subdomain: " + name)
    assert status == 400


@pytest.mark.parametrize(
    "port", [b"0", b"80", b"19999", b"60001", b"-1", b"x", b"3.5", b"99999999999", b"0x5000"]
)
def test_what_is_no_allowed_port_is_refused(server: TunnelServer, port: bytes) -> None:
    status, _ = refused(server, b"x-tinytun-type: tcp", b"x-tinytun-port: " + port)
    assert status == 400


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        (b"CONNECT x:1\r\n", []),
        (b"CONNECT x:1 HTTP/2.0\r\n", []),
        (b"CONNECT  x:1 HTTP/1.1\r\n", []),
        (CONNECT, [b"no colon"]),
        (CONNECT, [b"x : y"]),
        (CONNECT, [b"a: 1", b" folded"]),
        (CONNECT, [b"x-tinytun-subdomain: one", b"x-tinytun-subdomain: two"]),
    ],
    ids=["no version", "HTTP/2.0", "two spaces", "no colon", "space before colon", "folded", "two names"],
)
def test_malformed_requests_are_refused(server: TunnelServer, line: bytes, fields: list[bytes]) -> None:
    status, _ = refused(server, *fields, line=line)
    assert status in (400, 505)


def test_a_head_that_is_too_large_is_refused(server: TunnelServer) -> None:
    with connect(server.connection_port) as sock:
        sock.sendall(CONNECT + b"x-filler: " + b"x" * 20_000)
        assert read_response(sock).status == 431


def test_a_taken_name_is_409_with_a_reason_and_stays_with_its_owner(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    open_tunnel(start_service())
    with connect(server.connection_port) as sock:
        sock.sendall(CONNECT + b"x-tinytun-subdomain: DEMO\r\n\r\n")
        answer = read_response(sock)
    assert answer.status == 409
    assert answer.body.strip() == b"Subdomain not available: it is open now"
    assert get(server.proxy_port).body == b"ok"


def test_a_full_server_says_when_to_try_again(start_server: StartServer) -> None:
    server = start_server(max_tunnels=1)
    sock, answer = ask(server)
    with sock, connect(server.connection_port) as late:
        assert answer.status == 101
        late.sendall(CONNECT + b"\r\n")
        answer = read_response(late)
        assert answer.status == 503
        assert int(answer.get(b"retry-after") or 0) >= 1


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"OPTIONS", b"POST"])
def test_any_other_method_is_a_health_check(server: TunnelServer, method: bytes) -> None:
    with connect(server.connection_port) as sock:
        sock.sendall(method + b" / HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = read_response(sock, method)
        assert (answer.status, answer.body) == (200, b"")
        assert answer.get(b"connection") == b"close"
        assert sock.recv(10) == b""


# -- further sessions ---------------------------------------------------------


def sessions_of(server: TunnelServer, name: str | int = "demo") -> list[Session]:
    return server.registry.tunnels[name].sessions


def answer(client: RawClient, body: bytes) -> None:
    """Serves the next visitor on that session, and nobody after him on the same stream."""
    stream_id, _ = client.next_request()
    client.send(stream_id, respond(body, b"Connection: close"), end=True)


def test_every_client_is_told_how_to_join_and_each_tunnel_has_its_own_key(server: TunnelServer) -> None:
    keys = set()
    for _ in range(3):
        sock, said = ask(server)
        sock.close()
        keys.add(said.get(b"x-tinytun-join"))
    assert len(keys) == 3
    assert all(re.fullmatch(rb"[0-9a-f]{32}", key or b"") for key in keys)


def test_a_session_that_joins_serves_visitors_beside_the_first(server: TunnelServer) -> None:
    with RawClient(server) as first, RawClient(server, join=first) as second:
        assert second.connection_id == first.connection_id
        assert len(sessions_of(server)) == 2
        assert len(listed(server)) == 1
        socks = [connect(server.proxy_port) for _ in range(2)]
        for sock in socks:
            sock.sendall(request("demo", "/", b"Connection: close"))
        # Both have come before one is answered: the first session is free again then.
        streams = [(client, client.next_request()[0]) for client in (first, second)]
        for (client, stream), body in zip(streams, (b"one", b"two"), strict=True):
            client.send(stream, respond(body, b"Connection: close"), end=True)
        assert {read_response(sock).body for sock in socks} == {b"one", b"two"}
        for sock in socks:
            sock.close()


def test_visitors_of_a_tcp_tunnel_are_spread_too(start_server: StartServer) -> None:
    server = start_server(tcp_ports="20000-32000")
    (port,) = free_tunnel_ports(1)
    with RawClient(server, port=port) as first, RawClient(server, port=port, join=first) as second:
        visitors = [connect(port) for _ in range(4)]
        for client in (first, second):
            for _ in range(2):
                client.accept(client.next(RequestReceived).stream_id or 0)
        for sock in visitors:
            sock.close()


def test_the_answer_to_who_joins_describes_the_tunnel(server: TunnelServer) -> None:
    with RawClient(server) as first:
        join = b"x-tinytun-join: %b %b" % (first.connection_id, first.key)
        sock, said = ask(server, join, b"x-tinytun-subdomain: another", b"x-tinytun-type: http")
        with sock:
            assert said.status == 101
            assert said.get(b"x-tinytun-subdomain") == b"demo"
            assert said.get(b"x-tinytun-url") == server.url_of("demo").encode()
        assert list(server.registry.tunnels) == ["demo"]


@pytest.mark.parametrize("who", ["a stranger", "another tunnel's client"])
def test_who_does_not_know_the_key_is_told_what_is_told_about_no_tunnel(
    server: TunnelServer, who: str
) -> None:
    with RawClient(server) as first, RawClient(server, "other") as other:
        key = other.key if who == "another tunnel's client" else b"0" * 32
        answers = []
        for connection_id in (first.connection_id, b"0" * 32):
            with connect(server.connection_port) as sock:
                sock.sendall(CONNECT + b"x-tinytun-join: %b %b\r\n\r\n" % (connection_id, key))
                said = read_response(sock)
                answers.append((said.status, said.fields, said.body))
        assert answers[0] == answers[1]
        assert answers[0][0] == 404
        assert b"no such tunnel" in answers[0][2]
        assert len(sessions_of(server)) == 1


@pytest.mark.parametrize("value", [b"", b"x", b"x y", b"x " + b"y" * 65, b"x y " + b"z" * 32])
def test_a_malformed_join_is_refused(server: TunnelServer, value: bytes) -> None:
    status, _ = refused(server, b"x-tinytun-join: " + value)
    assert status == 400


def test_there_is_an_end_to_the_sessions_of_a_tunnel(
    server: TunnelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinytun_gevent.registry.MAX_SESSIONS", 3)
    with RawClient(server) as first:
        join = b"x-tinytun-join: %b %b" % (first.connection_id, first.key)
        silent, said = ask(server, join)  # promised, and counted
        with silent, RawClient(server, join=first, waits=False):
            assert said.status == 101
            with connect(server.connection_port) as late:
                late.sendall(CONNECT + join + b"\r\n\r\n")
                said = read_response(late)
            assert said.status == 429
            assert int(said.get(b"retry-after") or 0) >= 1
        eventually(lambda: not server.registry.tunnels["demo"].promised)
        eventually(lambda: len(sessions_of(server)) == 1)
        with RawClient(server, join=first):
            assert len(sessions_of(server)) == 2


def test_who_joins_and_never_speaks_costs_the_tunnel_nothing(start_server: StartServer) -> None:
    server = start_server(handshake_timeout=0.3)
    with RawClient(server) as first:
        silent, said = ask(server, b"x-tinytun-join: %b %b" % (first.connection_id, first.key))
        with silent:
            assert said.status == 101
            eventually(lambda: not server.registry.tunnels["demo"].promised)
            assert len(sessions_of(server)) == 1
            first.sync()
        assert listed(server)


def test_the_tunnel_lives_while_one_session_does(server: TunnelServer) -> None:
    with RawClient(server) as first, RawClient(server, join=first) as second:
        tunnel = server.registry.tunnels["demo"]
        with connect(server.proxy_port) as lost, connect(server.proxy_port) as kept:
            lost.sendall(request("demo", "/lost", method=b"POST", body=b"x"))
            first.next_request()
            kept.sendall(request("demo", "/kept"))
            stream_id, _ = second.next_request()
            first.close()
            assert read_response(lost).status == 503
            second.send(stream_id, respond(b"kept", b"Connection: close"), end=True)
            assert read_response(kept).body == b"kept"
        eventually(lambda: len(tunnel.sessions) == 1)
        assert server.registry.tunnels["demo"] is tunnel
        (said,) = listed(server)
        assert said["id"] == first.connection_id.decode()
        assert int(str(said["read_bytes"])) > 0
        with connect(server.proxy_port) as sock:
            sock.sendall(request("demo", "/next"))
            answer(second, b"next")
            assert read_response(sock).body == b"next"
        with RawClient(server, join=second):
            assert len(tunnel.sessions) == 2
    eventually(lambda: not server.registry.tunnels)


def test_bytes_of_sessions_that_are_gone_still_count(server: TunnelServer) -> None:
    with RawClient(server) as first:
        with RawClient(server, join=first) as second, connect(server.proxy_port) as busy:
            busy.sendall(request("demo", "/busy"))
            first.next_request()
            with connect(server.proxy_port) as sock:
                sock.sendall(request("demo", "/"))
                answer(second, b"x" * 1000)
                assert len(read_response(sock).body) == 1000
        eventually(lambda: len(sessions_of(server)) == 1)
        assert server.registry.tunnels["demo"].read_bytes > 1000


def test_a_goodbye_on_one_session_leaves_the_tunnel_and_on_the_last_one_frees_its_name(
    server: TunnelServer,
) -> None:
    with RawClient(server) as first, RawClient(server, join=first) as second:
        with connect(server.proxy_port) as running, connect(server.proxy_port) as sock:
            running.sendall(request("demo", "/running"))
            stream_id, _ = first.next_request()
            first.goaway()
            first.sync()
            for _ in range(3):  # nobody is sent to the one that leaves
                sock.sendall(request("demo", "/"))
                second_id, _ = second.next_request()
                second.send(second_id, respond(b"ok", b"Connection: close"), end=True)
                assert read_response(sock).body == b"ok"
            assert list(server.registry.tunnels) == ["demo"]
            second.goaway()
            eventually(lambda: not server.registry.tunnels)
            first.send(stream_id, respond(b"the rest", b"Connection: close"), end=True)
            assert read_response(running).body == b"the rest"
        with pytest.raises(AssertionError, match="404"):
            RawClient(server, join=first)


def test_a_stopping_server_says_so_on_every_session(server: TunnelServer) -> None:
    with RawClient(server) as first, RawClient(server, join=first) as second:
        server.stop()
        for client in (first, second):
            client.next(ConnectionTerminated)


def test_a_connection_that_is_cut_off_takes_its_session_along() -> None:
    """As a server does at its end with those that are left."""
    core = ServerCore(ServerConfig())
    ours, theirs = socket_pair()
    serving = gevent.spawn(Listener(core, Entrance(core), Tunnels(core)).handle, ours, ("127.0.0.1", 1))
    theirs.sendall(b"CONNECT localhost:1 HTTP/1.1\r\nx-tinytun-subdomain: demo\r\n\r\n")
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += theirs.recv(1)
    peer = RawPeer(theirs)
    peer.greet(client=False)
    wait_until(lambda: core.registry.tunnels["demo"].ready)
    (session,) = core.registry.tunnels["demo"].sessions
    serving.kill()
    assert session.closed.is_set()
    assert not core.registry.tunnels
    theirs.close()


def test_a_key_is_not_logged(server: TunnelServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"), RawClient(server) as first, RawClient(server, join=first):
        refused_key = b"f" * 32
        with connect(server.connection_port) as sock:
            sock.sendall(CONNECT + b"x-tinytun-join: %b %b\r\n\r\n" % (first.connection_id, refused_key))
            assert read_response(sock).status == 404
    assert "no such tunnel" in caplog.text
    assert first.key.decode() not in caplog.text
    assert refused_key.decode() not in caplog.text


# -- how long -----------------------------------------------------------------


def test_who_says_nothing_or_too_little_is_cut_off_in_time(
    fast_clock: FastClock, start_server: StartServer
) -> None:
    server = start_server()
    watched = len(server.core.clock)
    with connect(server.connection_port) as silent, connect(server.connection_port) as slow:
        slow.sendall(b"CONNECT x:1 HTTP/1.1\r\n")
        eventually(lambda: len(server.core.clock) == watched + 2)
        for _ in range(3):  # each byte comes in time, the whole does not
            slow.sendall(b"x")
            fast_clock.forward(server.config.handshake_timeout / 2)
        for sock in (silent, slow):
            try:
                assert sock.recv(100) == b""
            except ConnectionResetError:
                pass


@pytest.fixture(scope="module", autouse=True)
def silence() -> Iterator[Future[None]]:
    """Clients that never speak, on a server of their own while the other tests run."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(_stay_silent)


def test_a_client_that_never_speaks_after_its_101_is_not_listed_and_soon_freed(
    silence: Future[None],
) -> None:
    """With the default deadline."""
    silence.result(2 * DEADLINE)


def _stay_silent() -> None:
    config = dict.fromkeys(("connection_port", "proxy_port", "tcp_proxy_port", "metadata_port"), 0)
    with TunnelServer(
        bind="127.0.0.1", base_domains="localhost", tcp_ports="20000-32000", **config
    ) as server:
        (port,) = free_tunnel_ports(1)
        wishes = (
            (b"x-tinytun-subdomain: demo",),
            (b"x-tinytun-type: tcp", b"x-tinytun-port: %d" % port),
            (b"x-tinytun-type: tcp_port",),
        )
        silent = [ask(server, *wish) for wish in wishes]
        assert [answer.status for _, answer in silent] == [101] * 3
        assert listed(server) == []
        assert len(server.registry.tunnels) == 3, "the names are not held"
        eventually(lambda: not server.registry.tunnels)
        socket.create_server(("127.0.0.1", port)).close()
        for (sock, _), wish in zip(silent, wishes, strict=True):
            sock.close()
            again, answer = ask(server, *wish)
            again.close()
            assert answer.status == 101


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
def test_a_name_is_free_as_soon_as_its_client_is_gone(
    server: TunnelServer, leave: Callable[[socket.socket], None]
) -> None:
    for _ in range(5):
        sock, _ = ask(server, b"x-tinytun-subdomain: demo")
        sock.sendall(SETTINGS)
        eventually(lambda: listed(server))
        leave(sock)
        eventually(lambda: not server.registry.tunnels)
        assert listed(server) == []


def test_a_client_that_leaves_before_its_101_leaves_nothing(server: TunnelServer) -> None:
    for _ in range(20):
        sock = connect(server.connection_port)
        sock.sendall(CONNECT + b"x-tinytun-subdomain: demo\r\n\r\n")
        reset(sock)
    eventually(lambda: not server.registry.tunnels)


def test_a_client_that_speaks_no_http2_after_its_101_is_cut_off(server: TunnelServer) -> None:
    sock, answer = ask(server, b"x-tinytun-subdomain: demo")
    with sock:
        assert answer.status == 101
        sock.sendall(request() * 3)
        eventually(lambda: not server.registry.tunnels)


def test_what_one_connection_does_wrong_disturbs_no_other(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    open_tunnel(start_service())
    for bad in (b"\0" * 100, b"\x16\x03\x01\x02\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\r\n" * 50):
        with connect(server.connection_port) as sock:
            sock.sendall(bad)
            assert get(server.proxy_port).status == 200
