"""What a server's 101 confirms of what was asked for, and what follows where it does not."""

from __future__ import annotations

from typing import Final

from ..errors import RefusedError
from ..wire.handshake import OpenReply, OpenRequest

HOST_HEADER: Final = "this server does not know --host-header: the local service sees the public Host"

WARNINGS: Final = {
    "rewrite": "this server does not rewrite Origin and links: the local service sees the public Origin, and "
    "visitors what it says of itself",
    "forwarded_host": "this server does not know --forwarded-host: the local service sees the public host",
}
"""Options that a server need not know: nothing is open without them that should be closed. Every other
option must be confirmed."""


def check_confirmed(request: OpenRequest, reply: OpenReply) -> None:
    """Raises RefusedError if the server has opened something other than what must be."""
    if reply.kind not in (None, request.kind):
        what = f"a tunnel of type {reply.kind}, not {request.kind}"
        raise RefusedError(f"{request.authority} opened {what}", 502)
    ignored = [name for name in _unconfirmed(request, reply) if name not in WARNINGS]
    if ignored:
        raise RefusedError(f"{request.authority} does not know what must hold: {', '.join(ignored)}", 502)


def warnings(request: OpenRequest, reply: OpenReply) -> list[str]:
    """What the user should know of that the server does not do."""
    ignored = _unconfirmed(request, reply)
    told = [WARNINGS[name] for name in ignored if name in WARNINGS]
    if request.host_header is None or reply.host_header:
        return told
    return [HOST_HEADER, *(text for text in told if text is not WARNINGS["rewrite"])]


def _unconfirmed(request: OpenRequest, reply: OpenReply) -> list[str]:
    asked = () if request.options is None else request.options.names
    return [name for name in asked if name not in reply.options]
