"""The user's token: where it comes from, where it is kept, and that it goes nowhere in the clear."""

from __future__ import annotations

import json
import logging
import os
import socket as native
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from fake_server import DEADLINE, FakeServer, refuse, running
from helpers import deadline
from hypothesis import example, given
from hypothesis import strategies as st

from tinytun_gevent import Tunnel
from tinytun_gevent.client import credentials, dial
from tinytun_gevent.client.config import make_config
from tinytun_gevent.client.credentials import (
    MOST_BYTES,
    Logins,
    check_token,
    choose_token,
    config_directory,
    must_hide,
    parse_logins,
)
from tinytun_gevent.client.dial import dial_server
from tinytun_gevent.client.events import State
from tinytun_gevent.errors import RefusedError, SessionClosedError, UsageError
from tinytun_gevent.wire.goodbye import INADEQUATE_SECURITY
from tinytun_gevent.wire.handshake import (
    MAX_TOKEN,
    Join,
    Kind,
    OpenRequest,
    build_request,
    is_token,
    parse_request,
)

SERVER = "tunnel.example:5554"
SECRET = "tt_a-secret.token_of~mine+/="


def environ(tmp_path: Path, **more: str) -> dict[str, str]:
    return {"XDG_CONFIG_HOME": str(tmp_path)} | more


def test_where_a_token_comes_from_in_turn(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("of-file\n")
    file.chmod(0o600)
    assert choose_token(None, None, SERVER, environ(tmp_path)) is None
    Logins(str(tmp_path / "tinytun")).put(SERVER, "of-login")
    assert choose_token(None, None, "Tunnel.Example:5554", environ(tmp_path)) == "of-login"
    assert choose_token(None, None, "other.example:5554", environ(tmp_path)) is None
    variables = environ(tmp_path, TINYTUN_TOKEN=" of-variable ")
    assert choose_token(None, None, SERVER, variables) == "of-variable"
    assert choose_token(None, file, SERVER, variables) == "of-file"
    assert choose_token("of-flag", None, SERVER, variables) == "of-flag"
    with pytest.raises(UsageError, match="do not go together"):
        choose_token("of-flag", file, SERVER, variables)
    assert choose_token(None, None, SERVER, environ(tmp_path, TINYTUN_TOKEN=" ")) == "of-login"


@pytest.mark.parametrize("text", ["", "a b", "se\ncret", "s\u00e9cret", "s" * (MAX_TOKEN + 1), "secret\x00"])
def test_what_is_no_token_is_not_shown(text: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(text)
    file.chmod(0o600)
    for options in ({"token": text}, {"token_file": file}):
        with pytest.raises(UsageError, match="that is no token") as wrong:
            make_config("1", server="http://localhost:1", environ={}, **options)  # type: ignore[arg-type]
        assert "cret" not in str(wrong.value)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf%s\r\n",
        b"%s\r\n",
        b"%s",
    ],
)
def test_a_token_file_of_any_editor_is_read(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "token"
    file.touch(mode=0o600)
    file.write_bytes(content % SECRET.encode())
    assert choose_token(None, file, SERVER, {}) == SECRET


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_token_file_of_powershell_is_read(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "token"
    file.touch(mode=0o600)
    longest = "x" * MAX_TOKEN
    file.write_bytes(f"\ufeff{longest}\r\n".encode(encoding))
    assert choose_token(None, file, SERVER, {}) == longest


@given(st.binary(max_size=50))
@example(b"\xff\xfex")
@example(b"\xfe\xff\xd8\x00")
def test_whatever_is_in_a_token_file_is_text(data: bytes) -> None:
    assert isinstance(credentials.decode_token(data), str)


def test_a_token_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--token-file .*No such file"):
        choose_token(None, tmp_path / "none", SERVER, {})


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
def test_files_that_others_can_read_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "token"
    file.write_text(SECRET)
    Logins(str(tmp_path / "tinytun")).put(SERVER, SECRET)
    kept = tmp_path / "tinytun" / "tokens.json"
    for path, options in ((file, {"token_file": file}), (kept, {"token_file": None})):
        for mode, warned in ((0o640, True), (0o600, False)):
            path.chmod(mode)
            caplog.clear()
            assert choose_token(None, options["token_file"], SERVER, environ(tmp_path)) == SECRET
            assert ("others can read" in caplog.text) is warned
            assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("variables", "platform", "expected"),
    [
        ({"HOME": "/home/me"}, "linux", "/home/me/.config/tinytun"),
        ({"HOME": "/home/me", "XDG_CONFIG_HOME": "/x"}, "linux", "/x/tinytun"),
        ({"HOME": "/home/me", "XDG_CONFIG_HOME": "x"}, "linux", "/home/me/.config/tinytun"),
        ({"HOME": "/Users/me"}, "darwin", "/Users/me/Library/Application Support/tinytun"),
        ({"APPDATA": "/c/Roaming"}, "win32", "/c/Roaming/tinytun"),
        ({}, "linux", None),
        ({}, "win32", None),
    ],
)
def test_where_logins_are_kept(variables: dict[str, str], platform: str, expected: str | None) -> None:
    assert config_directory(variables, platform) == expected


def test_logins_are_their_users_alone_and_can_be_forgotten(tmp_path: Path) -> None:
    logins = Logins(str(tmp_path / "new"))
    for server in ("a:1", "b:2", "a:1"):
        logins.put(server, server[0] + SECRET)
    assert stat.S_IMODE(os.stat(logins.path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(tmp_path / "new").st_mode) == 0o700
    assert (logins.get("a:1"), logins.get("b:2")) == ("a" + SECRET, "b" + SECRET)
    assert logins.remove("A:1")
    assert not logins.remove("a:1")
    assert (logins.get("a:1"), logins.get("b:2")) == (None, "b" + SECRET)
    assert logins.remove(None)
    assert not logins.remove(None)
    assert os.listdir(tmp_path / "new") == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"tokens": 1}',
        b'{"tokens": {"a:1": 1}}',
        b"\xff",
        b"[" * 100_000,
        b'{"tokens": {}}' + b" " * MOST_BYTES,
    ],
)
def test_a_damaged_file_is_none_and_is_not_written_over(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    logins = Logins(str(tmp_path))
    Path(logins.path).write_bytes(content)
    assert logins.get("a:1") is None
    before = Path(logins.path).read_bytes()
    with pytest.raises(UsageError, match="remove it to begin anew"):
        logins.put("a:1", SECRET)
    assert Path(logins.path).read_bytes() == before


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@example(b'{"tokens": {"a": "1"}}')
@example(b'{"tokens": {"secret": ["secret"]}}')
def test_whatever_is_in_the_file_is_logins_or_damage(data: bytes) -> None:
    try:
        found = parse_logins(data)
    except ValueError as error:
        said = str(error)
    else:
        said = "it is damaged"
        assert all(type(text) is str for pair in found.items() for text in pair)
    assert said == "it is damaged", "it may repeat what is secret"


@given(st.dictionaries(st.text(max_size=20), st.text(max_size=20), max_size=5))
def test_logins_are_read_as_they_were_written(tokens: dict[str, str]) -> None:
    assert parse_logins(json.dumps({"tokens": tokens}).encode()) == tokens


@pytest.mark.skipif(os.name != "posix", reason="Windows locks no directory")
def test_two_logins_at_once_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one waits for the first, which has read the file and not yet written it."""
    has_read, goes_on = threading.Event(), threading.Event()
    load = Logins._load

    def slowly(logins: Logins, *, strict: bool = False) -> dict[str, str]:
        found = load(logins, strict=strict)
        if threading.current_thread().name == "first":
            has_read.set()
            assert goes_on.wait(DEADLINE)
        return found

    monkeypatch.setattr(Logins, "_load", slowly)
    first = threading.Thread(target=Logins(str(tmp_path)).put, args=("a:1", "one"), name="first")
    second = threading.Thread(target=Logins(str(tmp_path)).put, args=("b:2", "two"), name="second")
    first.start()
    assert has_read.wait(DEADLINE)
    second.start()
    second.join(0.1)
    assert second.is_alive(), "it did not wait"
    goes_on.set()
    for thread in (first, second):
        thread.join(DEADLINE)
    assert load(Logins(str(tmp_path))) == {"a:1": "one", "b:2": "two"}


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"tokens\.json"):
        Logins(str(tmp_path / "file")).put("a:1", SECRET)


# -- the field ----------------------------------------------------------------


@example(" 0")
@given(st.text(st.characters(max_codepoint=255), max_size=40))
def test_what_is_a_token_arrives_as_it_is(text: str) -> None:
    request = OpenRequest(Kind.HTTP, "x:1", token=text)
    if not is_token(text):
        with pytest.raises(UsageError):
            build_request(request)
        return
    assert parse_request(build_request(request)) == request
    assert check_token(f" {text}\n", "x") == text
    assert text not in repr(request).replace("authority='x:1'", "") or len(text) < 12


def test_it_goes_with_joins_and_with_resumed_names() -> None:
    for more in ({"join": Join("0" * 32, "1" * 32)}, {"resume": "2" * 64}):
        request = OpenRequest(Kind.HTTP, "x:1", token=SECRET, **more)  # type: ignore[arg-type]
        assert parse_request(build_request(request)) == request


# -- where it may go ----------------------------------------------------------


@pytest.mark.parametrize("url", ["http://192.0.2.1:5554", "http://[2001:db8::1]:1", "http://0.0.0.0:1"])
def test_in_the_clear_it_goes_nowhere_else(url: str) -> None:
    with pytest.raises(UsageError, match="use https://, or --insecure") as refused:
        make_config("1", server=url, token=SECRET, environ={})
    assert SECRET not in str(refused.value)
    assert make_config("1", server=url, token=SECRET, insecure=True, environ={}).token == SECRET
    assert make_config("1", server=url.replace("http:", "https:"), token=SECRET, environ={}).token == SECRET
    assert make_config("1", server=url, environ={}).token is None


def test_through_a_proxy_only_by_tls() -> None:
    for url in ("http://localhost:1", "http://127.0.0.1:1"):
        with pytest.raises(UsageError, match="use https://"):
            make_config("1", server=url, token=SECRET, proxy="http://127.0.0.1:2", environ={})
    assert make_config("1", server="https://x:1", token=SECRET, proxy="http://p:2", environ={}).token


def _resolving(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[Any]:
    """Lets every name lead to ``addresses``; the list of what was connected to."""
    connected: list[Any] = []
    monkeypatch.setattr(
        dial, "resolve", lambda host, port: [(int(native.AF_INET), (a, port)) for a in addresses]
    )
    monkeypatch.setattr(dial, "first_to_connect", lambda addresses: connected.append(addresses))
    return connected


@pytest.mark.parametrize("addresses", [("192.0.2.1",), ("127.0.0.1", "192.0.2.1"), ("0.0.0.0",)])
def test_a_name_is_what_it_resolves_to(monkeypatch: pytest.MonkeyPatch, addresses: tuple[str, ...]) -> None:
    connected = _resolving(monkeypatch, *addresses)
    for host in ("localhost", "tunnel.example"):
        config = make_config("1", server=f"http://{host}:5554", token=SECRET, environ={})
        with pytest.raises(UsageError, match="use https://"):
            dial_server(config)
    assert not connected, "nobody was connected to"


def test_what_was_connected_to_counts_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere:
        family = native.AF_INET
        closed = False

        def getpeername(self) -> tuple[str, int]:
            return "192.0.2.1", 5554

        def close(self) -> None:
            self.closed = True

    sock = Elsewhere()
    _resolving(monkeypatch, "127.0.0.1")
    monkeypatch.setattr(dial, "first_to_connect", lambda addresses: sock)
    config = make_config("1", server="http://localhost:5554", token=SECRET, environ={})
    with pytest.raises(UsageError, match="use https://"):
        dial_server(config)
    assert sock.closed


@pytest.mark.parametrize(
    ("host", "hidden"),
    [
        ("127.0.0.1", False),
        ("127.9.9.9", False),
        ("::1", False),
        ("::1%lo", False),
        ("10.0.0.1", True),
        ("x", True),
    ],
)
def test_loopback_alone_is_this_machine(host: str, hidden: bool) -> None:
    assert must_hide(host) == hidden


# -- what a client does with it -----------------------------------------------


@pytest.fixture
def server() -> Any:
    server = FakeServer()
    yield server
    server.close()


def test_a_client_shows_it_each_time(server: FakeServer) -> None:
    with running(server, token=SECRET) as (agent, _):
        agent.wait_connected(DEADLINE)
        assert server.requests.get(timeout=DEADLINE).token == SECRET
        server.sessions.get(timeout=DEADLINE).close()
        assert server.requests.get(timeout=DEADLINE).token == SECRET


@pytest.mark.parametrize("before", ["", "x" * 190])
def test_a_server_that_repeats_it_does_not_bring_it_into_the_log(server: FakeServer, before: str) -> None:
    """Nor the half of it, where the server's text is cut."""
    server.script.append(refuse(401, f"{before}who is {SECRET}?"))
    with running(server, token=SECRET) as (agent, _), pytest.raises(RefusedError) as refused:
        agent.wait_connected(DEADLINE)
    assert f"{before}who is …" in str(refused.value)
    assert SECRET[:3] not in str(refused.value) + agent.reason


def test_a_server_that_ends_it_says_why_but_never_repeats_the_token(server: FakeServer) -> None:
    with running(server, token=SECRET) as (agent, events):
        agent.wait_connected(DEADLINE)
        server.script.append(refuse(401, "The token is not valid here"))
        ended = SessionClosedError(f"the token was revoked: {SECRET}")
        server.sessions.get(timeout=DEADLINE).close(ended, INADEQUATE_SECURITY)
        assert events.wait_for(State.RECONNECTING) == "the server says: the token was revoked: …"
        hint = r"not valid here .*'tinytun login --server .* TINYTUN_TOKEN"
        with pytest.raises(RefusedError, match=hint), deadline():
            agent.wait()
    assert server.requests.qsize() == 2, "it asked again after a 401"


def test_the_library_hides_it() -> None:
    tunnel = Tunnel(1, server="https://tunnel.example", token=SECRET)
    assert tunnel.config.token == SECRET
    assert SECRET not in repr(tunnel.config)
    assert SECRET not in repr(tunnel)


def test_the_log_names_no_token_at_any_level(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    assert credentials.log.name.startswith("tinytun_gevent.")
    with caplog.at_level(logging.DEBUG), running(server, token=SECRET) as (agent, _):
        agent.wait_connected(DEADLINE)
    assert SECRET not in caplog.text
