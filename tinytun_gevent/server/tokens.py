"""Who may open a tunnel: the tokens of AUTH_FILE, read and checked, and what each of them may have.

The file is TOML, an array of tables ``[[tokens]]``, and has hashes only. Nothing here needs gevent: the
master, ``--check`` and ``tinytun-server token`` read the same file by the same rules.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import cycle
from typing import Annotated, Any, Final

import msgspec

from ..errors import UsageError
from ..registry import Permit
from . import patterns
from .account import Account, Limits

MAX_FILE: Final = 4 * 1024 * 1024
"""Bytes of the file: room for 10,000 tokens that list some names each."""

MAX_TOKENS: Final = 10_000
"""As many as a server has tunnels by default; reading so many takes about a second, in a thread."""

MAX_NAMES: Final = 256
"""Names, or ports and ranges of them, that a token lists."""

ID_LENGTH: Final = 32
"""Digits of the hash, 128 bits, that a holder is known by; whoever reads them learns nothing of the token."""

HIGHEST: Final = 10**15
"""No limit is higher: a petabyte a second is a typing mistake."""

_RANGE: Final = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?\Z")

_Count = Annotated[int, msgspec.Meta(ge=0, le=HIGHEST)]
_List = Annotated[list[str], msgspec.Meta(max_length=MAX_NAMES)]
_Ports = Annotated[list[str | int], msgspec.Meta(max_length=MAX_NAMES)]


class _Limits(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    tunnels: _Count | None = None
    visitors: _Count | None = None
    requests: Annotated[float, msgspec.Meta(ge=0, le=HIGHEST)] | None = None
    rate: _Count | None = None


class _Entry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    label: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    sha256: str
    names: _List | None = None
    reserve: _List = []
    ports: _Ports | None = None
    reserve_ports: _Ports = []
    limits: _Limits | None = None
    each: _Limits | None = None
    expires: Any = None


class _File(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    tokens: Annotated[list[_Entry], msgspec.Meta(max_length=MAX_TOKENS)] = []


@dataclass(frozen=True, slots=True)
class Token:
    """One entry of the file; the token itself is nowhere."""

    #: What the operator calls its holder; printable.
    label: str
    #: SHA-256 of the token's text, 64 hexadecimal digits.
    sha256: str
    #: Patterns of the subdomains it is confined to; None: any.
    names: tuple[str, ...] | None
    #: Patterns of those that only it, and who reserves them as well, may have.
    reserve: tuple[str, ...]
    #: The same for ports.
    ports: tuple[range, ...] | None
    reserve_ports: tuple[range, ...]
    #: What its holder may use, in all and with each tunnel.
    limits: Limits
    each: Limits
    #: Until when it is good; None: for ever.
    expires: datetime | None

    @property
    def id(self) -> str:
        """What its holder is known by, here and after a restart: the beginning of the hash."""
        return self.sha256[:ID_LENGTH]

    @property
    def account(self) -> Account:
        return Account(self.id, self.label, self.limits, self.each)

    def has_expired(self, now: datetime) -> bool:
        return self.expires is not None and now >= self.expires


def hash_of(token: str) -> str:
    """What the file has of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def parse_tokens(data: bytes, limits: Limits | None = None, each: Limits | None = None) -> tuple[Token, ...]:
    """The file's content; raises ``ValueError`` that says what is wrong, with its path in the file.

    ``limits`` and ``each`` are for what an entry does not say. No value of the file is in the error: one
    might have written the token itself where its hash belongs.
    """
    if len(data) > MAX_FILE:
        raise ValueError(f"it is longer than {MAX_FILE} bytes")
    try:
        content = msgspec.toml.decode(data, type=_File)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `")
        place = path.rstrip("`").removeprefix("$").lstrip(".")
        raise ValueError(f"{place}: {message}" if place else message) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"it is not TOML: {_without_text(error)}") from None
    tokens: list[Token] = []
    labels: dict[str, int] = {}
    hashes: dict[str, int] = {}
    for number, entry in enumerate(content.tokens):
        path = f"tokens[{number}]"
        token = _token(path, entry, limits or Limits(), each or Limits())
        for known, key, what in ((labels, token.label, "label"), (hashes, token.id, "sha256")):
            if known.setdefault(key, number) != number:
                raise ValueError(f"{path}.{what}: is that of tokens[{known[key]}] as well")
        tokens.append(token)
    return tuple(tokens)


def read_tokens(path: str, limits: Limits | None = None, each: Limits | None = None) -> tuple[Token, ...]:
    """The tokens of the file at ``path``. Blocks; raises UsageError, one line, if it is not as it must be."""
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_FILE + 1)
        return parse_tokens(data, limits, each)
    except OSError as error:
        raise UsageError(f"AUTH_FILE={path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UsageError(f"AUTH_FILE={path}: {error}") from None


def parse_expiry(value: Any) -> datetime:
    """When something ends that ends at ``value``: a moment, in UTC unless it says otherwise, or a whole day.

    Raises ``ValueError``.
    """
    try:
        if isinstance(value, datetime):
            return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
        if isinstance(value, date):
            return datetime(value.year, value.month, value.day, tzinfo=UTC) + timedelta(days=1)
    except OverflowError:
        pass
    raise ValueError("a date such as 2030-12-31, or a date and time, without quotes")


def parse_ports(value: str | int) -> range:
    """``20000`` or ``20000-20010`` as a range; raises ``ValueError``."""
    match = _RANGE.match(str(value))
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last <= 65535:
        raise ValueError('a port such as 20000, or a range such as "20000-20010"')
    return range(first, last + 1)


def check_label(text: str) -> str:
    """``text``, if it may be a label; raises ``ValueError``."""
    if not text.isprintable() or text != text.strip() or not 1 <= len(text) <= 64:
        raise ValueError("1 to 64 characters that can be printed, without a space at either end")
    return text


class Rules:
    """All tokens that are in force: whose a token is, and who may have which name.

    A name that somebody reserves is for those who do; one that several reserve is for all of them, so
    that a token can be replaced by another one beside it.
    """

    def __init__(self, tokens: Iterable[Token] = (), reserved: Sequence[str] = ()) -> None:
        """``reserved`` are patterns of names that nobody gets."""
        self._tokens = {token.id: token for token in tokens}
        self._reserved = tuple(reserved)
        #: Who reserves what; patterns with a ``*`` apart, since they have to be tried one by one.
        self._names: dict[str, set[str]] = {}
        self._patterns: list[tuple[str, str]] = []
        self._ports: dict[int, set[str]] = {}
        for token in self._tokens.values():
            for pattern in token.reserve:
                if "*" in pattern:
                    self._patterns.append((pattern, token.id))
                else:
                    self._names.setdefault(pattern, set()).add(token.id)
            for ports in token.reserve_ports:
                for port in ports:
                    self._ports.setdefault(port, set()).add(token.id)

    def find(self, presented: str) -> Token | None:
        """The entry of a token that somebody shows; None if there is none.

        A lookup takes longer or shorter by what its key is, so what is looked up is the hash: whoever
        measures learns about the hash of his own guess, from which no better guess follows. The hash as a
        whole is compared in constant time.
        """
        digest = hash_of(presented)
        token = self._tokens.get(digest[:ID_LENGTH])
        return token if token is not None and hmac.compare_digest(token.sha256, digest) else None

    def get(self, account_id: str) -> Token | None:
        """The entry that an account stands for; None if it was removed."""
        return self._tokens.get(account_id)

    def next_expiry(self, now: datetime) -> datetime | None:
        """When the next of them ends; None if none does."""
        return min((t.expires for t in self._tokens.values() if t.expires and t.expires > now), default=None)

    def why_not(self, token: Token | None, name: str | int) -> str:
        """Why the holder of ``token`` may not have ``name``; empty if he may."""
        what = "subdomain" if isinstance(name, str) else "port"
        reservers = self._reservers(name)
        if isinstance(name, str) and any(patterns.fits(pattern, name) for pattern in self._reserved):
            return "This subdomain is reserved"
        if token is not None and token.id in reservers:
            return ""
        if reservers:
            return f"This {what} is reserved for somebody else"
        if token is None:
            return ""
        if isinstance(name, str):
            fits = token.names is None or any(patterns.fits(pattern, name) for pattern in token.names)
        else:
            fits = token.ports is None or any(name in ports for ports in token.ports)
        return "" if fits else f"This token does not allow that {what}"

    def _reservers(self, name: str | int) -> set[str]:
        if isinstance(name, int):
            return self._ports.get(name, set())
        others = {owner for pattern, owner in self._patterns if patterns.fits(pattern, name)}
        return others | self._names.get(name, set())


class TokenPermit(Permit):
    """What names the holder of a token may have; those of a server without tokens, with None."""

    def __init__(self, rules: Rules, token: Token | None) -> None:
        self._rules = rules
        self._token = token

    def why_not(self, name: str | int) -> str:
        return self._rules.why_not(self._token, name)

    def names(self) -> Iterator[str]:
        """Made up from his patterns if he has some, else those that he lists, else any."""
        token = self._token
        if token is None or token.names is None:
            return super().names()
        open_ones = [pattern for pattern in token.names if "*" in pattern]
        return map(patterns.fill, cycle(open_ones)) if open_ones else iter(token.names)

    def ports(self, every: range) -> Sequence[int]:
        token = self._token
        if token is None or token.ports is None:
            return every
        return [port for ports in token.ports for port in ports if port in every]


def _token(path: str, entry: _Entry, limits: Limits, each: Limits) -> Token:
    def checked(key: str, check: Any, value: Any, what: str = "") -> Any:
        try:
            return check(value)
        except ValueError as error:
            raise ValueError(f"{path}.{key}: {what}allowed: {error}") from None

    def all_of(key: str, check: Any, values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(checked(f"{key}[{i}]", check, value) for i, value in enumerate(values))

    names, ports = entry.names, entry.ports
    return Token(
        label=checked("label", check_label, entry.label),
        sha256=checked("sha256", _check_hash, entry.sha256),
        names=None if names is None else all_of("names", patterns.check_pattern, names),
        reserve=all_of("reserve", patterns.check_pattern, entry.reserve),
        ports=None if ports is None else all_of("ports", parse_ports, ports),
        reserve_ports=all_of("reserve_ports", parse_ports, entry.reserve_ports),
        limits=_filled(entry.limits, limits),
        each=_filled(entry.each, each),
        expires=None if entry.expires is None else checked("expires", parse_expiry, entry.expires),
    )


def _filled(given: _Limits | None, default: Limits) -> Limits:
    """What the file says, and for the rest what the server does."""

    def pick(said: Any, otherwise: Any) -> Any:
        return otherwise if said is None else said

    if given is None:
        return default
    return Limits(
        tunnels=pick(given.tunnels, default.tunnels),
        visitors=pick(given.visitors, default.visitors),
        requests=pick(given.requests, default.requests),
        rate=pick(given.rate, default.rate),
    )


def _check_hash(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise ValueError("64 hexadecimal digits, the SHA-256 of the token, not the token itself")
    return text.lower()


def _without_text(error: Exception) -> str:
    """What a parser says, without what it quotes of the file."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    place = re.search(r"\(at (line \d+, column \d+|end of document)\)", str(error))
    return place[1] if place else "it is nested too deeply"
