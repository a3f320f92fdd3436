"""Everything the client can be told, checked: flags win over environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast, get_args

from ..errors import UsageError
from ..wire.handshake import Kind, is_host, is_subdomain
from ..wire.origin import parse_origin
from .address import is_address
from .credentials import PLAIN, choose_token, must_hide
from .proxies import Proxy, choose_proxy
from .servers import DEFAULT_SERVER, SERVER_VARIABLE, Choice, ServerAddress, choose_server, parse_server
from .state import state_directory
from .target import Target, Verify, parse_target

if TYPE_CHECKING:
    from ..wire.options import Options

__all__ = [
    "DEFAULT_SERVER",
    "SERVER_VARIABLE",
    "ClientConfig",
    "ServerAddress",
    "make_config",
    "parse_server",
]

#: What a port may be; which ones a server gives to TCP tunnels, it says itself (its TCP_PORTS).
TCP_PORTS = range(1, 65536)

#: More streams than a process can have descriptors are a typing mistake.
MAX_CONCURRENCY = 1_000_000
DEFAULT_CONCURRENCY = 100

#: What a server allows; more TCP connections hardly carry more.
MAX_SESSIONS = 16
#: With Linux's 4 MiB in flight on each: 320 MB/s over 50 ms, and a quarter of a single one's losses.
DEFAULT_SESSIONS = 4

LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """One tunnel, as the user wants it; build it with `make_config`, which checks.

    ``subdomain`` and ``port`` are None for "any"; ``host_header`` is None for the visitor's
    own Host; ``ca`` is a PEM file that replaces the system's trust store;
    ``connect_timeout`` is in seconds, None for giving up at the first start only, and with ``wait`` never;
    ``sessions`` is how many TCP
    connections to the server the tunnel may have; ``state_dir`` is where what proves that a name is ours is
    kept, None for in memory only.
    """

    kind: Kind
    target: Target
    server: ServerAddress
    subdomain: str | None = None
    port: int | None = None
    concurrency: int = DEFAULT_CONCURRENCY
    sessions: int = DEFAULT_SESSIONS
    host_header: str | None = None
    #: What else is asked of the server's edge; None for nothing.
    options: Options | None = None
    ca: str | None = None
    insecure: bool = False
    proxy: Proxy | None = None
    connect_timeout: float | None = None
    wait: bool = False
    state_dir: str | None = None
    #: What says who opens the tunnel; None for nobody in particular.
    token: str | None = field(default=None, repr=False)


def make_config(
    target: str,
    *,
    kind: Kind | str = Kind.HTTP,
    server: str | None = None,
    subdomain: str | None = None,
    port: int | str | None = None,
    concurrency: int | str = DEFAULT_CONCURRENCY,
    sessions: int | str = DEFAULT_SESSIONS,
    host_header: str | None = None,
    forwarded_host: bool | str = "on",
    rewrite_links: bool | str | None = None,
    ca: str | os.PathLike[str] | None = None,
    insecure: bool = False,
    token: str | None = None,
    token_file: str | os.PathLike[str] | None = None,
    proxy: str | None = None,
    connect_timeout: float | str | None = None,
    wait: bool = False,
    verify_target: str = "auto",
    environ: Mapping[str, str] = os.environ,
) -> ClientConfig:
    """Check every value and put them together.

    ``server`` None means `SERVER_VARIABLE`, then what `tinytun login` has kept, then `DEFAULT_SERVER`, which
    is logged as a warning; ``proxy`` None means what
    ``HTTPS_PROXY`` and ``NO_PROXY`` say, an empty one none at all; ``token`` None what ``token_file`` has,
    then ``TINYTUN_TOKEN``, then what `tinytun login` has kept for the server. Raises UsageError, which names
    the flag or variable, the value and what is allowed. ``rewrite_links`` None means on if there is a
    ``host_header``.
    """
    kind = _check_kind(kind)
    http = kind is Kind.HTTP
    if http and port is not None:
        raise UsageError("--port is for tcp tunnels")
    if not http and (subdomain is not None or host_header is not None):
        raise UsageError("--subdomain and --host-header are for http tunnels")
    if not http and (rewrite_links is not None or not _check_switch("--forwarded-host", forwarded_host)):
        raise UsageError("--forwarded-host and --rewrite-links are for http tunnels")
    parsed_target = parse_target(str(target), _check_verify(verify_target))
    chosen_host = _check_host_header(host_header, parsed_target)
    choice = choose_server(server, environ)
    address = choice.address
    chosen_proxy = choose_proxy(address.host, address.port, proxy, environ)
    chosen_token = choose_token(token, token_file, address.authority, environ)
    if chosen_token is not None and not insecure:
        _check_hidden(address, chosen_proxy)
    config = ClientConfig(
        kind=kind,
        target=parsed_target,
        server=address,
        subdomain=_check_subdomain(subdomain),
        port=_check_tcp_port(port),
        concurrency=_check_number("--concurrency", concurrency, range(1, MAX_CONCURRENCY + 1)),
        sessions=_check_number("--sessions", sessions, range(1, MAX_SESSIONS + 1)),
        host_header=chosen_host,
        options=_options(
            f"{parsed_target.scheme}://{chosen_host or parsed_target.host_header}",
            requests=chosen_host is not None,
            links=_check_links(rewrite_links, usual=chosen_host is not None),
            forwarded_host=_check_switch("--forwarded-host", forwarded_host),
        ),
        ca=_kept_ca(choice, insecure) if ca is None else _check_ca(ca),
        insecure=insecure,
        proxy=chosen_proxy,
        connect_timeout=_check_seconds(connect_timeout),
        wait=wait,
        state_dir=state_directory(environ),
        token=chosen_token,
    )
    choice.tell()  # nothing else is wrong, which would be the one line to read
    return config


def config_from_arguments(arguments: Mapping[str, Any], environ: Mapping[str, str]) -> ClientConfig:
    """The config for what docopt read from ``tinytun http`` or ``tinytun tcp``; raises UsageError."""
    return make_config(
        arguments["<target>"],
        kind=Kind.HTTP if arguments["http"] else Kind.TCP,
        server=arguments["--server"],
        subdomain=arguments["--subdomain"],
        port=arguments["--port"],
        concurrency=arguments["--concurrency"],
        sessions=arguments["--sessions"],
        host_header=arguments["--host-header"],
        forwarded_host=arguments["--forwarded-host"],
        rewrite_links=arguments["--rewrite-links"],
        ca=arguments["--ca"],
        insecure=arguments["--insecure"],
        token=arguments["--token"],
        token_file=arguments["--token-file"],
        proxy=arguments["--proxy"],
        connect_timeout=arguments["--connect-timeout"],
        wait=arguments["--wait"],
        verify_target=arguments["--verify-target"],
        environ=environ,
    )


def _check_hidden(server: ServerAddress, proxy: Proxy | None) -> None:
    """Raises UsageError if it is certain that a token would leave this machine in the clear.

    A name may mean this machine without looking like it: `dial_server` looks at its addresses.
    """
    elsewhere = is_address(server.host) and must_hide(server.host)
    if not server.tls and (proxy is not None or elsewhere):
        raise UsageError(f"{server} {PLAIN}")


def _check_kind(kind: Kind | str) -> Kind:
    try:
        return Kind(kind)
    except ValueError:
        raise UsageError(f"kind {kind!r}: allowed: http, tcp") from None


def _check_verify(value: str) -> Verify:
    for allowed in get_args(Verify):
        if value == allowed:
            return cast(Verify, allowed)
    raise UsageError(f"--verify-target {value!r}: allowed: auto, always, never")


def _check_subdomain(value: str | None) -> str | None:
    """The name in lower case; a blank one counts as absent, as in the original."""
    if value is None or not value.strip():
        return None
    name = value.strip().lower()
    if not value.isascii() or not is_subdomain(name):  # the Kelvin sign's lower case is "k"
        raise UsageError(
            f"--subdomain {value!r}: allowed: 1-63 of a-z, 0-9 and -, without a hyphen at either end"
        )
    return name


def _check_tcp_port(value: int | str | None) -> int | None:
    return None if value is None else _check_number("--port", value, TCP_PORTS)


def _check_number(flag: str, value: int | str, allowed: range) -> int:
    try:
        number = int(value)
    except ValueError:
        number = -1
    if number not in allowed or (isinstance(value, str) and not value.isdecimal()):
        raise UsageError(f"{flag} {value!r}: allowed: {allowed.start}-{allowed.stop - 1}")
    return number


def _check_seconds(value: float | str | None) -> float | None:
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86_400 * 365:
        raise UsageError(f"--connect-timeout {value!r}: allowed: a number of seconds above 0")
    return seconds


def _check_host_header(value: str | None, target: Target) -> str | None:
    """``rewrite`` is the target's own host; anything else must be a host, maybe with a port."""
    if value is None:
        return None
    if value.lower() == "rewrite":
        return target.host_header
    if not is_host(value):
        raise UsageError(f"--host-header {value!r}: allowed: HOST[:PORT] or rewrite")
    return value


def _check_switch(flag: str, value: bool | str) -> bool:
    if isinstance(value, bool):
        return value
    if value.lower() not in ("on", "off"):
        raise UsageError(f"{flag} {value!r}: allowed: on, off")
    return value.lower() == "on"


def _check_links(value: bool | str | None, *, usual: bool) -> bool:
    return usual if value is None else _check_switch("--rewrite-links", value)


def _options(origin: str, *, requests: bool, links: bool, forwarded_host: bool) -> Options | None:
    """What the server's edge is asked for; None for nothing, so that no server has to know of it."""
    if not requests and not links and forwarded_host:
        return None
    from ..wire.options import Options, Rewrite  # msgspec: most tunnels never need it

    if parse_origin(origin.encode()) is None:
        raise UsageError(f"{origin!r} is no origin that a web page can have: see --host-header")
    rewrite = Rewrite(origin, requests, links) if requests or links else None
    return Options(rewrite=rewrite, forwarded_host=forwarded_host)


def _check_ca(value: str | os.PathLike[str]) -> str:
    path = os.fspath(value)
    if not os.path.isfile(path):
        raise UsageError(f"--ca {path!r}: no such file")
    return path


def _kept_ca(choice: Choice, insecure: bool) -> str | None:
    """The certificates to trust that were kept of this server; raises UsageError if they are gone."""
    if choice.ca is None or insecure or not choice.address.tls:
        return None
    if not os.path.isfile(choice.ca):
        raise UsageError(
            f"{choice.ca}, the certificates to trust of {choice.address}, is no file any more; "
            f"'tinytun login --server {choice.address} --ca FILE' names another"
        )
    return choice.ca


def check_log_level(value: str) -> str:
    """The level in lower case; raises UsageError."""
    if value.lower() not in LOG_LEVELS:
        raise UsageError(f"--log-level {value!r}: allowed: {', '.join(LOG_LEVELS)}")
    return value.lower()
