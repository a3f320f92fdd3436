"""Which tunnel has which name: claimed, found, released. No I/O.

A tunnel lives from `Registry.claim` (before the 101, so that nobody is promised what he
cannot get) to `Registry.release`. In between it becomes ``ready`` when its first session is
established; only then is it listed, and may further sessions join it. Everything happens
between two greenlet switches, so no lock is needed.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from secrets import randbelow
from typing import TYPE_CHECKING, Any, Final

from .errors import NameTakenError, RefusedError, TryLaterError
from .names import random_id, random_name
from .wire.handshake import Kind, is_subdomain

if TYPE_CHECKING:
    from collections.abc import Callable

    from .session import Session

TRY_AGAIN: Final = 5.0
"""Seconds after which a client that found the server full is told to try again."""

MAX_SESSIONS: Final = 16
"""Sessions of one tunnel: past that many TCP connections a path carries hardly more, and each costs
the server a socket and up to 100 KiB."""


@dataclass(slots=True, eq=False)
class Tunnel:
    """One tunnel, from its claim to its release."""

    #: 32 hexadecimal digits, unique for ever.
    id: str
    kind: Kind
    #: The subdomain in lower case, or the port.
    name: str | int
    #: ``<subdomain>.<base domain>``; None for a TCP tunnel.
    domain: str | None = None
    #: How visitors reach it; None for TCP, where the client knows the host it connected to.
    url: str | None = None
    #: What the local service is to see as ``Host``; None for the visitor's own.
    host_header: str | None = None
    #: The opener's address, ``ip:port``.
    remote: str = ""
    #: The secret with which the opener's further sessions join it.
    key: str = field(default_factory=random_id, repr=False)
    #: Sessions that carry its visitors; empty while the client is away.
    sessions: list[Session] = field(default_factory=list)
    #: Gives out streams over those sessions (the server's StreamPool, which shares that list).
    pool: Any = None
    #: Whether a session has been established; before that, the name is taken but not listed.
    ready: bool = False
    #: When it was claimed, in seconds since the epoch: for people, not for timers.
    since: float = field(default_factory=time.time)
    #: Sessions that were promised and are not among ``sessions`` yet.
    joining: int = 0
    #: What sessions that are gone have carried, both ways.
    _past_read: int = 0
    _past_written: int = 0

    @property
    def takes_visitors(self) -> bool:
        """Whether one of its sessions does."""
        return any(session.takes_visitors for session in self.sessions)

    @property
    def read_bytes(self) -> int:
        """Bytes from the tunnel to its visitors, up to now."""
        return self._past_read + sum(session.data_received for session in self.sessions)

    @property
    def written_bytes(self) -> int:
        """Bytes from its visitors to the tunnel, up to now."""
        return self._past_written + sum(session.data_sent for session in self.sessions)

    def part(self, session: Session) -> None:
        """Keeps the counters of a session that leaves ``sessions``."""
        self._past_read += session.data_received
        self._past_written += session.data_sent


class Registry:
    """All tunnels of one server, by name; ``tunnels`` may be read, only methods change it."""

    def __init__(
        self,
        base_domains: Collection[str],
        *,
        tcp_ports: range = range(20000, 60001),
        limit: int = 10_000,
        url_of: Callable[[str], str] | None = None,
    ) -> None:
        """``base_domains`` are lower case; the first one is shown. ``url_of`` makes an HTTP tunnel's URL."""
        self.base_domains = tuple(base_domains)
        #: Subdomains are keyed as text, ports as numbers: "30000" and 30000 are two names.
        self.tunnels: dict[str | int, Tunnel] = {}
        #: The same tunnels by id.
        self._by_id: dict[str, Tunnel] = {}
        #: How many tunnels were ever established.
        self.opened = 0
        self._bases = frozenset(self.base_domains)
        self._tcp_ports = tcp_ports
        self._limit = limit
        self._url_of = url_of

    def claim(
        self,
        kind: Kind,
        *,
        subdomain: str | None = None,
        port: int | None = None,
        host_header: str | None = None,
        remote: str = "",
    ) -> Tunnel:
        """Takes a name (``Kind.HTTP``) or a port for a new tunnel; None means any.

        The caller releases it, whatever becomes of it. Raises NameTakenError (409),
        TryLaterError (503: the server is full), RefusedError (400: not a name, or a port
        outside TCP_PORTS).
        """
        if len(self.tunnels) >= self._limit:
            raise TryLaterError("This server has no room for another tunnel", 503, TRY_AGAIN)
        tunnel = Tunnel(random_id(), kind, "", host_header=host_header, remote=remote)
        if kind is Kind.HTTP:
            tunnel.name = label = self._free_subdomain(subdomain)
            tunnel.domain = f"{label}.{self.base_domains[0]}"
            tunnel.url = self._url_of(label) if self._url_of else None
        else:
            tunnel.name = self._free_port(port)
        self.tunnels[tunnel.name] = tunnel
        self._by_id[tunnel.id] = tunnel
        return tunnel

    def _free_subdomain(self, wanted: str | None) -> str:
        if wanted is None:
            while (name := random_name()) in self.tunnels:
                pass
            return name
        name = wanted.lower()
        if not is_subdomain(name):
            raise RefusedError("Subdomain not valid: 1-63 of a-z, 0-9 and inner hyphens", 400)
        if name in self.tunnels:
            raise NameTakenError("Subdomain not available")
        return name

    def _free_port(self, wanted: int | None) -> int:
        ports = self._tcp_ports
        if wanted is None:
            return self._random_port()
        if wanted not in ports:
            raise RefusedError(f"Port not allowed: {ports.start}-{ports.stop - 1}", 400)
        if wanted in self.tunnels:
            raise NameTakenError("Port not available")
        return wanted

    def _random_port(self) -> int:
        """The first free port from a random one on: any free one is found, clashes stay rare."""
        start = randbelow(len(self._tcp_ports))
        for step in range(len(self._tcp_ports)):
            port = self._tcp_ports[(start + step) % len(self._tcp_ports)]
            if port not in self.tunnels:
                return port
        raise TryLaterError("No port is available", 503, TRY_AGAIN)

    def join(self, connection_id: str, key: str) -> Tunnel:
        """The established tunnel that another session is added to, with a place kept for it.

        The caller gives the place back (``joining``), whatever becomes of it. Raises RefusedError
        (404: there is no such tunnel or that is not its key; nobody learns which) or
        TryLaterError (429: it has :data:`MAX_SESSIONS`).
        """
        tunnel = self._by_id.get(connection_id)
        known = tunnel.key if tunnel is not None else ""
        same = hmac.compare_digest(known.encode(), key.encode())
        if tunnel is None or not same or not tunnel.ready:
            raise RefusedError("There is no such tunnel", 404)
        if len(tunnel.sessions) + tunnel.joining >= MAX_SESSIONS:
            raise TryLaterError("This tunnel has all the sessions that it may have", 429, TRY_AGAIN)
        tunnel.joining += 1
        return tunnel

    def holds(self, tunnel: Tunnel) -> bool:
        """Whether the tunnel still has its name."""
        return tunnel.id in self._by_id

    def establish(self, tunnel: Tunnel) -> None:
        """Its first session is established: the tunnel is listed from now on. Idempotent."""
        if not tunnel.ready:
            tunnel.ready = True
            self.opened += 1

    def release(self, tunnel: Tunnel) -> None:
        """Frees the tunnel's name at once; idempotent, and harmless to a successor of that name."""
        if self.tunnels.get(tunnel.name) is tunnel:
            del self.tunnels[tunnel.name]
        self._by_id.pop(tunnel.id, None)
        tunnel.ready = False

    def label_of(self, host: str) -> str | None:
        """The subdomain that ``host`` names: one label before one of our base domains.

        None when it is not under one of them. ``host`` is normalized: lower case, without
        port and trailing dot.
        """
        label, dot, base = host.partition(".")
        return label if dot and label and base in self._bases else None

    def is_ours(self, host: str) -> bool:
        """Whether ``host`` is one of our base domains or anything below one.

        Together with `find_host`: not ours is somebody else's host, ours but not found is a
        tunnel that is not there.
        """
        while host:
            if host in self._bases:
                return True
            host = host.partition(".")[2]
        return False

    def find_host(self, host: str) -> Tunnel | None:
        """The tunnel whose visitors say ``Host: host`` (normalized); it may have no session now."""
        label = self.label_of(host)
        return None if label is None else self.tunnels.get(label)

    def find_port(self, port: int) -> Tunnel | None:
        """The TCP tunnel of ``port``; it may have no session now."""
        return self.tunnels.get(port)

    def find_text(self, text: str) -> Tunnel | None:
        """The tunnel that ``/tunnels/<text>`` means: a subdomain, or a port as 30000 or :30000."""
        tunnel = self.tunnels.get(text.lower())
        if tunnel is None:
            digits = text.removeprefix(":")
            if digits.isascii() and digits.isdecimal() and len(digits) <= 5:
                tunnel = self.tunnels.get(int(digits))
        return tunnel

    def listed(self) -> Iterator[Tunnel]:
        """The tunnels that are established, oldest first."""
        return (tunnel for tunnel in self.tunnels.values() if tunnel.ready)
