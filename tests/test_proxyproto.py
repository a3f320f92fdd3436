"""PROXY headers: round trips, truncation at every byte, TLVs, and lengths that lie."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.errors import ProxyHeaderError
from tinytun_gevent.wire.proxyproto import (
    MAX_LENGTH,
    SIGNATURE_V1,
    SIGNATURE_V2,
    ProxyHeader,
    build_v2,
    parse,
    starts_like_proxy,
)

V4 = bytes([192, 0, 2, 1, 198, 51, 100, 2]) + struct.pack("!HH", 40000, 30000)
V6 = ipaddress.ip_address("2001:db8::1").packed + ipaddress.ip_address("2001:db8::2").packed + V4[8:]
ends = st.tuples(st.ip_addresses().map(str), st.integers(0, 65535))
tlvs = st.lists(
    st.tuples(st.integers(0, 255), st.binary(max_size=60)).map(
        lambda tlv: struct.pack("!BH", tlv[0], len(tlv[1])) + tlv[1]
    ),
    max_size=5,
).map(b"".join)


def v2(block: bytes, family: int = 0x11, command: int = 0x21, size: int | None = None) -> bytes:
    return SIGNATURE_V2 + struct.pack("!BBH", command, family, len(block) if size is None else size) + block


def unmapped(host: str) -> str:
    address = ipaddress.ip_address(host)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def expect_incomplete_until_whole(header: bytes, result: ProxyHeader) -> None:
    """Every prefix asks for more; the whole, with or without bytes behind it, is understood."""
    for size in range(len(header)):
        assert parse(header[:size]) is None, size
    assert parse(header) == result
    assert parse(header + b"\x16\x03GET / HTTP/1.1") == result
    assert parse(bytearray(header)) == result
    assert result.length == len(header)


@given(ends, ends)
def test_v2_round_trip(source: tuple[str, int], destination: tuple[str, int]) -> None:
    header = build_v2(source, destination)
    expected = ProxyHeader(
        (unmapped(source[0]), source[1]), (unmapped(destination[0]), destination[1]), False, len(header)
    )
    expect_incomplete_until_whole(header, expected)


def test_v2_bytes_are_the_standards() -> None:
    assert build_v2(("192.0.2.1", 40000), ("198.51.100.2", 30000)) == v2(V4)
    assert build_v2(("2001:db8::1", 40000), ("2001:db8::2", 30000)) == v2(V6, 0x21)


def test_two_families_are_both_written_as_ipv6() -> None:
    header = build_v2(("192.0.2.1", 1), ("2001:db8::2", 2))
    assert header[13] == 0x21
    assert header[16:32] == ipaddress.ip_address("::ffff:192.0.2.1").packed
    assert parse(header) == ProxyHeader(("192.0.2.1", 1), ("2001:db8::2", 2), False, 52)


def test_a_zone_is_not_sent() -> None:
    assert build_v2(("fe80::1%eth0", 1), ("fe80::2", 2)) == build_v2(("fe80::1", 1), ("fe80::2", 2))


@pytest.mark.parametrize("end", [("localhost", 1), ("", 1), ("1.2.3.4", -1), ("1.2.3.4", 65536)])
def test_what_is_no_address_is_not_written(end: tuple[str, int]) -> None:
    for pair in ((end, ("1.2.3.4", 5)), (("1.2.3.4", 5), end)):
        with pytest.raises(ValueError):
            build_v2(*pair)


def test_mapped_addresses_come_out_as_ipv4() -> None:
    mapped = ipaddress.ip_address("::ffff:192.0.2.1").packed
    header = parse(v2(mapped + mapped + V4[8:], 0x21))
    assert header == ProxyHeader(("192.0.2.1", 40000), ("192.0.2.1", 30000), False, 52)
    line = b"PROXY TCP6 ::ffff:192.0.2.1 2001:DB8::2 1 2\r\n"
    assert parse(line) == ProxyHeader(("192.0.2.1", 1), ("2001:db8::2", 2), False, len(line))


@given(tlvs)
def test_tlvs_are_skipped(extra: bytes) -> None:
    for block, family, host in ((V4, 0x11, "192.0.2.1"), (V6, 0x21, "2001:db8::1")):
        header = v2(block + extra, family)
        parsed = parse(header + b"GET")
        assert parsed is not None
        assert parsed.source == (host, 40000)
        assert parsed.length == len(header)
        assert parse(header[:-1]) is None


@pytest.mark.parametrize("extra", [b"\x04", b"\x04\x00", b"\x04\x00\x01", b"\x04\x00\x00\x04\xff\xffabc"])
def test_tlvs_that_do_not_fill_the_header_are_refused(extra: bytes) -> None:
    with pytest.raises(ProxyHeaderError):
        parse(v2(V4 + extra))


@pytest.mark.parametrize("family", [0x00, 0x11, 0x12, 0x21, 0x31, 0xFF])
@pytest.mark.parametrize("block", [b"", V4, b"\xff" * 7])
def test_local_ignores_family_and_block(family: int, block: bytes) -> None:
    header = v2(block, family, command=0x20)
    expect_incomplete_until_whole(header, ProxyHeader(None, None, True, len(header)))


@pytest.mark.parametrize(("family", "block"), [(0x00, b""), (0x00, b"\xff" * 9), (0x31, b"/" * 216)])
def test_a_proxy_that_does_not_know_says_no_addresses(family: int, block: bytes) -> None:
    header = v2(block, family)
    expect_incomplete_until_whole(header, ProxyHeader(None, None, False, len(header)))


@pytest.mark.parametrize("family", [0x01, 0x02, 0x10, 0x12, 0x13, 0x20, 0x22, 0x32, 0x41, 0xFF])
def test_other_families_are_refused(family: int) -> None:
    with pytest.raises(ProxyHeaderError):
        parse(v2(b"\0" * 216, family))


@pytest.mark.parametrize("command", [0x00, 0x01, 0x11, 0x22, 0x2F, 0x31, 0xF1])
def test_other_versions_and_commands_are_refused(command: int) -> None:
    with pytest.raises(ProxyHeaderError):
        parse(v2(V4, command=command))


@pytest.mark.parametrize(("family", "need"), [(0x11, 12), (0x21, 36), (0x31, 216)])
def test_a_length_too_small_for_the_addresses_is_refused(family: int, need: int) -> None:
    for size in (0, 1, need - 1):
        with pytest.raises(ProxyHeaderError):
            parse(v2(b"\0" * need, family, size=size))
    assert parse(v2(b"\0" * need, family)) is not None


def test_a_length_over_the_limit_is_refused_before_the_bytes_are_there() -> None:
    longest = MAX_LENGTH - 16
    whole = v2(V4 + struct.pack("!BH", 4, longest - 15) + b"x" * (longest - 15))
    assert len(whole) == MAX_LENGTH
    parsed = parse(whole)
    assert parsed is not None
    assert parsed.length == MAX_LENGTH
    for size in (longest + 1, 65535):
        for command in (0x20, 0x21):
            with pytest.raises(ProxyHeaderError):
                parse(v2(b"", command=command, size=size))


# Version 1


@given(st.sampled_from((4, 6)), st.data())
def test_v1_lines(version: int, data: st.DataObject) -> None:
    addresses = st.ip_addresses(v=version)
    source, destination = str(data.draw(addresses)), str(data.draw(addresses))
    ports = data.draw(st.tuples(st.integers(0, 65535), st.integers(0, 65535)))
    line = f"PROXY TCP{version} {source} {destination} {ports[0]} {ports[1]}\r\n".encode()
    expected = ProxyHeader((unmapped(source), ports[0]), (unmapped(destination), ports[1]), False, len(line))
    expect_incomplete_until_whole(line, expected)


@pytest.mark.parametrize("rest", [b"", b" ", b" ffff:f::1 x y z", b" 1 2 3 4 5 6 7"])
def test_v1_unknown(rest: bytes) -> None:
    line = b"PROXY UNKNOWN" + rest + b"\r\n"
    expect_incomplete_until_whole(line, ProxyHeader(None, None, False, len(line)))


def test_the_longest_v1_line() -> None:
    full = b"ffff:" * 7 + b"ffff"
    line = b"PROXY UNKNOWN " + full + b" " + full + b" 65535 65535\r\n"
    assert len(line) == 107
    expect_incomplete_until_whole(line, ProxyHeader(None, None, False, 107))
    with pytest.raises(ProxyHeaderError):
        parse(line[:-2] + b"1\r\n")
    with pytest.raises(ProxyHeaderError):
        parse(b"PROXY " + b"x" * 101)


@pytest.mark.parametrize(
    "rest",
    [
        b"TCP4 1.2.3.4 5.6.7.8 1",
        b"TCP4 1.2.3.4 5.6.7.8 1 2 3",
        b"TCP4 1.2.3.4 5.6.7.8 1 65536",
        b"TCP4 1.2.3.4 5.6.7.8 -1 2",
        b"TCP4 1.2.3.4 5.6.7.8 +1 2",
        b"TCP4 1.2.3.4 5.6.7.8 01 2",
        b"TCP4 1.2.3.4 5.6.7.8 1 2 ",
        b"TCP4  1.2.3.4 5.6.7.8 1 2",
        b"TCP4 1.2.3.4\t5.6.7.8 1 2",
        b"TCP4 1.2.3.400 5.6.7.8 1 2",
        b"TCP4 01.2.3.4 5.6.7.8 1 2",
        b"TCP4 1.2.3 5.6.7.8 1 2",
        b"TCP4 ::1 ::2 1 2",
        b"TCP6 1.2.3.4 5.6.7.8 1 2",
        b"TCP6 ::1%eth0 ::2 1 2",
        b"TCP6 ::1 :::2 1 2",
        b"TCP4 1.2.3.4 5.6.7.8 1 2\n",
        b"TCP4 1.2.3.4 5.6.7.8 1 \xb2",
        b"tcp4 1.2.3.4 5.6.7.8 1 2",
        b"UDP4 1.2.3.4 5.6.7.8 1 2",
        b"TCP5 1.2.3.4 5.6.7.8 1 2",
        b"UNKNOWNS",
        b"TCP4",
        b"",
    ],
)
def test_malformed_v1_lines_are_refused(rest: bytes) -> None:
    with pytest.raises(ProxyHeaderError):
        parse(b"PROXY " + rest + b"\r\n")


# Telling, and hostile bytes


def test_starts_like_proxy() -> None:
    for signature in (SIGNATURE_V1, SIGNATURE_V2):
        for size in range(len(signature)):
            assert starts_like_proxy(signature[:size]) is None
            assert starts_like_proxy(bytearray(signature[:size])) is None
        assert starts_like_proxy(signature) is True
        assert starts_like_proxy(bytearray(signature + b"x" * 999)) is True
    for other in (b"GET / HTTP/1.1", b"P", b"PR", b"\r\n\r\n\0"):
        expected = None if SIGNATURE_V1.startswith(other) or SIGNATURE_V2.startswith(other) else False
        assert starts_like_proxy(other) is expected
    for other in (b"POST / HTTP/1.1", b"PROXX", b"\r\nGET", SIGNATURE_V2[:-1] + b"x", b"proxy "):
        assert starts_like_proxy(other) is False
        with pytest.raises(ProxyHeaderError):
            parse(other)


@given(
    st.sampled_from((b"", SIGNATURE_V1, SIGNATURE_V2, SIGNATURE_V2 + b"\x21\x11", b"PROXY TCP6 ::1 ")),
    st.binary(max_size=600),
    st.booleans(),
)
def test_garbage_raises_nothing_but_proxy_header_error(start: bytes, rest: bytes, line: bool) -> None:
    data = start + rest + (b"\r\n" if line else b"")
    header = parse_or_error(data)
    if isinstance(header, ProxyHeader):
        assert header.length <= min(len(data), MAX_LENGTH)
    if len(data) > MAX_LENGTH:  # no endless "incomplete"
        assert header is not None


def parse_or_error(data: bytes) -> ProxyHeader | ProxyHeaderError | None:
    try:
        return parse(data)
    except ProxyHeaderError as error:
        return error


@given(
    st.sampled_from((v2(V4), v2(V6, 0x21), b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n")),
    st.integers(0, 51),
    st.integers(0, 255),
)
def test_one_changed_byte_is_never_an_exception_of_another_kind(header: bytes, at: int, byte: int) -> None:
    changed = bytearray(header)
    changed[at % len(changed)] = byte
    result = parse_or_error(bytes(changed))
    assert result is None or isinstance(result, (ProxyHeader, ProxyHeaderError))
