"""Rewrites what names the public origin in requests, and what names the local service's in answers.

A service that sees its own ``Host`` refuses an ``Origin`` that names another one (Django's CSRF check,
the WebSockets of Jupyter and Next), and redirects visitors to an address that only its own computer knows.
So with ``--host-header`` both directions are translated:

- ``Origin`` and ``Referer`` of a request that equal the tunnel's *own* public origin become the service's.
  Any other stays, ``null`` too, so that a service still recognises requests from other sites.
- ``Location``, ``Content-Location`` and ``Refresh`` that name the service become public, as nginx's
  ``proxy_redirect default`` does, by the scheme that the visitor came by. A cookie's ``Domain`` that covers
  the service is left out: the cookie is then the public host's alone (RFC 6265 §5.3), as it was the
  service's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from tinytun_gevent.wire.fields import Fields
from tinytun_gevent.wire.forwarded import Forwarding
from tinytun_gevent.wire.origin import PORTS, Origin, parse_origin

if TYPE_CHECKING:
    from tinytun_gevent.wire.options import Options
    from tinytun_gevent.wire.request import RequestHead

LOCAL: Final = frozenset({b"localhost", b"127.0.0.1", b"[::1]", b"0.0.0.0", b"[::]"})
"""Names of this computer: a service on one of them may call itself by any other."""

_URL: Final = re.compile(rb"(https?:)?//([^/?#\\\"']*)(.*)", re.IGNORECASE | re.DOTALL)
_REFRESH: Final = re.compile(rb"(.*?\burl[ \t]*=[ \t]*[\"']?)(.*)", re.IGNORECASE | re.DOTALL)


def rewriting_of(options: Options | None, published: str | None) -> Rewriting | None:
    """What a tunnel's ``options`` ask for; None if nothing. ``published`` is its public URL, as shown."""
    if options is None or (options.rewrite is None and options.forwarded_host):
        return None
    return Rewriting(options, published)


class Rewriting:
    """What one tunnel asked to have rewritten; made once, used for each of its requests."""

    __slots__ = ("_forwarded_host", "_links", "_origin", "_published", "_requests", "_target")

    def __init__(self, options: Options, published: str | None) -> None:
        """See `rewriting_of`."""
        rewrite = options.rewrite
        self._target = parse_origin(rewrite.origin.encode()) if rewrite is not None else None
        #: The same as an ``Origin`` field has it.
        self._origin = b"" if self._target is None else bytes(self._target)
        self._requests = rewrite is not None and rewrite.requests
        self._links = rewrite is not None and rewrite.links
        self._forwarded_host = options.forwarded_host
        self._published = parse_origin((published or "").rstrip("/").encode())

    def request(self, head: RequestHead, forwarding: Forwarding) -> tuple[Fields, Forwarding]:
        """The fields that the service gets, those about forwarding apart; neither argument is changed."""
        fields = head.fields
        if self._requests:
            own = own_origins(public_origin(head, forwarding), self._published)
            fields = request_fields(fields, own, self._origin)
        if not self._forwarded_host:
            forwarding = replace(forwarding, tells_origin=False)
        return fields, forwarding

    def links(self, head: RequestHead, forwarding: Forwarding) -> Links | None:
        """What becomes of the links in the answers to a request; None if they stay as they are."""
        public = public_origin(head, forwarding)
        if not self._links or self._target is None or public is None:
            return None
        return _links(self._target, public, self._published)


def public_origin(head: RequestHead, forwarding: Forwarding) -> Origin | None:
    """The origin that a visitor's browser sees: the scheme it came by, and the host it asked for."""
    host = forwarding.host or head.host_field
    return parse_origin(b"%b://%b" % (forwarding.proto.encode(), host))


@lru_cache(maxsize=1024)
def own_origins(public: Origin | None, published: Origin | None) -> frozenset[Origin]:
    """The origins that are the tunnel's: the one that the visitor asked, and the published one.

    The latter is what browsers see where a proxy in front, that nobody told the server of, ends TLS. A plain
    one never counts for a visitor by TLS: anybody on the way may write pages of that.
    """
    if public is not None and public.scheme == b"https" and published and published.scheme == b"http":
        published = None
    return frozenset(origin for origin in (public, published) if origin is not None)


def request_fields(fields: Fields, own: frozenset[Origin], target: bytes) -> Fields:
    """``fields``, or a copy of them with an ``Origin`` and ``Referer`` of ``own`` made ``target``'s."""
    written = fields
    for index, (name, value) in enumerate(fields):
        key = name.lower()
        if key == b"origin":
            rewritten = target if parse_origin(value.rstrip(b" \t")) in own else value
        elif key == b"referer":
            rewritten = rewrite_url(value, own, target)
        else:
            continue
        if rewritten is not value:
            written = fields.copy() if written is fields else written
            written[index] = name, rewritten
    return written


def rewrite_url(value: bytes, own: frozenset[Origin], target: bytes) -> bytes:
    """The same path at ``target``, if ``value`` is an absolute URL of ``own``; otherwise ``value``."""
    match = _URL.fullmatch(value)
    if match is None or match[1] is None or parse_origin(b"%b//%b" % (match[1], match[2])) not in own:
        return value
    return target + match[3]


class Links:
    """The links in the answers to one request: those to ``target`` become ``public``."""

    __slots__ = ("_hosts", "_ports", "_public", "_secure")

    def __init__(self, target: Origin, public: Origin, published: Origin | None) -> None:
        self._public = public
        self._hosts = LOCAL if target.host in LOCAL else frozenset({target.host})
        # The scheme does not matter: a service that was told of a visitor by https says https://localhost:3000.
        usual = target.port == PORTS[target.scheme]
        self._ports = frozenset(PORTS.values()) if usual else frozenset({target.port})
        #: What https becomes: a service that sends plain visitors there is not to get them back by http.
        self._secure = public
        if target.scheme == public.scheme == b"http" and published and published.scheme == b"https":
            self._secure = published

    def fields(self, fields: Fields) -> Fields:
        """A response's ``fields``, or a copy of them with its links made public."""
        written = fields
        for index, (name, value) in enumerate(fields):
            rewrite = _RESPONSE_FIELDS.get(name.lower())
            if rewrite is not None:
                written = fields.copy() if written is fields else written
                written[index] = name, rewrite(self, value)
        return written

    def link(self, value: bytes) -> bytes:
        """``Location`` and ``Content-Location``: ``scheme://host[:port]…`` or ``//host[:port]…``."""
        match = _URL.fullmatch(value)
        if match is None or not self._is_target(match[1], match[2]):
            return value
        scheme, _, rest = match.groups()
        if scheme is None:
            return b"//" + self._public.authority + rest
        return bytes(self._secure if scheme.lower() == b"https:" else self._public) + rest

    def refresh(self, value: bytes) -> bytes:
        """``Refresh: 5; url=…``, which no RFC has and every browser does."""
        match = _REFRESH.fullmatch(value)
        return value if match is None else match[1] + self.link(match[2])

    def cookie(self, value: bytes) -> bytes:
        """``Set-Cookie`` without a ``Domain`` that no browser takes from the public host."""
        if b"domain" not in value.lower():
            return value
        first, *attributes = value.split(b";")
        return b";".join([first, *(part for part in attributes if not self._is_foreign_domain(part))])

    def _is_target(self, scheme: bytes | None, authority: bytes) -> bool:
        origin = parse_origin(b"%b//%b" % (scheme or self._public.scheme + b":", authority))
        if origin is None or origin.host not in self._hosts:
            return False
        return origin.port in self._ports

    def _is_foreign_domain(self, attribute: bytes) -> bool:
        """Whether it is a ``Domain`` that covers the service and not the public host (RFC 6265 §5.1.3)."""
        name, _, value = attribute.partition(b"=")
        if name.strip(b" \t").lower() != b"domain":
            return False
        domain = value.strip(b" \t").lower().removeprefix(b".")
        return any(_covers(domain, host) for host in self._hosts) and not _covers(domain, self._public.host)


def _covers(domain: bytes, host: bytes) -> bool:
    return bool(domain) and (host == domain or host.endswith(b"." + domain))


_links = lru_cache(maxsize=1024)(Links)  # they depend on the visitor's scheme and host only

_RESPONSE_FIELDS: Final[dict[bytes, Callable[[Links, bytes], bytes]]] = {
    b"location": Links.link,
    b"content-location": Links.link,
    b"refresh": Links.refresh,
    b"set-cookie": Links.cookie,
}
