"""Host and port, as people write them."""

from __future__ import annotations

import re
from ipaddress import ip_address

_PORT = re.compile(r"[0-9]{1,5}\Z")
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9_.])?\Z")


def split_host_port(text: str) -> tuple[str, int | None]:
    """Split ``HOST``, ``HOST:PORT``, ``[V6]`` or ``[V6]:PORT``; the port may be absent.

    The host comes back without brackets. Raises ValueError, whose text says what is wrong.
    """
    if text.startswith("["):
        host, closed, rest = text[1:].partition("]")
        if not closed or not _is_ipv6(host) or (rest and not rest.startswith(":")):
            raise ValueError("an IPv6 address is written [::1]:PORT")
        return host, parse_port(rest[1:]) if rest else None
    if text.count(":") > 1:
        raise ValueError("an IPv6 address is written [::1]:PORT")
    host, colon, port = text.partition(":")
    if not host:
        raise ValueError("the host is missing")
    if not _HOST.match(_ascii(host)) or ".." in host:
        raise ValueError(f"{host!r} is not a host name")
    return _ascii(host), parse_port(port) if colon else None


def parse_port(text: str) -> int:
    """A port number from 1 to 65535; raises ValueError."""
    if not _PORT.match(text) or not 1 <= int(text) <= 65535:
        raise ValueError(f"{text!r} is not a port (1-65535)")
    return int(text)


def bracketed(host: str) -> str:
    """``host`` as it is written in a URL: an IPv6 address gets its brackets."""
    return f"[{host}]" if ":" in host else host


def is_loopback(host: str) -> bool:
    """Whether a name or numeric address can only mean this machine (RFC 6761 §6.3)."""
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def is_address(host: str) -> bool:
    """Whether it is numeric, so that nobody is asked where it leads."""
    try:
        ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _ascii(host: str) -> str:
    """An internationalized name in the form that is resolved and sent (RFC 5890)."""
    if host.isascii():
        return host
    try:
        return host.encode("idna").decode("ascii")
    except UnicodeError:
        raise ValueError(f"{host!r} is not a host name") from None


def _is_ipv6(text: str) -> bool:
    try:
        return ip_address(text).version == 6
    except ValueError:
        return False
