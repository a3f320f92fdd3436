"""The configuration file: what it may say, and one line with the file and the key for what it may not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.errors import UsageError
from tinytun_gevent.server import configfile
from tinytun_gevent.server.config import ServerConfig, variables

OPTIONS = dataclasses.fields(ServerConfig)


def parse(text: str) -> dict[str, str]:
    return configfile.parse(text.encode(), OPTIONS)


def test_values_are_numbers_booleans_strings_and_lists() -> None:
    text = """
# ports
proxy_port = 80
head_timeout = 2.5
drain_timeout = 3
tcp_listen = false
base_domain = ["a.example.com", "b.example.org"]
trusted_proxies = "10.0.0.0/8, ::1"
peers = []
tcp_ports = "20000-20099"
bind = "[::1]"
public_url = ""
"""
    config = ServerConfig(
        **{key.lower(): value for key, value in parse(text).items() if key != "BASE_DOMAIN"}
    )
    assert (config.proxy_port, config.head_timeout, config.drain_timeout) == (80, 2.5, 3)
    assert (config.tcp_listen, config.bind, config.tcp_ports) == (False, "::1", range(20000, 20100))
    assert len(config.trusted_proxies) == 2
    assert parse(text)["BASE_DOMAIN"] == "a.example.com,b.example.org"
    assert parse(text)["PUBLIC_URL"] == parse(text)["PEERS"] == ""


def test_numbers_and_switches_may_be_text_as_the_variable_would_say_it() -> None:
    text = 'proxy_port = "80"\ntcp_listen = "off"\nhead_timeout = "2"\ntcp_ports = 25565'
    expected = {"PROXY_PORT": "80", "TCP_LISTEN": "off", "HEAD_TIMEOUT": "2", "TCP_PORTS": "25565"}
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("proxy_prot = 80", "proxy_prot: there is no such key; did you mean proxy_port?"),
        ("PROXY_PORT = 80", "PROXY_PORT: there is no such key; did you mean proxy_port?"),
        ("proxy-port = 80", "proxy-port: there is no such key; did you mean proxy_port?"),
        ("colour = 1", "colour: there is no such key; 'tinytun-server --help' lists the variables"),
        (
            "[server]\nproxy_port = 80",
            "[server]: there are no tables here; write each variable as key = value",
        ),
        ("proxy_port = true", "proxy_port: a whole number is expected, not true or false"),
        ("proxy_port = 80.5", "proxy_port: a whole number is expected, not a fraction"),
        ("proxy_port = [80]", "proxy_port: a whole number is expected, not a list of something else"),
        ("tcp_listen = 1", "tcp_listen: true or false is expected, not a number"),
        ("peers = [1]", "peers: a list of strings, or one string is expected, not a list of something else"),
        ("bind = 1", "bind: a string is expected, not a number"),
        ("bind = 2026-01-01", "bind: a string is expected, not a date or a time"),
        ("proxy_port = 99999", "proxy_port = 99999: allowed: a port from 1 to 65535"),
        ("proxy_port = 'http'", "proxy_port = http: allowed: a port"),
        ("backlog = 0x" + "f" * 20_000, "backlog = a very large number: allowed: a whole number"),
        ("head_timeout = nan", "head_timeout = nan: allowed: seconds"),
        ("base_domain = []", "base_domain = '': allowed: at least one domain"),
        ("proxy_port = 1\nproxy_port = 2", "it is not TOML: "),
        ("proxy_port: 80", "it is not TOML: "),
    ],
)
def test_what_is_wrong_is_one_line_with_its_key(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert str(caught.value).startswith(says)
    assert str(caught.value).isprintable()


def test_a_mark_at_the_beginning_is_not_part_of_the_first_key() -> None:
    assert parse("\ufeffproxy_port = 80") == {"PROXY_PORT": "80"}


def test_what_is_too_long_or_no_text_is_refused() -> None:
    with pytest.raises(UsageError, match="longer than 65536 bytes"):
        parse("#" * 65_537)
    with pytest.raises(UsageError, match="not UTF-8"):
        configfile.parse(b"bind = '\xff'", OPTIONS)


def test_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    with pytest.raises(UsageError) as caught:
        ServerConfig.from_environ({}, {"--config": str(file)})
    assert str(caught.value) == f"--config {file}: No such file or directory"
    file.write_text("proxy_port = 'x'")
    with pytest.raises(UsageError) as caught:
        ServerConfig.from_environ({}, {"--config": str(file)})
    assert str(caught.value).startswith(f"{file}: proxy_port = x: allowed: a port")
    file.write_text("proxy_port = 5554")
    with pytest.raises(UsageError) as caught:
        ServerConfig.from_environ({}, {"--config": str(file)})
    assert str(caught.value).startswith(f"{file}: proxy_port = 5554: is CONNECTION_PORT as well")


VALUES: st.SearchStrategy[Any] = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.text(max_size=30), st.lists(st.text(max_size=9), max_size=3)
)


def toml_of(value: Any) -> str:
    """A value as TOML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(char):08X}" for char in value) + '"'
    if isinstance(value, list):
        return "[" + ",".join(map(toml_of, value)) + "]"
    return repr(value)


@given(st.sampled_from([v.name.lower() for v in variables()]), VALUES)
def test_any_value_is_one_that_the_variable_takes_or_refused_in_one_line(key: str, value: Any) -> None:
    found, problem = None, key
    try:
        found = parse(f"{key} = {toml_of(value)}")
    except UsageError as error:
        problem = str(error)
    assert problem.startswith((key, "it is not TOML"))
    assert problem.isprintable()
    if found is None:
        return
    option = next(o for o in OPTIONS if o.metadata["variable"].lower() == key)
    option.metadata["form"].read(found[key.upper()].strip())


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_in_one_line(data: bytes) -> None:
    problem = "none"
    try:
        configfile.parse(data, OPTIONS)
    except UsageError as error:
        problem = str(error)
    assert problem.isprintable()
