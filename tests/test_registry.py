"""Names and ports: claimed, found, released; and the random names."""

from __future__ import annotations

import re
import time
from collections import Counter

import pytest

from tinytun_gevent import names
from tinytun_gevent.errors import NameTakenError, RefusedError, TryLaterError
from tinytun_gevent.registry import LEASE, MAX_SESSIONS, TRY_AGAIN, Record, Registry, Tunnel
from tinytun_gevent.wire.handshake import Kind, is_subdomain
from tinytun_gevent.wire.options import Options, Rewrite


@pytest.fixture
def registry() -> Registry:
    return Registry(
        ("example.com", "tun.example.org"),
        tcp_ports=range(30000, 30003),
        limit=5,
        url_of=lambda name: f"http://{name}.example.com:5555",
    )


def test_a_claim_has_all_that_the_101_says(registry: Registry) -> None:
    tunnel = registry.claim(Kind.HTTP, subdomain="App", host_header="local:1", remote="192.0.2.1:5")
    assert (tunnel.name, tunnel.domain, tunnel.url) == (
        "app",
        "app.example.com",
        "http://app.example.com:5555",
    )
    assert re.fullmatch("[0-9a-f]{32}", tunnel.id)
    assert (tunnel.host_header, tunnel.remote, tunnel.sessions) == ("local:1", "192.0.2.1:5", [])
    tcp = registry.claim(Kind.TCP, port=30001)
    assert (tcp.name, tcp.domain, tcp.url) == (30001, None, None)
    assert tcp.id != tunnel.id


def test_a_taken_name_is_refused_until_it_is_released(registry: Registry) -> None:
    first = registry.claim(Kind.HTTP, subdomain="app")
    with pytest.raises(NameTakenError, match=r"^Subdomain not available: it is open now$") as caught:
        registry.claim(Kind.HTTP, subdomain="APP")
    assert caught.value.status == 409
    registry.release(first)
    second = registry.claim(Kind.HTTP, subdomain="app")
    registry.release(first)  # late, and harmless to its successor
    assert registry.find_host("app.example.com") is second


def test_a_name_that_is_kept_says_for_how_long_and_not_for_whom(registry: Registry) -> None:
    tunnel = registry.claim(Kind.HTTP, subdomain="app", opener="anna", resume="")
    registry.establish(tunnel)
    tunnel.promised = 0
    registry.lease(tunnel, time.monotonic())
    with pytest.raises(NameTakenError, match=r"^Subdomain not available: .* for (29|30) s more$"):
        registry.claim(Kind.HTTP, subdomain="app", opener="bob")
    registry.lease(tunnel, time.monotonic() - 1000)  # over, and not yet seen
    with pytest.raises(NameTakenError, match=r"for 1 s more$"):
        registry.claim(Kind.HTTP, subdomain="app", opener="bob")


def test_a_taken_port_is_refused_for_both_kinds(registry: Registry) -> None:
    registry.claim(Kind.TCP_PORT, port=30000)
    with pytest.raises(NameTakenError, match="Port not available"):
        registry.claim(Kind.TCP, port=30000)


@pytest.mark.parametrize("port", [29999, 30003, 0, 80, 65536])
def test_a_port_outside_the_range_is_refused(registry: Registry, port: int) -> None:
    with pytest.raises(RefusedError, match="Port not allowed: this server gives 30000-30002") as caught:
        registry.claim(Kind.TCP, port=port)
    assert caught.value.status == 400


@pytest.mark.parametrize("name", ["", "-a", "a-", "a.b", "a_b", "ä", "a" * 64, "a b", "a\n"])
def test_what_is_no_label_is_refused(registry: Registry, name: str) -> None:
    with pytest.raises(RefusedError) as caught:
        registry.claim(Kind.HTTP, subdomain=name)
    assert caught.value.status == 400
    assert registry.tunnels == {}


def test_any_port_finds_the_last_free_one(registry: Registry) -> None:
    ports = {registry.claim(Kind.TCP).name for _ in range(3)}
    assert ports == {30000, 30001, 30002}
    with pytest.raises(TryLaterError) as caught:
        registry.claim(Kind.TCP)
    assert (caught.value.status, caught.value.retry_after) == (503, 5.0)


def test_a_full_server_says_so(registry: Registry) -> None:
    tunnels = [registry.claim(Kind.HTTP) for _ in range(5)]
    with pytest.raises(TryLaterError) as caught:
        registry.claim(Kind.HTTP, subdomain="one-more")
    assert caught.value.status == 503
    registry.release(tunnels[0])
    assert registry.claim(Kind.HTTP, subdomain="one-more").name == "one-more"


def test_random_names_avoid_those_that_are_taken(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter(["same", "same", "same", "other"])
    monkeypatch.setattr("tinytun_gevent.rights.random_name", lambda: next(drawn))
    assert registry.claim(Kind.HTTP).name == "same"
    assert registry.claim(Kind.HTTP).name == "other"


@pytest.mark.parametrize(
    ("host", "found", "ours"),
    [
        ("app.example.com", True, True),
        ("app.tun.example.org", True, True),
        ("other.example.com", False, True),
        ("example.com", False, True),
        ("a.app.example.com", False, True),
        ("app.example.com.evil.net", False, False),
        ("appexample.com", False, False),
        ("app.example.net", False, False),
        ("example.org", False, False),
        ("app", False, False),
        (".example.com", False, True),
        ("", False, False),
        ("127.0.0.1", False, False),
    ],
)
def test_the_whole_host_is_compared(registry: Registry, host: str, found: bool, ours: bool) -> None:
    tunnel = registry.claim(Kind.HTTP, subdomain="app")
    assert registry.find_host(host) is (tunnel if found else None)
    assert registry.is_ours(host) is ours


def test_a_port_is_not_found_as_a_host_nor_a_name_as_a_port(registry: Registry) -> None:
    tcp = registry.claim(Kind.TCP, port=30000)
    assert registry.find_host("30000.example.com") is None
    assert registry.find_port(30000) is tcp
    http = registry.claim(Kind.HTTP, subdomain="30001")
    assert registry.find_port(30001) is None
    assert registry.find_host("30001.example.com") is http


def test_a_path_means_a_name_before_a_port(registry: Registry) -> None:
    tcp = registry.claim(Kind.TCP, port=30000)
    assert registry.find_text("30000") is registry.find_text(":30000") is tcp
    http = registry.claim(Kind.HTTP, subdomain="30000")
    assert registry.find_text("30000") is http
    assert registry.find_text(":30000") is tcp
    assert registry.find_text("nobody") is None
    for nonsense in ("", ":", ":x", ":-1", "²", ":٣", ":99999999999", "/"):
        assert registry.find_text(nonsense) is None


def test_a_tunnel_is_listed_only_while_it_is_established(registry: Registry) -> None:
    tunnel = registry.claim(Kind.HTTP, subdomain="app")
    assert list(registry.listed()) == []
    registry.establish(tunnel)
    registry.establish(tunnel)
    assert list(registry.listed()) == [tunnel]
    registry.release(tunnel)
    assert list(registry.listed()) == []
    assert not tunnel.ready


def test_random_names_are_labels_without_ambiguous_letters_and_differ() -> None:
    drawn = [names.random_name() for _ in range(2000)]
    assert len(set(drawn)) == len(drawn)  # fails by chance once in 5,000 runs
    for name in drawn:
        assert is_subdomain(name)
        assert len(name) == 11
        assert not set(name) & set("lqcxy0123456789")
    first = Counter(name[0] for name in drawn)
    assert len(first) == 16
    assert names.COMBINATIONS == 102_400**2


def test_ids_are_32_hexadecimal_digits() -> None:
    assert re.fullmatch("[0-9a-f]{32}", names.random_id())
    assert names.random_id() != names.random_id()


# Further sessions


def established(registry: Registry) -> Tunnel:
    tunnel = registry.claim(Kind.HTTP, subdomain="app")
    tunnel.promised -= 1
    registry.establish(tunnel)
    return tunnel


def established_elsewhere() -> Tunnel:
    return established(Registry(["example.com"]))


def test_who_knows_the_key_joins_a_tunnel(registry: Registry) -> None:
    tunnel = established(registry)
    assert re.fullmatch("[0-9a-f]{32}", tunnel.key)
    assert tunnel.key not in repr(tunnel)
    assert tunnel.key != established_elsewhere().key
    assert registry.join(tunnel.id, tunnel.key) is tunnel
    assert tunnel.promised == 1


def test_an_unknown_tunnel_and_a_wrong_key_are_refused_alike(registry: Registry) -> None:
    tunnel, other = established(registry), established_elsewhere()
    pending = registry.claim(Kind.HTTP)
    said = set()
    for connection_id, key in (
        (tunnel.id, other.key),
        (tunnel.id, tunnel.key[:-1]),
        (tunnel.id, tunnel.key.upper() + "0"),
        (other.id, other.key),
        (other.id, ""),
        (pending.id, pending.key),
    ):
        with pytest.raises(RefusedError) as caught:
            registry.join(connection_id, key)
        said.add((type(caught.value), caught.value.status, str(caught.value)))
    assert len(said) == 1
    assert next(iter(said))[1] == 404
    assert not tunnel.promised


def test_keys_are_compared_in_constant_time(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    tunnel = established(registry)
    compared: list[tuple[bytes, bytes]] = []

    def compare(known: bytes, given: bytes) -> bool:
        compared.append((known, given))
        return False

    monkeypatch.setattr("hmac.compare_digest", compare)
    with pytest.raises(RefusedError):
        registry.join(tunnel.id, tunnel.key)
    assert compared == [(tunnel.key.encode(), tunnel.key.encode())]


def test_a_tunnel_has_a_bounded_number_of_sessions(registry: Registry) -> None:
    tunnel = established(registry)
    for _ in range(MAX_SESSIONS):
        registry.join(tunnel.id, tunnel.key)
    with pytest.raises(TryLaterError) as caught:
        registry.join(tunnel.id, tunnel.key)
    assert (caught.value.status, caught.value.retry_after) == (429, TRY_AGAIN)
    tunnel.promised -= 1
    assert registry.join(tunnel.id, tunnel.key) is tunnel


def test_a_released_tunnel_cannot_be_joined(registry: Registry) -> None:
    tunnel = established(registry)
    assert registry.holds(tunnel)
    registry.release(tunnel)
    assert not registry.holds(tunnel)
    successor = established(registry)
    with pytest.raises(RefusedError):
        registry.join(tunnel.id, tunnel.key)
    registry.release(tunnel)
    assert registry.join(successor.id, successor.key) is successor


# -- whose a name is ----------------------------------------------------------------------------------


def leased(registry: Registry, *, opener: str = "me") -> tuple[Tunnel, str]:
    """The tunnel ``app`` of ``opener``, lost at time 100, and its token."""
    tunnel = registry.claim(Kind.HTTP, subdomain="app", opener=opener, resume="")
    tunnel.promised -= 1
    registry.establish(tunnel)
    registry.lease(tunnel, 100.0)
    return tunnel, registry.token_of(tunnel)


def test_a_leased_tunnel_is_resumed_by_its_token_alone(registry: Registry) -> None:
    tunnel, token = leased(registry, opener="")
    assert list(registry.listed()) == []
    for opener, shown in (("", None), ("", ""), ("", token[:-1] + "x"), ("you", token)):
        with pytest.raises(NameTakenError):
            registry.claim(Kind.HTTP, subdomain="app", opener=opener, resume=shown)
    assert registry.claim(Kind.HTTP, subdomain="APP", opener="", resume=token) is tunnel
    assert (tunnel.promised, registry.token_of(tunnel)) == (1, token)


def test_a_leased_tunnel_is_its_openers_on_any_machine(registry: Registry) -> None:
    tunnel, token = leased(registry, opener="me")
    with pytest.raises(NameTakenError):
        registry.claim(Kind.HTTP, subdomain="app", opener="you", resume="")
    assert registry.claim(Kind.HTTP, subdomain="app", opener="me", resume="") is tunnel
    with pytest.raises(NameTakenError):  # he is coming back already: somebody else of his must show the token
        registry.claim(Kind.HTTP, subdomain="app", opener="me", resume="")
    assert registry.claim(Kind.HTTP, subdomain="app", opener="me", resume=token) is tunnel


def test_a_token_is_of_one_name_one_tunnel_one_opener_and_one_secret(registry: Registry) -> None:
    tunnel, token = leased(registry)
    other = registry.claim(Kind.TCP, port=30000, opener="me", resume="")
    assert registry.token_of(other) != token
    tunnel.opener = "you"
    assert registry.token_of(tunnel) != token
    tunnel.opener = "me"
    assert registry.token_of(tunnel) == token
    same = Registry(["example.com"], secret=b"x" * 32).token_of(tunnel)
    assert same != token
    assert same == Registry(["example.org"], secret=b"x" * 32).token_of(tunnel)


def test_a_lease_is_over_after_its_time_unless_its_owner_is_coming(registry: Registry) -> None:
    tunnel, token = leased(registry)
    assert registry.expired(100.0 + LEASE - 0.1) == []
    assert registry.expired(100.0 + LEASE) == [tunnel]
    registry.claim(Kind.HTTP, subdomain="app", opener="me", resume=token)
    assert registry.expired(100.0 + LEASE) == []
    registry.establish(tunnel)
    tunnel.promised -= 1
    assert registry.expired(100.0 + LEASE) == []


def test_what_lasts_is_what_has_an_owner(registry: Registry) -> None:
    changes: list[None] = []
    registry.on_change = lambda: changes.append(None)
    registry.claim(Kind.HTTP, subdomain="never-came-up", resume="")
    established(registry)
    assert (registry.lasting(), changes) == ([], [])
    registry.release(registry.tunnels["app"])
    tunnel, _ = leased(registry)
    assert registry.lasting() == [Record(Kind.HTTP, "app", tunnel.id, "me", True)]
    registry.release(tunnel)
    assert (registry.lasting(), len(changes)) == ([], 2)


def test_what_was_remembered_is_leased_under_the_same_token(registry: Registry) -> None:
    tunnel, token = leased(registry)
    (record,) = registry.lasting()
    assert registry.restore(record, 5.0) is None, "the name is taken"
    registry.release(tunnel)
    again = registry.restore(record, 5.0)
    assert again is not None
    assert (again.leased_until, registry.token_of(again)) == (5.0 + LEASE, token)
    assert again.url == "http://app.example.com:5555"
    assert registry.claim(Kind.HTTP, subdomain="app", opener="me", resume=token) is again


def test_options_are_remembered_with_the_name_and_go_with_a_new_claim(registry: Registry) -> None:
    options = Options(rewrite=Rewrite("http://localhost:3000"))
    tunnel = registry.claim(
        Kind.HTTP, subdomain="app", resume="", host_header="localhost:3000", options=options
    )
    registry.establish(tunnel)
    (record,) = registry.lasting()
    assert (record.host_header, record.options) == ("localhost:3000", options)
    token = registry.token_of(tunnel)
    registry.release(tunnel)
    again = registry.restore(record, 5.0)
    assert again is not None
    assert (again.host_header, again.options) == ("localhost:3000", options)
    assert again.rewriting is not None
    registry.claim(Kind.HTTP, subdomain="app", resume=token)
    assert (again.host_header, again.options, again.rewriting) == (None, None, None)


def test_a_name_that_is_claimed_with_other_options_is_remembered_anew(registry: Registry) -> None:
    tunnel = registry.claim(Kind.HTTP, subdomain="app", resume="")
    registry.establish(tunnel)
    changes: list[None] = []
    registry.on_change = lambda: changes.append(None)
    registry.claim(Kind.HTTP, subdomain="app", resume=registry.token_of(tunnel), options=Options())
    assert len(changes) == 1


@pytest.mark.parametrize("name", ["not a name", "", 29999])
def test_a_remembered_name_that_nobody_may_have_is_forgotten(registry: Registry, name: str | int) -> None:
    kind = Kind.HTTP if isinstance(name, str) else Kind.TCP
    assert registry.restore(Record(kind, name, "0" * 32, "", True), 0.0) is None
    assert registry.tunnels == {}


def test_a_name_without_owner_is_kept_for_its_visitors_only(registry: Registry) -> None:
    """Handed over by another process: a client that knows no tokens gets it back by asking first."""
    tunnel = registry.restore(Record(Kind.HTTP, "app", "0" * 32, "", False), 0.0)
    assert registry.claim(Kind.HTTP, subdomain="app") is tunnel
    with pytest.raises(NameTakenError):
        registry.claim(Kind.HTTP, subdomain="app")
