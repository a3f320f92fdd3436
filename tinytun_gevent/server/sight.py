"""What the operator can see of a server, at the moment of asking: numbers, and whether it takes visitors."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from .. import __version__
from ..registry import Tunnel
from ..wire.handshake import Kind
from .lag import LoopLag
from .tally import NO_ANSWER, Refusal

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from .core import ServerCore

PORTS: Final = ("connection", "proxy", "proxy_tls", "tcp_proxy", "metadata", "tcp")
"""Where connections come in; ``tcp`` are the ports of all TCP tunnels together."""


def status_classes(statuses: list[int]) -> dict[str, int]:
    """The exchanges of a Tally by what an operator calls their class."""
    named = {f"{digit}xx": statuses[digit] for digit in range(1, 6)}
    return {**named, "none": statuses[NO_ANSWER]}


def moment(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339 has them, in UTC: ``2026-11-26T12:00:00Z``."""
    return "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z".format(*time.gmtime(seconds)[:6])


class Sight:
    """One server as its operator sees it; everything is read when it is asked for."""

    def __init__(
        self, core: ServerCore, connections: Callable[[], Mapping[str, int]], accepts: Callable[[], bool]
    ) -> None:
        """``connections`` tells how many there are on which of :data:`PORTS`, ``accepts`` whether
        visitors and clients get in now.
        """
        self.core = core
        self._connections = connections
        self._accepts = accepts
        self.lag = LoopLag()
        #: Seconds since the epoch.
        self.started = time.time()

    def unready(self) -> str:
        """Why no visitor should be sent here; ``""`` if one may be."""
        if self.core.draining:
            return "draining"
        return "" if self._accepts() else "not accepting"

    def connections(self) -> dict[str, int]:
        """Connections now, by port."""
        return {**dict.fromkeys(PORTS, 0), **self._connections()}

    def certificates(self) -> Mapping[str, float]:
        """When the server's certificates end, in seconds since the epoch, by the operator's names."""
        return {} if self.core.certificates is None else self.core.certificates.ends()

    def visitors(self) -> dict[str, int]:
        """Exchanges, upgraded ones too, and connections that are carried as they are, now."""
        carried = self.core.tally.carried
        return {"http": self.core.busy - carried, "tcp": carried}

    def tunnels(self) -> dict[str, int]:
        """Tunnels that are established."""
        kinds = [tunnel.kind is Kind.HTTP for tunnel in self.core.registry.listed()]
        return {"http": sum(kinds), "tcp": len(kinds) - sum(kinds)}

    def leased(self) -> int:
        """Names that are kept for a client that was lost."""
        return sum(tunnel.leased_until is not None for tunnel in self.core.registry.tunnels.values())

    def refusals(self) -> dict[str, int]:
        """How often the server refused something, by reason; all reasons there are."""
        return {reason.value: self.core.tally.refusals[reason] for reason in Refusal}

    def describe(self, tunnel: Tunnel) -> dict[str, Any]:
        """One tunnel as JSON shows it. Fields may be added; the first four are the original's and stay."""
        number = isinstance(tunnel.name, int)
        return {
            "id": tunnel.id,
            "name": {"PortNumber" if number else "Subdomain": tunnel.name},
            "read_bytes": tunnel.read_bytes,
            "written_bytes": tunnel.written_bytes,
            "kind": "http" if tunnel.kind is Kind.HTTP else "tcp",
            "url": tunnel.url,
            "since": moment(tunnel.since),
            "remote": tunnel.remote,
            "label": tunnel.account.label if tunnel.account is not None else "",
            "visitors": tunnel.pool.in_use if tunnel.pool is not None else 0,
            "sessions": len(tunnel.sessions),
        }

    def summary(self) -> dict[str, Any]:
        """The whole as JSON, for people's programs."""
        core, tally = self.core, self.core.tally
        lateness = self.lag.lateness
        return {
            "version": __version__,
            "since": moment(self.started),
            "uptime_seconds": round(time.time() - self.started, 1),
            "draining": core.draining,
            "tunnels": [self.describe(tunnel) for tunnel in core.registry.listed()],
            "leased": self.leased(),
            "sessions": len(tally.sessions),
            "visitors": self.visitors(),
            "connections": self.connections(),
            "exchanges": status_classes(tally.statuses),
            "bytes": {"in": tally.bytes_in, "out": tally.bytes_out},
            "refusals": self.refusals(),
            "tunnels_opened": tally.tunnels_opened,
            "tunnels_resumed": tally.tunnels_resumed,
            "tunnels_lost": tally.tunnels_lost,
            "open_fds": open_descriptors(),
            "max_fds": most_descriptors(),
            "loop_lag_seconds": {
                "mean": round(lateness.sum / max(1, sum(lateness.counts)), 6),
                "worst": round(self.lag.worst, 6),
            },
        }


def open_descriptors() -> int | None:
    """How many this process has open; None where that cannot be found out."""
    try:
        count = os.stat("/proc/self/fd").st_size  # since Linux 6.2 the number, without a look at each
        return count or len(os.listdir("/proc/self/fd")) - 1  # the one that lists them
    except OSError:
        return None


def most_descriptors() -> int | None:
    """How many it may have; None if there is no limit that is known."""
    if resource is None:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else int(soft)
