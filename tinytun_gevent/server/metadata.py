"""The metadata API: which tunnels there are. A WSGI application, and a host for it.

``GET /tunnels`` lists the established tunnels, ``GET /tunnels/<name>`` is one of them. Peers ask
each other exactly this, so the shape of the answers stays. It has no password: it is
protected by where it listens (METADATA_BIND), and against web pages that have the
browser of somebody inside ask (DNS rebinding) by the Host it must be asked with.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

import gevent
from gevent import socket
from gunicorn.config import Config
from gunicorn.workers.base_async import AsyncWorker

from ..registry import Registry, Tunnel
from .addresses import is_ip
from .config import ServerConfig

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger("tinytun_gevent.server")

CONNECTION_LIFE: Final = 30.0
"""Seconds a connection to the API lives at most: nobody holds one by reading slowly."""

HEAD_TIMEOUT: Final = 5.0
"""Seconds for a request's head, and for the pause before the next one."""

_REASONS: Final = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 421: "Misdirected Request"}


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
        if not self._accepts(host):
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
            address, _, port = host[1:].partition("]")
            return ":" in address and is_ip(address) and (not port or port.startswith(":"))
        name = host.partition(":")[0].lower().removesuffix(".")
        return is_ip(name) or name in self._hosts


class _Log(logging.LoggerAdapter[logging.Logger]):
    """Our logger as gunicorn's request handling wants it: it would install handlers of its own."""

    def access(self, *args: Any) -> None:
        """No access log: peers ask all the time."""


class MetadataHost(AsyncWorker):  # type: ignore[misc]
    """gunicorn's own request handling without its arbiter: one object serves any number of sockets.

    It stands where a gunicorn worker would, so the API is parsed and answered by the same code
    in the worker process and in an in-process server.
    """

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        # The base constructor would make the temporary file that the arbiter watches.
        self.cfg = Config()
        self.cfg.set("limit_request_line", 2048)
        self.cfg.set("limit_request_fields", 50)
        self.log = _Log(log)
        self.wsgi = app
        self.alive = True
        self.nr = 0
        self.max_requests = sys.maxsize

    def timeout_ctx(self) -> gevent.Timeout:
        return gevent.Timeout(HEAD_TIMEOUT, False)  # type: ignore[arg-type]  # False: just leave the block

    def serve(self, listener: socket.socket, client: socket.socket, address: tuple[str, int]) -> None:
        """Answers the requests of one connection and closes it; blocks, raises nothing."""
        client.setblocking(True)
        watchdog = gevent.get_hub().loop.timer(CONNECTION_LIFE)
        watchdog.start(_cut, client)
        try:
            self.handle(listener, client, address)
        finally:
            watchdog.close()

    def close(self) -> None:
        """Lets connections end after the request they are in."""
        self.alive = False


def _cut(client: socket.socket) -> None:
    """Wakes whoever reads or writes ``client``, with an error."""
    try:
        client.shutdown(socket.SHUT_RDWR)
    except OSError:
        log.debug("a metadata connection had ended")
