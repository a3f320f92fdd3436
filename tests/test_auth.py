"""Who is let in: tokens over real sockets, and what a change of their file does to tunnels that are open."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import OpenTunnel, StartServer, StartService
from h2.events import ConnectionTerminated
from helpers import free_tunnel_ports
from raw_client import RawClient
from support import Response, connect, eventually, read_response

from tinytun_gevent import Tunnel, TunnelServer
from tinytun_gevent.client.events import State
from tinytun_gevent.errors import NameTakenError, RefusedError, UsageError
from tinytun_gevent.registry import Record
from tinytun_gevent.server import auth
from tinytun_gevent.server.account import Account, Limits
from tinytun_gevent.server.auth import EXPIRED, NO_TOKEN, WRONG_TOKEN, Gate
from tinytun_gevent.server.config import ServerConfig
from tinytun_gevent.server.tally import Refusal, Tally
from tinytun_gevent.server.tokens import hash_of
from tinytun_gevent.wire.handshake import Kind, OpenRequest

pytestmark = pytest.mark.usefixtures("fast_clock")

ALICE, BOB = "tt_alice-7", "tt_bob-7"


class File:
    """A file of tokens; each change is another file, as the command makes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, str] = {}

    def put(self, token: str, lines: str = "") -> None:
        self.entries[token] = lines
        self.write()

    def remove(self, token: str) -> None:
        del self.entries[token]
        self.write()

    def write(self, text: str | None = None) -> None:
        blocks = (
            f'[[tokens]]\nlabel = "{token[3:]}"\nsha256 = "{hash_of(token)}"\n{lines}\n'
            for token, lines in self.entries.items()
        )
        draft = self.path.with_suffix(".new")
        draft.write_text("\n".join(blocks) if text is None else text)
        os.replace(draft, self.path)


@pytest.fixture
def file(tmp_path: Path) -> File:
    file = File(tmp_path / "tokens.toml")
    file.put(ALICE)
    file.put(BOB)
    return file


@pytest.fixture
def start(start_server: StartServer, file: File) -> Callable[..., TunnelServer]:
    return lambda **options: start_server(auth_file=str(file.path), **options)


def knock(server: TunnelServer, token: str | None, name: str = "demo", **fields: object) -> Response:
    """What a CONNECT is answered; the connection is closed."""
    lines = [f"CONNECT x:{server.connection_port} HTTP/1.1", f"x-tinytun-subdomain: {name}"]
    lines += [f"{key.replace('_', '-')}: {value}" for key, value in fields.items()]
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    with connect(server.connection_port) as sock:
        sock.sendall("\r\n".join([*lines, "", ""]).encode())
        return read_response(sock, b"CONNECT" if token in (ALICE, BOB) else b"GET")


def reason(server: TunnelServer, token: str | None, name: str = "demo", **fields: object) -> tuple[int, str]:
    answer = knock(server, token, name, **fields)
    return answer.status, answer.body.decode()


def test_without_a_file_everybody_is_let_in_and_a_token_means_nothing(server: TunnelServer) -> None:
    assert knock(server, ALICE).status == 101
    assert knock(server, ALICE, "other").status == 101
    assert server.core.gate.is_open


def test_with_one_only_who_has_a_token(start: Callable[..., TunnelServer], open_tunnel: OpenTunnel) -> None:
    server = start()
    assert reason(server, None) == (401, NO_TOKEN)
    assert reason(server, "tt_wrong") == (401, WRONG_TOKEN)
    assert not server.registry.tunnels
    assert server.core.tally.refusals == {Refusal.TOKEN: 2}
    tunnel = open_tunnel(1, server=server, token=ALICE)
    found = server.registry.tunnels["demo"]
    assert found.opener == hash_of(ALICE)[:32]
    assert found.account == Account(found.opener, "alice-7")
    assert tunnel.state is State.CONNECTED


def test_credentials_of_another_scheme_are_none(start: Callable[..., TunnelServer]) -> None:
    assert reason(start(), None, authorization="Basic YTpi") == (401, NO_TOKEN)


def test_names_and_ports_that_a_token_may_have(start: Callable[..., TunnelServer], file: File) -> None:
    (port, other) = free_tunnel_ports(2)
    file.put(ALICE, f'names = ["a", "a-*"]\nports = [{port}]\nreserve = ["mine"]')
    server = start(reserved_names="www,adm*")
    assert reason(server, BOB, "www")[0] == 403
    assert reason(server, BOB, "admin") == (403, "This subdomain is reserved")
    assert reason(server, BOB, "mine") == (403, "This subdomain is reserved for somebody else")
    assert reason(server, ALICE, "b") == (403, "This token does not allow that subdomain")
    tcp = {"x_tinytun_type": "tcp", "x_tinytun_port": other}
    assert reason(server, ALICE, **tcp) == (403, "This token does not allow that port")
    assert knock(server, ALICE, "mine").status == 101
    assert knock(server, ALICE, "A-1").status == 101
    name = knock(server, ALICE, "").get(b"x-tinytun-subdomain") or b""
    assert name.startswith(b"a-")
    granted = knock(server, ALICE, x_tinytun_type="tcp")
    assert granted.get(b"x-tinytun-port") == b"%d" % port


def test_reserved_names_hold_without_tokens_too(start_server: StartServer) -> None:
    server = start_server(reserved_names="www")
    assert reason(server, None, "www") == (403, "This subdomain is reserved")
    assert knock(server, ALICE, "other").status == 101


def test_an_expired_token_says_so(start: Callable[..., TunnelServer], file: File) -> None:
    file.put(ALICE, "expires = 2020-01-01")
    assert reason(start(), ALICE) == (401, EXPIRED)


def test_only_its_account_joins_a_tunnel(start: Callable[..., TunnelServer]) -> None:
    server = start()
    with _raw(server, ALICE) as first:
        join = f"{first.connection_id.decode()} {first.key.decode()}"
        assert reason(server, BOB, "", x_tinytun_join=join) == (404, "There is no such tunnel")
        assert reason(server, None, "", x_tinytun_join=join) == (401, NO_TOKEN)
        assert knock(server, ALICE, "", x_tinytun_join=join).status == 101


def _raw(server: TunnelServer, token: str, name: str = "demo", resume: bytes | None = b"") -> RawClient:
    return RawClient(server, name, resume=resume, fields=b"\r\nAuthorization: Bearer " + token.encode())


def test_a_client_adds_sessions_with_its_token(
    start: Callable[..., TunnelServer], open_tunnel: OpenTunnel
) -> None:
    from tinytun_gevent.client.joining import Team

    tunnel = open_tunnel(1, server=start(), token=ALICE)
    agent = tunnel._agent
    assert agent is not None
    team = agent._team
    assert isinstance(team, Team)
    assert team._request("0" * 32).token == ALICE


# -- the file changes ---------------------------------------------------------


def test_a_revoked_token_ends_its_tunnels_and_frees_their_names(
    start: Callable[..., TunnelServer], file: File, open_tunnel: OpenTunnel
) -> None:
    server = start()
    tunnel = open_tunnel(1, server=server, token=ALICE)
    other = open_tunnel(1, "other", server=server, token=BOB)
    began = time.monotonic()
    file.remove(ALICE)
    with pytest.raises(RefusedError, match="may have been revoked") as refused:
        tunnel.wait()
    assert time.monotonic() - began < 5
    assert refused.value.status == 401
    assert refused.value.exit_code == 3
    assert "demo" not in server.registry.tunnels
    assert other.state is State.CONNECTED


def test_its_sessions_are_told_why(start: Callable[..., TunnelServer], file: File) -> None:
    server = start()
    with _raw(server, ALICE) as client:
        file.remove(ALICE)
        told = client.next(ConnectionTerminated)
        assert told.additional_data == b"the token was revoked"
        assert told.error_code == 7


def test_what_becomes_forbidden_ends(start: Callable[..., TunnelServer], file: File) -> None:
    server = start()
    with _raw(server, ALICE) as client, _raw(server, ALICE, "fine") as other:
        file.put(BOB, 'reserve = ["demo"]')
        told = client.next(ConnectionTerminated)
        assert told.additional_data == b"This subdomain is reserved for somebody else"
        other.sync()


def test_a_token_ends_its_tunnels_when_it_expires(start: Callable[..., TunnelServer], file: File) -> None:
    until = datetime.now(UTC) + timedelta(seconds=0.4)
    file.put(ALICE, f"expires = {until.isoformat()}")
    server = start()
    with _raw(server, ALICE) as client:
        assert client.next(ConnectionTerminated).additional_data == b"the token has expired"
    assert reason(server, ALICE) == (401, EXPIRED)


def test_a_leased_name_is_freed_with_its_token(start: Callable[..., TunnelServer], file: File) -> None:
    server = start()
    _raw(server, ALICE).close()
    eventually(lambda: server.registry.tunnels["demo"].leased_until is not None)
    file.remove(ALICE)
    eventually(lambda: "demo" not in server.registry.tunnels)


def test_limits_that_change_reach_tunnels_that_are_open(
    start: Callable[..., TunnelServer], file: File
) -> None:
    server = start()
    with _raw(server, ALICE):
        file.put(ALICE, "limits = {tunnels = 3}")
        eventually(lambda: server.registry.tunnels["demo"].account.limits == Limits(tunnels=3))


def test_a_new_token_is_known_soon(start: Callable[..., TunnelServer], file: File) -> None:
    server = start()
    file.put("tt_carol")
    eventually(lambda: server.core.gate.account_of(hash_of("tt_carol")[:32]))


@pytest.mark.parametrize("gone", [False, True])
def test_an_edit_that_makes_no_sense_changes_nothing_and_is_told_once(
    start: Callable[..., TunnelServer], file: File, gone: bool, caplog: pytest.LogCaptureFixture
) -> None:
    server = start()

    def told() -> list[str]:
        return [record.getMessage() for record in caplog.records if "AUTH_FILE" in record.getMessage()]

    with caplog.at_level(logging.INFO, "tinytun_gevent.server"):
        if gone:
            file.path.unlink()
        else:
            file.put(BOB, 'ports = ["x"]')
        eventually(lambda: server.core.gate._reading is None and told())
        ticks: list[float] = []
        server.core.clock.watch(_Ticks(ticks))
        eventually(lambda: len(ticks) > 5)
        (line,) = told()
        assert ("No such file" if gone else "tokens[1].ports[0]: allowed: a port") in line
        assert "stay in force" in line
        assert knock(server, ALICE).status == 101
        file.entries[BOB] = ""
        file.remove(ALICE)
        eventually(lambda: "tokens in force: 1" in told()[-1])
    assert reason(server, ALICE)[0] == 401


class _Ticks:
    def __init__(self, seen: list[float]) -> None:
        self.seen = seen

    def tick(self, now: float) -> None:
        self.seen.append(now)


def test_a_file_that_makes_no_sense_starts_no_server(start_server: StartServer, tmp_path: Path) -> None:
    for text in (None, "x = 1"):
        if text is not None:
            (tmp_path / "t.toml").write_text(text)
        with pytest.raises(UsageError, match="AUTH_FILE="):
            start_server(auth_file=str(tmp_path / "t.toml"))


# -- whose a name is ----------------------------------------------------------


def test_a_name_that_waits_is_its_tokens_on_another_machine(start: Callable[..., TunnelServer]) -> None:
    server = start()
    _raw(server, ALICE).close()
    eventually(lambda: server.registry.tunnels["demo"].leased_until is not None)
    before = server.registry.tunnels["demo"].id
    assert reason(server, BOB)[0] == 409
    with _raw(server, ALICE) as again:
        assert again.connection_id == before.encode()
        assert reason(server, ALICE) == (409, "Subdomain not available"), (
            "nobody steals from a running client"
        )


def test_remembered_tunnels_get_their_accounts_back(file: File) -> None:
    server = TunnelServer(
        bind="127.0.0.1",
        connection_port=0,
        proxy_port=0,
        tcp_proxy_port=0,
        metadata_port=0,
        state_dir=str(file.path.parent / "state"),
        auth_file=str(file.path),
        lease_seconds=600,
    )
    for _ in range(2):  # the second one remembers
        with server:
            if "demo" in server.registry.tunnels:
                found = server.registry.tunnels["demo"]
                assert found.account == Account(hash_of(ALICE)[:32], "alice-7")
                assert found.leased_until is not None
                return
            client = _raw(server, ALICE)
            eventually(lambda: server.registry.lasting())
            client.close()
            eventually(lambda: server.registry.tunnels["demo"].leased_until is not None)
    pytest.fail("nothing was remembered")


def test_remembered_names_of_a_revoked_token_are_free(start: Callable[..., TunnelServer]) -> None:
    server = start()
    now = time.monotonic()
    gone = server.registry.restore(Record(Kind.HTTP, "gone", "0" * 32, "f" * 32, True), now)
    kept = server.registry.restore(Record(Kind.HTTP, "kept", "1" * 32, "", True), now)
    assert gone is not None
    assert kept is not None
    server.core.gate._review_at = 0.0
    eventually(lambda: "gone" not in server.registry.tunnels)
    assert server.registry.holds(kept), "from when nobody was asked"


# -- guessing -----------------------------------------------------------------


def test_guessing_has_to_wait_but_who_is_known_here_does_not(start: Callable[..., TunnelServer]) -> None:
    server = start()
    assert knock(server, ALICE).status == 101
    for number in range(3):
        assert reason(server, f"tt_guess{number}")[0] == 401
    first = knock(server, "tt_guess")
    assert first.status == 429
    assert int(first.get(b"retry-after") or 0) > 15
    second = knock(server, BOB)
    assert second.status == 429, "a right token from here would be a guess that was right"
    assert int(second.get(b"retry-after") or 0) > int(first.get(b"retry-after") or 0)
    assert b"wait" in first.body
    assert knock(server, ALICE, "other").status == 101
    assert server.core.tally.refusals == {Refusal.TOKEN: 3, Refusal.PENALTY: 2}


def test_a_trusted_proxy_is_many_people(start: Callable[..., TunnelServer]) -> None:
    server = start(trusted_proxies="127.0.0.1")
    for number in range(10):
        assert reason(server, f"tt_guess{number}")[0] == 401
    assert knock(server, BOB).status == 101


def test_the_right_and_the_wrong_wait_alike(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an address is told while it waits must not depend on the token."""
    waits = []
    monkeypatch.setattr(auth.time, "monotonic", lambda: 100.0)
    for token in (BOB, "tt_wrong"):
        gate = _gate(file)
        for number in range(3):
            with pytest.raises(RefusedError):
                gate.admit(_request(f"tt_{number}"), "192.0.2.1")
        for _ in range(3):
            with pytest.raises(RefusedError) as refused:
                gate.admit(_request(token), "192.0.2.1")
        waits.append(str(refused.value))
        assert gate.admit(_request(BOB), "192.0.2.2").label == "bob-7"
    assert waits[0] == waits[1]


def test_an_ipv6_network_is_one_source(file: File) -> None:
    gate = _gate(file)
    for number in range(3):
        with pytest.raises(RefusedError):
            gate.admit(_request("tt_wrong"), f"2001:db8::{number}")
    with pytest.raises(RefusedError) as refused:
        gate.admit(_request(ALICE), "2001:db8::f")
    assert refused.value.status == 429
    assert gate.admit(_request(ALICE), "2001:db8:0:1::").label == "alice-7"


def _request(token: str) -> OpenRequest:
    return OpenRequest(Kind.HTTP, "x:1", token=token)


def _gate(file: File) -> Gate:
    from tinytun_gevent.registry import Registry

    config = ServerConfig(auth_file=str(file.path))
    return Gate(config, Registry(("localhost",)), Tally(), lambda ip: False)


def test_defaults_are_for_what_the_file_does_not_say(file: File) -> None:
    from tinytun_gevent.registry import Registry

    file.put(ALICE, "limits = {tunnels = 3}")
    gate = Gate(
        ServerConfig(auth_file=str(file.path)),
        Registry(("localhost",)),
        Tally(),
        lambda ip: False,
        anybody=Account(each=Limits(rate=5)),
        limits=Limits(tunnels=9, visitors=8),
    )
    assert gate.admit(_request(ALICE), "192.0.2.1").limits == Limits(tunnels=3, visitors=8)
    found = gate.admit(_request(BOB), "192.0.2.1")
    assert (found.limits, found.each) == (Limits(tunnels=9, visitors=8), Limits(rate=5))


# -- the client ---------------------------------------------------------------


def test_the_client_says_what_to_do(start: Callable[..., TunnelServer], file: File) -> None:
    file.put(BOB, 'reserve = ["demo"]')
    server = start()
    for token, error, hint in (
        (None, RefusedError, "asks for a token.*tinytun login --server 127.0.0.1:"),
        ("tt_wrong", RefusedError, "tinytun login --server 127.0.0.1:"),
        (ALICE, RefusedError, "reserved for somebody else.*whoever runs the server can allow it"),
    ):
        tunnel = Tunnel(1, server=server.url, subdomain="demo", proxy="", token=token)
        with pytest.raises(error, match=hint) as refused:
            tunnel.open()
        assert not isinstance(refused.value, NameTakenError)


def test_the_token_is_in_no_log(
    start: Callable[..., TunnelServer],
    file: File,
    open_tunnel: OpenTunnel,
    start_service: StartService,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG):
        server = start(log_level="trace")
        tunnel = open_tunnel(start_service(), server=server, token=ALICE)
        assert ALICE not in repr(tunnel.config) + repr(tunnel)
        for token in ("tt_wrong-secret", ALICE + "-secret"):
            reason(server, token)
        knock(server, ALICE, "x", authorization="Bearer twice-secret")
        knock(server, "bad secret token")
        file.remove(ALICE)
        with pytest.raises(RefusedError) as refused:
            tunnel.wait()
    text = caplog.text + str(refused.value)
    assert "is ended: the token was revoked" in text
    assert ALICE not in text
    assert "secret" not in text
