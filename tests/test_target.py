"""The forms in which a user names the local service."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.client.address import is_loopback, split_host_port
from tinytun_gevent.client.target import MAX_UNIX_PATH, Target, parse_target
from tinytun_gevent.errors import UsageError


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("3000", Target("localhost", 3000)),
        ("1", Target("localhost", 1)),
        ("65535", Target("localhost", 65535)),
        ("web:8000", Target("web", 8000)),
        ("127.0.0.1:80", Target("127.0.0.1", 80)),
        ("my_app.internal:80", Target("my_app.internal", 80)),
        ("[::1]:3000", Target("::1", 3000)),
        ("[fe80::1%eth0]:3000", Target("fe80::1%eth0", 3000)),
        ("unix:/run/app.sock", Target("", 0, path="/run/app.sock")),
        ("unix:///run/app.sock", Target("", 0, path="/run/app.sock")),
        ("unix:app.sock", Target("", 0, path="app.sock")),
        ("http://localhost:3000", Target("localhost", 3000)),
        ("http://localhost:3000/", Target("localhost", 3000)),
        ("http://web", Target("web", 80)),
        ("HTTP://web:81", Target("web", 81)),
        ("https://localhost:8443", Target("localhost", 8443, tls=True, verify=False)),
        ("https://127.0.0.2", Target("127.0.0.2", 443, tls=True, verify=False)),
        ("https://[::1]", Target("::1", 443, tls=True, verify=False)),
        ("https://app.localhost", Target("app.localhost", 443, tls=True, verify=False)),
        ("https://web.internal", Target("web.internal", 443, tls=True, verify=True)),
        ("https://10.0.0.1:8443", Target("10.0.0.1", 8443, tls=True, verify=True)),
        ("bücher.example:80", Target("xn--bcher-kva.example", 80)),
    ],
)
def test_every_form(text: str, target: Target) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "0", "65536", "99999999", "-1", "3000x", "٣", "web", "web:", ":3000", "web:0", "web:65536",
        "web:http", "::1:3000", "[::1]", "[::1]3000", "[web]:80", "[::1:80", "a b:80", "a\n:80", "web..x:80",
        "-web:80", "unix:", "unix:/a\0b", "ftp://web:80", "http://", "http://web:0", "http://web/path", "http://web?q",
        "http://web#f", "http://user:secret@web", "http://[::1", "https://web:port",
    ],
)  # fmt: skip
def test_nonsense_is_one_line_that_says_what_is_allowed(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_target(text)
    message = str(caught.value)
    assert "allowed: PORT, HOST:PORT" in message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["web:80/app", "3000/", "web:80?q", "me@web:80", "http://web/app"])
def test_every_form_says_that_the_whole_service_is_meant(text: str) -> None:
    with pytest.raises(UsageError, match="a tunnel leads to a whole service"):
        parse_target(text)


@pytest.mark.parametrize("text", ["./site", "../site", "/var/www", "~/site", "."])
def test_a_path_of_files_is_told_from_a_service(text: str) -> None:
    with pytest.raises(UsageError, match=r"path of files.*unix:/PATH"):
        parse_target(text)


def test_a_socket_path_that_no_system_takes() -> None:
    assert parse_target("unix:/" + "x" * (MAX_UNIX_PATH - 1)).path
    with pytest.raises(UsageError, match="103 bytes"):
        parse_target("unix:/" + "x" * MAX_UNIX_PATH)


def test_verification_can_be_asked_for_and_waived() -> None:
    assert parse_target("https://localhost", "always").verify
    assert not parse_target("https://web.internal", "never").verify
    assert not parse_target("http://web.internal", "always").verify


@pytest.mark.parametrize(
    ("text", "header"),
    [
        ("3000", "localhost:3000"),
        ("80", "localhost"),
        ("[::1]:3000", "[::1]:3000"),
        ("http://web", "web"),
        ("https://web", "web"),
        ("https://web:80", "web:80"),
        ("http://web:443", "web:443"),
        ("unix:/x", "localhost"),
        ("[fe80::1%eth0]:3000", "[fe80::1]:3000"),
    ],
)
def test_the_targets_own_host(text: str, header: str) -> None:
    assert parse_target(text).host_header == header


@pytest.mark.parametrize("text", ["localhost:3000", "[::1]:3000", "https://web:8443", "unix:/run/app.sock"])
def test_a_target_is_shown_as_it_can_be_written(text: str) -> None:
    assert str(parse_target(text)) == text


@given(st.text(max_size=60))
def test_any_text_is_a_target_or_a_usage_error(text: str) -> None:
    try:
        target = parse_target(text)
    except UsageError:
        return
    assert target.path or 1 <= target.port <= 65535


@given(st.text(alphabet="[]:.%a1 -é", max_size=20))
def test_host_and_port_or_a_value_error(text: str) -> None:
    try:
        host, port = split_host_port(text)
    except ValueError:
        return
    assert host
    assert port is None or 1 <= port <= 65535


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "a.localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_names_of_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["localhost.example", "xlocalhost", "128.0.0.1", "::2", "web", ""])
def test_names_of_other_machines(host: str) -> None:
    assert not is_loopback(host)
