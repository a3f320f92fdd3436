"""Answers plain http with the same URL by https (``HTTP_REDIRECT``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from ..wire.forwarded import Forwarding, client_from_forwarding
from ..wire.handshake import is_subdomain
from ..wire.request import RequestHead
from .pages import Failure

if TYPE_CHECKING:
    from ..registry import Registry
    from .config import ServerConfig

STATUS: Final = 308
"""Permanent, and the method and the body stay what they are (RFC 9110 section 15.4.9)."""

ACME: Final = b"/.well-known/acme-challenge/"
"""Certificate authorities ask for these by http (RFC 8555 section 8.3)."""

HTTPS_PORT: Final = 443


class Redirect:
    """Sends visitors that came by http to https, on hosts of this server only."""

    def __init__(self, config: ServerConfig, registry: Registry, trusted: Callable[[str], bool]) -> None:
        self._port = secure_port(config)
        self._registry = registry
        self._trusted = trusted

    def answer(self, request: RequestHead, direct: Forwarding) -> Failure | None:
        """The redirect for ``request``, or None where it is to be served.

        ``direct`` is what the connection says of the visitor. The host is one that this server serves, so
        the answer leads nowhere else, whatever a visitor sends.
        """
        if direct.proto == "https" or request.target[:1] != b"/" or request.target.startswith(ACME):
            return None
        label = self._registry.label_of(request.host)
        if request.host not in self._registry.base_domains and (label is None or not is_subdomain(label)):
            return None
        if direct.port == self._port:  # a PROXY header has a port but no scheme
            return None
        if self._came_by_https(request, direct):
            return None
        port = "" if self._port == HTTPS_PORT else f":{self._port}"
        url = f"https://{request.host}{port}{request.target.decode('ascii')}"
        reason = "Visitors that come by http are sent to the same address by https."
        return Failure(STATUS, reason, location=url)

    def _came_by_https(self, request: RequestHead, direct: Forwarding) -> bool:
        """Whether a trusted proxy says so, also one that says nothing else of the visitor."""
        if not request.claims or not self._trusted(direct.client):
            return False
        said = [value for name, value in request.claims if name.lower() == b"x-forwarded-proto"]
        if said and said[-1].rpartition(b",")[2].strip().lower() == b"https":
            return True
        return client_from_forwarding(request, direct, self._trusted).proto == "https"


def secure_port(config: ServerConfig) -> int:
    """The port in visitors' https URLs: that of ``PUBLIC_URL`` if it is https, else of ``PROXY_TLS_PORT``."""
    url = urlsplit(config.url_of("name"))
    return (url.port or HTTPS_PORT) if url.scheme == "https" else config.proxy_tls_port
