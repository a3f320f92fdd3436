"""Options of a tunnel: what its client asks of the server's edge, in ``x-tinytun-options``.

The field is base64url without padding (RFC 4648 §5) of a JSON object::

    {"rewrite": {"origin": "http://localhost:3000"}, "forwarded_host": false}

The server checks all of it before its 101, which names each option that is applied. A server that does
not know the field (the original's) ignores it: what its client makes of that is ``client/confirming.py``.

A further option is a further attribute of `Options`. It is confirmed by its name; a client refuses a
server that does not confirm it, unless ``client/confirming.py`` says that nothing depends on it.
"""

from __future__ import annotations

import binascii
import json
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import Any, Final

import msgspec
from msgspec import Struct

from tinytun_gevent.wire.origin import parse_origin

MAX_OPTIONS: Final = 8192
"""Bytes of the JSON; as base64 it fits into a CONNECT head beside the longest token."""

HTTP_ONLY: Final = ("rewrite", "forwarded_host")
"""Options of what only an HTTP tunnel has: fields."""

_BASE64: Final = re.compile(r"[A-Za-z0-9_-]+\Z")
_WHERE: Final = re.compile(r"(?P<what>.*?)(?: - at `(?:key in )?\$(?P<path>.*)`)?\Z", re.DOTALL)
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(?P<name>.*)`\Z", re.DOTALL)


class Rewrite(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How public URLs become the local service's, and its own become public."""

    origin: str
    """The local service's: ``http://localhost:3000``."""
    requests: bool = True
    """Whether an ``Origin`` and ``Referer`` that name the tunnel become it."""
    links: bool = True
    """Whether redirects (``Location`` and the like) and cookie domains that name it become public."""


class Options(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What a tunnel's client asks for, beside a name."""

    rewrite: Rewrite | None = None
    forwarded_host: bool = True
    """Whether the service is told its public address, by ``X-Forwarded-Host``, ``-Proto`` and ``-Port``."""

    @property
    def names(self) -> tuple[str, ...]:
        """Those that ask for something."""
        usual = zip(self.__struct_fields__, self.__struct_defaults__, strict=True)
        return tuple(name for name, default in usual if getattr(self, name) != default)


def build_options(options: Options) -> str:
    """Writes the field's value."""
    return urlsafe_b64encode(msgspec.json.encode(options)).rstrip(b"=").decode()


def parse_options(value: str, *, http: bool) -> Options:
    """Reads the field's value, for a tunnel of type ``http`` or another one.

    Raises ``ValueError``, whose text has the path of what is wrong: ``rewrite.origin: …``. It may repeat what
    the peer sent, so it is not fit for a terminal or a log.
    """
    text = _decode(value)
    try:
        options = msgspec.json.decode(text, type=Options)
    except msgspec.ValidationError as error:
        raise ValueError(_path_first(str(error))) from None
    except (msgspec.DecodeError, RecursionError):
        raise ValueError("not JSON") from None
    json.loads(text, object_pairs_hook=_without_duplicates)
    if options.rewrite is not None and parse_origin(options.rewrite.origin.encode()) is None:
        raise ValueError("rewrite.origin: not http://HOST[:PORT] or https://HOST[:PORT]")
    for name in options.names:
        if not http and name in HTTP_ONLY:
            raise ValueError(f"{name}: only HTTP tunnels have it")
    return options


def _decode(value: str) -> bytes:
    """The JSON text in ``value``. Raises ``ValueError``."""
    if len(value) > MAX_OPTIONS * 4 // 3 + 3:
        raise ValueError(f"longer than {MAX_OPTIONS} bytes")
    if not _BASE64.match(value):
        raise ValueError("not base64url without padding")
    try:
        text = urlsafe_b64decode(value + "=" * (-len(value) % 4))
    except binascii.Error:
        raise ValueError("not base64url without padding") from None
    if len(text) > MAX_OPTIONS:
        raise ValueError(f"longer than {MAX_OPTIONS} bytes")
    return text


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses a key that is there twice: two readers might take different ones (RFC 8259 §4)."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
        raise ValueError(f"{twice}: there twice")
    return found


def _path_first(message: str) -> str:
    """msgspec's message with the path in front: ``rewrite.links: Expected `bool`, got `int```."""
    match = _WHERE.match(message)
    assert match is not None  # it matches any text
    path, what = (match["path"] or "").lstrip("."), match["what"]
    if unknown := _UNKNOWN.match(what):
        path, what = f"{path}.{unknown['name']}".lstrip("."), "unknown"
    return f"{path}: {what}" if path else what
