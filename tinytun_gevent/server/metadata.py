"""The metadata API: which tunnels there are and how the server is, as a WSGI application.

``GET /tunnels`` lists the established tunnels, ``GET /tunnels/<name>`` is one of them. Peers ask
each other exactly this, so the shape of the answers stays. ``/status`` is the whole as JSON, ``/metrics``
the same for Prometheus, ``/healthz`` and ``/ready`` are for supervisors and load balancers. It has no
password: it is protected by where it listens (METADATA_BIND), and against web pages that have the
browser of somebody inside ask (DNS rebinding) by the Host it must be asked with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from .addresses import is_ip
from .config import ServerConfig
from .metrics import exposition
from .sight import Sight

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

_REASONS: Final = {
    200: "OK",
    404: "Not Found",
    405: "Method Not Allowed",
    421: "Misdirected Request",
    503: "Service Unavailable",
}

PROBES: Final = frozenset({"/healthz", "/ready"})
"""What load balancers ask in HTTP/1.0, without any Host. No browser does, and there is nothing to learn."""

_PORT: Final = re.compile(r"(?::[0-9]{0,5})?")
"""What may follow the host in a Host field."""

_ABSOLUTE: Final = re.compile(r"https?://([^/?#]+)", re.IGNORECASE)
"""A request target with a host of its own."""


def accepted_hosts(config: ServerConfig) -> frozenset[str]:
    """The names, besides IP addresses, that a request's Host may have."""
    return frozenset({"localhost", *config.metadata_hosts, *(entry.host for entry in config.peers)})


class MetadataApp:
    """The WSGI application over one server; each request is answered from its state now."""

    def __init__(self, sight: Sight) -> None:
        self._sight = sight
        self._registry = sight.core.registry
        self._hosts = accepted_hosts(sight.core.config)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        media_type = "application/json"
        status, value = self._answer(environ)
        if isinstance(value, tuple):
            media_type, body = value
        else:
            body = json.dumps(value).encode() + b"\n"
        fields = [
            ("Content-Type", media_type),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
        ]
        if status == 405:
            fields.append(("Allow", "GET, HEAD"))
        start_response(f"{status} {_REASONS[status]}", fields)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def _answer(self, environ: WSGIEnvironment) -> tuple[int, Any]:
        """The status, and what the JSON says; for ``/metrics`` the media type and the body."""
        host, path = environ.get("HTTP_HOST"), environ.get("PATH_INFO", "")
        accepted = path in PROBES if host is None else self._accepts(host)
        if not accepted or not self._accepts_target(environ.get("RAW_URI", "/")):
            return 421, {"error": "this Host is not answered here; METADATA_HOSTS adds names"}
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return 405, {"error": "only GET and HEAD are answered here"}
        if path == "/tunnels":
            return 200, [self._sight.describe(tunnel) for tunnel in self._registry.listed()]
        if path.startswith("/tunnels/"):
            if self._sight.core.draining:  # for another node, whose visitors would not get in
                return 404, {"error": "draining"}
            tunnel = self._registry.find_text(path.removeprefix("/tunnels/"))
            if tunnel is not None and tunnel.ready:
                return 200, self._sight.describe(tunnel)
            return 404, {"error": "there is no such tunnel"}
        return self._about_the_server(path, environ.get("HTTP_ACCEPT", ""))

    def _about_the_server(self, path: str, accept: str) -> tuple[int, Any]:
        if path == "/metrics":
            return 200, exposition(self._sight, accept)
        if path == "/status":
            return 200, self._sight.summary()
        if path == "/healthz":
            return 200, {"status": "ok"}
        if path == "/ready":
            reason = self._sight.unready()
            return (
                (503, {"status": "unavailable", "reason": reason}) if reason else (200, {"status": "ready"})
            )
        return 404, {"error": "there is nothing of that name here"}

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
