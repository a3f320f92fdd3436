"""Which server the commands use: named, of the environment, kept by a login, or the original's."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinytun_gevent.client import servers
from tinytun_gevent.client.config import DEFAULT_SERVER, make_config
from tinytun_gevent.client.login import show_server
from tinytun_gevent.client.servers import MOST_BYTES, KeptServers, choose_server, parse_kept
from tinytun_gevent.errors import UsageError

KEPT = "http://kept.example:7000"


def environ(tmp_path: Path, **more: str) -> dict[str, str]:
    return {"XDG_CONFIG_HOME": str(tmp_path)} | more


def kept(tmp_path: Path) -> KeptServers:
    return KeptServers(str(tmp_path / "tinytun"))


def test_what_names_the_server_in_turn(tmp_path: Path) -> None:
    variables = environ(tmp_path, TINYTUN_SERVER_URL="https://variable.example:1")
    assert str(choose_server(None, environ(tmp_path)).address) == DEFAULT_SERVER
    kept(tmp_path).use(choose_server(KEPT, {}).address)
    chosen = choose_server(None, environ(tmp_path))
    assert (str(chosen.address), chosen.notice) == (KEPT, "")
    assert str(choose_server(None, variables).address) == "https://variable.example:1"
    assert str(choose_server("https://flag.example:2", variables).address) == "https://flag.example:2"
    blank = environ(tmp_path, TINYTUN_SERVER_URL=" ")
    assert str(choose_server(None, blank).address) == KEPT


@pytest.mark.parametrize(
    ("server", "said"),
    [
        (None, "no server is named"),
        ("https://x.example", "port 443"),
        ("http://x.example", "port 80"),
        ("x.example", "port 5554"),
        ("https://x.example:443", ""),
        ("x.example:5554", ""),
    ],
)
def test_what_was_not_said_is_told(server: str | None, said: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tinytun_gevent"):
        make_config("1", server=server, environ={})
    assert len(caplog.records) == bool(said)
    assert said in caplog.text
    if server is None:
        assert caplog.records[0].levelno == logging.WARNING
        assert DEFAULT_SERVER in caplog.text
        assert "--server" in caplog.text


def test_a_default_is_taken_back_where_it_is_that_server_s(tmp_path: Path) -> None:
    servers_kept, address = kept(tmp_path), choose_server(KEPT, {}).address
    assert not servers_kept.forget(address)
    servers_kept.use(address)
    assert not servers_kept.forget(choose_server("https://other.example:1", {}).address)
    assert servers_kept.server() == KEPT
    assert servers_kept.forget(address)
    assert servers_kept.server() is None
    servers_kept.use(address)
    assert servers_kept.forget(None)
    assert not list((tmp_path / "tinytun").iterdir())


def test_the_trusted_certificates_of_a_server_are_kept_with_it(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text("-")
    address = choose_server("https://kept.example:5554", {}).address
    kept(tmp_path).use(address, str(ca))
    assert make_config("1", environ=environ(tmp_path)).ca == str(ca)
    assert make_config("1", server="kept.example", environ=environ(tmp_path)).ca == str(ca)
    assert make_config("1", server="https://other.example:1", environ=environ(tmp_path)).ca is None
    assert make_config("1", insecure=True, environ=environ(tmp_path)).ca is None
    kept(tmp_path).use(address)
    assert make_config("1", environ=environ(tmp_path)).ca == str(ca), "naming it again loses nothing"
    ca.unlink()
    with pytest.raises(UsageError, match=r"ca\.pem.*login --server https://kept\.example:5554 --ca"):
        make_config("1", environ=environ(tmp_path))
    kept(tmp_path).forget(address)
    assert choose_server("https://kept.example:5554", environ(tmp_path)).ca is None


@pytest.mark.parametrize("content", [b"", b"[]", b'{"server": 1}', b'{"server": "ftp://x"}', b'{"ca": []}'])
def test_a_damaged_file_is_told_and_not_written_over(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    settings = kept(tmp_path)
    Path(settings.path).parent.mkdir()
    Path(settings.path).write_bytes(content)
    assert str(choose_server(None, environ(tmp_path)).address) == DEFAULT_SERVER
    assert "damaged" in caplog.text
    with pytest.raises(UsageError, match="remove it to begin anew"):
        settings.use(choose_server(KEPT, {}).address)
    assert Path(settings.path).read_bytes() == content


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@example(b'{"server": "https://x:1", "ca": {"x:1": "/ca"}}')
@example(b"[" * 100_000)
@example(b"{}" + b" " * MOST_BYTES)
def test_whatever_is_in_the_file_is_settings_or_damage(data: bytes) -> None:
    try:
        found = parse_kept(data)
    except ValueError:
        return
    assert found.server is None or servers.parse_server(found.server)
    assert all(type(text) is str for pair in found.ca.items() for text in pair)


def arguments(url: str | None = None, **more: Any) -> dict[str, Any]:
    return {"<url>": url, "--server": None, "--ca": None} | more


def test_the_command_shows_and_sets_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variables = environ(tmp_path)
    assert show_server(arguments(), variables) == 0
    shown = capsys.readouterr()
    assert shown.out == DEFAULT_SERVER + "\n"
    assert "nothing names another" in shown.err
    assert show_server(arguments("https://mine.example"), variables) == 0
    assert "https://mine.example:443" in capsys.readouterr().err
    show_server(arguments(), variables)
    shown = capsys.readouterr()
    assert shown.out == "https://mine.example:443\n"
    assert "servers.json" in shown.err
    assert json.loads(Path(kept(tmp_path).path).read_text())["server"] == "https://mine.example:443"
    show_server(arguments(), variables | {"TINYTUN_SERVER_URL": "other:1"})
    shown = capsys.readouterr()
    assert shown.out == "https://other:1\n"
    assert "TINYTUN_SERVER_URL" in shown.err
    show_server(arguments("http://mine.example:1"), variables | {"TINYTUN_SERVER_URL": "other:1"})
    assert "TINYTUN_SERVER_URL wins" in capsys.readouterr().err
    with pytest.raises(UsageError, match="URL 'x:y'"):
        show_server(arguments("x:y"), variables)
    with pytest.raises(UsageError, match="do not go together"):
        show_server(arguments("x", **{"--server": "y"}), variables)
