"""The other nodes of a cluster: which of them has a tunnel that we do not have?

``PEERS`` names them. Every peer's metadata port is asked at once (``GET /tunnels/<name>``);
the first that has the tunnel wins. Nobody waits for a silent peer for longer than
`ASK_TIMEOUT` (plus `RESOLVE_WAIT`, once, right after the start).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import gevent
from gevent import socket
from gevent.event import AsyncResult, Event
from gevent.queue import Queue

from .addresses import bracketed, canonical, is_ip, is_local
from .config import ServerConfig
from .settings import PeerAddress

log = logging.getLogger("tinytun_gevent.server")

ASK_TIMEOUT: Final = 0.5
"""Seconds a peer has for connecting and answering."""

KEEP_FOUND: Final = 5.0
"""Seconds for which a peer that had the tunnel is taken to have it still."""

KEEP_MISSING: Final = 1.0
"""Seconds for which a tunnel that no peer had is taken to be nowhere; a client may come any moment."""

REST_AFTER_FAILURE: Final = 1.0
"""Seconds for which a peer that did not answer is not asked again."""

REFRESH: Final = 5.0
"""Seconds between two resolutions of the names in PEERS."""

RESOLVE_WAIT: Final = 0.4
"""Seconds that the first questions wait for the first resolution."""

MAX_REMEMBERED: Final = 10_000
"""Names whose answers are kept; visitors choose names, so there is no end of them."""

MAX_ASKING: Final = 64
"""Lookups that run at once; beyond them the answer is "nobody", at once."""

MAX_PEERS: Final = 64
"""Addresses that PEERS may resolve to."""

_MAX_ANSWER: Final = 65_536


@dataclass(frozen=True, slots=True)
class Peer:
    """Another node: one address and its ports."""

    host: str
    metadata_port: int
    proxy_port: int
    tcp_proxy_port: int


@dataclass(slots=True)
class _Known:
    """What is known about a name: who has it, until when, and a result that all who ask wait for."""

    result: AsyncResult[Peer | None]
    #: Monotonic seconds; None while the peers are being asked.
    until: float | None = None


class Peers:
    """The peers of one node. Without any configured, every answer is "nobody", at once."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._entries = config.peers
        #: What the entries last resolved to, ourselves left out.
        self._peers: tuple[Peer, ...] = ()
        self._ips: frozenset[str] = frozenset()
        #: What each name last resolved to, kept while DNS is away.
        self._resolved_to: dict[PeerAddress, tuple[str, ...]] = {}
        self._resolved = Event()
        self._resolver: gevent.Greenlet[..., None] | None = None
        self._known: dict[str | int, _Known] = {}
        self._asking = 0
        #: Until when (monotonic seconds) a peer that failed is left alone.
        self._resting: dict[Peer, float] = {}

    def __bool__(self) -> bool:
        """Whether there are peers at all."""
        return bool(self._entries)

    def start(self) -> None:
        """Begins to resolve the names in PEERS, again every `REFRESH` seconds; does not block."""
        if self._entries and self._resolver is None:
            self._resolver = gevent.spawn(self._keep_resolving)

    def stop(self) -> None:
        """Ends the resolving; idempotent."""
        resolver, self._resolver = self._resolver, None
        if resolver is not None:
            resolver.kill(block=False)

    def is_peer(self, ip: str) -> bool:
        """Whether ``ip`` (unmapped) is an address that PEERS resolves to; never blocks."""
        return ip in self._ips

    def find(self, name: str | int) -> Peer | None:
        """The peer that has the tunnel ``name`` (a subdomain, or a port as a number).

        Blocks for less than a second. Many may ask for one name at once: the peers are
        asked once.
        """
        if not self._entries:
            return None
        known = self._known.get(name)
        if known is None or (known.until is not None and known.until <= time.monotonic()):
            if self._asking >= MAX_ASKING:
                return None
            known = self._remember(name)
            gevent.spawn(self._look_up, name, known)
        return known.result.get()

    def answers(self, peer: Peer, name: str | int) -> bool:
        """Whether ``peer`` says anything at all of ``name``, be it yes or no; blocks for 0.5 s at most."""
        return self._question(peer, name) is not None

    def forget(self, name: str | int) -> None:
        """Drops what is known about ``name``: forwarding to the peer that had it failed."""
        known = self._known.get(name)
        if known is not None and known.until is not None:
            del self._known[name]

    def _remember(self, name: str | int) -> _Known:
        self._known.pop(name, None)
        while len(self._known) >= MAX_REMEMBERED:
            del self._known[next(iter(self._known))]
        known = self._known[name] = _Known(AsyncResult())
        return known

    def _look_up(self, name: str | int, known: _Known) -> None:
        """Settles ``known``, whatever happens."""
        self._asking += 1
        found: Peer | None = None
        try:
            self._resolved.wait(RESOLVE_WAIT)
            found = self._ask_all(name)
        finally:
            self._asking -= 1
            known.until = time.monotonic() + (KEEP_FOUND if found else KEEP_MISSING)
            known.result.set(found)

    def _ask_all(self, name: str | int) -> Peer | None:
        """Asks every peer at once; the first that has ``name``, or None when all have answered."""
        now = time.monotonic()
        peers = [peer for peer in self._peers if self._resting.get(peer, 0.0) <= now]
        answers: Queue[Peer | None] = Queue()
        asking = [gevent.spawn(self._ask, peer, name, answers) for peer in peers]
        try:
            for _ in asking:  # each answers within its own time
                peer = answers.get()
                if peer is not None:
                    return peer
            return None
        finally:
            gevent.killall(asking, block=False)

    def _ask(self, peer: Peer, name: str | int, answers: Queue[Peer | None]) -> None:
        """Puts exactly one answer, whatever the peer does."""
        found: bool | None = None
        try:
            found = self._question(peer, name)
        finally:
            answers.put(peer if found else None)

    def _question(self, peer: Peer, name: str | int) -> bool | None:
        """Whether ``peer`` has ``name``; None if it does not say so in time."""
        try:
            with gevent.Timeout(ASK_TIMEOUT, TimeoutError("no answer in time")):
                return _has(peer, name)
        except (OSError, ValueError, RecursionError) as error:  # TimeoutError is an OSError
            self._resting[peer] = time.monotonic() + REST_AFTER_FAILURE
            log.debug("peer %s:%d: %s", peer.host, peer.metadata_port, error)
            return None

    def _keep_resolving(self) -> None:
        while True:
            self._set(self._resolve())
            gevent.sleep(REFRESH)

    def _set(self, peers: tuple[Peer, ...]) -> None:
        if peers != self._peers:
            log.info("peers: %s", ", ".join(f"{bracketed(peer.host)}:{peer.metadata_port}" for peer in peers))
        self._peers = peers
        self._ips = frozenset(peer.host for peer in peers)
        self._resting = {peer: until for peer, until in self._resting.items() if peer in peers}
        self._resolved.set()

    def _resolve(self) -> tuple[Peer, ...]:
        """All addresses of all entries, ourselves left out; an unresolvable entry keeps what it had."""
        peers: dict[Peer, None] = {}
        for entry in self._entries:
            for host in self._addresses(entry):
                peer = self._peer(entry, host)
                if not self._is_self(peer):
                    peers[peer] = None
        return tuple(peers)[:MAX_PEERS]

    def _addresses(self, entry: PeerAddress) -> Iterable[str]:
        if is_ip(entry.host):
            return [entry.host]
        try:
            answers = socket.getaddrinfo(entry.host, None, 0, socket.SOCK_STREAM)
        except OSError as error:
            log.warning("PEERS: %s does not resolve: %s", entry.host, error)
            before = self._resolved_to.get(entry, ())
        else:
            before = tuple(dict.fromkeys(canonical(str(answer[4][0])) for answer in answers))
            self._resolved_to[entry] = before
        return before

    def _peer(self, entry: PeerAddress, host: str) -> Peer:
        config = self._config
        return Peer(
            host,
            entry.metadata_port or config.metadata_port,
            entry.proxy_port or config.proxy_port,
            entry.tcp_proxy_port or config.tcp_proxy_port,
        )

    def _is_self(self, peer: Peer) -> bool:
        """Whether asking ``peer`` would be asking ourselves."""
        config = self._config
        if peer.metadata_port != config.metadata_port:
            return False
        if config.metadata_bind in ("::", "0.0.0.0"):  # nosec B104 # read, not bound
            return is_local(peer.host)
        return peer.host == config.metadata_bind


def _has(peer: Peer, name: str | int) -> bool:
    """Asks one peer; blocks. Raises OSError or ValueError when it gives no proper answer."""
    text = f":{name}" if isinstance(name, int) else name
    request = (
        f"GET /tunnels/{text} HTTP/1.1\r\nHost: {bracketed(peer.host)}:{peer.metadata_port}\r\n"
        "Accept: application/json\r\nConnection: close\r\n\r\n"
    )
    family = socket.AF_INET6 if ":" in peer.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.connect((peer.host, peer.metadata_port))
        sock.sendall(request.encode("ascii"))
        answer = bytearray()
        while data := sock.recv(_MAX_ANSWER):
            answer += data
            if len(answer) > _MAX_ANSWER:
                raise ValueError("its answer is too long")
    return _says_yes(bytes(answer), name)


def _says_yes(answer: bytes, name: str | int) -> bool:
    """Whether an HTTP answer, read to its end, is about the tunnel ``name``."""
    head, blank, body = answer.partition(b"\r\n\r\n")
    status = head.split(b"\r\n", 1)[0].split(b" ")
    if not blank or len(status) < 2 or not status[0].startswith(b"HTTP/1."):
        raise ValueError("its answer is not HTTP")
    if status[1] == b"404":
        return False
    if status[1] != b"200":
        raise ValueError(f"it answered {status[1][:3]!r}")
    about = json.loads(body)
    wanted = {"PortNumber": name} if isinstance(name, int) else {"Subdomain": name}
    return isinstance(about, dict) and about.get("name") == wanted
