"""The server's configuration: variables, flags, defaults, and one clear line for what makes no sense."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.errors import UsageError
from tinytun_gevent.server import addresses
from tinytun_gevent.server.config import ServerConfig, notice, server_url, variables
from tinytun_gevent.server.settings import PeerAddress


def test_the_defaults_are_the_documented_ones() -> None:
    config = ServerConfig.from_environ({})
    assert config == ServerConfig()
    ports = (config.metadata_port, config.connection_port, config.proxy_port, config.tcp_proxy_port)
    assert ports == (5553, 5554, 5555, 5556)
    assert config.base_domains == ("local.tinytun.com",)
    assert (config.bind, config.metadata_bind) == ("::", "127.0.0.1")
    assert config.tcp_ports == range(20000, 60001)
    assert (config.trusted_proxies, config.peers) == ((), ())
    assert (config.head_bytes, config.head_fields, config.head_timeout) == (32768, 100, 10)
    assert config.head_field_bytes == 16384
    assert (config.answer_head_bytes, config.answer_head_fields, config.interim_answers) == (65536, 200, 64)
    assert (config.handshake_timeout, config.proxy_header_timeout, config.queue_timeout) == (5, 3, 5)
    assert (config.idle_timeout, config.tunnel_idle_timeout) == (75, 0)
    assert (config.backlog, config.drain_timeout, config.log_level) == (2048, 25, "info")


def test_variables_are_read_and_flags_win() -> None:
    environ = {"PROXY_PORT": "8080", "BASE_DOMAIN": "A.Example.com., b.example.org", "BIND": " 0.0.0.0 "}
    config = ServerConfig.from_environ(environ, {"--proxy-port": "80", "CONNECTION_PORT": "1"})
    assert (config.proxy_port, config.connection_port) == (80, 1)
    assert config.base_domains == ("a.example.com", "b.example.org")
    assert config.bind == "0.0.0.0"


def test_a_blank_variable_counts_as_absent_but_a_blank_flag_does_not() -> None:
    assert ServerConfig.from_environ({"PROXY_PORT": "", "BASE_DOMAIN": " "}) == ServerConfig()
    with pytest.raises(UsageError, match="BASE_DOMAIN='': allowed"):
        ServerConfig.from_environ({}, {"--base-domain": ""})


def test_an_unknown_flag_is_refused() -> None:
    with pytest.raises(UsageError, match="--nonsense"):
        ServerConfig.from_environ({}, {"--nonsense": "1"})


WRONG = [
    ("PROXY_PORT", "99999"),
    ("PROXY_PORT", "-1"),
    ("PROXY_PORT", "80a"),
    ("PROXY_PORT", "٣"),
    ("METADATA_PORT", "0x50"),
    ("BIND", "localhost"),
    ("BIND", "127.0.0.1:80"),
    ("METADATA_BIND", "[::1"),
    ("BASE_DOMAIN", "exa_mple.com"),
    ("BASE_DOMAIN", "*.example.com"),
    ("BASE_DOMAIN", ","),
    ("BASE_DOMAIN", "a" * 64 + ".com"),
    ("PUBLIC_URL", "{name}.{domain}"),
    ("CONNECTION_TLS", "perhaps"),
    ("TLS_DIR", "relative/path"),
    ("PROXY_TLS_PORT", "https"),
    ("PUBLIC_URL", "ftp://{name}.{domain}"),
    ("PUBLIC_URL", "https://{domain}"),
    ("PUBLIC_URL", "https://{name}.{domain}/{path}"),
    ("PUBLIC_URL", "https://{name}.{domain}/path"),
    ("PUBLIC_URL", "https://{name}.{domain}:0"),
    ("PUBLIC_URL", "https://{name}.{domain}:99999"),
    ("PUBLIC_URL", "https://u:p@{name}.{domain}"),
    ("PUBLIC_URL", "https://{name}.{domain}?{"),
    ("TCP_PORTS", "9-3"),
    ("TCP_PORTS", "0-10"),
    ("TCP_PORTS", "1-70000"),
    ("TCP_PORTS", "a-b"),
    ("TCP_LISTEN", "maybe"),
    ("TRUSTED_PROXIES", "10.0.0.0/33"),
    ("TRUSTED_PROXIES", "10.0.0.1,proxy.example.com"),
    ("PEERS", "host:0"),
    ("PEERS", "host:1:2:3:4"),
    ("PEERS", "::1"),
    ("PEERS", "[::zz]:1"),
    ("METADATA_HOSTS", "a b"),
    ("LOG_LEVEL", "loud"),
    ("RUST_LOG", "tinytun_server=loud"),
    ("HEAD_BYTES", "1"),
    ("HEAD_FIELDS", "0"),
    ("HEAD_TIMEOUT", "1e3"),
    ("HEAD_TIMEOUT", "0"),
    ("HEAD_TIMEOUT", "nan"),
    ("DRAIN_TIMEOUT", "-1"),
    ("MAX_TUNNELS", "0"),
    ("BACKLOG", "1000000"),
]


@pytest.mark.parametrize(("variable", "value"), WRONG)
def test_what_makes_no_sense_is_one_line_with_variable_value_and_what_is_allowed(
    variable: str, value: str
) -> None:
    with pytest.raises(UsageError) as caught:
        ServerConfig.from_environ({variable: value})
    text = str(caught.value)
    assert text.startswith((f"{variable}={value}: allowed: ", f"{variable}={value!r}: allowed: "))
    assert "\n" not in text
    assert caught.value.exit_code == 2


@given(st.sampled_from([v.name for v in variables()]), st.text(max_size=40))
def test_any_text_is_read_or_refused_in_one_line(variable: str, text: str) -> None:
    config, problem = ServerConfig(), f"{variable}"
    try:
        config = ServerConfig.from_environ({variable: text})
    except UsageError as error:
        problem = str(error)
    assert variable in problem
    assert problem.isprintable()
    assert dataclasses.replace(config) == config


def test_two_listeners_on_one_port_are_refused_but_not_two_chosen_by_the_system() -> None:
    with pytest.raises(UsageError, match="PROXY_PORT=5554: is CONNECTION_PORT"):
        ServerConfig(proxy_port=5554)
    assert ServerConfig(proxy_port=0, connection_port=0).proxy_port == 0


def test_values_may_be_given_as_python_knows_them() -> None:
    config = ServerConfig(
        base_domains=("localhost",),
        tcp_ports=range(30000, 30010),
        trusted_proxies=(ip_network("10.0.0.0/8"),),
    )
    assert config.tcp_ports == range(30000, 30010)
    assert dataclasses.replace(config, proxy_port=1).base_domains == ("localhost",)
    with pytest.raises(UsageError, match="TCP_PORTS"):
        ServerConfig(tcp_ports=5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="PROXY_PORT"):
        ServerConfig(proxy_port=-1)


@pytest.mark.parametrize(
    ("template", "port", "url"),
    [
        ("http://{name}.{domain}:{port}", 5555, "http://x.example.com:5555"),
        ("http://{name}.{domain}:{port}", 80, "http://x.example.com"),
        ("https://{name}.{domain}:{port}/", 443, "https://x.example.com"),
        ("https://{name}.{domain}", 5555, "https://x.example.com"),
        ("https://{name}.{domain}:80", 5555, "https://x.example.com:80"),
        ("http://{name}.tun.example.net:8443", 5555, "http://x.tun.example.net:8443"),
        ("HTTPS://{name}.{domain}:443", 1, "HTTPS://x.example.com"),
    ],
)
def test_urls_leave_out_default_ports_and_the_trailing_slash(template: str, port: int, url: str) -> None:
    config = ServerConfig(public_url=template, proxy_port=port, base_domains=("example.com", "other.org"))
    assert config.url_of("x") == url


@pytest.mark.parametrize(
    ("environ", "level"),
    [
        ({"RUST_LOG": "tinytun_server=warn"}, "warn"),
        ({"RUST_LOG": "debug"}, "debug"),
        ({"RUST_LOG": "info,hyper=warn,tinytun_server::proxy=trace"}, "trace"),
        ({"RUST_LOG": "tinytun_server=error,debug"}, "error"),
        ({"RUST_LOG": "hyper=debug"}, "info"),
        ({"RUST_LOG": "tinytun_server"}, "trace"),
        ({"RUST_LOG": "tinytun=off"}, "off"),
        ({"RUST_LOG": "WARN/regex"}, "warn"),
        ({"RUST_LOG": "tinytun_server[span{a=1}]=debug"}, "debug"),
        ({"RUST_LOG": "debug", "LOG_LEVEL": "error"}, "error"),
        ({"LOG_LEVEL": "WARNING"}, "warn"),
        ({}, "info"),
    ],
)
def test_rust_log_is_understood_as_a_level(environ: dict[str, str], level: str) -> None:
    assert ServerConfig.from_environ(environ).log_level == level


def test_a_flag_for_the_level_wins_over_rust_log() -> None:
    assert ServerConfig.from_environ({"RUST_LOG": "debug"}, {"--log-level": "warn"}).log_level == "warn"


def test_peers_are_names_or_addresses_with_ports_of_their_own() -> None:
    config = ServerConfig(peers="tinytun.internal, 10.0.0.2:1, [::1]:1:2:3,a:1:2")  # type: ignore[arg-type]
    assert config.peers == (
        PeerAddress("tinytun.internal"),
        PeerAddress("10.0.0.2", 1),
        PeerAddress("::1", 1, 2, 3),
        PeerAddress("a", 1, 2),
    )


@pytest.mark.parametrize(
    ("peers", "bind", "deaf"),
    [
        ("nodes.internal", "127.0.0.1", True),
        ("127.0.0.1:1,10.0.0.1", "[::1]", True),
        ("nodes.internal", "10.0.0.1", False),
        ("127.0.0.1:1,localhost:2", "127.0.0.1", False),
        ("", "127.0.0.1", False),
    ],
)
def test_peers_elsewhere_cannot_ask_on_loopback(peers: str, bind: str, deaf: bool) -> None:
    config = ServerConfig.from_environ({"PEERS": peers, "METADATA_BIND": bind})
    assert config.deaf_to_peers is deaf


def test_trusted_proxies_are_addresses_and_networks() -> None:
    config = ServerConfig(trusted_proxies="10.1.2.3/8, 192.0.2.7,2001:db8::/32,::ffff:198.51.100.0/120")  # type: ignore[arg-type]
    trusted = config.trusted()
    for ip in ("10.9.9.9", "192.0.2.7", "2001:db8::5", "198.51.100.77"):
        assert ip in trusted
    for ip in ("11.0.0.1", "192.0.2.8", "2001:db9::1", "nonsense", ""):
        assert ip not in trusted
    assert "127.0.0.1" not in ServerConfig().trusted()


def test_every_variable_is_documented_and_its_default_reads_back() -> None:
    table = variables()
    assert len({v.name for v in table}) == len(table) == len(dataclasses.fields(ServerConfig))
    for variable in table:
        assert variable.flag == "--" + variable.name.lower().replace("_", "-")
        assert len(variable.help) > 10
        assert ServerConfig.from_environ({variable.name: variable.default}) == ServerConfig()


def test_the_summary_is_what_differs() -> None:
    assert ServerConfig().summary() == ""
    config = ServerConfig(proxy_port=80, base_domains=("a.org", "b.org"), tcp_listen=False)
    assert config.summary().split("\n") == ["PROXY_PORT=80", "BASE_DOMAIN=a.org,b.org", "TCP_LISTEN=off"]


def test_the_url_for_clients_is_never_an_address_of_all() -> None:
    assert server_url(ServerConfig()) == "http://127.0.0.1:5554"
    assert server_url(ServerConfig(bind="::1")) == "http://[::1]:5554"


def test_reading_the_configuration_needs_no_gevent() -> None:
    code = (
        "import sys; from tinytun_gevent.server.config import ServerConfig;"
        "ServerConfig(); sys.exit('gevent' in sys.modules or 'gunicorn' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- addresses ----------------------------------------------------------------


def test_mapped_addresses_are_unmapped() -> None:
    assert addresses.plain(("::ffff:192.0.2.1", 5, 0, 0)) == ("192.0.2.1", 5)
    assert addresses.plain(("fe80::1%eth0", 5, 0, 2)) == ("fe80::1", 5)
    assert addresses.plain(("::ffff:0:1", 5, 0, 0)) == ("::ffff:0:1", 5)
    assert addresses.canonical("2001:DB8:0::1") == "2001:db8::1"
    assert addresses.canonical("::FFFF:192.0.2.1") == addresses.canonical("::ffff:c000:201") == "192.0.2.1"


needs_ipv6 = pytest.mark.skipif(not addresses.has_ipv6(), reason="this machine has no IPv6")


@needs_ipv6
def test_all_addresses_means_both_families_on_one_socket() -> None:
    with addresses.listen("::", 0, 5) as listener:
        port = listener.getsockname()[1]
        for host, seen in (("127.0.0.1", "127.0.0.1"), ("::1", "::1")):
            with socket.create_connection((host, port), timeout=60):
                accepted, address = listener.accept()
                accepted.close()
                assert addresses.plain(address)[0] == seen


def test_without_ipv6_all_addresses_means_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_ipv6", False)
    with addresses.listen("::", 0, 5) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"


def test_a_taken_port_is_one_line_and_nothing_stays_bound() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as spare:
        port, other = taken.getsockname()[1], spare.getsockname()[1]
        spare.close()
        wanted = [("METADATA_PORT", "127.0.0.1", other), ("PROXY_PORT", "127.0.0.1", port)]
        with pytest.raises(UsageError) as caught:
            addresses.listen_all(wanted, 5)
        assert f"PROXY_PORT={port}" in str(caught.value)
        assert "in use" in str(caught.value)
        assert "\n" not in str(caught.value)
        with socket.create_server(("127.0.0.1", other)):
            pass  # the first port was given back


def test_an_address_of_another_machine_cannot_be_bound() -> None:
    with pytest.raises(UsageError, match="no address of this machine"):
        addresses.listen_all([("PROXY_PORT", "203.0.113.1", 0)], 5)
    assert not addresses.is_local("203.0.113.1")
    assert addresses.is_local("127.0.0.1")


def test_with_certificates_urls_are_https_unless_the_operator_says_otherwise() -> None:
    plain, secure = ServerConfig(base_domains="a.org"), ServerConfig(base_domains="a.org", tls_dir="/tls")
    assert plain.url_of("x") == "http://x.a.org:5555"
    assert secure.url_of("x") == "https://x.a.org:5557"
    assert dataclasses.replace(secure, proxy_tls_port=443).url_of("x") == "https://x.a.org"
    for template, url in (
        ("https://{name}.{domain}", "https://x.a.org"),
        ("https://{name}.{domain}:{port}", "https://x.a.org:5557"),
        ("http://{name}.{domain}:{port}", "http://x.a.org:5555"),
    ):
        assert dataclasses.replace(secure, public_url=template).url_of("x") == url


def test_the_https_port_is_bound_only_with_certificates() -> None:
    assert len(ServerConfig().listeners()) == 4
    config = ServerConfig(tls_dir="/tls")
    assert config.listeners()[-1] == ("PROXY_TLS_PORT", "::", 5557)
    assert config.with_ports([1, 2, 3, 4, 5]).proxy_tls_port == 5
    with pytest.raises(UsageError, match="PROXY_TLS_PORT=5555: is PROXY_PORT as well"):
        ServerConfig(tls_dir="/tls", proxy_tls_port=5555)
    assert ServerConfig(proxy_tls_port=5555).proxy_tls_port == 5555


def test_tls_is_required_only_where_it_is_spoken() -> None:
    with pytest.raises(UsageError, match="CONNECTION_TLS=required: needs TLS_DIR"):
        ServerConfig(connection_tls="required")
    config = ServerConfig(connection_tls="REQUIRED", tls_dir="/tls")
    assert config.tls_required
    assert server_url(config) == "https://127.0.0.1:5554"


def test_an_open_server_is_told_of_only_where_others_reach_it() -> None:
    assert "port 5554 can open a tunnel" in notice(ServerConfig())
    behind_a_proxy = ServerConfig(bind="127.0.0.1", trusted_proxies="127.0.0.1")  # type: ignore[arg-type]
    assert "port 5554 can open a tunnel" in notice(behind_a_proxy)
    assert notice(ServerConfig(bind="127.0.0.1")) == notice(ServerConfig(auth_file="/x")) == ""
