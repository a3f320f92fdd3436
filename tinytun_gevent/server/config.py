"""Everything the server can be told: variables, flags, defaults and what is allowed.

One dataclass field is one variable; its metadata names the environment variable, the flag
and the meaning, from which the README's table and the command's help are checked. Nothing
here needs gevent, so gunicorn's master and ``--check`` can use it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from ..errors import UsageError
from . import settings
from .account import Limits
from .addresses import Network, Networks, bracketed, is_loopback, local
from .given import Given, collect, quoted
from .settings import Form, PeerAddress, fill_url

HIGHEST_COUNT: Final = 1_000_000
"""More connections than a process can have descriptors are a typing mistake."""

HIGHEST_RATE: Final = 10**11
"""Bytes a second; no network is faster."""

HIGHEST_WAIT: Final = 86_400.0
"""Seconds; no step of a connection sensibly waits for longer than a day."""


def _option(variable: str, default: Any, form: Form, meaning: str) -> Any:
    """A field: its variable, its default as the variable would say it, how it is read, what it means."""
    flag = "--" + variable.lower().replace("_", "-")
    metadata = {"variable": variable, "flag": flag, "help": meaning, "form": form}
    return field(default=form.read(default), metadata=metadata)


def _seconds(variable: str, default: str, meaning: str, low: float = 0.1) -> Any:
    return _option(variable, default, settings.seconds(low, HIGHEST_WAIT), meaning)


def _count(variable: str, default: str, meaning: str, low: int = 1, high: int = HIGHEST_COUNT) -> Any:
    return _option(variable, default, settings.whole(low, high), meaning)


def _limit(variable: str, default: str, meaning: str, high: int = HIGHEST_COUNT) -> Any:
    return _count(variable, default, f"{meaning}; 0: no limit", low=0, high=high)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """A server's configuration; every construction checks every value.

    A value may be given as Python knows it or as text, as the variable would say it.
    Raises UsageError: one line with the variable, the value and what is allowed. Times are
    in seconds, sizes in bytes.
    """

    connection_port: int = _option(
        "CONNECTION_PORT", "5554", settings.PORT, "port that tunnel clients connect to"
    )
    proxy_port: int = _option("PROXY_PORT", "5555", settings.PORT, "port that visitors reach HTTP tunnels on")
    tcp_proxy_port: int = _option(
        "TCP_PROXY_PORT", "5556", settings.PORT, "port for TCP behind a PROXY protocol load balancer"
    )
    metadata_port: int = _option("METADATA_PORT", "5553", settings.PORT, "port of the internal metadata API")
    proxy_tls_port: int = _option(
        "PROXY_TLS_PORT",
        "5557",
        settings.PORT,
        "port that visitors reach HTTP tunnels on by https, where TLS_DIR is set",
    )
    bind: str = _option(
        "BIND",
        "[::]",
        settings.ADDRESS,
        "address of the public ports ([::]: all, IPv4 and IPv6; 0.0.0.0 where there is no IPv6)",
    )
    metadata_bind: str = _option(
        "METADATA_BIND",
        "127.0.0.1",
        settings.ADDRESS,
        "address of the metadata port, which lists everybody's tunnels",
    )
    base_domains: tuple[str, ...] = _option(
        "BASE_DOMAIN",
        "local.tinytun.com",
        settings.BASE_DOMAINS,
        "domains whose subdomains are tunnels, comma-separated; new tunnels are shown under the first",
    )
    public_url: str = _option(
        "PUBLIC_URL",
        "",
        settings.PUBLIC_URL,
        "how a tunnel's URL is shown: {name}, {domain} and {port} are filled in; blank: "
        "http://{name}.{domain}:{port}, or https where TLS_DIR is set",
    )
    tls_dir: str = _option(
        "TLS_DIR",
        "",
        settings.DIRECTORY,
        "directory with certificates and their keys, in PEM files however deep; blank: no TLS",
    )
    connection_tls: str = _option(
        "CONNECTION_TLS",
        "accepted",
        settings.TLS_USE,
        "TLS on CONNECTION_PORT where TLS_DIR is set: accepted, beside plain clients, or required",
    )
    http_redirect: bool = _option(
        "HTTP_REDIRECT",
        "off",
        settings.SWITCH,
        "whether PROXY_PORT answers with a redirect to https, except for ACME challenges",
    )
    tcp_ports: range = _option("TCP_PORTS", "20000-60000", settings.RANGE, "ports that TCP tunnels get")
    tcp_listen: bool = _option(
        "TCP_LISTEN",
        "on",
        settings.SWITCH,
        "whether tunnels of type tcp listen on their port; off: only TCP_PROXY_PORT leads to them",
    )
    trusted_proxies: tuple[Network, ...] = _option(
        "TRUSTED_PROXIES",
        "",
        settings.NETWORKS,
        "addresses and CIDRs whose PROXY headers and forwarding fields are believed, comma-separated",
    )
    trusted_fields: tuple[str, ...] = _option(
        "TRUSTED_FIELDS",
        "",
        settings.TRUSTED_FIELDS,
        "fields about the visitor that those addresses, and PEERS, may set for services, such as "
        "X-Auth-Request-*, comma-separated",
    )
    auth_file: str = _option(
        "AUTH_FILE",
        "",
        settings.FILE,
        "file with the tokens of those who may open tunnels; without it, everybody may",
    )
    reserved_names: tuple[str, ...] = _option(
        "RESERVED_NAMES",
        "",
        settings.PATTERNS,
        "subdomains that nobody gets, comma-separated; * stands for any characters",
    )
    peers: tuple[PeerAddress, ...] = _option(
        "PEERS",
        "",
        settings.PEERS,
        "the other nodes: a DNS name or a list of host[:metadata_port[:proxy_port[:tcp_proxy_port]]]",
    )
    metadata_hosts: tuple[str, ...] = _option(
        "METADATA_HOSTS", "", settings.HOST_NAMES, "further names that the metadata API answers to"
    )
    log_level: str = _option(
        "LOG_LEVEL",
        "info",
        settings.LEVEL,
        "off, error, warn, info, debug or trace; RUST_LOG is understood as well",
    )
    log_format: str = _option(
        "LOG_FORMAT", "text", settings.LOG_FORMAT, "text, or json: an object a line, with its fields as keys"
    )
    access_log: str = _option(
        "ACCESS_LOG",
        "",
        settings.LOG_FILE,
        "file for a line about each HTTP exchange, in the combined format; -: standard output",
    )
    head_bytes: int = _count(
        "HEAD_BYTES", "32768", "longest request head, in bytes (431 beyond it)", low=1024, high=1 << 20
    )
    head_field_bytes: int = _count(
        "HEAD_FIELD_BYTES",
        "16384",
        "longest field of a request head, in bytes (431 beyond it)",
        low=1024,
        high=1 << 20,
    )
    head_fields: int = _count("HEAD_FIELDS", "100", "most fields in a request head", high=10_000)
    head_timeout: float = _seconds("HEAD_TIMEOUT", "10", "seconds for a whole request head (408 after it)")
    min_body_rate: int = _count(
        "MIN_BODY_RATE",
        "240",
        "bytes a second of a request's body: after 20 s below it, it gives way to a visitor that waits (408, "
        "as after a pause of 60 s in any case); and of an answer that is to be taken (cut off after 300 s); "
        "0: no limit",
        low=0,
    )
    answer_head_bytes: int = _count(
        "ANSWER_HEAD_BYTES",
        "65536",
        "longest response head, in bytes (502 beyond it)",
        low=1024,
        high=1 << 20,
    )
    answer_head_fields: int = _count(
        "ANSWER_HEAD_FIELDS", "200", "most fields in a response head", high=10_000
    )
    interim_answers: int = _count(
        "INTERIM_ANSWERS", "64", "most 1xx responses to one request", low=0, high=10_000
    )
    answer_timeout: float = _seconds(
        "ANSWER_TIMEOUT",
        "300",
        "seconds for the local service to begin its response (504 after it)",
    )
    stream_timeout: float = _seconds(
        "STREAM_TIMEOUT", "10", "seconds for the tunnel client to accept a visitor (504 after it)"
    )
    handshake_timeout: float = _seconds(
        "HANDSHAKE_TIMEOUT", "5", "seconds for a client's CONNECT, and again for its first HTTP/2 frames"
    )
    proxy_header_timeout: float = _seconds("PROXY_HEADER_TIMEOUT", "3", "seconds for a PROXY protocol header")
    queue_timeout: float = _seconds(
        "QUEUE_TIMEOUT", "5", "seconds a visitor waits at a tunnel's concurrency limit (503 after it)"
    )
    state_dir: str = _option(
        "STATE_DIR",
        "",
        settings.DIRECTORY,
        "the server's own directory, for names that outlive a restart; blank: the system's usual place",
    )
    lease_seconds: float = _seconds(
        "LEASE_SECONDS", "30", "seconds a lost tunnel's name is kept for its owner", low=0
    )
    park_seconds: float = _seconds(
        "PARK_SECONDS", "10", "seconds a visitor waits for a client that was lost (503 after it)", low=0
    )
    park_visitors: int = _count(
        "PARK_VISITORS", "256", "most visitors that wait so at once, for each tunnel (503 beyond it)"
    )
    idle_timeout: float = _seconds(
        "IDLE_TIMEOUT", "75", "seconds an HTTP connection may be idle between requests"
    )
    tunnel_idle_timeout: float = _seconds(
        "TUNNEL_IDLE_TIMEOUT", "0", "the same for upgraded and TCP connections; 0: no limit", low=0
    )
    max_connections: int = _count("MAX_CONNECTIONS", "65536", "most connections at once on each port")
    max_tunnels: int = _count("MAX_TUNNELS", "10000", "most tunnels at once (503 beyond it)")
    source_tunnels: int = _limit(
        "SOURCE_TUNNELS",
        "50",
        "most tunnels at once of clients with one address, on a server without AUTH_FILE (429 beyond it)",
    )
    token_tunnels: int = _limit("TOKEN_TUNNELS", "100", "most tunnels at once of one token (429 beyond it)")
    token_visitors: int = _limit(
        "TOKEN_VISITORS", "32768", "most visitors at once of all tunnels of a token (503 beyond it)"
    )
    token_requests: int = _limit(
        "TOKEN_REQUESTS", "0", "HTTP requests a second to all tunnels of a token (429 beyond them)"
    )
    token_rate: int = _limit(
        "TOKEN_RATE",
        "0",
        "bytes a second, both ways together, through all tunnels of a token",
        high=HIGHEST_RATE,
    )
    tunnel_visitors: int = _limit(
        "TUNNEL_VISITORS", "16384", "most visitors at once of each tunnel (503 beyond it)"
    )
    tunnel_requests: int = _limit(
        "TUNNEL_REQUESTS", "0", "HTTP requests a second to each tunnel (429 beyond them)"
    )
    tunnel_rate: int = _limit(
        "TUNNEL_RATE", "0", "bytes a second, both ways together, through each tunnel", high=HIGHEST_RATE
    )
    connect_rate: int = _limit(
        "CONNECT_RATE", "0", "connects a second of visitors with one address (429 beyond them)"
    )
    connect_burst: int = _count("CONNECT_BURST", "100", "connects of one address that may come at once")
    backlog: int = _count("BACKLOG", "2048", "connections that the system queues on each port", high=65_535)
    drain_timeout: float = _option(
        "DRAIN_TIMEOUT",
        "25",
        settings.seconds(0, 3600),
        "seconds that running exchanges get to finish when the server stops",
    )

    reload_timeout: float = _option(
        "RELOAD_TIMEOUT",
        "60",
        settings.seconds(0, 86_400),
        "the same in the old process after a reload, while the new one serves",
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            given = getattr(self, option.name)
            object.__setattr__(self, option.name, _checked(option.metadata, given))
        self._check_ports()
        self._check_redirect()
        if self.trusted_fields and not self.trusted_proxies and not self.peers:
            raise UsageError("TRUSTED_FIELDS: says what TRUSTED_PROXIES and PEERS may set; there are none")

    def _check_ports(self) -> None:
        """Two listeners on one port are a mistake that ``bind`` would report as another program's."""
        seen: dict[int, str] = {}
        if self.tls_required and not self.tls_dir:
            raise UsageError("CONNECTION_TLS=required: needs TLS_DIR; allowed without it: accepted")
        names = ["connection_port", "proxy_port", "tcp_proxy_port", "metadata_port"]
        for name in [*names, "proxy_tls_port"] if self.tls_dir else names:
            port = getattr(self, name)
            if port and port in seen:
                raise UsageError(
                    f"{name.upper()}={port}: is {seen[port]} as well; allowed: a port of its own"
                )
            seen[port] = name.upper()

    def _check_redirect(self) -> None:
        """A redirect must lead to something, and not back to itself."""
        if not self.http_redirect or self.tls_dir:
            return
        if not self.public_url.lower().startswith("https:"):
            raise UsageError("HTTP_REDIRECT=on: needs TLS_DIR, or a PUBLIC_URL that begins with https://")
        if not self.trusted_proxies:
            raise UsageError(
                "HTTP_REDIRECT=on: without TLS_DIR needs TRUSTED_PROXIES, whose X-Forwarded-Proto says "
                "who came by https"
            )

    @classmethod
    def from_environ(
        cls, environ: Mapping[str, str], overrides: Mapping[str, str] | None = None
    ) -> ServerConfig:
        """The configuration of a command: ``overrides`` (flags) win over ``environ``, that over a file.

        See `given.collect`. Raises UsageError.
        """
        return cls.of(cls.given(environ, overrides))

    @classmethod
    def given(
        cls,
        environ: Mapping[str, str],
        overrides: Mapping[str, str] | None = None,
        file: Mapping[str, str] | None = None,
    ) -> Given:
        """What was said, and where; see `given.collect`. Raises UsageError."""
        return collect(fields(cls), environ, overrides or {}, file)

    @classmethod
    def of(cls, given: Given) -> ServerConfig:
        """The configuration that was given. Raises UsageError, which names the file if that is to blame."""
        try:
            return cls(**given.values)  # type: ignore[arg-type]
        except UsageError as error:
            variable, colon, rest = str(error).partition(":")
            variable, equals, value = variable.partition("=")
            if not given.is_from_file(variable):
                raise
            text = f"{given.path}: {variable.lower()}{equals and ' = '}{value}{colon}{rest}"
            raise UsageError(text) from None

    def url_of(self, name: str) -> str:
        """The URL under which visitors reach the HTTP tunnel ``name``."""
        scheme = "https" if self.tls_dir else "http"
        template = self.public_url or scheme + "://{name}.{domain}:{port}"
        secure = self.tls_dir and template.startswith("https:")
        port = self.proxy_tls_port if secure else self.proxy_port
        return fill_url(template, name, self.base_domains[0], port)

    @property
    def tls_required(self) -> bool:
        """Whether tunnel clients must speak TLS."""
        return self.connection_tls == settings.REQUIRED

    def listeners(self) -> tuple[tuple[str, str, int], ...]:
        """``(variable, address, port)`` of the listening sockets, in the order they are made."""
        plain = (
            ("METADATA_PORT", self.metadata_bind, self.metadata_port),
            ("CONNECTION_PORT", self.bind, self.connection_port),
            ("PROXY_PORT", self.bind, self.proxy_port),
            ("TCP_PROXY_PORT", self.bind, self.tcp_proxy_port),
        )
        return (*plain, ("PROXY_TLS_PORT", self.bind, self.proxy_tls_port)) if self.tls_dir else plain

    def with_ports(self, ports: Sequence[int]) -> ServerConfig:
        """The same with the real ports of those :meth:`listeners`."""
        fields = [variable.lower() for variable, _, _ in self.listeners()]
        return replace(self, **dict(zip(fields, ports, strict=True)))  # type: ignore[arg-type]

    @property
    def deaf_to_peers(self) -> bool:
        """Whether there are peers elsewhere that cannot ask us: the metadata port is on loopback only."""
        here = [is_loopback(entry.host) for entry in self.peers]
        return bool(here) and not all(here) and is_loopback(self.metadata_bind)

    @property
    def token_limits(self) -> Limits:
        """What the tunnels of one token may use together, where nothing else is said of it."""
        return Limits(self.token_tunnels, self.token_visitors, self.token_requests, self.token_rate)

    @property
    def tunnel_limits(self) -> Limits:
        """What each tunnel may use, where nothing else is said of its token."""
        return Limits(0, self.tunnel_visitors, self.tunnel_requests, self.tunnel_rate)

    def trusted(self) -> Networks:
        """Whose forwarding fields and PROXY headers are believed, to be asked with ``in``."""
        return Networks(self.trusted_proxies)

    def summary(self) -> str:
        """The values that differ from the defaults, one line a variable, as ``--check`` shows them."""
        lines = []
        for option in fields(self):
            value, form = getattr(self, option.name), option.metadata["form"]
            if value != option.default:
                lines.append(f"{option.metadata['variable']}={form.show(value)}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Variable:
    """One row of the table of variables; ``default`` is text, as the variable would say it."""

    name: str
    flag: str
    default: str
    help: str


def variables() -> tuple[Variable, ...]:
    """All variables of the server in the order they are documented."""
    return tuple(
        Variable(
            name=option.metadata["variable"],
            flag=option.metadata["flag"],
            default=option.metadata["form"].show(option.default),
            help=option.metadata["help"],
        )
        for option in fields(ServerConfig)
    )


def server_url(config: ServerConfig) -> str:
    """What a client on this machine gives as ``--server``: never an all-addresses address."""
    scheme = "https" if config.tls_required else "http"
    return f"{scheme}://{bracketed(local(config.bind))}:{config.connection_port}"


def notice(config: ServerConfig) -> str:
    """What an operator should know of a server without tokens, in a line; blank if nobody else reaches it."""
    if config.auth_file or (is_loopback(config.bind) and not config.trusted_proxies):
        return ""
    return (
        f"there are no tokens: whoever reaches port {config.connection_port} can open a tunnel. "
        "This changes it: AUTH_FILE=/etc/tinytun-tokens.toml"
    )


def metadata_url(config: ServerConfig) -> str:
    """Where the metadata API is reached on this machine, without a trailing slash."""
    return f"http://{bracketed(local(config.metadata_bind))}:{config.metadata_port}"


def _checked(metadata: Mapping[str, Any], given: Any) -> Any:
    """``given``, as text or as a value, through the same check."""
    form: Form = metadata["form"]
    variable: str = metadata["variable"]
    try:
        text = given if isinstance(given, str) else form.show(given)
    except (TypeError, ValueError, AttributeError):
        raise UsageError(f"{variable}={given!r}: is of a wrong type") from None
    try:
        return form.read(text.strip())
    except ValueError as error:
        raise UsageError(f"{variable}={quoted(text)}: allowed: {error}") from None
