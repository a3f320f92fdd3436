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

_PATTERN: Final = re.compile(r"[a-z0-9*](?:[a-z0-9*-]{0,61}[a-z0-9*])?\Z")


def is_pattern(text: str) -> bool:
    """Whether ``text`` is a subdomain in lower case, where ``*`` stands for any characters, or for none."""
    return _PATTERN.match(text) is not None


class Names:
    """A set of subdomains, given by patterns."""

    __slots__ = ("_exact", "_patterns", "_wild")

    def __init__(self, patterns: Iterable[str] = ()) -> None:
        """Raises ``ValueError`` for what :func:`is_pattern` is not true of."""
        self._patterns = tuple(dict.fromkeys(patterns))
        wrong = next((text for text in self._patterns if not is_pattern(text)), None)
        if wrong is not None:
            raise ValueError(f"{wrong!r} is no subdomain and no pattern of some")
        self._exact = frozenset(text for text in self._patterns if "*" not in text)
        wild = [text for text in self._patterns if "*" in text]
        # fnmatch's expressions never go back over a name, however many stars there are.
        self._wild = re.compile("|".join(map(fnmatch.translate, wild))) if wild else None

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        return name in self._exact or (self._wild is not None and self._wild.match(name) is not None)

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def __str__(self) -> str:
        return ", ".join(self._patterns)

    def offers(self) -> Iterator[str]:
        """Names of the set for somebody who wants any: first those that are given exactly."""
        yield from (text for text in self._patterns if "*" not in text)
        for text in self._patterns:
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

    def within(self, ports: range) -> list[int]:
        """Those that are in ``ports`` as well."""
        parts = (range(max(p.start, ports.start), min(p.stop, ports.stop)) for p in self._ranges)
        return list(dict.fromkeys(port for part in parts for port in part))


class Reservations:
    """What only some may take, by their ids, and what nobody may."""

    def __init__(self, nobody: Names | None = None) -> None:
        self._nobody = nobody or Names()
        self._held: list[tuple[Names | Ports, str]] = []

    def add(self, held: Names | Ports, id: str) -> None:
        """Reserves ``held`` for ``id``, beside whoever has some of it reserved as well."""
        if held:
            self._held.append((held, id))

    def closed(self, name: str | int) -> bool:
        """Whether nobody may have ``name``."""
        return name in self._nobody

    def holders(self, name: str | int) -> set[str]:
        """For whom ``name`` is reserved; nobody: it is not."""
        return {id for held, id in self._held if name in held}


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
