"""The metadata API: which tunnels there are, as a WSGI application.

``GET /tunnels`` lists the established tunnels, ``GET /tunnels/<name>`` is one of them. Peers ask
each other exactly this, so the shape of the answers stays. It has no password: it is
protected by where it listens (METADATA_BIND), and against web pages that have the
browser of somebody inside ask (DNS rebinding) by the Host it must be asked with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from ..registry import Registry, Tunnel
from .addresses import is_ip
from .config import ServerConfig

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

_REASONS: Final = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 421: "Misdirected Request"}

_PORT: Final = re.compile(r"(?::[0-9]{0,5})?")
"""What may follow the host in a Host field."""

_ABSOLUTE: Final = re.compile(r"https?://([^/?#]+)", re.IGNORECASE)
"""A request target with a host of its own."""


def describe(tunnel: Tunnel) -> dict[str, Any]:
    """One tunnel as JSON shows it; fields may be added, these stay."""
    number = isinstance(tunnel.name, int)
    return {
        "id": tunnel.id,
        "name": {"PortNumber" if number else "Subdomain": tunnel.name},
        "read_bytes": tunnel.read_bytes,
        "written_bytes": tunnel.written_bytes,
    }


def accepted_hosts(config: ServerConfig) -> frozenset[str]:
    """The names, besides IP addresses, that a request's Host may have."""
    return frozenset({"localhost", *config.metadata_hosts, *(entry.host for entry in config.peers)})


class MetadataApp:
    """The WSGI application over one registry; each request is answered from its state now."""

    def __init__(self, registry: Registry, config: ServerConfig) -> None:
        self._registry = registry
        self._hosts = accepted_hosts(config)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        status, value = self._answer(environ)
        body = json.dumps(value).encode() + b"\n"
        fields = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        if status == 405:
            fields.append(("Allow", "GET, HEAD"))
        start_response(f"{status} {_REASONS[status]}", fields)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def _answer(self, environ: WSGIEnvironment) -> tuple[int, Any]:
        host = environ.get("HTTP_HOST", "")
        if not self._accepts(host) or not self._accepts_target(environ.get("RAW_URI", "/")):
            return 421, {"error": "this Host is not answered here; METADATA_HOSTS adds names"}
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return 405, {"error": "only GET and HEAD are answered here"}
        path: str = environ.get("PATH_INFO", "")
        if path == "/tunnels":
            return 200, [describe(tunnel) for tunnel in self._registry.listed()]
        if path.startswith("/tunnels/"):
            tunnel = self._registry.find_text(path.removeprefix("/tunnels/"))
            if tunnel is not None and tunnel.ready:
                return 200, describe(tunnel)
        return 404, {"error": "there is no such tunnel"}

    def _accepts(self, host: str) -> bool:
        """Whether the Host field ``host`` is an address or a name that can only mean this API."""
        if host.startswith("["):
            address, bracket, port = host[1:].partition("]")
            return bracket != "" and ":" in address and is_ip(address) and _PORT.fullmatch(port) is not None
        name, colon, port = host.partition(":")
        if not _PORT.fullmatch(colon + port):  # "127.0.0.1:x@evil.example", or a second Host behind a comma
            return False
        name = name.lower().removesuffix(".")
        return is_ip(name) or name in self._hosts

    def _accepts_target(self, target: str) -> bool:
        """Whether a request target names no other host than may be asked (RFC 9112 section 3.2.2)."""
        if target.startswith("/"):
            return True
        match = _ABSOLUTE.match(target)
        return match is not None and self._accepts(match[1])
