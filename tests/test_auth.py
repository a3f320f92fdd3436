"""Who may open a tunnel: tokens, what they allow, and what becomes of tunnels when they do not any more."""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import gevent
import pytest
from conftest import StartServer
from h2.events import ConnectionTerminated
from helpers import deadline
from raw_client import RawClient
from support import Response, connect, eventually, read_head, read_response, reset

from tinytun_gevent import TunnelServer
from tinytun_gevent.background import run_in_hub
from tinytun_gevent.errors import RefusedError, TryLaterError, UsageError
from tinytun_gevent.registry import Record
from tinytun_gevent.server import tokens
from tinytun_gevent.server.auth import Auth
from tinytun_gevent.server.authfile import Grant, account_id, digest
from tinytun_gevent.server.config import ServerConfig
from tinytun_gevent.server.tally import Refusal, Tally
from tinytun_gevent.wire.handshake import Kind

ANNA, BOB = "tt_anna-secret-secret-secret", "tt_bob-secret-secret-secret"


def entry(label: str, token: str, *more: str) -> str:
    return "\n".join(["[[tokens]]", f'label = "{label}"', f'sha256 = "{digest(token)}"', *more, ""])


@pytest.fixture
def auth_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.toml"
    path.write_text(
        entry("anna", ANNA, 'names = ["anna", "anna-*"]', "ports = []")
        + entry("bob", BOB, 'reserved = ["shop"]')
    )
    return path


@pytest.fixture
def guarded(start_server: StartServer, auth_file: Path, fast_clock: None) -> TunnelServer:
    """A server with tokens, whose clock is fast and to whom this address is a stranger's."""
    return start_server(auth_file=str(auth_file), reserved_names="www")


def replace(path: Path, text: str) -> None:
    """As an editor does it: all at once."""
    draft = path.with_suffix(".draft")
    draft.write_text(text)
    os.replace(draft, path)


def say(sock: socket.socket, token: str | None, *fields: str) -> None:
    """Sends a CONNECT."""
    lines = ["CONNECT 127.0.0.1:5554 HTTP/1.1", *fields]
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    sock.sendall("\r\n".join([*lines, "", ""]).encode())


def answer(server: TunnelServer, token: str | None, *fields: str) -> Response:
    """The whole of a refusal."""
    with connect(server.connection_port) as sock:
        say(sock, token, *fields)
        return read_response(sock)


def refusal(server: TunnelServer, token: str | None, *fields: str) -> tuple[int, str]:
    """Status and reason of a refusal."""
    refused = answer(server, token, *fields)
    return refused.status, refused.body.decode()


def goaway_reason(client: RawClient) -> bytes:
    """Why the server has ended a session."""
    return client.next(ConnectionTerminated).additional_data or b""


def test_only_who_has_a_token_opens_a_tunnel(guarded: TunnelServer) -> None:
    status, text = refusal(guarded, None)
    assert (status, "asks for a token" in text) == (401, True)
    assert refusal(guarded, "tt_wrong") == (401, "The token is not valid here")
    assert guarded.core.tally.refusals[Refusal.TOKEN] == 2
    client = RawClient(guarded, "anna", bearer=ANNA)
    tunnel = guarded.registry.tunnels["anna"]
    assert tunnel.account.label == "anna"
    assert ANNA not in tunnel.opener
    client.close()


@pytest.mark.parametrize(
    ("token", "wish", "status", "says"),
    [
        (
            ANNA,
            "x-tinytun-subdomain: other",
            403,
            "does not allow the subdomain other; it allows: anna, anna-*",
        ),
        (ANNA, "x-tinytun-subdomain: shop", 403, "The subdomain shop is reserved"),
        (BOB, "x-tinytun-subdomain: www", 403, "The subdomain www is reserved"),
        (ANNA, "x-tinytun-type: tcp", 503, "No port is available"),
        (ANNA, "x-tinytun-type: tcp\r\nx-tinytun-port: 20000", 403, "it allows: none"),
    ],
)
def test_a_token_has_what_it_allows(
    guarded: TunnelServer, token: str, wish: str, status: int, says: str
) -> None:
    answered, text = refusal(guarded, token, wish)
    assert (answered, says in text) == (status, True), text
    assert not guarded.registry.tunnels


def test_who_wants_any_name_gets_one_that_his_token_allows(guarded: TunnelServer) -> None:
    names = []
    with connect(guarded.connection_port) as one, connect(guarded.connection_port) as other:
        for sock in (one, other):
            say(sock, ANNA)
            names.append((read_head(sock).get(b"x-tinytun-subdomain") or b"").decode())
    assert names[0] == "anna"
    assert names[1].startswith("anna-")


def test_a_session_joins_only_with_the_same_token(guarded: TunnelServer) -> None:
    client = RawClient(guarded, "shop", bearer=BOB)
    wish = f"x-tinytun-join: {client.connection_id.decode()} {client.key.decode()}"
    assert refusal(guarded, ANNA, wish) == (404, "There is no such tunnel")
    assert refusal(guarded, None, wish)[0] == 401
    RawClient(guarded, "shop", bearer=BOB, join=client).close()
    client.close()


# -- a file that is being rewritten -------------------------------------------


def found(path: Path) -> Auth:
    """What a server makes of the file when it starts."""
    auth = Auth(ServerConfig(auth_file=str(path)), Tally(), lambda ip: False)
    auth.load()
    return auth


def knows(auth: Auth, token: str) -> bool:
    """Whether a token gets in."""
    try:
        auth.authenticate(token, "192.0.2.1")
    except TryLaterError:
        raise
    except RefusedError:
        return False
    return True


def look(auth: Auth, now: float) -> None:
    """One look at monotonic time ``now``, and what comes of it."""
    with deadline():
        auth.tick(now)
        if auth._reading is not None:
            auth._reading.join()


def test_a_file_that_is_being_written_revokes_nobody(auth_file: Path) -> None:
    auth = found(auth_file)
    look(auth, 0)
    text = auth_file.read_text()
    for now, length in enumerate((0, 40, text.index("[[tokens]]", 1)), 1):
        auth_file.write_text(text[:length])
        look(auth, now)
        assert knows(auth, BOB)
    auth_file.write_text(text + entry("eve", "tt_eve"))
    look(auth, 4)
    assert not knows(auth, "tt_eve")
    look(auth, 5)
    assert knows(auth, "tt_eve")
    assert auth.problem is None


def test_a_file_that_was_renamed_into_its_place_counts_at_the_next_look(auth_file: Path) -> None:
    auth = found(auth_file)
    look(auth, 0)
    replace(auth_file, entry("anna", ANNA))
    look(auth, 1)
    assert knows(auth, ANNA)
    assert not knows(auth, BOB)


def test_a_file_that_changes_while_it_is_read_does_not_count(
    auth_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auth = found(auth_file)
    look(auth, 0)
    read = tokens.read

    def interrupted(config: ServerConfig) -> list[Grant]:
        monkeypatch.setattr(tokens, "read", read)
        os.truncate(auth_file, 0)
        return read(config)

    monkeypatch.setattr(tokens, "read", interrupted)
    replace(auth_file, auth_file.read_text() + "# more\n")
    look(auth, 1)
    assert knows(auth, BOB)
    assert tokens.read is read, "it was read, and not believed"


def test_a_file_that_changes_while_it_is_read_at_the_start_sends_nobody_away_for_good(
    auth_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, text = tokens.read, auth_file.read_text()

    def interrupted(config: ServerConfig) -> list[Grant]:
        monkeypatch.setattr(tokens, "read", read)
        os.truncate(auth_file, 0)
        return read(config)

    monkeypatch.setattr(tokens, "read", interrupted)
    auth, now = found(auth_file), time.monotonic()
    assert "it is being changed" in str(auth.problem)
    with pytest.raises(TryLaterError):
        auth.authenticate(BOB, "192.0.2.1")
    auth_file.write_text(text)
    for second in (1, 2):
        look(auth, now + second)
    assert knows(auth, BOB)


def test_an_empty_file_counts_after_its_time_with_a_warning(
    auth_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    auth = found(auth_file)
    look(auth, 0)
    replace(auth_file, "")
    for now in range(1, 11):
        look(auth, now)
        assert knows(auth, BOB)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{auth_file} is empty; what it said before goes on" in caplog.text
    look(auth, 11)
    assert not knows(auth, BOB)
    assert "nobody has access" in caplog.text


def test_a_server_that_starts_while_the_file_is_empty_sends_nobody_away_for_good(auth_file: Path) -> None:
    text = auth_file.read_text()
    os.truncate(auth_file, 0)
    auth = found(auth_file)
    assert auth.problem is not None
    with pytest.raises(TryLaterError) as caught:
        auth.authenticate(BOB, "192.0.2.1")
    assert caught.value.status == 503
    auth_file.write_text(text)
    look(auth, time.monotonic() + 1)
    look(auth, time.monotonic() + 2)
    assert knows(auth, BOB)
    assert auth.problem is None


def test_a_file_that_has_been_empty_for_long_means_it(
    auth_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.truncate(auth_file, 0)
    later = time.time() + 60
    monkeypatch.setattr("tinytun_gevent.server.auth.time.time", lambda: later)
    auth = found(auth_file)
    assert auth.problem is None
    assert not knows(auth, BOB)


def test_a_file_that_was_empty_at_the_start_counts_in_the_end(auth_file: Path) -> None:
    os.truncate(auth_file, 0)
    auth, now = found(auth_file), time.monotonic()
    look(auth, now + 9)
    assert not auth.is_ready
    look(auth, now + 11)
    assert not knows(auth, BOB)


def test_half_a_file_at_the_start_costs_nobody_his_name(
    start_server: StartServer, auth_file: Path, tmp_path: Path
) -> None:
    """A new worker reads what a script is still writing."""
    text, state = auth_file.read_text(), str(tmp_path / "state")
    server = start_server(auth_file=str(auth_file), state_dir=state)
    client = RawClient(server, "shop", bearer=BOB, resume=b"")
    leases = tmp_path / "state" / "leases.json"
    eventually(lambda: leases.exists() and '"shop"' in leases.read_text())
    server.stop()
    client.close()
    auth_file.write_text(text[: text.index("[[tokens]]", 1)])
    after = start_server(auth_file=str(auth_file), state_dir=state)
    assert refusal(after, BOB, "x-tinytun-subdomain: shop")[0] == 401
    assert "shop" in after.registry.tunnels
    auth_file.write_text(text)
    eventually(lambda: run_in_hub(after.core.auth.account_of, account_id(digest(BOB))))
    RawClient(after, "shop", bearer=BOB, resume=client.token).close()


def test_the_clients_of_an_emptied_file_go_on(
    guarded: TunnelServer, auth_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with RawClient(guarded, "shop", bearer=BOB) as client:
        text = auth_file.read_text()
        os.truncate(auth_file, 0)
        eventually(lambda: "is empty" in caplog.text)
        auth_file.write_text(text)
        eventually(lambda: "read again" in caplog.text)
        client.sync()
        assert set(guarded.registry.tunnels) == {"shop"}


def test_showing_a_token_that_was_valid_until_lately_is_no_guess(
    guarded: TunnelServer, auth_file: Path
) -> None:
    text = auth_file.read_text()
    replace(auth_file, entry("anna", ANNA))
    eventually(lambda: refusal(guarded, BOB)[0] == 401)
    for _ in range(10):
        assert refusal(guarded, BOB) == (401, "The token is not valid here")
    replace(auth_file, text)
    eventually(lambda: run_in_hub(guarded.core.auth.account_of, account_id(digest(BOB))))
    RawClient(guarded, "shop", bearer=BOB).close()


def test_showing_a_token_that_has_just_expired_is_no_lapse(auth_file: Path) -> None:
    replace(auth_file, entry("anna", ANNA, f"expires = {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"))
    auth = found(auth_file)
    eventually(lambda: not knows(auth, ANNA))
    assert not any(knows(auth, ANNA) for _ in range(100))
    assert not len(auth._penalties)


def test_a_token_whose_tunnel_another_process_knew_is_no_guess(
    start_server: StartServer, auth_file: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    server = start_server(auth_file=str(auth_file), state_dir=str(state))
    client = RawClient(server, "shop", bearer=BOB, resume=b"")
    eventually(lambda: (state / "leases.json").exists() and '"shop"' in (state / "leases.json").read_text())
    server.stop()
    client.close()
    replace(auth_file, entry("anna", ANNA))
    after = start_server(auth_file=str(auth_file), state_dir=str(state))
    for _ in range(10):
        assert refusal(after, BOB)[0] == 401
    RawClient(after, "anna", bearer=ANNA).close()


# -- changes ------------------------------------------------------------------


def test_a_removed_token_ends_its_tunnels_and_no_others(guarded: TunnelServer, auth_file: Path) -> None:
    anna, bob = RawClient(guarded, "anna", bearer=ANNA), RawClient(guarded, "shop", bearer=BOB)
    replace(auth_file, entry("bob", BOB))
    assert goaway_reason(anna) == b"its token was revoked or has expired"
    eventually(lambda: set(guarded.registry.tunnels) == {"shop"})
    assert refusal(guarded, ANNA)[0] == 401
    bob.close()


def test_a_removed_token_ends_what_still_runs_on_a_session_that_leaves(
    guarded: TunnelServer, auth_file: Path
) -> None:
    """Its tunnel has no name any more then: the client has said goodbye."""
    client = RawClient(guarded, "shop", bearer=BOB)
    with connect(guarded.proxy_port) as visitor:
        visitor.sendall(b"GET /long HTTP/1.1\r\nHost: shop.localhost\r\n\r\n")
        client.next_request()
        client.goaway()
        eventually(lambda: "shop" not in guarded.registry.tunnels)
        assert guarded.core.busy
        replace(auth_file, entry("anna", ANNA))
        assert goaway_reason(client) == b"its token was revoked or has expired"
        eventually(lambda: not guarded.core.busy)


def test_a_token_that_may_less_than_before_loses_what_it_may_not(
    guarded: TunnelServer, auth_file: Path
) -> None:
    anna, other = RawClient(guarded, "anna", bearer=ANNA), RawClient(guarded, "anna-b", bearer=ANNA)
    replace(auth_file, entry("anna", ANNA, 'names = ["anna"]', "limits = { tunnels = 1 }"))
    assert goaway_reason(other) == b"its token does not allow the name any more"
    eventually(lambda: set(guarded.registry.tunnels) == {"anna"})
    tunnel = guarded.registry.tunnels["anna"]
    eventually(lambda: tunnel.account.limits.tunnels == 1)
    assert refusal(guarded, ANNA) == (409, "All subdomains that your token allows are taken")
    anna.close()


def test_a_token_expires_while_it_is_in_use(
    guarded: TunnelServer, auth_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(auth_file, entry("anna", ANNA, "expires = 2126-01-31"))
    eventually(lambda: refusal(guarded, BOB)[0] == 401)
    anna = RawClient(guarded, "anna", bearer=ANNA)
    monkeypatch.setattr("tinytun_gevent.server.auth.time.time", lambda: 5e9)  # 2128
    assert goaway_reason(anna) == b"its token was revoked or has expired"
    assert refusal(guarded, ANNA) == (401, "The token has expired")


@pytest.mark.parametrize("damage", ["[[tokens]\n", None, "x" * (1 << 20) + "y"])
def test_a_file_that_makes_no_sense_changes_nothing(
    guarded: TunnelServer, auth_file: Path, damage: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    client = RawClient(guarded, "anna", bearer=ANNA)
    if damage is None:
        auth_file.unlink()
    else:
        replace(auth_file, damage)
    eventually(lambda: guarded.core.auth.problem)
    assert str(auth_file) in str(guarded.core.auth.problem)
    assert set(guarded.registry.tunnels) == {"anna"}
    RawClient(guarded, "anna-b", bearer=ANNA).close()
    replace(auth_file, entry("eve", "tt_eve"))
    eventually(lambda: guarded.core.auth.problem is None)
    assert goaway_reason(client)


def test_a_file_that_could_never_be_read_sends_nobody_away_for_good(
    guarded: TunnelServer, auth_file: Path
) -> None:
    """As after the death of a worker. A 401 would end every client, and each of them would have to wait."""
    core = guarded.core
    auth = Auth(core.config, core.tally, core.is_trusted)
    text = auth_file.read_text()
    auth_file.write_text("[[tokens]\n")
    auth.load()
    for _ in range(5):
        with pytest.raises(TryLaterError) as caught:
            auth.authenticate(BOB, "192.0.2.1")
        assert caught.value.status == 503
        assert str(auth_file) not in str(caught.value)
    assert not auth.is_ready
    auth_file.write_text(text)
    auth.load()
    assert auth.is_ready
    assert auth.authenticate(BOB, "192.0.2.1").label == "bob"


def test_names_are_kept_for_their_owners_until_the_file_can_be_read(
    guarded: TunnelServer, auth_file: Path
) -> None:
    core, registry = guarded.core, guarded.registry
    bob, eve = account_id(digest(BOB)), account_id(digest("tt_eve"))
    for name, opener in (("shop", bob), ("eve", eve)):
        assert registry.restore(Record(Kind.HTTP, name, digest(name)[:32], opener, True), time.monotonic())
    grants, core.auth._accounts = core.auth._accounts, {}
    core.auth.is_ready = False
    assert core.auth.on_change is not None
    core.auth.on_change()
    assert set(registry.tunnels) == {"shop", "eve"}
    core.auth._accounts, core.auth.is_ready = grants, True
    core.auth.on_change()
    assert set(registry.tunnels) == {"shop"}


def test_a_change_is_noticed_while_every_thread_waits_for_something_else(
    guarded: TunnelServer, auth_file: Path
) -> None:
    """Such as names that nobody resolves, or handshakes with a large key."""
    blocked = threading.Event()
    pool = run_in_hub(lambda: gevent.get_hub().threadpool)
    run_in_hub(lambda: [pool.spawn(blocked.wait) for _ in range(pool.maxsize)])
    try:
        anna = RawClient(guarded, "anna", bearer=ANNA)
        replace(auth_file, entry("bob", BOB))
        assert goaway_reason(anna) == b"its token was revoked or has expired"
    finally:
        blocked.set()


def test_a_token_expires_again_when_the_clock_was_wrong(
    guarded: TunnelServer, auth_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine without a battery: the time comes after the server has started, and it is earlier."""
    replace(auth_file, entry("anna", ANNA, "expires = 2126-01-31"))
    eventually(lambda: refusal(guarded, BOB)[0] == 401)
    clock = "tinytun_gevent.server.auth.time.time"
    monkeypatch.setattr(clock, lambda: 5e9)  # 2128
    eventually(lambda: guarded.core.auth._next_expiry == math.inf)
    monkeypatch.setattr(clock, lambda: 4.8e9)  # 2122
    eventually(lambda: guarded.core.auth._next_expiry < math.inf)
    anna = RawClient(guarded, "anna", bearer=ANNA)
    monkeypatch.setattr(clock, lambda: 5e9)
    assert goaway_reason(anna) == b"its token was revoked or has expired"


def test_what_is_wrong_at_the_start_is_told_and_nothing_starts(
    start_server: StartServer, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="there is no such file"):
        start_server(auth_file=str(tmp_path / "none.toml"))


def test_guessing_makes_an_address_wait_even_with_a_right_token(guarded: TunnelServer) -> None:
    for _ in range(4):
        assert refusal(guarded, "tt_wrong")[0] == 401
    refused = answer(guarded, ANNA)
    assert refused.status == 429
    assert int(refused.get(b"retry-after") or 0) in (4, 5)
    assert guarded.core.tally.refusals[Refusal.PENALTY] == 1


def test_who_was_let_in_before_is_not_shut_out_by_others_at_his_address(guarded: TunnelServer) -> None:
    RawClient(guarded, "shop", bearer=BOB).close()
    for _ in range(4):
        assert refusal(guarded, "tt_wrong")[0] == 401
    RawClient(guarded, "other", bearer=BOB).close()
    before, after = answer(guarded, ANNA), answer(guarded, "tt_wrong")
    assert (before.status, before.body) == (after.status, after.body), "nobody learns what is right"
    assert before.status == 429


def test_a_port_that_another_program_has_does_not_cost_its_owner_the_lease(guarded: TunnelServer) -> None:
    """Also if he has come from another machine, so that he has nothing to show but his token."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
        registry = guarded.registry
        registry._tcp_ports = range(port, port + 1)
        record = Record(Kind.TCP, port, "0" * 32, account_id(digest(BOB)), True)
        tunnel = registry.restore(record, time.monotonic())
        wish = ("x-tinytun-type: tcp", f"x-tinytun-port: {port}")
        assert refusal(guarded, BOB, *wish, "x-tinytun-resume:") == (
            409,
            "Port not available: another program on the server's machine has it",
        )
        assert registry.tunnels.get(port) is tunnel


def test_a_trusted_proxy_is_not_made_to_wait(start_server: StartServer, auth_file: Path) -> None:
    server = start_server(auth_file=str(auth_file), trusted_proxies="127.0.0.1")
    for _ in range(6):
        assert refusal(server, "tt_wrong")[0] == 401
    RawClient(server, "anna", bearer=ANNA).close()


def test_the_same_token_owns_its_leased_names_from_any_machine(guarded: TunnelServer) -> None:
    client = RawClient(guarded, "shop", bearer=BOB, resume=b"")
    assert refusal(guarded, BOB, "x-tinytun-subdomain: shop") == (
        409,
        "Subdomain not available: it is open now",
    )
    reset(client.sock)
    eventually(lambda: guarded.registry.tunnels["shop"].leased_until is not None)
    tunnel = guarded.registry.tunnels["shop"]
    RawClient(guarded, "shop", bearer=BOB, resume=b"").close()
    assert guarded.registry.tunnels.get("shop", tunnel) is tunnel


def test_names_of_an_open_server_are_nobodys_once_it_has_tokens(
    start_server: StartServer, auth_file: Path, tmp_path: Path, fast_clock: None
) -> None:
    state = str(tmp_path / "state")
    leases = tmp_path / "state" / "leases.json"
    for first, second, bearer in (("", str(auth_file), None), (str(auth_file), "", BOB)):
        server = start_server(state_dir=state, auth_file=first)
        client = RawClient(server, "shop", bearer=bearer, resume=b"")
        reset(client.sock)
        eventually(lambda: leases.exists() and '"shop"' in leases.read_text())
        server.stop()
        after = start_server(state_dir=state, auth_file=second)
        assert not after.registry.tunnels
        after.stop()


def test_reserved_names_are_nobodys_on_an_open_server_too(start_server: StartServer) -> None:
    server = start_server(reserved_names="www,api-*")
    assert refusal(server, None, "x-tinytun-subdomain: API-1") == (403, "The subdomain api-1 is reserved")
    RawClient(server, "app").close()


def test_no_token_is_in_any_log(
    guarded: TunnelServer, auth_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    client = RawClient(guarded, "shop", bearer=BOB, resume=b"")
    resume = client.token.decode()
    reset(client.sock)
    refusal(guarded, "tt_wrong-one", "x-tinytun-subdomain: shop")
    refusal(guarded, "tt_mal forged")
    refusal(guarded, ANNA, "x-tinytun-subdomain: shop")
    for secret in (BOB, ANNA, "tt_wrong-one", "forged", resume):
        assert secret not in caplog.text
        assert secret not in repr(guarded.core.auth.__dict__)


@pytest.mark.parametrize(
    ("token", "wish", "line"),
    [
        ("tt_wrong", ("x-tinytun-subdomain: shop",), "refused 127.0.0.1 the subdomain shop: "),
        ("tt_wrong", ("x-tinytun-type: tcp",), "refused 127.0.0.1 a port: "),
        (BOB, ("x-tinytun-subdomain: www",), "refused 127.0.0.1 (bob) the subdomain www: "),
        (ANNA, ("x-tinytun-type: tcp", "x-tinytun-port: 20999"), "refused 127.0.0.1 (anna) port 20999: "),
    ],
)
def test_the_log_says_who_was_refused_what(
    guarded: TunnelServer, caplog: pytest.LogCaptureFixture, token: str, wish: tuple[str, ...], line: str
) -> None:
    with caplog.at_level("INFO", "tinytun_gevent.server"):
        refusal(guarded, token, *wish)
    (said,) = [text for text in caplog.messages if text.startswith("refused")]
    assert said.startswith(line)
    assert token not in said


def test_the_log_says_whose_a_tunnel_is(guarded: TunnelServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "tinytun_gevent.server"):
        RawClient(guarded, "anna", bearer=ANNA).close()
        eventually(lambda: any("tunnel anna (anna) closed: " in text for text in caplog.messages))
    assert any(text.startswith("tunnel anna (anna) opened for 127.0.0.1:") for text in caplog.messages)
    assert {
        getattr(record, "label", "") for record in caplog.records if "opened for" in record.getMessage()
    } == {"anna"}


# -- whether a token is valid, without a tunnel -------------------------------


def checked(server: TunnelServer, token: str) -> Response:
    with connect(server.connection_port) as sock:
        sock.sendall(f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
        return read_response(sock, b"GET")


def test_a_get_tells_whether_a_token_is_valid_and_a_guess_costs_as_much(guarded: TunnelServer) -> None:
    assert checked(guarded, ANNA).status == 204
    statuses = [checked(guarded, f"tt_guess-{number}").status for number in range(20)]
    assert statuses[0] == 401
    assert statuses[-1] == 429
    assert checked(guarded, ANNA).status == 204, "it was let in from there before"
    assert checked(guarded, BOB).status == 429, "who waits learns nothing"


def test_a_get_with_a_token_says_that_none_is_needed(server: TunnelServer) -> None:
    response = checked(server, ANNA)
    assert response.status == 200
    assert b"takes no tokens" in response.body
    assert checked(server, "no,token").status == 400
