"""Which server the client uses: named, of the environment, kept by ``tinytun login``, or the original's."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final
from urllib.parse import urlsplit

from .. import files
from ..errors import UsageError
from .address import bracketed, split_host_port
from .credentials import MOST_BYTES, config_directory, one_at_a_time, read_kept

log = logging.getLogger(__name__)

DEFAULT_SERVER: Final = "https://tinytun.com:5554"
SERVER_VARIABLE: Final = "TINYTUN_SERVER_URL"

CONNECTION_PORT: Final = 5554
"""Where a server listens for clients unless told otherwise (CONNECTION_PORT)."""

FILE: Final = "servers.json"


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """The server's connection port, and whether it is spoken to by TLS."""

    host: str
    port: int
    tls: bool

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}"

    @property
    def authority(self) -> str:
        """``host:port``, as a CONNECT request names it."""
        return f"{bracketed(self.host)}:{self.port}"


@dataclass(frozen=True, slots=True)
class Choice:
    """The server to use. ``why`` says what named it, ``notice`` what the user has not said.

    ``ca`` is the file of certificates that is kept for it.
    """

    address: ServerAddress
    why: str
    notice: str = ""
    is_default: bool = False
    ca: str | None = None

    def tell(self) -> None:
        """Logs what the user has not said: a stranger's server is worth a warning."""
        if self.notice:
            log.log(logging.WARNING if self.is_default else logging.INFO, "%s", self.notice)


@dataclass(frozen=True, slots=True)
class Kept:
    """The default server's URL, and by server the files of certificates to trust."""

    server: str | None = None
    ca: Mapping[str, str] = field(default_factory=dict)


def parse_server(text: str, source: str = "--server") -> ServerAddress:
    """Read a server URL: ``http://`` plain, ``https://`` TLS, a bare host TLS on port 5554.

    A URL without a port means its scheme's own, 80 or 443. Raises UsageError naming ``source``.
    """
    return _parse(text, source)[0]


def choose_server(server: str | None, environ: Mapping[str, str]) -> Choice:
    """The server that ``--server`` means, or the variable, or a login, or none; raises UsageError."""
    directory = config_directory(environ)
    kept = KeptServers(directory).load() if directory is not None else Kept()
    from_environment = environ.get(SERVER_VARIABLE, "").strip()
    if server is not None:
        choice = _named(server, "--server")
    elif from_environment:
        choice = _named(from_environment, SERVER_VARIABLE)
    elif kept.server is not None:
        why = f"kept in {KeptServers(directory or '').path} by 'tinytun login' or 'tinytun server'"
        choice = Choice(parse_server(kept.server), why)
    else:
        notice = (
            f"no server is named, so this is the public one, {DEFAULT_SERVER}, which others run; to use your "
            f"own: --server URL, {SERVER_VARIABLE}, or once 'tinytun server URL'"
        )
        choice = Choice(
            parse_server(DEFAULT_SERVER),
            "the original's public server: nothing names another; 'tinytun server URL' does",
            notice,
            is_default=True,
        )
    return replace(choice, ca=kept.ca.get(choice.address.authority.lower()))


class KeptServers:
    """What later commands are to know of servers, in a file of the user's beside the tokens."""

    def __init__(self, directory: str) -> None:
        """Touches nothing yet."""
        self.path = os.path.join(directory, FILE)

    def server(self) -> str | None:
        return self.load().server

    def use(self, address: ServerAddress, ca: str | None = None) -> None:
        """Makes it the default; with ``ca`` that file is trusted there. Raises UsageError."""
        with one_at_a_time(self.path):
            kept = self.load(strict=True)
            more = {} if ca is None else {address.authority.lower(): os.path.abspath(ca)}
            self._save(Kept(str(address), {**kept.ca, **more}))

    def forget(self, address: ServerAddress | None) -> bool:
        """Forgets what is kept of one server, or with None of all; whether it was the default.

        Raises UsageError.
        """
        if not os.path.exists(self.path):
            return False
        with one_at_a_time(self.path):
            kept = self.load(strict=True)
            if address is None:
                self._save(Kept())
                return kept.server is not None
            was = kept.server is not None and parse_server(kept.server).authority == address.authority
            ca = {server: path for server, path in kept.ca.items() if server != address.authority.lower()}
            self._save(Kept(None if was else kept.server, ca))
            return was

    def load(self, *, strict: bool = False) -> Kept:
        """What is kept; see :func:`read_kept`."""
        return read_kept(self.path, parse_kept, Kept(), "the servers", strict=strict)

    def _save(self, kept: Kept) -> None:
        """All at once or not at all; without anything to keep there is no file."""
        try:
            if kept.server is not None or kept.ca:
                content = {"server": kept.server, "ca": dict(kept.ca)}
                files.replace(self.path, json.dumps(content, indent=1).encode())
            elif os.path.exists(self.path):
                os.unlink(self.path)
        except OSError as error:
            raise UsageError(f"{self.path}: {error.strerror or error}") from None


def parse_kept(data: bytes) -> Kept:
    """What the file's content keeps; raises ValueError."""
    if len(data) > MOST_BYTES:
        raise ValueError("it is too large")
    try:
        content = json.loads(data)
        server, ca = content.get("server"), content.get("ca", {})
        if server is not None:
            parse_server(server)
        if not all(isinstance(path, str) for path in ca.values()):
            raise ValueError
    except (ValueError, AttributeError, TypeError, RecursionError, UsageError):
        raise ValueError("it is damaged") from None
    return Kept(server, ca)


def _named(text: str, source: str) -> Choice:
    address, written = _parse(text, source)
    if written:
        return Choice(address, f"named by {source}")
    other = "" if address.port == CONNECTION_PORT else f"; most servers have {CONNECTION_PORT}"
    notice = f"{source} {text.strip()} names no port: port {address.port} is used{other}"
    return Choice(address, f"named by {source}", notice)


def _parse(text: str, source: str) -> tuple[ServerAddress, bool]:
    """The server, and whether its port was written."""
    try:
        parts = urlsplit(text.strip() if "://" in text else f"bare://{text.strip()}")
        if parts.scheme not in ("http", "https", "bare"):
            raise ValueError(f"{parts.scheme}:// is unknown")
        if parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc:
            raise ValueError("a server has no path, query or password")
        host, port = split_host_port(parts.netloc)
    except ValueError as error:
        raise UsageError(
            f"{source} {text!r}: {error}; allowed: https://HOST[:PORT], http://HOST[:PORT] or HOST[:PORT]"
        ) from None
    default = {"http": 80, "https": 443, "bare": CONNECTION_PORT}[parts.scheme]
    return ServerAddress(host, port or default, tls=parts.scheme != "http"), port is not None
