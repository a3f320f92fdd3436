"""Where a value comes from: flags, variables under both of their names, the file; what is Kubernetes' own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tinytun_gevent.errors import UsageError
from tinytun_gevent.server.config import ServerConfig
from tinytun_gevent.server.given import overridden

OPTIONS = dataclasses.fields(ServerConfig)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "server.toml"
    file.write_text('proxy_port = 1\nconnection_port = 2\nmetadata_port = 3\nlog_level = "warn"\n')
    return file


def test_flags_win_over_variables_and_those_over_the_file(file: Path) -> None:
    environ = {"PROXY_PORT": "11", "CONNECTION_PORT": "12"}
    given = ServerConfig.given(environ, {"--config": str(file), "--proxy-port": "21"})
    config = ServerConfig.of(given)
    assert (config.proxy_port, config.connection_port, config.metadata_port) == (21, 12, 3)
    assert given.origins["PROXY_PORT"] == "--proxy-port"
    assert given.origins["CONNECTION_PORT"] == "CONNECTION_PORT"
    assert given.is_from_file("METADATA_PORT")
    assert overridden(OPTIONS, given) == [
        "connection_port of the file does not count: the environment's CONNECTION_PORT wins",
        "proxy_port of the file does not count: the option --proxy-port wins",
    ]


def test_what_says_the_same_as_the_file_overrides_nothing(file: Path) -> None:
    given = ServerConfig.given({"PROXY_PORT": " 01 "}, {"--config": str(file)})
    assert overridden(OPTIONS, given) == []


def test_a_prefixed_variable_wins_over_the_bare_one() -> None:
    environ = {"PROXY_PORT": "1", "TINYTUN_SERVER_PROXY_PORT": "2", "TINYTUN_SERVER_BIND": " "}
    assert ServerConfig.from_environ(environ).proxy_port == 2
    assert ServerConfig.from_environ(environ, {"--proxy-port": "3"}).proxy_port == 3


def test_the_clients_variables_are_not_the_servers() -> None:
    environ = {
        "TINYTUN_SERVER_URL": "https://example.com",
        "TINYTUN_TOKEN": "tt_x",
        "TINYTUN_STATE_DIR": "relative",
        "TINYTUN_PROXY_PORT": "many",
    }
    given = ServerConfig.given(environ)
    assert ServerConfig.of(given) == ServerConfig()
    assert given.origins == {}


@pytest.mark.parametrize("name", ["PROXY_PORT", "TINYTUN_SERVER_PROXY_PORT"])
@pytest.mark.parametrize("value", ["tcp://10.0.0.1:5555", "udp://10.0.0.1:5555", " TCP://[::1]:1 "])
def test_what_kubernetes_sets_for_a_service_is_ignored(name: str, value: str) -> None:
    given = ServerConfig.given({name: value})
    assert ServerConfig.of(given).proxy_port == 5555
    (line,) = given.ignored
    assert line.startswith(f"{name}=")
    assert "Kubernetes" in line
    other = {"PROXY_PORT", "TINYTUN_SERVER_PROXY_PORT"} - {name}
    assert ServerConfig.from_environ({name: value, other.pop(): "7"}).proxy_port == 7


@pytest.mark.parametrize(("name", "value"), [("PROXY_PORT", "http://a"), ("BIND", "tcp://10.0.0.1:5555")])
def test_what_else_looks_like_a_url_is_wrong(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=name):
        ServerConfig.from_environ({name: value})


def test_the_level_of_rust_is_a_variable_too(file: Path) -> None:
    flags = {"--config": str(file)}
    assert ServerConfig.from_environ({}, flags).log_level == "warn"
    assert ServerConfig.from_environ({"RUST_LOG": "debug"}, flags).log_level == "debug"
    environ = {"RUST_LOG": "debug", "TINYTUN_SERVER_LOG_LEVEL": "error"}
    assert ServerConfig.from_environ(environ, flags).log_level == "error"


def test_what_was_read_before_is_not_read_again(tmp_path: Path) -> None:
    flags = {"--config": str(tmp_path / "gone.toml")}
    given = ServerConfig.given({}, flags, {"PROXY_PORT": "4"})
    assert ServerConfig.of(given).proxy_port == 4
    assert given.is_from_file("PROXY_PORT")
