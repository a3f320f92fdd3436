"""Fields that claim who a visitor is or what was asked for: the one table of them.

Proxies, identity providers and clouds set these, and services believe them, so none of a visitor's
reaches a service. ``TrustedFields`` are those of them that a trusted proxy may set all the same.

CGI, WSGI and their like make variables of field names, and programs read the variables. WSGI (PEP 3333,
RFC 3875 §4.1.18) makes ``_`` of ``-``; PHP makes it of ``.`` as well, lighttpd of everything that is neither
letter nor digit (both tried). So all these characters are one character here, and case does not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from tinytun_gevent.wire.fields import Fields

_NAME: Final = re.compile(r"[!#$%&'+.^_`|~0-9A-Za-z-]{1,64}\*?", re.ASCII)
_ALPHANUMERIC: Final = b"0123456789abcdefghijklmnopqrstuvwxyz"
_CANONICAL: Final = bytes(byte if byte in _ALPHANUMERIC else 0x2D for byte in bytes(range(256)).lower())
_CACHED_NAME: Final = 48
"""Bytes of a name whose answer is remembered; all of the table are shorter, and so is what browsers send."""


class Row(NamedTuple):
    """Names with one source."""

    source: str
    """What sets or believes them."""
    names: tuple[str, ...]
    """``*`` at the end of a name stands for any characters."""


TABLE: Final = (
    Row("Forwarding, RFC 7239 and before it", ("Forwarded", "X-Forwarded", "X-Forwarded-*", "Forwarded-*")),
    Row("Forwarding, as frameworks guess it", ("X-Forward-For", "X-Real-*", "Real-IP", "Proxy-Client-IP")),
    Row("The visitor's address", ("Client-IP", "X-Client-IP", "X-Cluster-Client-IP", "X-ProxyUser-IP")),
    Row("The visitor's address, from caches", ("True-Client-IP", "X-True-Client-IP", "X-Originating-IP")),
    Row("The target before it was rewritten", ("X-Original-*", "X-Rewrite-*", "X-HTTP-DestinationURL")),
    Row("Host and scheme", ("X-Host", "X-HTTP-Host-Override", "X-Scheme", "X-URL-Scheme", "Front-End-HTTPS")),
    Row("gunicorn, mounted applications", ("Script-Name", "Path-Info", "X-Script-Name")),
    Row("CGI's proxy variable (httpoxy)", ("Proxy",)),
    Row("CGI's variables, Authelia", ("Remote-*",)),
    Row("Authenticating proxies, Kubernetes", ("X-Remote-*", "X-Authenticated-*", "X-Proxy-Remote-User")),
    Row("oauth2-proxy", ("X-Auth-Request-*",)),
    Row("Grafana, Gitea", ("X-WEBAUTH-*",)),
    Row("authentik, Pomerium, Vouch", ("X-Authentik-*", "X-Pomerium-*", "X-Vouch-*")),
    Row("Caddy's security module", ("X-Token-Subject", "X-Token-User-*")),
    Row("APISIX, WSO2, Google's gateways", ("X-Userinfo", "X-JWT-Assertion", "X-Endpoint-API-UserInfo")),
    Row("Kong", ("X-Consumer-*", "X-Credential-Identifier", "X-Credential-Username", "X-Anonymous-Consumer")),
    Row("OpenID Connect and SAML in Apache", ("OIDC-*", "MELLON-*", "Shib-*", "EPPN", "CAS-User")),
    Row("SiteMinder, Oracle Access Manager", ("SM-User*", "SM-UniversalID", "OAM-*", "OSSO-*")),
    Row("IBM Access Manager", ("IV-User*", "IV-Groups", "IV-Creds", "IV-Remote-Address*")),
    Row("Sandstorm, Replit", ("X-Sandstorm-*", "X-Replit-User-*")),
    Row("ngrok, Teleport", ("Ngrok-Auth-*", "Teleport-JWT-Assertion")),
    Row("Tailscale", ("Tailscale-User-*", "Tailscale-App-Capabilities", "Tailscale-Headers-Info")),
    Row("Client certificates, RFC 9440", ("Client-Cert", "Client-Cert-Chain")),
    Row("Client certificates, from proxies", ("SSL-*", "X-SSL-*", "X-Client-Cert*", "X-TLS-Client-*")),
    Row("Client certificates, for Puppet", ("X-Client-Verify", "X-Client-DN")),
    Row("Jetty", ("Proxy-Auth-Cert", "Proxy-SSL-Id", "X-Proxied-HTTPS")),
    Row("WebLogic, WebSphere", ("WL-Proxy-*", "$WS*")),
    Row("IIS", ("X-ARR-*", "MS-ASPNETCORE-*")),
    Row("Envoy, Linkerd", ("X-Envoy-*", "L5d-*")),
    Row("What lets a service hand out files", ("X-Accel-*", "X-Sendfile-*")),
    Row("Next.js, for requests of its own", ("X-Middleware-Subrequest*",)),
    Row("Cloudflare", ("CF-*",)),
    Row("Fastly", ("Fastly-Client*", "Fastly-FF", "Fastly-SSL")),
    Row("Akamai", ("Akamai-Client-IP", "X-Akamai-Edgescape")),
    Row("Imperva, Sucuri", ("Incap-Client-IP", "X-Sucuri-*")),
    Row("Alibaba, ChinaCache", ("Ali-CDN-Real-IP", "CDN-Src-IP")),
    Row("Amazon's load balancers", ("X-Amzn-OIDC-*", "X-Amzn-MTLS-*", "X-Amzn-TLS-*")),
    Row("Amazon's gateways", ("X-Apigateway-*", "X-Amzn-Request-Context", "X-Amzn-Lambda-Context")),
    Row("Amazon CloudFront", ("CloudFront-*",)),
    Row("Google", ("X-Goog-Authenticated-User-*", "X-Goog-IAP-*", "X-Appengine-*")),
    Row("Microsoft's App Service", ("X-MS-Client-Principal*", "X-MS-Token-*")),
    Row("Microsoft's Front Door", ("X-Azure-*", "X-FD-ClientIP", "X-FD-SocketIP")),
    Row("Fly", ("Fly-Client-IP", "Fly-Forwarded-*", "Fly-Src*")),
    Row("Vercel", ("X-Vercel-Forwarded-*", "X-Vercel-Proxied-*", "X-Vercel-IP-*", "X-Vercel-OIDC-*")),
    Row("Netlify, DigitalOcean", ("X-NF-Client-*", "DO-Connecting-IP")),
    Row("This server", ("X-Tinytun-*",)),
)
"""In the order of ``SECURITY.md``. What honest senders use is not in it: webhooks are signed in
``X-Vercel-Signature`` or ``Tailscale-Webhook-Signature``, applications take ``X-User-Id`` and
``X-Auth-Token`` from their own clients, and ``Via`` and ``CDN-Loop`` say nothing of the visitor."""

HONEST: Final = ("CF-Webhook-Auth", "CF-Access-Client-Id", "CF-Access-Client-Secret")
"""Passed on though the table would have them: secrets with which a sender shows who it is."""

OWN: Final = ("X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Forwarded-Port", "X-Tinytun-*")
"""Written by this server: no proxy may set them."""


def canonical(name: bytes) -> bytes:
    """Return what is equal for all spellings of a field name that may become one variable."""
    return name.translate(_CANONICAL)


def _of(names: Iterable[str]) -> tuple[frozenset[bytes], tuple[bytes, ...]]:
    """Return the canonical whole names, and the canonical beginnings of those with ``*``."""
    spelled = [name.encode() for name in names]
    whole = frozenset(canonical(name) for name in spelled if not name.endswith(b"*"))
    return whole, tuple(canonical(name[:-1]) for name in spelled if name.endswith(b"*"))


_WHOLE, _BEGINNINGS = _of(name for row in TABLE for name in row.names)
_HONEST: Final = _of(HONEST)[0]
_OWN, _OWN_BEGINNINGS = _of(OWN)


def is_claim(name: bytes) -> bool:
    """Return whether the table has the field ``name``, however it is spelled: no visitor may send it."""
    return _cached_is_claim(name) if len(name) <= _CACHED_NAME else _is_claim(name)


def _is_claim(name: bytes) -> bool:
    name = canonical(name)
    return name in _WHOLE or (name.startswith(_BEGINNINGS) and name not in _HONEST)


_cached_is_claim = lru_cache(maxsize=1024)(_is_claim)


def _is_own(name: bytes) -> bool:
    return name in _OWN or name.startswith(_OWN_BEGINNINGS)


class TrustedFields:
    """Which fields of the table a trusted proxy may set: ``TRUSTED_FIELDS``.

    A proxy removes a visitor's field in the spelling that it writes itself, so only that one is kept, but
    for its case.
    """

    def __init__(self, names: Iterable[str]) -> None:
        """``names`` are as :func:`check_trusted` allows them."""
        self._named = re.compile(b"|".join(map(_spelled_alike, names)) or b"(?!)", re.IGNORECASE)

    def kept(self, claims: Fields) -> Fields:
        """Return those of ``claims`` that are named, without what this server writes itself."""
        return [pair for pair in claims if self._named.fullmatch(pair[0]) and not _is_own(canonical(pair[0]))]


def _spelled_alike(name: str) -> bytes:
    """Return the pattern for ``name``; what ``*`` stands for is parted by the same characters as the name.

    Else ``X-Auth-Request-*`` would keep ``X-Auth-Request-Preferred_Username``, which oauth2-proxy hands on.
    """
    pattern = re.escape(name.removesuffix("*"))
    if name.endswith("*"):
        parting = re.escape("".join(sorted(set(re.sub("[0-9A-Za-z*]", "", name)))))
        pattern += f"[0-9A-Za-z{parting}]*"
    return pattern.encode()


def check_trusted(name: str) -> None:
    """Raise ``ValueError`` with the reason unless ``TRUSTED_FIELDS`` may have ``name``.

    One that is not in the table may not: every visitor may send it, so trust in it would mean nothing.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"not {name!r}")
    spelled = canonical(name.removesuffix("*").encode())
    begins = name.endswith("*")
    if spelled.startswith(_OWN_BEGINNINGS) or (spelled in _OWN and not begins):
        raise ValueError(f"not {name!r}, which this server writes itself")
    if not (spelled.startswith(_BEGINNINGS) if begins else _is_claim(spelled)):
        raise ValueError(f"not {name!r}, which any visitor may send")
