"""Where a request belongs: to a tunnel of this server, to a peer that has it, or nowhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tinytun_gevent.registry import Tunnel
from tinytun_gevent.server.pages import Failure
from tinytun_gevent.server.peers import Peer
from tinytun_gevent.wire.handshake import is_subdomain
from tinytun_gevent.wire.http1 import RequestHead

if TYPE_CHECKING:
    from tinytun_gevent.server.config import ServerConfig
    from tinytun_gevent.server.core import ServerCore

HOP_FIELD: Final = b"X-Tinytun-Hop"
"""Marks a request that a peer server forwarded; believed from peers only."""


def find_route(core: ServerCore, request: RequestHead, caller: str) -> Tunnel | Peer | Failure:
    """Who gets ``request``, which came from the address ``caller``, or what the visitor is told.

    Blocks while peers are asked, see :func:`locate`. A request that a peer has forwarded is not sent on, so
    it cannot go round in circles.
    """
    registry = core.registry
    label = registry.label_of(request.host)
    if label is not None and is_subdomain(label):
        forwarded = core.peers.is_peer(caller) and _is_marked(request)
        return locate(core, label, ask=not forwarded) or Failure(404, f"There is no tunnel {request.host}.")
    if request.host in registry.base_domains:
        return apex(request, core.config)
    if registry.is_ours(request.host):
        return Failure(421, f"{request.host} cannot be the name of a tunnel.")
    return Failure(
        404,
        f"This tunnel server does not serve {request.host}.",
        title="This server does not serve this host",
        advice="Check the address. If this is your server: set BASE_DOMAIN to the domain of its tunnels.",
    )


def apex(request: RequestHead, config: ServerConfig) -> Failure:
    """What a base domain itself answers: what this server is, and how a tunnel to it is opened."""
    if request.method not in (b"GET", b"HEAD") or request.target.partition(b"?")[0] != b"/":
        return Failure(
            404,
            f"{request.host} is a tunnel server: it has no pages but the first one.",
            title="There is no such page",
            advice="Tunnels are at subdomains of this host.",
        )
    scheme = "https" if config.tls_dir else "http"
    server = f"{scheme}://{request.host}:{config.connection_port}"
    token = "; the token is from whoever runs this server" if config.auth_file else ""
    return Failure(
        200,
        "It gives programs that run elsewhere, on somebody's own computer, a public address below this one.",
        title="This is a tinytun server",
        advice=f"To open a tunnel to port 3000 of your computer: tinytun http 3000 --server {server}{token}",
    )


def locate(core: ServerCore, name: str | int, *, ask: bool) -> Tunnel | Peer | None:
    """Who has a subdomain or a port: this server, or with ``ask`` a peer. Blocks while peers are asked.

    They are where the name is unknown here, or its client was lost: he may have come back at another node.
    """
    tunnels = core.registry.tunnels
    if not ask or not core.peers or not _is_lost(tunnels.get(name)):
        return tunnels.get(name)
    peer = core.peers.find(name)
    tunnel = tunnels.get(name)  # meanwhile things may have changed
    return peer if peer is not None and _is_lost(tunnel) else tunnel


def _is_lost(tunnel: Tunnel | None) -> bool:
    return tunnel is None or tunnel.leased_until is not None


def mark_hop(request: RequestHead) -> None:
    """Says to the peer that gets ``request`` that it has been forwarded once."""
    request.fields = [*request.fields, (HOP_FIELD, b"1")]


def _is_marked(request: RequestHead) -> bool:
    return any(name.lower() == HOP_FIELD.lower() for name, _ in request.claims)
