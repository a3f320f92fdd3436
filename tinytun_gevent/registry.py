"""Which tunnel has which name: claimed, found, released. No I/O.

A tunnel lives from `Registry.claim` (before the 101, so that nobody is promised what he
cannot get) to `Registry.release`. In between it becomes ``ready`` when its first session is
established; only then is it listed, and may further sessions join it. One whose client asked for a
resume token is *leased* when its last session is lost: it keeps its name, unlisted, until its owner
claims it again or the lease is over. Everything happens between two greenlet switches, so no lock is needed.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from math import ceil
from secrets import randbelow, token_bytes
from typing import TYPE_CHECKING, Any, Final

from .errors import NameTakenError, RefusedError, TryLaterError
from .names import random_id
from .rights import ANYTHING, Rights
from .wire.handshake import Kind, is_subdomain
from .wire.rewriting import Rewriting, rewriting_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from .session import Session
    from .wire.options import Options

TRY_AGAIN: Final = 5.0
"""Seconds after which a client that found the server full is told to try again."""

LEASE: Final = 30.0
"""Seconds for which a lost tunnel keeps its name for its owner: a network that was down, or a restart."""

MAX_SESSIONS: Final = 16
"""Sessions of one tunnel: past that many TCP connections a path carries hardly more, and each costs
the server a socket and up to 100 KiB."""


@dataclass(slots=True, eq=False)
class Tunnel:
    """One tunnel, from its claim to its release."""

    #: 32 hexadecimal digits, unique for ever; kept when it is resumed.
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
    #: What else its client asked of the server's edge; None for nothing.
    options: Options | None = None
    #: What follows from them for requests and answers; None if nothing does.
    rewriting: Rewriting | None = None
    #: The opener's address, ``ip:port``.
    remote: str = ""
    #: What it counts for among all that one address may have (the server's Sources); blank for nothing.
    source: str = ""
    #: Who opened it, as `ServerCore.authorize` knows him; ``""`` for anybody.
    opener: str = ""
    #: The same as the server's Account; None where nobody has come back yet since a restart.
    account: Any = None
    #: What its visitors may use (the server's TunnelBudget); None if nothing limits them.
    budget: Any = None
    #: Whether its client asked for a resume token, so that the name is leased after a loss.
    resumable: bool = False
    #: Until when it is leased, in monotonic seconds; None while it is not.
    leased_until: float | None = None
    #: The secret with which the opener's further sessions join it; a new one with each claim.
    key: str = field(default_factory=random_id, repr=False)
    #: Sessions that carry its visitors; empty while the client is away.
    sessions: list[Session] = field(default_factory=list)
    #: Gives out streams over those sessions (the server's StreamPool, which shares that list).
    pool: Any = None
    #: Whether a session has been established; before that, the name is taken but not listed.
    ready: bool = False
    #: When it was claimed, in seconds since the epoch: for people, not for timers.
    since: float = field(default_factory=time.time)
    #: Sessions that were promised by a 101 and are not among ``sessions`` yet.
    promised: int = 0
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

    def ask(self, host_header: str | None, options: Options | None) -> None:
        """Its client asks for these, and for nothing that it asked for before."""
        self.host_header, self.options = host_header, options
        self.rewriting = rewriting_of(options, self.url)

    def part(self, session: Session) -> None:
        """Keeps the counters of a session that leaves ``sessions``."""
        self._past_read += session.data_received
        self._past_written += session.data_sent


@dataclass(frozen=True, slots=True)
class Record:
    """What another process has to know of a tunnel to keep its name for its owner."""

    kind: Kind
    name: str | int
    id: str
    opener: str
    #: Whether there is an owner with a token; the others' names are kept for their visitors only.
    resumable: bool
    #: What its visitors' requests depend on, who may wait here for its client.
    host_header: str | None = None
    options: Options | None = None
    #: What it counts for, see `Tunnel.source`.
    source: str = ""


class Registry:
    """All tunnels of one server, by name; ``tunnels`` may be read, only methods change it."""

    def __init__(
        self,
        base_domains: Collection[str],
        *,
        tcp_ports: range = range(20000, 60001),
        limit: int = 10_000,
        url_of: Callable[[str], str] | None = None,
        secret: bytes | None = None,
        lease: float = LEASE,
    ) -> None:
        """``base_domains`` are lower case; the first one is shown. ``url_of`` makes an HTTP tunnel's URL.

        ``secret`` makes the resume tokens; None: one that nobody will ever know again. ``lease`` is in
        seconds.
        """
        self.base_domains = tuple(base_domains)
        #: Subdomains are keyed as text, ports as numbers: "30000" and 30000 are two names.
        self.tunnels: dict[str | int, Tunnel] = {}
        #: The same tunnels by id.
        self._by_id: dict[str, Tunnel] = {}
        self._bases = frozenset(self.base_domains)
        self._tcp_ports = tcp_ports
        self._limit = limit
        self._url_of = url_of
        self._secret = secret or token_bytes(32)
        self._lease = lease
        #: Called when a name that outlives its sessions has come or gone; must not block.
        self.on_change: Callable[[], None] | None = None

    def claim(
        self,
        kind: Kind,
        *,
        subdomain: str | None = None,
        port: int | None = None,
        host_header: str | None = None,
        options: Options | None = None,
        remote: str = "",
        opener: str = "",
        resume: str | None = None,
        rights: Rights = ANYTHING,
    ) -> Tunnel:
        """Takes a name (``Kind.HTTP``) or a port, None meaning any, and keeps a place for a session.

        Whoever shows the name's token as ``resume`` gets the tunnel that has it, with its id, its
        counters, the visitors who wait for it, and what sessions it still has: those are to be ended, and
        so are those that were promised with another ``key``. A name that is leased is also its opener's by
        himself, if he is somebody (``opener``): he has come from another machine.

        The caller gives the place back (``promised``) and releases the tunnel, whatever becomes of
        it. Raises NameTakenError (409), TryLaterError (503: the server is full), RefusedError (400:
        not a name, or a port outside TCP_PORTS; 403: ``rights`` do not allow it).
        """
        name = self._wanted(kind, subdomain, port)
        if name is not None and (refusal := rights.refusal(name)):
            raise RefusedError(refusal, 403)
        tunnel = None if name is None else self.tunnels.get(name)
        if tunnel is None:
            tunnel = self._new(kind, self._free(kind, rights) if name is None else name)
        elif not self._is_owner(tunnel, opener, resume):
            what = "Subdomain" if kind is Kind.HTTP else "Port"
            raise NameTakenError(f"{what} not available: {_why_taken(tunnel, time.monotonic())}")
        tunnel.kind, tunnel.remote = kind, remote
        tunnel.ask(host_header, options)
        tunnel.opener, tunnel.resumable = opener, resume is not None
        tunnel.key = random_id()
        tunnel.promised += 1
        if tunnel.ready:  # else it is noted when it is established
            self._changed(tunnel)
        return tunnel

    def _new(self, kind: Kind, name: str | int, tunnel_id: str | None = None) -> Tunnel:
        """Registers a tunnel under ``name``, which is free."""
        if len(self.tunnels) >= self._limit:
            raise TryLaterError("This server has no room for another tunnel", 503, TRY_AGAIN)
        tunnel = Tunnel(tunnel_id or random_id(), kind, name)
        if isinstance(name, str):
            tunnel.domain = f"{name}.{self.base_domains[0]}"
            tunnel.url = self._url_of(name) if self._url_of else None
        self.tunnels[name] = tunnel
        self._by_id[tunnel.id] = tunnel
        return tunnel

    def _wanted(self, kind: Kind, subdomain: str | None, port: int | None) -> str | int | None:
        """The name that is asked for, if it is one that a tunnel may have. Raises RefusedError."""
        if kind is not Kind.HTTP:
            if port is not None and port not in self._tcp_ports:
                ports = self._tcp_ports
                raise RefusedError(f"Port not allowed: this server gives {ports.start}-{ports.stop - 1}", 400)
            return port
        if subdomain is not None and not is_subdomain(subdomain.lower()):
            raise RefusedError("Subdomain not valid: 1-63 of a-z, 0-9 and inner hyphens", 400)
        return None if subdomain is None else subdomain.lower()

    def _is_owner(self, tunnel: Tunnel, opener: str, resume: str | None) -> bool:
        """Whether who shows ``resume`` may have a name that is taken."""
        if tunnel.opener != opener:
            return False
        free = tunnel.leased_until is not None and not tunnel.promised
        if not tunnel.resumable:  # at most kept for visitors: its client knows nothing of tokens
            return free
        return (free and opener != "") or self.proves(tunnel, resume)

    def proves(self, tunnel: Tunnel, resume: str | None) -> bool:
        """Whether ``resume`` is the token that was given for ``tunnel``."""
        return tunnel.resumable and hmac.compare_digest(self.token_of(tunnel), resume or "")

    def token_of(self, tunnel: Tunnel) -> str:
        """What the owner of ``tunnel`` shows to get its name back: an HMAC over name, id and opener."""
        named = f"{type(tunnel.name).__name__} {tunnel.name} {tunnel.id} {tunnel.opener}"
        return hmac.new(self._secret, named.encode(), "sha256").hexdigest()

    def _free(self, kind: Kind, rights: Rights) -> str | int:
        """A name or port that is free and that ``rights`` allow."""
        return self._free_subdomain(rights) if kind is Kind.HTTP else self._free_port(rights)

    def _free_subdomain(self, rights: Rights) -> str:
        for name in rights.names():
            if name not in self.tunnels and rights.allows(name):
                return name
        raise NameTakenError("All subdomains that your token allows are taken")

    def _free_port(self, rights: Rights) -> int:
        """The first free port from a random one on: any free one is found, clashes stay rare."""
        ports = rights.ports(self._tcp_ports)
        start = randbelow(len(ports)) if ports else 0
        for step in range(len(ports)):
            port = ports[(start + step) % len(ports)]
            if port not in self.tunnels and rights.allows(port):
                return port
        raise TryLaterError("No port is available", 503, TRY_AGAIN)

    def join(self, connection_id: str, key: str, opener: str = "") -> Tunnel:
        """The established tunnel to which its ``opener`` adds another session, with a place kept for it.

        The caller gives the place back (``promised``), whatever becomes of it. Raises RefusedError
        (404: there is no such tunnel or that is not its key; nobody learns which) or
        TryLaterError (429: it has :data:`MAX_SESSIONS`).
        """
        tunnel = self._by_id.get(connection_id)
        known = tunnel.key if tunnel is not None else ""
        same = hmac.compare_digest(known.encode(), key.encode())
        if tunnel is None or not same or tunnel.opener != opener or not tunnel.ready:
            raise RefusedError("There is no such tunnel", 404)
        if len(tunnel.sessions) + tunnel.promised >= MAX_SESSIONS:
            raise TryLaterError("This tunnel has all the sessions that it may have", 429, TRY_AGAIN)
        tunnel.promised += 1
        return tunnel

    def holds(self, tunnel: Tunnel) -> bool:
        """Whether the tunnel still has its name."""
        return self._by_id.get(tunnel.id) is tunnel

    def establish(self, tunnel: Tunnel) -> None:
        """A session of it is established: the tunnel is listed from now on. Idempotent."""
        tunnel.leased_until = None
        if not tunnel.ready:
            tunnel.ready = True
            self._changed(tunnel)

    def lease(self, tunnel: Tunnel, now: float, at_least: float = 0.0) -> None:
        """Keeps the name of a tunnel that was lost at monotonic time ``now``, for its owner only.

        ``at_least`` is in seconds, for when leases are shorter or switched off.
        """
        tunnel.ready = False
        tunnel.leased_until = now + max(self._lease, at_least)

    def expired(self, now: float) -> list[Tunnel]:
        """The tunnels whose lease is over and that nobody is about to resume: to be released."""
        return [
            tunnel
            for tunnel in self.tunnels.values()
            if tunnel.leased_until is not None and now >= tunnel.leased_until and not tunnel.promised
        ]

    def lasting(self) -> list[Record]:
        """What is to be remembered beyond this process: the names that have an owner."""
        return [record for record in self.records() if record.resumable]

    def records(self) -> list[Record]:
        """What a process that takes over has to know: all names that visitors may ask for."""
        return [
            Record(
                tunnel.kind,
                tunnel.name,
                tunnel.id,
                tunnel.opener,
                tunnel.resumable,
                tunnel.host_header,
                tunnel.options,
                tunnel.source,
            )
            for tunnel in self.tunnels.values()
            if tunnel.ready or tunnel.leased_until is not None
        ]

    def restore(self, record: Record, now: float, at_least: float = 0.0) -> Tunnel | None:
        """Leases a name that another process has remembered; None if it cannot be had (any more)."""
        name = record.name
        possible = is_subdomain(name) if isinstance(name, str) else name in self._tcp_ports
        known = name in self.tunnels or record.id in self._by_id
        if not possible or known or len(self.tunnels) >= self._limit:
            return None
        tunnel = self._new(record.kind, record.name, record.id)
        tunnel.opener, tunnel.resumable = record.opener, record.resumable
        tunnel.ask(record.host_header, record.options)
        tunnel.source = record.source
        self.lease(tunnel, now, at_least)
        return tunnel

    def release(self, tunnel: Tunnel) -> None:
        """Frees the tunnel's name at once; idempotent, and harmless to a successor of that name."""
        if not self.holds(tunnel):
            return
        del self.tunnels[tunnel.name], self._by_id[tunnel.id]
        tunnel.ready, tunnel.leased_until = False, None
        self._changed(tunnel)

    def _changed(self, tunnel: Tunnel) -> None:
        if tunnel.resumable and self.on_change is not None:
            self.on_change()

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


def _why_taken(tunnel: Tunnel, now: float) -> str:
    """Why a name is not free, in words that anybody may read: nothing of its owner is in them."""
    if tunnel.leased_until is None or tunnel.promised:
        return "it is open now"
    left = max(1, ceil(tunnel.leased_until - now))
    return f"its client was lost, and it is kept for that one for {left} s more"
