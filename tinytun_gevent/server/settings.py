"""Turning one environment variable's text into a value, and back.

Every `Form` is a pair of functions that undo each other; ``read`` raises ValueError with a
phrase saying what is allowed, to which the config adds the variable and the value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from ..rights import is_pattern
from ..wire.claims import check_trusted
from .addresses import Network, bracketed, canonical, parse_network

_LABEL: Final = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST_NAME: Final = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\Z")
_MAX_HOST_NAME: Final = 253
_WHOLE: Final = re.compile(r"[0-9]{1,12}\Z")
_DECIMAL: Final = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,6})?\Z")
_PLACEHOLDER: Final = re.compile(r"\{[^{}]*\}|[{}]")
_PLACEHOLDERS: Final = ("{name}", "{domain}", "{port}")
_SWITCH: Final = {"1": True, "true": True, "yes": True, "on": True} | {
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}


@dataclass(frozen=True, slots=True)
class Form:
    """How a kind of value is written: ``read(show(value)) == value``."""

    read: Callable[[str], Any]
    show: Callable[[Any], str] = str


def whole(low: int, high: int) -> Form:
    """A whole number from ``low`` to ``high``, both allowed."""

    def read(text: str) -> int:
        if not _WHOLE.match(text) or not low <= int(text) <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(text)

    return Form(read)


def seconds(low: float, high: float) -> Form:
    """A number of seconds, fractions allowed."""

    def read(text: str) -> float:
        if not _DECIMAL.match(text) or not low <= float(text) <= high:
            raise ValueError(f"seconds from {low:g} to {high:g}")
        return float(text)

    return Form(read, lambda value: f"{value:g}")


def _read_switch(text: str) -> bool:
    if text.lower() not in _SWITCH:
        raise ValueError("on or off")
    return _SWITCH[text.lower()]


def _read_port(text: str) -> int:
    if not _WHOLE.match(text) or int(text) > 65535:
        raise ValueError("a port from 1 to 65535, or 0 for one that the system chooses")
    return int(text)


def _read_address(text: str) -> str:
    try:
        return canonical(text[1:-1] if text.startswith("[") and text.endswith("]") else text)
    except ValueError:
        raise ValueError("one IP address, such as 0.0.0.0, 127.0.0.1 or [::]") from None


def _read_range(text: str) -> range:
    first, dash, last = text.partition("-")
    first, last = first.strip(), (last if dash else first).strip()
    if not (_WHOLE.match(first) and _WHOLE.match(last) and 1 <= int(first) <= int(last) <= 65535):
        raise ValueError("a range of ports, such as 20000-60000")
    return range(int(first), int(last) + 1)


def _read_host_name(text: str) -> str:
    name = text.lower().removesuffix(".")
    if not _HOST_NAME.match(name) or len(name) > _MAX_HOST_NAME:
        raise ValueError(f"host names of letters, digits, hyphens and dots, not {text!r}")
    return name


def _items(text: str) -> Iterable[str]:
    """The comma-separated parts of ``text``, blank ones left out."""
    return (part.strip() for part in text.split(",") if part.strip())


def _read_host_names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(_read_host_name, _items(text))))


def _read_base_domains(text: str) -> tuple[str, ...]:
    domains = _read_host_names(text)
    if not domains:
        raise ValueError("at least one domain, such as tunnels.example.com")
    return domains


def _read_networks(text: str) -> tuple[Network, ...]:
    def network(item: str) -> Network:
        try:
            return parse_network(item)
        except ValueError:
            raise ValueError(f"addresses and CIDRs, such as 10.0.0.0/8, not {item!r}") from None

    return tuple(dict.fromkeys(map(network, _items(text))))


def _show_network(network: Network) -> str:
    single = network.num_addresses == 1
    return str(network.network_address) if single else str(network)


def _read_public_url(text: str) -> str:
    """A template whose every URL has a scheme, a host with the tunnel's name in it, and no path."""
    allowed = "http:// or https:// and a host with {name}, optionally {domain} and {port}, without a path"
    template = text.rstrip("/")
    if not text:
        return ""
    if any(item not in _PLACEHOLDERS for item in _PLACEHOLDER.findall(template)):
        raise ValueError(allowed)
    try:
        url = urlsplit(fill_url(template, "name", "example.com", 1234))
        port_is_fine = url.port is None or url.port > 0
    except ValueError:
        raise ValueError(allowed) from None
    plain = not (url.path or url.query or url.fragment or url.username or url.password is not None)
    host = url.hostname or ""
    if url.scheme not in ("http", "https") or not plain or not port_is_fine or not _HOST_NAME.match(host):
        raise ValueError(allowed)
    if "{name}" not in template:
        raise ValueError(allowed)
    return template


def fill_url(template: str, name: str, domain: str, port: int) -> str:
    """One tunnel's URL: the scheme's default port left out, no trailing slash."""
    url = template.replace("{name}", name).replace("{domain}", domain).replace("{port}", str(port))
    scheme, _, rest = url.partition("://")
    default = {"http": ":80", "https": ":443"}.get(scheme.lower(), "")
    return f"{scheme}://{rest.removesuffix(default)}" if default else url


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """One entry of PEERS: a name or address, and its ports where they differ from our own."""

    host: str
    metadata_port: int | None = None
    proxy_port: int | None = None
    tcp_proxy_port: int | None = None

    def __str__(self) -> str:
        ports = (self.metadata_port, self.proxy_port, self.tcp_proxy_port)
        return bracketed(self.host) + "".join(f":{port}" for port in ports if port is not None)


_PEER: Final = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[^:\[\]]+))(?P<ports>(?::[0-9]{1,5}){0,3})\Z"
)


def _read_peer(text: str) -> PeerAddress:
    match = _PEER.match(text)
    allowed = f"host[:metadata_port[:proxy_port[:tcp_proxy_port]]], [v6] in brackets, not {text!r}"
    if match is None:
        raise ValueError(allowed)
    ports = [int(port) for port in match["ports"].split(":")[1:]]
    if not all(1 <= port <= 65535 for port in ports):
        raise ValueError(allowed)
    try:
        host = canonical(match["v6"]) if match["v6"] else _read_host_name(match["host"])
    except ValueError:
        raise ValueError(allowed) from None
    return PeerAddress(host, *ports)


def _read_peers(text: str) -> tuple[PeerAddress, ...]:
    return tuple(dict.fromkeys(map(_read_peer, _items(text))))


LEVELS: Final = ("off", "error", "warn", "info", "debug", "trace")
_OTHER_SPELLINGS: Final = {"warning": "warn", "critical": "error"}


def _read_level(text: str) -> str:
    level = _OTHER_SPELLINGS.get(text.lower(), text.lower())
    if level not in LEVELS:
        raise ValueError(f"one of {', '.join(LEVELS)}")
    return level


def _read_rust_log(text: str) -> str:
    """The level that a Rust log filter gives this server: ``tinytun_server=debug,hyper=warn``.

    The directive for ``tinytun_server`` (or a module in it, or ``tinytun``) counts before one
    without a target; a target alone means trace; other targets are not ours. Without any
    that concerns us the answer is ``""``.
    """
    general = ours = ""
    for directive in _items(text.partition("/")[0]):
        target, equals, level = re.sub(r"\[[^]]*\]", "", directive).partition("=")
        target = target.strip()
        if not equals and target.lower() in (*LEVELS, *_OTHER_SPELLINGS):
            general = _read_level(target)
            continue
        value = _read_level(level.strip()) if level.strip() else "trace"
        if target.partition("::")[0] in ("tinytun_server", "tinytun"):
            ours = value
        elif not target:
            general = value
    return ours or general


def joined(values: Iterable[object]) -> str:
    return ",".join(map(str, values))


def _read_directory(text: str) -> str:
    if "\0" in text or (text and not os.path.isabs(text)):
        raise ValueError("an absolute path")
    return text


REQUIRED: Final = "required"


def _read_tls_use(text: str) -> str:
    if text.lower() not in ("accepted", REQUIRED):
        raise ValueError("accepted or required")
    return text.lower()


def _read_log_format(text: str) -> str:
    if text.lower() not in ("text", "json"):
        raise ValueError("text or json")
    return text.lower()


def _read_log_file(text: str) -> str:
    if text == "-":
        return text
    try:
        return _read_directory(text)
    except ValueError:
        raise ValueError("an absolute path, or - for standard output") from None


def _read_patterns(text: str) -> tuple[str, ...]:
    patterns = tuple(item.lower() for item in _items(text))
    wrong = next((item for item in patterns if not is_pattern(item)), None)
    if wrong is not None:
        raise ValueError(f"subdomains and patterns such as app-*, not {wrong!r}")
    return tuple(dict.fromkeys(patterns))


def _read_trusted_fields(text: str) -> tuple[str, ...]:
    names = {name.lower(): name for name in _items(text)}
    for name in names.values():
        try:
            check_trusted(name)
        except ValueError as error:
            raise ValueError(f"names that SECURITY.md lists, such as X-Auth-Request-*, {error}") from None
    return tuple(names.values())


SWITCH: Final = Form(_read_switch, lambda value: "on" if value else "off")
PORT: Final = Form(_read_port)
ADDRESS: Final = Form(_read_address, bracketed)
RANGE: Final = Form(_read_range, lambda value: f"{value.start}-{value.stop - 1}")
BASE_DOMAINS: Final = Form(_read_base_domains, joined)
HOST_NAMES: Final = Form(_read_host_names, joined)
NETWORKS: Final = Form(_read_networks, lambda value: joined(map(_show_network, value)))
TRUSTED_FIELDS: Final = Form(_read_trusted_fields, joined)
PUBLIC_URL: Final = Form(_read_public_url)
PEERS: Final = Form(_read_peers, joined)
LEVEL: Final = Form(_read_level)
DIRECTORY: Final = Form(_read_directory)
TLS_USE: Final = Form(_read_tls_use)
FILE: Final = DIRECTORY
PATTERNS: Final = Form(_read_patterns, joined)
LOG_FORMAT: Final = Form(_read_log_format)
LOG_FILE: Final = Form(_read_log_file)
RUST_LOG: Final = Form(_read_rust_log)
