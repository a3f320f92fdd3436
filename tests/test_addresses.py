"""IP addresses that callers send or have: what is one, and who is trusted."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from tinytun_gevent.server.addresses import Networks, is_ip, network_of, source_of

ZONES = ["fe80::1%eth0", "::1%", "::1%25eth0", '::1%x - - [now] "GET / HTTP/1.1" 200', "2001:db8::1%::"]


@pytest.mark.parametrize("text", ["192.0.2.1", "::1", "2001:db8::1", "::ffff:192.0.2.1"])
def test_addresses(text: str) -> None:
    assert is_ip(text)


@pytest.mark.parametrize("text", [*ZONES, "", "localhost", "192.0.2.1:80", "[::1]", "192.0.2.01", "1"])
def test_what_is_no_address(text: str) -> None:
    assert not is_ip(text)


@pytest.mark.parametrize("text", ZONES)
def test_an_address_with_a_zone_is_trusted_by_nobody(text: str) -> None:
    assert text not in Networks([ip_network("::/0")])


def test_networks_and_single_addresses_are_trusted() -> None:
    trusted = Networks([ip_network("10.0.0.0/8"), ip_network("2001:db8::1/128")])
    assert "10.1.2.3" in trusted
    assert "2001:db8::1" in trusted
    assert "2001:db8::2" not in trusted
    assert "11.0.0.1" not in trusted


@pytest.mark.parametrize(
    ("ip", "source"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("::ffff:c000:207", "192.0.2.7"),
        ("0:0:0:0:0:FFFF:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::ffff:c000:207", "2001:db8:1:2::/64"),
        ("::1", "::/64"),
    ],
)
def test_what_one_customer_changes_as_he_likes_is_one_source(ip: str, source: str) -> None:
    assert source_of(ip) == source
    assert network_of(ip) == network_of(source.removesuffix("/64"))
