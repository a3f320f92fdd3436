"""How many tunnels the clients of one address may have."""

from __future__ import annotations

import logging
import socket
import time
from pathlib import Path

import pytest
from conftest import StartServer
from free_ports import free_tunnel_ports
from hypothesis import given
from hypothesis import strategies as st
from raw_client import RawClient, proxy_header
from support import Response, connect, eventually, read_head, read_response

from tinytun_gevent import TunnelServer
from tinytun_gevent.errors import TryLaterError
from tinytun_gevent.registry import Record, Tunnel
from tinytun_gevent.server.account import Account
from tinytun_gevent.server.sources import Sources
from tinytun_gevent.server.tally import Refusal, Tally
from tinytun_gevent.wire.handshake import Kind

HERE, THERE = "192.0.2.1", "192.0.2.2"


def nobody(ip: str) -> bool:
    return False


def tunnel(number: int) -> Tunnel:
    return Tunnel(f"{number:032x}", Kind.HTTP, f"name{number}")


# -- by themselves ------------------------------------------------------------


def test_a_source_has_as_many_as_it_may_and_others_have_theirs() -> None:
    tally = Tally()
    sources = Sources(2, nobody, tally)
    held = [tunnel(1), tunnel(2)]
    for one in held:
        sources.check(HERE)
        sources.hold(one, HERE)
    with pytest.raises(TryLaterError, match="your address has 2") as caught:
        sources.check(HERE)
    assert (caught.value.status, caught.value.retry_after) == (429, 10)
    assert tally.refusals[Refusal.TUNNELS] == 1
    sources.check(THERE)
    sources.close(held[0])
    sources.close(held[0])
    sources.check(HERE)


def test_one_that_moves_counts_where_it_is() -> None:
    sources, one = Sources(1, nobody, Tally()), tunnel(1)
    sources.hold(one, HERE)
    sources.hold(one, THERE)
    sources.hold(one, THERE)
    assert [sources.count(source) for source in (HERE, THERE)] == [0, 1]
    sources.close(one)
    assert not len(sources)


def test_without_a_limit_they_are_counted_and_whoever_is_exempt_is_not() -> None:
    sources = Sources(0, lambda ip: ip == THERE, Tally())
    for number in range(100):
        sources.check(sources.source_of(HERE))
        sources.hold(tunnel(number), sources.source_of(HERE))
    assert sources.count(HERE) == 100
    assert sources.source_of(THERE) == ""
    sources = Sources(1, lambda ip: ip == THERE, Tally())
    for number in range(3):
        sources.check("")
        sources.hold(tunnel(number), "")
    assert not len(sources)


def test_the_log_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    sources = Sources(1, nobody, Tally())
    sources.hold(tunnel(1), HERE)
    for _ in range(100):
        with pytest.raises(TryLaterError):
            sources.check(HERE)
    assert [record.message for record in caplog.records] == [f"{HERE} has reached a limit: tunnels"]


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["", HERE, THERE])), max_size=50))
def test_every_tunnel_counts_once_where_it_was_held_last(steps: list[tuple[int, str]]) -> None:
    sources, tunnels = Sources(0, nobody, Tally()), [tunnel(number) for number in range(6)]
    where: dict[int, str] = {}
    for number, source in steps:
        sources.hold(tunnels[number], source)
        where[number] = source
    for source in (HERE, THERE):
        assert sources.count(source) == list(where.values()).count(source)
    for one in tunnels:
        sources.close(one)
    assert not len(sources)


# -- in a server --------------------------------------------------------------


@pytest.fixture
def site(start_server: StartServer, fast_clock: None) -> TunnelServer:
    """A server where an address may have two tunnels, and a PROXY header tells which address it is."""
    return start_server(source_tunnels=2, trusted_proxies="127.0.0.1", lease_seconds=20)


def asked(server: TunnelServer, *fields: str, source: str = HERE) -> tuple[socket.socket, Response]:
    """The answer's head to a CONNECT, on a connection that stays open."""
    sock = connect(server.connection_port)
    lines = ["CONNECT 127.0.0.1:5554 HTTP/1.1", *fields, "", ""]
    sock.sendall((proxy_header(source) if source else b"") + "\r\n".join(lines).encode())
    return sock, read_head(sock)


def status(server: TunnelServer, *fields: str, source: str = HERE) -> int:
    """How a CONNECT is answered; a tunnel that was opened is gone again when this returns."""
    sock, head = asked(server, *fields, source=source)
    sock.close()
    eventually(lambda: not any(one.promised for one in list(server.registry.tunnels.values())))
    return head.status


def lose(client: RawClient) -> None:
    """Ends its connection as ``kill -9`` does, once the server has noticed."""
    client.sock.shutdown(socket.SHUT_RDWR)


def is_leased(server: TunnelServer, name: str | int) -> bool:
    found = server.registry.tunnels.get(name)
    return found is not None and found.leased_until is not None


def test_one_too_many_is_refused_until_one_says_goodbye(site: TunnelServer) -> None:
    one, two = (RawClient(site, name, source=HERE) for name in ("one", "two"))
    with connect(site.connection_port) as sock:
        sock.sendall(proxy_header(HERE) + b"CONNECT x:1 HTTP/1.1\r\n\r\n")
        refused = read_response(sock)
    assert refused.status == 429
    assert refused.get(b"retry-after") == b"10"
    assert refused.body == b"The limit of tunnels at once is reached: your address has 2"
    assert status(site, "x-tinytun-type: tcp") == 429
    assert status(site, source=THERE) == 101
    assert status(site, source="") == 101, "a trusted proxy by itself is not counted"
    one.goaway()
    eventually(lambda: "one" not in site.registry.tunnels)
    assert status(site) == 101
    two.close()
    one.close()


def test_names_that_are_promised_count(start_server: StartServer) -> None:
    """Who says nothing behind the CONNECT has a name as well, for a while."""
    server = start_server(source_tunnels=5)
    opened = [asked(server, "x-tinytun-resume:", source="") for _ in range(8)]
    assert sorted(head.status for _, head in opened) == [101] * 5 + [429] * 3
    assert len(server.registry.tunnels) == 5
    for sock, _ in opened:
        sock.close()
    eventually(lambda: not server.registry.tunnels)
    assert not len(server.core.sources)


def test_lost_tunnels_count_while_their_names_are_kept(site: TunnelServer) -> None:
    """An empty resume field asks for a lease: so one stranger took 1,500 names."""
    for number in range(10):
        name = f"name{number}"
        if number < 2:
            client = RawClient(site, name, source=HERE, resume=b"")
            lose(client)
            eventually(lambda name=name: is_leased(site, name))
            client.close()
        else:
            assert status(site, f"x-tinytun-subdomain: {name}", "x-tinytun-resume:") == 429
    assert len(site.registry.tunnels) == 2


def test_an_owner_gets_a_name_again_although_it_counts_from_any_address(site: TunnelServer) -> None:
    one, two = (RawClient(site, name, source=HERE, resume=b"") for name in ("one", "two"))
    full = [RawClient(site, name, source=THERE) for name in ("three", "four")]
    lose(one)
    eventually(lambda: is_leased(site, "one"))
    with RawClient(site, "one", source=HERE, resume=one.token):
        assert status(site) == 429
        with RawClient(site, "one", source=THERE, resume=one.token):
            assert site.core.sources.count(THERE) == 2
            assert site.core.sources.count(HERE) == 2
            assert status(site) == 429, "moving a tunnel has made room for another one"
    for client in (one, two, *full):
        client.close()


def test_a_name_that_is_kept_for_its_visitors_only_is_nobodys_to_take_beyond_the_limit(
    site: TunnelServer,
) -> None:
    """After a reload a client of the original's kind has nothing to show."""
    full = [RawClient(site, name, source=HERE) for name in ("one", "two")]
    record = Record(Kind.HTTP, "old", "a" * 32, "", False, source=THERE)
    assert site.registry.restore(record, time.monotonic())
    assert status(site, "x-tinytun-subdomain: old", "x-tinytun-resume: " + "0" * 64) == 429
    assert "old" in site.registry.tunnels
    for client in full:
        client.close()


def test_a_lease_that_is_over_makes_room(start_server: StartServer, fast_clock: None) -> None:
    server = start_server(source_tunnels=1, lease_seconds=0.2)
    client = RawClient(server, resume=b"")
    lose(client)
    eventually(lambda: not server.registry.tunnels)
    assert status(server, source="") == 101
    client.close()


def test_ports_count_as_names_do(start_server: StartServer) -> None:
    (port,) = free_tunnel_ports(1)
    server = start_server(source_tunnels=1)
    with RawClient(server, port=port):
        assert status(server, "x-tinytun-type: tcp", source="") == 429
        assert status(server, source="") == 429
    eventually(lambda: not server.registry.tunnels)
    assert status(server, source="") == 101


def test_a_customer_of_ipv6_is_one_address_and_a_mapped_one_is_ipv4(site: TunnelServer) -> None:
    clients = [RawClient(site, f"six{n}", source=f"2001:db8:1:2::{n}") for n in (1, 2)]
    assert status(site, source="2001:db8:1:2:ffff::3") == 429
    assert status(site, source="2001:db8:1:3::1") == 101
    clients += [RawClient(site, f"four{n}", source=ip) for n, ip in enumerate((HERE, f"::ffff:{HERE}"))]
    assert status(site) == 429
    assert status(site, source="::ffff:c000:201") == 429
    for client in clients:
        client.close()


def test_the_next_process_counts_what_it_finds(start_server: StartServer, tmp_path: Path) -> None:
    options = {"source_tunnels": 2, "trusted_proxies": "127.0.0.1", "state_dir": str(tmp_path / "state")}
    server = start_server(**options)
    client = RawClient(server, "one", source=HERE, resume=b"")
    leases = tmp_path / "state" / "leases.json"
    eventually(lambda: leases.exists() and '"one"' in leases.read_text())
    server.stop()
    client.close()
    after = start_server(**options)
    assert after.core.sources.count(HERE) == 1
    with RawClient(after, "two", source=HERE):
        assert status(after) == 429
        with RawClient(after, "one", source=HERE, resume=client.token):
            assert after.core.sources.count(HERE) == 2


def test_accounts_have_limits_of_their_own(site: TunnelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site.core, "authorize", lambda request, address: Account("a", "alice"))
    clients = [RawClient(site, f"name{number}", source=HERE) for number in range(4)]
    assert not len(site.core.sources)
    for client in clients:
        client.close()
