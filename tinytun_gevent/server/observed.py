"""What is told of exchanges that are over, to whoever counts or logs them."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Protocol

from ..registry import Tunnel
from ..wire.http1 import RequestHead

log = logging.getLogger("tinytun_gevent.server")


class Observed(Protocol):
    """What `ServerCore.observe` learns of an exchange that is over."""

    @property
    def tunnel(self) -> Tunnel | None:
        """Which tunnel carried it, if one did."""

    @property
    def tunnel_id(self) -> str:
        """Its id; ``""`` if none did."""

    @property
    def request(self) -> RequestHead | None:
        """None if it could not be understood."""

    @property
    def client(self) -> str:
        """The visitor's IP address, also behind a trusted proxy."""

    @property
    def request_id(self) -> str:
        """What failure page, log and access log call it; made when it is first asked for."""

    @property
    def status(self) -> int:
        """The final answer's; 0 if the visitor left before it had all of it."""

    @property
    def response_bytes(self) -> int:
        """Bytes of the answer's body."""

    @property
    def started_at(self) -> float:
        """When it began, in monotonic seconds."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that could not be understood, and so never became an exchange."""

    client: str
    request_id: str
    status: int
    response_bytes: int
    started_at: float
    tunnel: Tunnel | None = None
    tunnel_id: str = ""
    request: RequestHead | None = None


def log_exchange(exchange: Observed) -> None:
    """One line for whoever debugs; nothing that the visitor or the service has sent is in it."""
    if not log.isEnabledFor(logging.DEBUG):
        return
    tunnel = exchange.tunnel.name if exchange.tunnel is not None else "-"
    seconds = time.monotonic() - exchange.started_at
    log.debug(
        "exchange over: tunnel %s, visitor %s, request %s, status %d, %d bytes, %.0f ms",
        tunnel,
        exchange.client,
        exchange.request_id,
        exchange.status,
        exchange.response_bytes,
        seconds * 1000,
        extra={
            "request_id": exchange.request_id,
            "tunnel": tunnel,
            "visitor": exchange.client,
            "status": exchange.status,
            "bytes": exchange.response_bytes,
            "duration": round(seconds, 6),
        },
    )
