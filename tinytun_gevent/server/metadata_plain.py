"""Serving the metadata API where gunicorn cannot be imported (it needs POSIX)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler

from gevent import socket

log = logging.getLogger("tinytun_gevent.server")

IDLE_TIMEOUT: Final = 5.0
"""Seconds that the peer may neither send nor take a byte."""


class PlainHost:
    """The same interface as `MetadataHost`, on the standard library: one request a connection."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        environ = {
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "",
            "SCRIPT_NAME": "",
            "GATEWAY_INTERFACE": "CGI/1.1",
        }
        self._server: Any = SimpleNamespace(base_environ=environ, get_app=lambda: app)

    def serve(self, listener: socket.socket, client: socket.socket, address: tuple[str, int]) -> None:
        """Answers one request and closes the connection; blocks, raises nothing."""
        client.settimeout(IDLE_TIMEOUT)
        try:
            _Handler(client, address, self._server)
        except OSError as error:
            log.debug("%s left the metadata API: %s", address[0], error)
        finally:
            client.close()

    def close(self) -> None:
        """There are no idle connections."""


class _Handler(WSGIRequestHandler):
    def address_string(self) -> str:
        return str(self.client_address[0])  # not looked up in the DNS

    def log_message(self, format: str, *args: Any) -> None:
        """No access log: peers ask all the time."""
