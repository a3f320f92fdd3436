"""A name stays its owner's: leases, parked visitors, sessions that are replaced, restarts."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import StartServer
from free_ports import free_tunnel_ports
from h2.events import ConnectionTerminated, DataReceived
from raw_client import GOAWAY, RawClient
from support import (
    DEADLINE,
    Response,
    connect,
    eventually,
    get,
    read_head,
    read_response,
    read_rest,
    request,
    reset,
    respond,
)

from tinytun_gevent import TunnelServer
from tinytun_gevent.registry import Record, Registry, Tunnel
from tinytun_gevent.server.leases import Leases
from tinytun_gevent.server.storage import Storage
from tinytun_gevent.wire.handshake import Kind

pytestmark = pytest.mark.usefixtures("fast_clock")

Later = Future[Response]

SETTINGS = bytes(3) + b"\x04" + bytes(5)
"""A client's first frame, with nothing in it."""


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


@pytest.fixture
def server(start_server: StartServer) -> TunnelServer:
    return start_server(park_seconds=DEADLINE, lease_seconds=2 * DEADLINE)


def lose(client: RawClient) -> None:
    """Ends its connection as ``kill -9`` does: no GOAWAY."""
    client.sock.shutdown(socket.SHUT_RDWR)


def wish(server: TunnelServer, *fields: bytes) -> tuple[int, str]:
    """How a CONNECT for the name ``demo`` is answered: status, and the token of a 101."""
    with connect(server.connection_port) as sock:
        lines = (b"CONNECT a:1 HTTP/1.1", b"x-tinytun-subdomain: demo", *fields, b"", b"")
        sock.sendall(b"\r\n".join(lines))
        head = read_head(sock)
        return head.status, (head.get(b"x-tinytun-resume") or b"").decode()


def is_leased(server: TunnelServer, name: str | int = "demo") -> bool:
    tunnel = server.registry.tunnels.get(name)
    return tunnel is not None and tunnel.leased_until is not None


def parked(server: TunnelServer, name: str | int = "demo") -> int:
    return server.registry.tunnels[name].pool.waiting_count  # type: ignore[no-any-return]


def answer(client: RawClient, body: bytes) -> bytes:
    """Answers the next request; its head."""
    stream_id, head = client.next_request()
    client.send(stream_id, respond(body))
    return head


# -- whose a name is ----------------------------------------------------------


def test_who_does_not_ask_gets_no_token_and_leaves_no_lease(server: TunnelServer) -> None:
    with RawClient(server) as client:
        assert client.token == b""
        lose(client)
        eventually(lambda: not server.registry.tunnels)
    assert get(server.proxy_port).status == 404


def test_a_lost_name_is_its_owners_only(server: TunnelServer) -> None:
    with RawClient(server, resume=b"") as client:
        token, tunnel_id = client.token, client.connection_id
        assert len(token) == 64
        lose(client)
        eventually(lambda: is_leased(server))
        for line in (b"X-None: 1", b"x-tinytun-resume:", b"x-tinytun-resume: " + b"0" * 64):
            assert wish(server, line)[0] == 409
    with RawClient(server, resume=token) as again:
        assert (again.token, again.connection_id) == (token, tunnel_id)
        assert not is_leased(server)


def test_a_lease_ends_and_the_token_with_it(start_server: StartServer) -> None:
    server = start_server(lease_seconds=0.2)
    with RawClient(server, resume=b"") as client:
        token = client.token
        lose(client)
        eventually(lambda: not server.registry.tunnels)
    with RawClient(server, resume=b"") as other:
        assert other.token != token
        assert wish(server, b"x-tinytun-resume: " + token)[0] == 409


def test_a_token_is_good_for_its_own_name_only(server: TunnelServer) -> None:
    with RawClient(server, "other", resume=b"") as other, RawClient(server, resume=b""):
        assert wish(server, b"x-tinytun-resume: " + other.token)[0] == 409


def test_a_goodbye_frees_the_name_at_once_and_nobody_is_parked(server: TunnelServer) -> None:
    with RawClient(server, resume=b"") as client:
        client.goaway()
        eventually(lambda: not server.registry.tunnels)
        assert get(server.proxy_port).status == 404
        assert wish(server)[0] == 101


def test_a_goodbye_with_an_error_frees_nothing(server: TunnelServer) -> None:
    """A client that gives up its connection, because it takes us for dead, wants its name again."""
    with RawClient(server, resume=b"") as client:
        client.sock.sendall(bytes.fromhex("000008 07 00 00000000 00000000 00000008".replace(" ", "")))
        eventually(lambda: is_leased(server))
        assert wish(server)[0] == 409


def test_leases_can_be_switched_off(start_server: StartServer) -> None:
    server = start_server(lease_seconds=0)
    with RawClient(server, resume=b"") as client:
        lose(client)
        eventually(lambda: not server.registry.tunnels)


def test_a_reload_waits_for_clients_also_without_leases() -> None:
    registry = Registry(["localhost"], lease=0)
    given_up: list[Tunnel] = []
    leases = Leases(registry, Storage(None), given_up.append)
    (restored,) = leases.start([Record(Kind.HTTP, "demo", "0" * 32, "", False)])
    leases.tick(time.monotonic() + 5)
    assert not given_up
    leases.tick(time.monotonic() + 15)
    assert given_up == [restored]


def test_a_leased_name_is_not_listed(server: TunnelServer) -> None:
    with RawClient(server, resume=b"") as client:
        lose(client)
        eventually(lambda: is_leased(server))
        for path in ("/tunnels", "/tunnels/demo"):
            with connect(server.metadata_port) as sock:
                sock.sendall(
                    b"GET %b HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n" % path.encode()
                )
                answered = read_response(sock)
                assert answered.status == (200 if path == "/tunnels" else 404)
                assert path != "/tunnels" or json.loads(answered.body) == []


def test_the_owner_replaces_a_session_that_is_still_there(
    server: TunnelServer, pool: ThreadPoolExecutor
) -> None:
    with RawClient(server, resume=b"") as dead:
        waiting: Later = pool.submit(get, server.proxy_port)
        dead.next_request()
        with RawClient(server, resume=dead.token) as client:
            ended = dead.next(ConnectionTerminated)
            assert (ended.error_code, ended.additional_data) == (8, b"replaced")
            assert b"GET / HTTP/1.1" in answer(client, b"here")
            assert waiting.result().body == b"here"
            assert len(server.registry.tunnels["demo"].sessions) == 1


def test_a_session_that_does_not_come_up_leaves_the_lease(start_server: StartServer) -> None:
    server = start_server(handshake_timeout=0.2, lease_seconds=10)
    with RawClient(server, resume=b"") as client:
        lose(client)
        eventually(lambda: is_leased(server))
        token = client.token
        assert wish(server, b"x-tinytun-resume: " + token)[0] == 101  # and is gone again
        eventually(lambda: not server.registry.tunnels["demo"].promised)
        assert is_leased(server)
    with RawClient(server, resume=token):
        pass


def test_a_name_that_was_never_served_is_not_kept(server: TunnelServer) -> None:
    """Its client has not taken in the token, and would be told that its own name is taken."""
    assert wish(server, b"x-tinytun-resume:")[0] == 101  # and is gone again
    eventually(lambda: not server.registry.tunnels)


def test_a_goodbye_with_the_first_frames_frees_the_name(server: TunnelServer) -> None:
    with connect(server.connection_port) as hasty:
        hasty.sendall(b"CONNECT a:1 HTTP/1.1\r\nx-tinytun-subdomain: demo\r\nx-tinytun-resume:\r\n\r\n")
        assert read_head(hasty).status == 101
        hasty.sendall(SETTINGS + GOAWAY)
        eventually(lambda: not server.registry.tunnels)
        assert get(server.proxy_port).status == 404


def test_one_of_several_sessions_lost_leases_nothing(server: TunnelServer) -> None:
    with RawClient(server, resume=b"") as first, RawClient(server, join=first):
        lose(first)
        eventually(lambda: len(server.registry.tunnels["demo"].sessions) == 1)
        assert not is_leased(server)
        assert server.registry.tunnels["demo"].ready


def test_while_another_session_joins_visitors_wait_for_it(
    server: TunnelServer, pool: ThreadPoolExecutor
) -> None:
    with RawClient(server, resume=b"") as first:
        with connect(server.connection_port) as joining:  # promised, and silent until the first is lost
            line = b"x-tinytun-join: %b %b" % (first.connection_id, first.key)
            joining.sendall(b"CONNECT a:1 HTTP/1.1\r\n" + line + b"\r\n\r\n")
            assert read_head(joining).status == 101
            lose(first)
            eventually(lambda: not server.registry.tunnels["demo"].sessions)
            waiting: Later = pool.submit(get, server.proxy_port)
            eventually(lambda: parked(server) == 1)
        eventually(lambda: is_leased(server))
        with RawClient(server, resume=first.token) as again:
            answer(again, b"in the end")
            assert waiting.result().body == b"in the end"


@pytest.mark.parametrize("joins", [True, False], ids=["join", "claim"])
def test_who_was_promised_a_session_before_the_owner_came_back_gets_none(
    server: TunnelServer, joins: bool
) -> None:
    with RawClient(server, resume=b"") as first, connect(server.connection_port) as late:
        line = b"x-tinytun-subdomain: demo\r\nx-tinytun-resume: " + first.token
        if joins:
            line = b"x-tinytun-join: %b %b" % (first.connection_id, first.key)
        late.sendall(b"CONNECT a:1 HTTP/1.1\r\n" + line + b"\r\n\r\n")
        assert read_head(late).status == 101
        with RawClient(server, resume=first.token):
            late.sendall(SETTINGS)
            assert b"replaced" in read_rest(late)
            tunnel = server.registry.tunnels["demo"]
            eventually(lambda: not tunnel.promised)
            assert len(tunnel.sessions) == 1
            assert tunnel.ready


def test_the_key_of_sessions_before_joins_nothing(server: TunnelServer) -> None:
    with RawClient(server, resume=b"") as first, RawClient(server, resume=first.token) as again:
        assert again.key != first.key
        with connect(server.connection_port) as late:
            line = b"x-tinytun-join: %b %b" % (first.connection_id, first.key)
            late.sendall(b"CONNECT a:1 HTTP/1.1\r\n" + line + b"\r\n\r\n")
            assert read_head(late).status == 404


# -- visitors meanwhile -------------------------------------------------------


def test_visitors_wait_for_the_client_with_their_bodies_unread(
    server: TunnelServer, pool: ThreadPoolExecutor
) -> None:
    body = bytes(300_000)
    with RawClient(server, resume=b"") as client:
        lose(client)
        eventually(lambda: is_leased(server))
        posted: Later = pool.submit(get, server.proxy_port, method=b"POST", body=body)
        eventually(lambda: parked(server) == 1)
        with RawClient(server, resume=client.token) as again:
            stream_id, head = again.next_request()
            got = len(head.split(b"\r\n\r\n", 1)[1])
            while got < len(body):
                got += len(again.next_data(stream_id))
            again.send(stream_id, respond(b"all of it"))
            assert posted.result().body == b"all of it"


def test_visitors_who_wait_in_vain_get_a_503(start_server: StartServer) -> None:
    server = start_server(park_seconds=0.3)
    with RawClient(server, resume=b"") as client:
        lose(client)
        eventually(lambda: is_leased(server))
        began = time.monotonic()
        answered = get(server.proxy_port)
        assert (answered.status, answered.get(b"retry-after")) == (503, b"2")
        assert time.monotonic() - began >= 0.3


def test_only_so_many_visitors_wait(start_server: StartServer, pool: ThreadPoolExecutor) -> None:
    server = start_server(park_visitors=2)
    with RawClient(server, resume=b"") as client:
        lose(client)
        eventually(lambda: is_leased(server))
        waiting: list[Later] = [pool.submit(get, server.proxy_port) for _ in range(2)]
        eventually(lambda: parked(server) == 2)
        assert get(server.proxy_port).status == 503
        with RawClient(server, resume=client.token) as again:
            for _ in waiting:
                answer(again, b"ok")
            assert [later.result().status for later in waiting] == [200, 200]


def test_visitors_are_told_when_the_owner_says_goodbye(
    server: TunnelServer, pool: ThreadPoolExecutor
) -> None:
    """He comes back only to leave: whoever waits is not kept for the rest of his patience."""
    with RawClient(server, resume=b"") as client:
        lose(client)
        eventually(lambda: is_leased(server))
        with RawClient(server, resume=client.token, max_streams=0) as again:
            waiting: Later = pool.submit(get, server.proxy_port)
            eventually(lambda: parked(server) == 1)
            again.goaway()
            assert waiting.result(DEADLINE / 2).status == 503


@pytest.mark.parametrize("method", [b"GET", b"PUT"])
def test_a_request_that_was_lost_with_the_client_is_sent_again(
    server: TunnelServer, pool: ThreadPoolExecutor, method: bytes
) -> None:
    with RawClient(server, resume=b"") as client:
        waiting: Later = pool.submit(get, server.proxy_port, method=method, body=b"x" * (method == b"PUT"))
        client.next_request()
        lose(client)
        with RawClient(server, resume=client.token) as again:
            assert answer(again, b"again").startswith(method)
            assert waiting.result().body == b"again"


def test_what_may_not_be_repeated_is_not(server: TunnelServer, pool: ThreadPoolExecutor) -> None:
    with RawClient(server, resume=b"") as client:
        waiting: Later = pool.submit(get, server.proxy_port, method=b"POST", body=b"x")
        client.next_request()
        lose(client)
        assert waiting.result().status == 503


def test_a_request_that_kills_its_client_is_given_up(server: TunnelServer, pool: ThreadPoolExecutor) -> None:
    client = RawClient(server, resume=b"")
    waiting: Later = pool.submit(get, server.proxy_port)
    for _ in range(2):
        client.next_request()
        lose(client)
        client.close()
        client = RawClient(server, resume=client.token)
    client.next_request()
    lose(client)
    client.close()
    assert waiting.result().status == 503


# -- TCP ----------------------------------------------------------------------


def test_a_ports_visitors_wait_too(start_server: StartServer) -> None:
    server = start_server(tcp_ports="20000-32000", park_seconds=5)
    (port,) = free_tunnel_ports(1)
    with RawClient(server, port=port, resume=b"") as client:
        lose(client)
        eventually(lambda: is_leased(server, port))
        with connect(port) as visitor:
            visitor.sendall(b"hello")
            eventually(lambda: parked(server, port) == 1)
            with RawClient(server, port=port, resume=client.token) as again:
                stream_id, _ = again.next_request_data()
                again.send(stream_id, b"welcome", end=True)
                assert read_rest(visitor) == b"welcome"
        with connect(port) as late:
            late.sendall(b"x")


def test_the_end_of_a_lease_closes_the_port(start_server: StartServer) -> None:
    server = start_server(tcp_ports="20000-32000", lease_seconds=0.2)
    (port,) = free_tunnel_ports(1)
    with RawClient(server, port=port, resume=b"") as client:
        lose(client)
        eventually(lambda: not server.registry.tunnels)
    with pytest.raises(ConnectionRefusedError):
        connect(port)


# -- restarts -----------------------------------------------------------------


def test_names_outlive_a_restart(start_server: StartServer, tmp_path: Path) -> None:
    (port,) = free_tunnel_ports(1)
    options = {"state_dir": str(tmp_path), "tcp_ports": "20000-32000", "park_seconds": 5}
    server = start_server(**options)
    with (
        RawClient(server, resume=b"") as client,
        RawClient(server, port=port, resume=b"") as tcp,
        RawClient(server, "original"),
    ):
        server.stop()
        client.next(ConnectionTerminated)
        server = start_server(**options)
        assert set(server.registry.tunnels) == {"demo", port}
        assert wish(server)[0] == 409
        with connect(port) as visitor:  # the port is open at once
            visitor.sendall(b"hello")
            eventually(lambda: parked(server, port) == 1)
            with (
                RawClient(server, resume=client.token),
                RawClient(server, port=port, resume=tcp.token) as back,
            ):
                stream_id, _ = back.next_request_data()
                back.send(stream_id, b"welcome", end=True)
                assert read_rest(visitor) == b"welcome"


def test_a_port_that_is_not_free_stays_its_owners(start_server: StartServer, tmp_path: Path) -> None:
    (port,) = free_tunnel_ports(1)
    options = {"state_dir": str(tmp_path), "tcp_ports": "20000-32000"}
    server = start_server(**options)
    with RawClient(server, port=port, resume=b"") as client:
        server.stop()
        client.next(ConnectionTerminated)
    with socket.create_server(("127.0.0.1", port)):
        server = start_server(**options)
        with connect(server.connection_port) as early:
            line = b"x-tinytun-type: tcp\r\nx-tinytun-port: %d\r\nx-tinytun-resume: %b" % (port, client.token)
            early.sendall(b"CONNECT a:1 HTTP/1.1\r\n" + line + b"\r\n\r\n")
            assert read_head(early).status == 409
        assert is_leased(server, port)
        assert not server.registry.tunnels[port].promised
    with RawClient(server, port=port, resume=client.token) as again:
        assert again.connection_id == client.connection_id


def test_the_file_follows_what_comes_and_goes(
    start_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinytun_gevent.server.leases.PAUSE", 0.01)
    server = start_server(state_dir=str(tmp_path))

    def names() -> list[str]:
        try:
            return [entry["name"] for entry in json.loads((tmp_path / "leases.json").read_bytes())["names"]]
        except FileNotFoundError:
            return []

    with RawClient(server, resume=b"") as client, RawClient(server, "other", resume=b"") as other:
        eventually(lambda: sorted(names()) == ["demo", "other"])
        lose(other)
        eventually(lambda: is_leased(server, "other"))
        client.goaway()
        eventually(lambda: names() == ["other"])


def test_a_disk_that_takes_nothing_stops_no_traffic_and_is_told_of_once(
    start_server: StartServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("tinytun_gevent.server.leases.PAUSE", 0.01)
    (tmp_path / "leases.json.new").mkdir()  # nothing can be written there
    server = start_server(state_dir=str(tmp_path))
    with RawClient(server, resume=b"") as client, RawClient(server, "other", resume=b""):
        eventually(lambda: "cannot be written" in caplog.text)
        served = threading.Thread(target=answer, args=(client, b"ok"))
        served.start()
        assert get(server.proxy_port).body == b"ok"
        served.join()
        (tmp_path / "leases.json.new").rmdir()
        eventually(lambda: "can be written again" in caplog.text)
        assert len(json.loads((tmp_path / "leases.json").read_bytes())["names"]) == 2
    assert caplog.text.count("cannot be written") == 1


def test_a_visitor_who_leaves_while_he_waits_costs_nothing_later(
    server: TunnelServer, pool: ThreadPoolExecutor
) -> None:
    with RawClient(server, resume=b"") as client:
        lose(client)
        eventually(lambda: is_leased(server))
        sock = connect(server.proxy_port)
        sock.sendall(request())
        eventually(lambda: parked(server) == 1)
        reset(sock)
        with RawClient(server, resume=client.token) as again:
            waiting: Later = pool.submit(get, server.proxy_port, target="/second")
            while b"/second" not in ((event := again.next(DataReceived)).data or b""):
                pass
            again.accept(event.stream_id or 0)
            again.send(event.stream_id or 0, respond(b"second"))
            assert waiting.result().body == b"second"
