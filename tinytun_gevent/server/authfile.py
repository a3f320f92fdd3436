"""The file of tokens: its text as values. No I/O.

::

    [[tokens]]
    label = "anna"                     # what logs and status call her
    sha256 = "9f86d0…"                 # of the token; `tinytun-server token new` makes both
    names = ["anna", "anna-*"]         # what she may take; without it, whatever is not reserved
    ports = ["20000-20099"]            # likewise
    reserved = ["shop"]                # what she may take and nobody else
    reserved_ports = [25565]
    expires = 2027-01-31               # or with a time of day
    limits = { tunnels = 5, visitors = 100, requests = 50, rate = 1_000_000 }   # of all her tunnels
    each = { visitors = 20 }           # of each one
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime, time
from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from .. import toml
from ..errors import UsageError
from ..rights import Names, Ports, Reservations, Rights, is_pattern
from .account import Account, Limits

MAX_FILE: Final = 1 << 20
"""Bytes of the file at most; ten thousand tokens are about as many."""

MAX_TOKENS: Final = 10_000
MAX_ITEMS: Final = 256
"""Names, or ranges of ports, in one list."""

LABEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}\Z")
"""What a label may be: it stands in logs, whose fields it must not break."""

UNLIMITED: Final = Limits()

_RANGE: Final = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?\Z")
_Count = Annotated[int, Meta(ge=0, le=1_000_000)]
_Items = Annotated[list[Any], Meta(max_length=MAX_ITEMS)]


class _Limits(Struct, forbid_unknown_fields=True, frozen=True):
    tunnels: _Count | UnsetType = UNSET
    visitors: _Count | UnsetType = UNSET
    requests: Annotated[float, Meta(ge=0, le=1e6)] | UnsetType = UNSET
    rate: Annotated[int, Meta(ge=0, le=10**11)] | UnsetType = UNSET

    def over(self, usual: Limits) -> Limits:
        """With the ``usual`` figures where there are none."""
        given = {
            name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not UNSET
        }
        return Limits(**{field.name: getattr(usual, field.name) for field in fields(Limits)} | given)


class _Each(_Limits, forbid_unknown_fields=True, frozen=True):
    """Limits of one tunnel, so there is no number of tunnels."""

    tunnels: UnsetType = UNSET


class _Entry(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    label: str
    sha256: str
    names: _Items | None = None
    ports: _Items | None = None
    reserved: _Items = []
    reserved_ports: _Items = []
    expires: Any = None
    limits: _Limits = _Limits()
    each: _Each = _Each()


class _File(Struct, forbid_unknown_fields=True, frozen=True):
    tokens: Annotated[list[_Entry], Meta(max_length=MAX_TOKENS)] = []


@dataclass(frozen=True, slots=True)
class Grant:
    """One token: who has it, what it allows, and until when."""

    #: The SHA-256 of the token, in hexadecimal digits.
    sha256: str
    account: Account
    #: After which moment it is no longer valid, in seconds since the epoch; None: for ever.
    expires: float | None
    #: What was given, for a list of tokens.
    names: Names | None
    ports: Ports | None
    reserved: Names
    reserved_ports: Ports


def parse(
    text: str, *, usual: Limits = UNLIMITED, usual_each: Limits = UNLIMITED, nobody: Names | None = None
) -> list[Grant]:
    """The tokens of a file, in its order.

    ``usual`` and ``usual_each`` are the figures where a token has none; ``nobody`` gets the names in that.
    Raises UsageError, which says what is wrong and where.
    """
    try:
        file = msgspec.convert(toml.loads(text), _File)
    except msgspec.ValidationError as error:
        raise UsageError(_pathfirst(str(error))) from None
    except ValueError as error:  # also of a number with thousands of digits
        raise UsageError(f"it is not TOML: {error}") from None
    reservations = Reservations(nobody)
    grants = [
        _grant(f"tokens[{number}]", entry, reservations, (usual, usual_each))
        for number, entry in enumerate(file.tokens)
    ]
    _check_unique(grants)
    return grants


def digest(token: str) -> str:
    """What the file has of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def account_id(sha256: str) -> str:
    """What an account is called in leases and resume tokens: enough of the hash to be unique."""
    return sha256[:32]


def _grant(path: str, entry: _Entry, reservations: Reservations, usual: tuple[Limits, Limits]) -> Grant:
    if not LABEL.match(entry.label):
        raise UsageError(f"{path}.label: 1-64 letters, digits and . _ @ + - are allowed")
    if not re.match(r"[0-9a-f]{64}\Z", entry.sha256):
        raise UsageError(f"{path}.sha256: not 64 hexadecimal digits in lower case")
    id = account_id(entry.sha256)
    names = None if entry.names is None else read_names(entry.names, f"{path}.names")
    ports = None if entry.ports is None else read_ports(entry.ports, f"{path}.ports")
    own = read_names(entry.reserved, f"{path}.reserved")
    own_ports = read_ports(entry.reserved_ports, f"{path}.reserved_ports")
    reservations.add(own, id)
    reservations.add(own_ports, id)
    rights = Rights(reservations, id, names, ports, own, own_ports)
    account = Account(id, entry.label, entry.limits.over(usual[0]), entry.each.over(usual[1]), rights)
    expires = None if entry.expires is None else read_expiry(entry.expires, f"{path}.expires")
    return Grant(entry.sha256, account, expires, names, ports, own, own_ports)


def read_names(items: list[Any], path: str) -> Names:
    """Patterns of subdomains. Raises UsageError."""
    for number, item in enumerate(items):
        if not isinstance(item, str) or not is_pattern(item.lower()):
            raise UsageError(f"{path}[{number}]: {item!r:.64} is no subdomain and no pattern such as app-*")
    return Names(item.lower() for item in items)


def read_ports(items: list[Any], path: str) -> Ports:
    """Ports and ranges of them. Raises UsageError."""
    ranges = []
    for number, item in enumerate(items):
        match = _RANGE.match(str(item)) if type(item) in (int, str) else None
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last <= 65535:
            raise UsageError(f'{path}[{number}]: {item!r:.64} is no port and no range such as "20000-20099"')
        ranges.append(range(first, last + 1))
    return Ports(ranges)


def read_expiry(value: Any, path: str) -> float:
    """Seconds since the epoch; a date counts to its end, a time without a zone is UTC. Raises UsageError."""
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time.max)
    if not isinstance(value, datetime):
        raise UsageError(f"{path}: not a date such as 2027-01-31, nor one with a time of day")
    try:
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    except (OverflowError, ValueError):
        raise UsageError(f"{path}: out of range") from None


def _check_unique(grants: list[Grant]) -> None:
    for what in ("label", "sha256"):
        seen: dict[str, int] = {}
        for number, grant in enumerate(grants):
            value = grant.account.label if what == "label" else grant.sha256
            if value in seen:
                raise UsageError(f"tokens[{number}].{what}: the same as of tokens[{seen[value]}]")
            seen[value] = number


def _pathfirst(message: str) -> str:
    """msgspec's message with the path in front: ``tokens[2].label: Expected …``."""
    what, at, path = message.rpartition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    return f"{path}: {what}" if at and path else (what or message)
