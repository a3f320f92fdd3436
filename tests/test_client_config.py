"""The client's options and variables: what they mean, and what is refused with which words."""

from __future__ import annotations

from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent import registry
from tinytun_gevent.client.config import (
    MAX_SESSIONS,
    ClientConfig,
    ServerAddress,
    check_log_level,
    make_config,
    parse_server,
)
from tinytun_gevent.client.proxies import bypasses, choose_proxy, parse_proxy
from tinytun_gevent.errors import UsageError
from tinytun_gevent.wire.handshake import Kind
from tinytun_gevent.wire.options import Options, Rewrite


def config(target: str = "3000", **options: object) -> ClientConfig:
    options.setdefault("environ", {})
    return make_config(target, **options)  # type: ignore[arg-type]


# -- server ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address", "shown"),
    [
        ("https://tun.example:5554", ServerAddress("tun.example", 5554, True), "https://tun.example:5554"),
        ("https://tun.example", ServerAddress("tun.example", 443, True), "https://tun.example:443"),
        ("http://tun.example", ServerAddress("tun.example", 80, False), "http://tun.example:80"),
        ("http://127.0.0.1:5554/", ServerAddress("127.0.0.1", 5554, False), "http://127.0.0.1:5554"),
        ("HTTPS://[::1]:1", ServerAddress("::1", 1, True), "https://[::1]:1"),
        ("tun.example", ServerAddress("tun.example", 5554, True), "https://tun.example:5554"),
        ("tun.example:443", ServerAddress("tun.example", 443, True), "https://tun.example:443"),
        ("[::1]", ServerAddress("::1", 5554, True), "https://[::1]:5554"),
    ],
)
def test_server_urls(text: str, address: ServerAddress, shown: str) -> None:
    assert parse_server(text) == address
    assert str(address) == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ftp://x",
        "https://",
        "https://x:0",
        "https://x:99999",
        "https://x/y",
        "https://u:p@x",
        "::1",
        "a b",
    ],
)
def test_server_urls_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError, match="allowed: https://HOST"):
        parse_server(text)


def test_the_flag_beats_the_variable_beats_the_default() -> None:
    environ = {"TINYTUN_SERVER_URL": "http://from-variable:1"}
    assert config(environ=environ, server="http://from-flag:1").server.host == "from-flag"
    assert config(environ=environ).server.host == "from-variable"
    assert str(config(environ={"TINYTUN_SERVER_URL": ""}).server) == "https://tinytun.com:5554"
    assert str(config().server) == "https://tinytun.com:5554"


def test_an_error_names_where_the_value_came_from() -> None:
    with pytest.raises(UsageError, match=r"^TINYTUN_SERVER_URL 'http://x:y'"):
        config(environ={"TINYTUN_SERVER_URL": "http://x:y"})


def test_the_state_directory_is_only_where_the_environment_says() -> None:
    assert config(environ={"TINYTUN_STATE_DIR": "/mine"}).state_dir == "/mine"
    assert config(environ={}).state_dir is None
    with pytest.raises(UsageError, match=r"^--server 'http://x:y'"):
        config(server="http://x:y")


# -- the tunnel -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_name", "name"),
    [(None, None), ("", None), ("  ", None), ("app", "app"), ("My-App", "my-app"), ("a" * 63, "a" * 63)],
)
def test_subdomains(given_name: str | None, name: str | None) -> None:
    assert config(subdomain=given_name).subdomain == name


@pytest.mark.parametrize("name", ["-a", "a-", "a.b", "a_b", "a" * 64, "é", "a b", "\u212a"])
def test_subdomains_that_no_server_takes(name: str) -> None:
    with pytest.raises(UsageError, match="--subdomain"):
        config(subdomain=name)


@pytest.mark.parametrize("port", [1, 80, 20000, "30000", 60001, "65535"])
def test_ports(port: int | str) -> None:
    assert config(kind="tcp", port=port).port == int(port)


@pytest.mark.parametrize("port", [0, 65536, "x", "-1", "", "30000.5", "1e4", " 30000"])
def test_ports_out_of_range(port: int | str) -> None:
    with pytest.raises(UsageError, match=r"--port .*: allowed: 1-65535"):
        config(kind="tcp", port=port)


@pytest.mark.parametrize("count", [0, -1, "0", "x", "1.5", 1_000_001])
def test_concurrency_out_of_range(count: int | str) -> None:
    with pytest.raises(UsageError, match=r"--concurrency .*: allowed: 1-1000000"):
        config(concurrency=count)


@pytest.mark.parametrize("count", [0, 17, -1, "0", "17", "x", "4.0", ""])
def test_sessions_out_of_range(count: int | str) -> None:
    with pytest.raises(UsageError, match=r"--sessions .*: allowed: 1-16"):
        config(sessions=count)


def test_there_are_up_to_four_sessions_unless_told_otherwise() -> None:
    assert config().sessions == 4
    assert [config(sessions=count).sessions for count in (1, "16")] == [1, 16]


def test_a_client_asks_for_no_more_sessions_than_a_server_allows() -> None:
    assert MAX_SESSIONS == registry.MAX_SESSIONS


def test_concurrency_is_100_unless_told_otherwise() -> None:
    assert config().concurrency == 100
    assert config(concurrency="7").concurrency == 7


def test_options_of_the_other_kind_are_refused() -> None:
    with pytest.raises(UsageError, match="--port"):
        config(port=30000)
    with pytest.raises(UsageError, match="--subdomain"):
        config(kind="tcp", subdomain="x")
    with pytest.raises(UsageError, match="--host-header"):
        config(kind="tcp", host_header="x")
    with pytest.raises(UsageError, match="allowed: http, tcp"):
        config(kind="udp")
    assert config(kind=Kind.TCP_PORT, port=20000).kind is Kind.TCP_PORT


@pytest.mark.parametrize(
    ("value", "target", "header"),
    [
        (None, "3000", None),
        ("rewrite", "3000", "localhost:3000"),
        ("REWRITE", "https://web", "web"),
        ("app.test", "3000", "app.test"),
        ("app.test:8080", "3000", "app.test:8080"),
        ("[::1]:80", "3000", "[::1]:80"),
    ],
)
def test_host_header(value: str | None, target: str, header: str | None) -> None:
    assert config(target, host_header=value).host_header == header


@pytest.mark.parametrize("value", ["", "a b", "a\r\nX: y", "http://a", "a/b", "a:b", "a:99999"])
def test_host_headers_that_would_break_a_request(value: str) -> None:
    with pytest.raises(UsageError, match="--host-header"):
        config(host_header=value)


def test_nothing_is_asked_of_the_edge_unless_there_is_a_wish() -> None:
    assert config().options is None
    assert config(forwarded_host="ON", rewrite_links="off").options is None
    assert config(kind="tcp").options is None


@pytest.mark.parametrize(
    ("target", "asked", "options"),
    [
        ("3000", {"host_header": "rewrite"}, Options(rewrite=Rewrite("http://localhost:3000"))),
        ("https://web", {"host_header": "rewrite"}, Options(rewrite=Rewrite("https://web"))),
        ("[fe80::1%lo]:3000", {"host_header": "rewrite"}, Options(rewrite=Rewrite("http://[fe80::1]:3000"))),
        ("unix:/run/x", {"host_header": "rewrite"}, Options(rewrite=Rewrite("http://localhost"))),
        ("3000", {"host_header": "app.test:1"}, Options(rewrite=Rewrite("http://app.test:1"))),
        (
            "3000",
            {"host_header": "rewrite", "rewrite_links": "off"},
            Options(rewrite=Rewrite("http://localhost:3000", links=False)),
        ),
        ("3000", {"rewrite_links": "on"}, Options(rewrite=Rewrite("http://localhost:3000", requests=False))),
        ("3000", {"rewrite_links": True}, Options(rewrite=Rewrite("http://localhost:3000", requests=False))),
        ("3000", {"forwarded_host": "off"}, Options(forwarded_host=False)),
        ("3000", {"forwarded_host": False}, Options(forwarded_host=False)),
    ],
)
def test_what_is_asked_of_the_servers_edge(target: str, asked: dict[str, Any], options: Options) -> None:
    assert config(target, **asked).options == options


@pytest.mark.parametrize("flag", ["forwarded_host", "rewrite_links"])
def test_switches_are_on_or_off_and_for_http(flag: str) -> None:
    said = "--" + flag.replace("_", "-")
    with pytest.raises(UsageError, match=f"{said}.*allowed: on, off"):
        config(**{flag: "maybe"})
    with pytest.raises(UsageError, match=said):
        config(kind="tcp", **{flag: "off"})


def test_a_host_that_no_page_can_have_is_refused() -> None:
    with pytest.raises(UsageError, match="--host-header"):
        config(host_header=".")


@pytest.mark.parametrize("value", ["0", "-1", "x", "nan", "inf", ""])
def test_connect_timeouts_that_make_no_sense(value: str) -> None:
    with pytest.raises(UsageError, match="--connect-timeout"):
        config(connect_timeout=value)
    assert config(connect_timeout="1.5").connect_timeout == 1.5


def test_files_and_words(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--ca .*no such file"):
        config(ca=tmp_path / "none.pem")
    with pytest.raises(UsageError, match="allowed: auto, always, never"):
        config(verify_target="maybe")
    with pytest.raises(UsageError, match="allowed: debug, info, warning, error"):
        check_log_level("loud")
    assert check_log_level("INFO") == "info"


# -- proxies --------------------------------------------------------------------


def test_proxy_urls() -> None:
    assert str(parse_proxy("http://proxy:3128")) == "proxy:3128"
    assert str(parse_proxy("proxy:3128/")) == "proxy:3128"
    assert parse_proxy("http://proxy").port == 80
    assert parse_proxy("http://[::1]:8").host == "::1"
    with_password = parse_proxy("http://us%40er:p%3Aw:x@proxy:1")
    assert with_password.credentials is not None
    assert b64decode(with_password.credentials.removeprefix("Basic ")) == b"us@er:p:w:x"


@pytest.mark.parametrize(
    "url", ["socks5://p:1", "https://p:1", "http://", "http://p:x", "http://p/x", "http://a b:1"]
)
def test_proxy_urls_that_make_no_sense(url: str) -> None:
    with pytest.raises(UsageError, match=r"--proxy: .*allowed"):
        parse_proxy(url)


@pytest.mark.parametrize(
    "url", ["http://u:secret@p:x", "socks5://u:secret@p", "http://u:secret@", "http://u:se/cret@p:1"]
)
def test_a_proxys_password_is_not_shown(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_proxy(url)
    assert "secret" not in str(caught.value)
    assert "cret" not in str(caught.value).replace("crets", "")
    assert "secret" not in repr(parse_proxy("http://u:secret@p:1"))


def test_the_flag_and_the_variables() -> None:
    environ = {"HTTPS_PROXY": "http://upper:1", "https_proxy": "http://lower:1"}
    assert str(choose_proxy("x", 1, None, environ)) == "lower:1"
    assert str(choose_proxy("x", 1, None, {"HTTPS_PROXY": "upper:1"})) == "upper:1"
    assert str(choose_proxy("x", 1, "flag:1", environ)) == "flag:1"
    assert choose_proxy("x", 1, "", environ) is None
    assert choose_proxy("x", 1, None, environ | {"NO_PROXY": "x"}) is None
    assert str(choose_proxy("x", 1, "flag:1", {"NO_PROXY": "*"})) == "flag:1"
    assert choose_proxy("x", 1, None, {}) is None
    with pytest.raises(UsageError, match=r"^HTTPS_PROXY: "):
        choose_proxy("x", 1, None, {"HTTPS_PROXY": "socks5://x"})


@pytest.mark.parametrize(
    ("no_proxy", "host", "direct"),
    [
        ("", "a.example", False),
        ("*", "a.example", True),
        ("example", "a.example", True),
        ("a.example", "a.example", True),
        ("A.Example.", "a.example", True),
        (".a.example", "a.example", True),
        (".a.example", "b.a.example", True),
        ("a.example", "xa.example", False),
        ("other, a.example", "a.example", True),
        ("other a.example", "a.example", True),
        ("a.example:5554", "a.example", True),
        ("a.example:1", "a.example", False),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.0.0.0/8", "a.example", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3:5554", "10.1.2.3", True),
        ("fd00::/8", "fd00::1", True),
        ("::1", "::1", True),
        ("0:0::1", "::1", True),
        ("[::1]:5554", "::1", True),
        ("10.0.0.0/99", "10.1.2.3", False),
        (",, ,", "a.example", False),
    ],
)
def test_no_proxy(no_proxy: str, host: str, direct: bool) -> None:
    assert bypasses(no_proxy, host, 5554) is direct


@given(st.text(alphabet="*.,:/[] 10af", max_size=30))
def test_any_no_proxy_is_answered(no_proxy: str) -> None:
    assert bypasses(no_proxy, "10.0.0.1", 5554) in (True, False)
