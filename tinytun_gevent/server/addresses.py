"""IP addresses and listening sockets: parsing, unmapping, who is trusted, binding.

Only the standard library's own sockets are used here, and none is connected or read, so
gunicorn's master may import it as well as the worker.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

from ..errors import UsageError

Network = IPv4Network | IPv6Network

EVERYWHERE: Final = "::"
"""All addresses of both families, on one socket."""

_MAPPED: Final = "::ffff:"


def unmap(ip: str) -> str:
    """The IPv4 address inside an IPv4-mapped IPv6 one (RFC 4291 §2.5.5.2); others unchanged.

    A dual-stack socket reports IPv4 callers as ``::ffff:192.0.2.1``; nothing else in the
    server may see that spelling, or the same caller would compare, log and forward as two.
    """
    if ip.startswith(_MAPPED) and "." in ip:
        return ip[len(_MAPPED) :]
    return ip


def plain(address: tuple[str, int] | tuple[str, int, int, int]) -> tuple[str, int]:
    """What ``accept`` or ``getsockname`` returned, as ``(ip, port)``, unmapped, without a zone."""
    return unmap(address[0].partition("%")[0]), address[1]


def canonical(ip: str) -> str:
    """The one spelling of an address: lower case, shortest, unmapped; ``ValueError`` if it is none."""
    address = ip_address(ip.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)


def network_of(ip: str) -> str | int:
    """What stands for everybody behind ``ip``: itself, or of IPv6 the first 64 bits.

    The others one customer changes as he likes. An IPv4-mapped address is the IPv4 one, however written.
    """
    if ":" not in ip:
        return ip
    number = int(IPv6Address(ip))
    return str(IPv4Address(number & 0xFFFFFFFF)) if number >> 32 == 0xFFFF else number >> 64


def source_of(ip: str) -> str:
    """The same as text, for people and files: ``192.0.2.7``, ``2001:db8:1:2::/64``."""
    network = network_of(ip)
    return network if isinstance(network, str) else f"{IPv6Address(network << 64)}/64"


def is_ip(text: str) -> bool:
    """Whether ``text`` is an IP address without brackets, port or zone, which may hold any text at all."""
    if "%" in text:
        return False
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether ``host`` is an address, or the name, that means this machine only."""
    return ip_address(host).is_loopback if is_ip(host) else host == "localhost"


def local(bind: str) -> str:
    """Where a program on this machine reaches what listens on the address ``bind``."""
    return "127.0.0.1" if bind in (EVERYWHERE, "0.0.0.0") else bind  # nosec B104 # read, not bound


def bracketed(host: str) -> str:
    """``host`` as it stands in a URL or Host field: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


class Networks:
    """A fixed set of networks and single addresses, asked about callers' addresses.

    Answers are remembered, up to a bound, because the same proxies call again and again.
    """

    _REMEMBERED: Final = 1024

    def __init__(self, networks: Iterable[Network] = ()) -> None:
        self._networks = tuple(networks)
        self._answers: dict[str, bool] = {}

    def __contains__(self, ip: str) -> bool:
        """Whether ``ip`` (unmapped) lies in one of the networks; what is no address is in none."""
        if not self._networks:
            return False
        answer = self._answers.get(ip)
        if answer is None:
            answer = self._search(ip)
            if len(self._answers) >= self._REMEMBERED:
                self._answers.clear()
            self._answers[ip] = answer
        return answer

    def _search(self, ip: str) -> bool:
        if not is_ip(ip):
            return False
        address = ip_address(ip)
        return any(address in network for network in self._networks if network.version == address.version)


def parse_network(text: str) -> Network:
    """An address or CIDR as a network; ``ValueError`` if it is neither.

    ``10.0.0.1/8`` is taken for ``10.0.0.0/8``, and IPv4-mapped networks for the IPv4 ones
    that callers are compared as.
    """
    network = ip_network(text, strict=False)
    mapped = network.network_address.ipv4_mapped if isinstance(network, IPv6Network) else None
    if mapped is not None and network.prefixlen >= 96:
        return ip_network((mapped, network.prefixlen - 96))
    return network


def has_ipv6() -> bool:
    """Whether an IPv6 socket can be made and bound here (a kernel may lack it, or forbid it)."""
    if not socket.has_ipv6:
        return False
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def is_local(ip: str) -> bool:
    """Whether ``ip`` is an address of this machine: only those can be bound."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((ip, 0))
    except OSError:
        return False
    return True


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """A listening socket on ``host`` (an address; ``::`` is every address of both families).

    ``port`` 0 lets the kernel choose. Where the machine has no IPv6, ``::`` becomes
    ``0.0.0.0``. The caller closes it. Raises OSError as ``bind`` does.
    """
    if host == EVERYWHERE and not has_ipv6():
        host = "0.0.0.0"  # nosec B104 # what the operator asked for
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere the option would let two programs share the port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != EVERYWHERE))
        sock.bind((host, port))
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def listen_all(wanted: Iterable[tuple[str, str, int]], backlog: int) -> list[socket.socket]:
    """Listening sockets for every ``(variable, host, port)``, all of them or none.

    Raises UsageError, one line that names the variable, with nothing left bound.
    """
    sockets: list[socket.socket] = []
    try:
        for variable, host, port in wanted:
            try:
                sockets.append(listen(host, port, backlog))
            except OSError as error:
                raise UsageError(_why_not(variable, host, port, error)) from error
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _why_not(variable: str, host: str, port: int, error: OSError) -> str:
    place = f"{variable}={port}: {bracketed(host)}:{port}"
    if error.errno == errno.EADDRINUSE:
        return f"{place} is in use by another program"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{place} may not be bound by this user: ports below 1024 are often reserved for root"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{place} is no address of this machine"
    return f"{place} cannot be bound: {error.strerror or error}"
