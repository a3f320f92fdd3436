"""Which names and ports may be taken by whom: patterns, and what is reserved. No I/O."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from .names import random_name, random_word
from .wire.handshake import is_subdomain

MAX_PATTERN: Final = 63
"""Characters of a pattern at most, as of the label that it stands for (RFC 1035 §2.3.4)."""

TRIES: Final = 256
"""Random names that are tried, of each pattern where there are some: nearly always the first one is free."""

PAGE: Final = 256
"""Ports that are looked for together: there are 256 pages, so neither are there many nor is much in one."""

_PATTERN: Final = re.compile(r"[a-z0-9*](?:[a-z0-9*-]{0,61}[a-z0-9*])?\Z")


def is_pattern(text: str) -> bool:
    """Whether ``text`` is a subdomain in lower case, where ``*`` stands for any characters, or for none."""
    return _PATTERN.match(text) is not None


class Names:
    """A set of subdomains, given by patterns."""

    __slots__ = ("_exact", "_wild", "patterns")

    def __init__(self, patterns: Iterable[str] = ()) -> None:
        """Raises ``ValueError`` for what :func:`is_pattern` is not true of."""
        #: In the order in which they were given.
        self.patterns = tuple(dict.fromkeys(patterns))
        wrong = next((text for text in self.patterns if not is_pattern(text)), None)
        if wrong is not None:
            raise ValueError(f"{wrong!r} is no subdomain and no pattern of some")
        self._exact = frozenset(text for text in self.patterns if "*" not in text)
        wild = [text for text in self.patterns if "*" in text]
        # fnmatch's expressions never go back over a name, however many stars there are.
        self._wild = re.compile("|".join(map(fnmatch.translate, wild))) if wild else None

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        return name in self._exact or (self._wild is not None and self._wild.match(name) is not None)

    def __bool__(self) -> bool:
        return bool(self.patterns)

    def __str__(self) -> str:
        return ", ".join(self.patterns)

    def offers(self) -> Iterator[str]:
        """Names of the set for somebody who wants any: first those that are given exactly."""
        yield from (text for text in self.patterns if "*" not in text)
        for text in self.patterns:
            if "*" in text:
                for _ in range(TRIES):
                    name = re.sub(r"\*+", lambda _: random_word(), text)
                    if is_subdomain(name):
                        yield name


class Ports:
    """A set of ports, given by ranges."""

    __slots__ = ("_ranges",)

    def __init__(self, ranges: Iterable[range] = ()) -> None:
        self._ranges = tuple(ranges)

    def __contains__(self, port: object) -> bool:
        return any(port in ports for ports in self._ranges)

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def __str__(self) -> str:
        return ", ".join(str(p.start) if len(p) == 1 else f"{p.start}-{p.stop - 1}" for p in self._ranges)

    def pages(self) -> set[int]:
        """Where in pieces of :data:`PAGE` ports some of them are."""
        return {page for p in self._ranges if p for page in range(p[0] // PAGE, p[-1] // PAGE + 1)}

    def within(self, ports: range) -> list[int]:
        """Those that are in ``ports`` as well."""
        parts = (range(max(p.start, ports.start), min(p.stop, ports.stop)) for p in self._ranges)
        return list(dict.fromkeys(port for part in parts for port in part))


class Reservations:
    """What only some may take, by their ids, and what nobody may.

    Thousands have something reserved, and all tunnels are looked at whenever that changes. So only what may
    fit a name is compared with it: a pattern by what stands before its first star, ports by their page.
    """

    def __init__(self, nobody: Names | None = None) -> None:
        self._nobody = nobody or Names()
        self._exact: dict[str, set[str]] = {}
        self._wild: dict[str, list[tuple[Names, str]]] = {}
        self._pages: dict[int, list[tuple[Ports, str]]] = {}

    def add(self, held: Names | Ports, id: str) -> None:
        """Reserves ``held`` for ``id``, beside whoever has some of it reserved as well."""
        if isinstance(held, Ports):
            for page in held.pages():
                self._pages.setdefault(page, []).append((held, id))
            return
        for pattern in held.patterns:
            start, star, _ = pattern.partition("*")
            if star:
                self._wild.setdefault(start, []).append((Names([pattern]), id))
            else:
                self._exact.setdefault(pattern, set()).add(id)

    def closed(self, name: str | int) -> bool:
        """Whether nobody may have ``name``."""
        return name in self._nobody

    def holders(self, name: str | int) -> set[str]:
        """For whom ``name`` is reserved; nobody: it is not."""
        if isinstance(name, int):
            return {id for held, id in self._pages.get(name // PAGE, ()) if name in held}
        found = set(self._exact.get(name, ()))
        for end in range(len(name) + 1):
            found.update(id for held, id in self._wild.get(name[:end], ()) if name in held)
        return found


class Rights:
    """What one who opens tunnels may take; by itself whatever is not reserved."""

    __slots__ = ("_id", "_names", "_own", "_own_ports", "_ports", "_reservations")

    def __init__(
        self,
        reservations: Reservations | None = None,
        id: str = "",
        names: Names | None = None,
        ports: Ports | None = None,
        own: Names | None = None,
        own_ports: Ports | None = None,
    ) -> None:
        """``names`` and ``ports`` confine him (None: they do not), beside ``own`` and ``own_ports``, which
        are reserved for him in ``reservations``."""
        self._reservations = reservations or Reservations()
        self._id = id
        self._names = names
        self._own = own or Names()
        self._ports = ports
        self._own_ports = own_ports or Ports()

    def allows(self, name: str | int) -> bool:
        """Whether he may take ``name``, if it is free."""
        return not self.refusal(name)

    def refusal(self, name: str | int) -> str:
        """Why he may not take ``name``, in a few words for him; blank if he may."""
        confined: Names | Ports | None
        own: Names | Ports
        if isinstance(name, str):
            kind, confined, own = "subdomain", self._names, self._own
        else:
            kind, confined, own = "port", self._ports, self._own_ports
        holders = self._reservations.holders(name)
        if self._reservations.closed(name) or (holders and self._id not in holders):
            return f"The {kind} {name} is reserved"
        if holders or confined is None or name in confined:
            return ""
        allowed = ", ".join(filter(None, (str(confined), str(own))))
        return f"Your token does not allow the {kind} {name}; it allows: {allowed or 'none'}"

    def names(self) -> Iterator[str]:
        """Subdomains for him who wants any; some may be taken, or reserved for others."""
        if self._names is None:
            return (random_name() for _ in range(TRIES))
        return (name for names in (self._names, self._own) for name in names.offers())

    def ports(self, ports: range) -> Sequence[int]:
        """Those of ``ports`` for him who wants any; some may be taken, or reserved for others."""
        if self._ports is None:
            return ports
        return list(dict.fromkeys(self._ports.within(ports) + self._own_ports.within(ports)))


ANYTHING: Final = Rights()
