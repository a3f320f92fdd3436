"""The certificates that the server shows: which one for which name, and new ones as soon as they are there.

A directory is looked at every :data:`LOOK` seconds, in a thread. What has changed, as `filechange` has it, is
in use from the next handshake on; connections that stand do not notice.
"""

from __future__ import annotations

import _ssl
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import gevent
from gevent import ssl

from tinytun_gevent.background import in_a_thread
from tinytun_gevent.errors import UsageError
from tinytun_gevent.server.pem import NAMELESS, Directory, Pair, Signature, covers
from tinytun_gevent.wire.clienthello import SPOKEN

log = logging.getLogger("tinytun_gevent.server")

LOOK: Final = 2.0
"""Seconds between two looks at the directory: with the time to read it, a change is in use within 5, also one
that counts at the second look."""

CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""For TLS 1.2, what Mozilla calls intermediate, without DHE, which is slow. TLS 1.3 has its own."""

TICKET_LIFE: Final = 12 * 3600.0
"""Seconds until the key of session tickets is a new one: whoever learns it can read TLS 1.2 of that time."""

SOON: Final = 14 * 86400.0
"""Seconds before a certificate's end from which on the log warns. Everybody's renewal comes before."""

_NAME_UNKNOWN: Final = 112
"""The alert unrecognized_name (RFC 6066 §3)."""


_Line = tuple[int, *tuple[str, ...]]
"""A level, a text and its values, as the log wants them."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A pair that OpenSSL has accepted, and what shows it."""

    pair: Pair
    context: ssl.SSLContext


@dataclass(slots=True)
class Store:
    """All that is shown at one time; never changed once it is made."""

    #: None before the directory has been read.
    signature: Signature | None = None
    loaded: list[Loaded] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    #: By name, ``*.example.com`` included.
    by_name: dict[str, Loaded] = field(default_factory=dict)
    default: Loaded | None = None
    #: Whether a handshake may take the hub's time for milliseconds.
    slow: bool = False

    def choose(self, name: str | None) -> Loaded | None:
        """What to show to a client that asks for ``name``: that name's, the wildcard's, or the default."""
        if name:
            name = name.lower().rstrip(".")
            found = self.by_name.get(name) or self.by_name.get("*." + name.partition(".")[2])
            if found is not None:
                return found
        return self.default


class Certificates:
    """The certificates of one directory. Make it, :meth:`load` it once, then :meth:`start` looking."""

    def __init__(self, path: str, domains: tuple[str, ...]) -> None:
        """``domains`` are the base domains; the default certificate is one of the first."""
        self._path = path
        self._directory = Directory(path)
        self._domains = domains
        self._store = Store()
        #: What the log has been told and what is still so: of the directory, of its files, and of their ends.
        self._failure: set[_Line] = set()
        self._said: set[_Line] = set()
        self._warned: set[_Line] = set()
        self._greenlet: gevent.Greenlet[[], None] | None = None
        self._renew_tickets(time.monotonic())

    def _renew_tickets(self, now: float) -> None:
        #: What every connection begins with. Tickets are its own whatever certificate is shown, so they
        #: outlive a change of certificates.
        self.context = _context()
        # gevent's own property is for its sockets: it calls back with an object that there is none of here.
        bare: Any = _ssl._SSLContext.sni_callback
        bare.__set__(self.context, self._show)
        self._tickets_until = now + TICKET_LIFE

    @property
    def slow(self) -> bool:
        """Whether a handshake may take milliseconds, for which the hub should not wait."""
        return self._store.slow

    def ends(self) -> dict[str, float]:
        """When the certificate ends that is shown for each name, in seconds since the epoch."""
        return {name: loaded.pair.expires for name, loaded in self._store.by_name.items()}

    def _show(self, connection: Any, name: str | None, context: ssl.SSLContext) -> int | None:
        """OpenSSL asks which certificate to show; an alert's number refuses."""
        chosen = self._store.choose(name)
        if chosen is None:
            return _NAME_UNKNOWN
        connection.context = chosen.context
        return None

    # -- what is there --------------------------------------------------------

    def start(self) -> None:
        """Looks for changes from now on; never blocks."""
        self._greenlet = self._greenlet or gevent.spawn(self._watch)

    def stop(self) -> None:
        greenlet, self._greenlet = self._greenlet, None
        if greenlet is not None:
            greenlet.kill(block=False)

    def load(self) -> None:
        """Reads the directory, and says in the log what is new. Blocks on the disk, in a thread."""
        try:
            store = in_a_thread(lambda: self._read(self._store))
        except OSError as error:
            line = logging.WARNING, "TLS_DIR=%s: %s", self._path, error.strerror or str(error)
            self._failure = _say([line], self._failure)
            return
        self._failure = set()
        if store is not None:
            self._store = store
            self._said = _say(self._about(store), self._said)
        self._warned = _say(self._ending(time.time()), self._warned)

    def problem(self) -> UsageError | None:
        """A file that was emptied a moment ago, so that nobody knows what was in it. Blocks on the disk."""
        path = in_a_thread(lambda: self._directory.emptied(time.time()))
        return None if path is None else UsageError(f"TLS_DIR: {path} is empty since a moment ago")

    def _watch(self) -> None:
        while True:
            gevent.sleep(LOOK)
            now = time.monotonic()
            if now > self._tickets_until:
                self._renew_tickets(now)
            try:
                self.load()
            except Exception:  # certificates that are in use stay so
                log.exception("certificates could not be looked at")

    def _read(self, before: Store) -> Store | None:
        """What there is now, None if that is what there was. Runs in a thread."""
        signature = self._directory.signature()
        if signature == before.signature:
            return None
        pairs, broken = self._directory.read(signature)
        known, marks = {loaded.pair: loaded for loaded in before.loaded}, before.signature or {}
        loaded = []
        for pair in pairs:
            unchanged = all(marks.get(p) == signature.get(p) for p in (pair.certificate, pair.key))
            try:
                loaded.append(known[pair] if pair in known and unchanged else Loaded(pair, _context(pair)))
            except OSError as error:  # ssl.SSLError is one
                broken[pair.certificate] = getattr(error, "reason", None) or error.strerror or str(error)
        return _arranged(signature, loaded, broken, before, self._domains, time.time())

    # -- what is said of it ---------------------------------------------------

    def _about(self, store: Store) -> Iterator[_Line]:
        """What there is to say of what is there."""
        for path, reason in store.broken.items():
            yield logging.WARNING, "TLS_DIR: %s cannot be used: %s", path, reason
        if not store.loaded:
            yield logging.WARNING, "TLS_DIR=%s has no certificate with its key", self._path
        for loaded in store.loaded:
            pair = loaded.pair
            text = "certificate for %s, until %s, from %s"
            yield logging.INFO, text, pair.title, pair.until, pair.certificate
            if not pair.names:
                yield logging.WARNING, "%s: %s", pair.certificate, NAMELESS
        for domain in self._domains:
            if store.loaded and not any(covers(loaded.pair.names, domain) for loaded in store.loaded):
                yield logging.WARNING, "no certificate in TLS_DIR is for *.%s", domain

    def _ending(self, now: float) -> Iterator[_Line]:
        """Of those in use, which end soon."""
        used = {id(loaded): loaded.pair for loaded in self._store.by_name.values()}
        for pair in used.values():
            if now > pair.expires:
                text = "the certificate in %s has expired on %s"
            elif now > pair.expires - SOON:
                text = "the certificate in %s expires on %s"
            else:
                continue
            yield logging.WARNING, text, pair.certificate, pair.until


def _say(lines: Iterable[_Line], said: set[_Line]) -> set[_Line]:
    """Logs what was not ``said`` before; returns what is said now. What comes again is said again."""
    now = dict.fromkeys(lines)
    for line in now:
        if line not in said:
            log.log(*line)
    return set(now)


def _arranged(
    signature: Signature,
    loaded: list[Loaded],
    broken: dict[str, str],
    before: Store,
    domains: tuple[str, ...],
    now: float,
) -> Store:
    """A store of what was ``loaded``, and of what was in use ``before`` and cannot be replaced yet.

    That is a pair of which a file is still there, but broken or changed without the other; and all of
    them where nothing else would be left.
    """
    paths = {one.pair.certificate for one in loaded}
    prints = {one.pair.fingerprint for one in loaded}
    for old in before.loaded:
        there = old.pair.certificate in signature or old.pair.key in signature
        if there and old.pair.certificate not in paths and old.pair.fingerprint not in prints:
            loaded.append(old)
    store = Store(signature, loaded or before.loaded, broken)
    store.slow = any(one.pair.slow for one in store.loaded)
    store.by_name = _best(store.loaded, now)
    first = domains[0]
    of_domain = store.by_name.get("*." + first) or store.by_name.get(first)
    by_path = sorted(store.loaded, key=lambda one: one.pair.certificate)
    store.default = of_domain or (by_path[0] if by_path else None)
    return store


def _best(loaded: Iterable[Loaded], now: float) -> dict[str, Loaded]:
    """For each name the one that is valid now and for longest."""
    found: dict[str, Loaded] = {}
    for one in sorted(loaded, key=lambda one: (one.pair.begins <= now, one.pair.expires, one.pair.chain)):
        found.update(dict.fromkeys(one.pair.names, one))
    return found


def _context(pair: Pair | None = None) -> ssl.SSLContext:
    """OpenSSL's settings for a server, with the certificate of ``pair``. Raises ``OSError``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    # All are good; the client knows which of them it is quicker at.
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(list(SPOKEN))
    if pair is not None:
        context.load_cert_chain(pair.certificate, pair.key, password=_no_password)
    return context


def _no_password() -> str:
    """OpenSSL would ask at the terminal."""
    raise OSError("its key has a password")
