"""Which HTTP proxy, if any, leads to the server: ``--proxy``, ``HTTPS_PROXY``, ``NO_PROXY``.

The connection to the server is always tunneled with CONNECT, so ``HTTPS_PROXY`` is the variable
that counts, for an ``http://`` server too. As in curl, the lower-case spelling wins, and
``--proxy`` beats both and is not subject to ``NO_PROXY``.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from urllib.parse import unquote, urlsplit

from ..errors import UsageError
from .address import bracketed, split_host_port


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy; ``credentials`` is the value of Proxy-Authorization, if it wants one."""

    host: str
    port: int
    credentials: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{bracketed(self.host)}:{self.port}"


def parse_proxy(url: str, source: str = "--proxy") -> Proxy:
    """Read ``[http://][user:password@]host[:port]``; raises UsageError naming ``source``.

    The user and password may be percent-encoded. The message never repeats the URL: it may
    hold a password.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme != "http":
            raise ValueError(f"{parts.scheme}:// proxies are not supported")
        if parts.path not in ("", "/") or parts.query or parts.fragment:
            raise ValueError("a proxy has no path")
        userinfo, _, address = parts.netloc.rpartition("@")
        host, port = split_host_port(address)
    except ValueError as error:
        reason = "the URL is malformed" if "@" in str(error) else error
        raise UsageError(f"{source}: {reason}; allowed: http://[USER:PASSWORD@]HOST[:PORT]") from None
    return Proxy(host, port or 80, _basic(userinfo) if userinfo else None)


def choose_proxy(host: str, port: int, proxy: str | None, environ: Mapping[str, str]) -> Proxy | None:
    """The proxy to use for ``host:port``; raises UsageError on one that makes no sense."""
    if proxy is not None:
        return parse_proxy(proxy) if proxy else None
    name = "https_proxy" if environ.get("https_proxy") else "HTTPS_PROXY"
    url = environ.get(name, "")
    excluded = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    if not url or bypasses(excluded, host, port):
        return None
    return parse_proxy(url, name)


def bypasses(no_proxy: str, host: str, port: int) -> bool:
    """Whether ``NO_PROXY`` says that ``host:port`` is reached directly.

    Its entries are separated by commas or spaces: ``*``, a domain with or without a leading
    dot (itself and everything below it), an address, a network in CIDR notation; each but ``*``
    and a network may end in ``:port``. Names in a target are not resolved.
    """
    entries = re.split(r"[,\s]+", no_proxy.strip().lower())
    name = host.lower().rstrip(".")
    return any(_matches(entry, name, port) for entry in entries if entry)


def _matches(entry: str, name: str, port: int) -> bool:
    if entry == "*":
        return True
    if "/" in entry:
        return _in_network(entry, name)
    if entry.count(":") > 1 and not entry.startswith("["):
        entry = f"[{entry}]"
    try:
        entry_host, entry_port = split_host_port(entry.lstrip("."))
    except ValueError:
        return False
    if entry_port is not None and entry_port != port:
        return False
    entry_host = entry_host.rstrip(".")
    return name == entry_host or name.endswith(f".{entry_host}") or _same_address(entry_host, name)


def _in_network(network: str, name: str) -> bool:
    try:
        return ip_address(name) in ip_network(network, strict=False)
    except ValueError:
        return False


def _same_address(one: str, other: str) -> bool:
    try:
        return ip_address(one) == ip_address(other)
    except ValueError:
        return False


def _basic(userinfo: str) -> str:
    """Proxy-Authorization for ``user:password`` (RFC 7617)."""
    user, _, password = userinfo.partition(":")
    pair = f"{unquote(user)}:{unquote(password)}".encode()
    return "Basic " + b64encode(pair).decode("ascii")
