"""The command ``tinytun-server doctor``: checks in order what a server needs to be reached.

It runs in a process of its own beside the server, with the server's options, and needs no gevent.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import socket
import ssl
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from ..diagnosis import Chain, NotApplicable, Trouble
from ..errors import TunnelError, UsageError
from . import status
from .addresses import bracketed, is_ip, is_local, local
from .config import ServerConfig, metadata_url

TIMEOUT: Final = 5.0
"""Seconds for each connection."""

FEW_DESCRIPTORS: Final = 4096
"""Below it a server is full with some thousand visitors."""

MOST_USED: Final = 0.8
"""Share of the descriptors from which on there is cause to raise their limit."""

SOON: Final = 14
"""Days before the end of a certificate at which it should have been renewed."""

DAY: Final = 86_400

_TIME_ERROR: Final = 5
"""What adjtimex(2) returns where the clock is not synchronized."""

CONFIGURATION: Final = "configuration"
NAMES: Final = "wildcard DNS"
SERVER: Final = "server runs"
CONNECTION: Final = "connection port"
PROXY: Final = "proxy port"
HTTPS: Final = "https port"


def run(overrides: Mapping[str, str], as_json: bool, environ: Mapping[str, str] | None = None) -> int:
    """Makes all checks and prints them; 2 if one has failed. ``overrides`` are the flags that were given."""
    doctor = Doctor()
    chain = doctor.examine(os.environ if environ is None else environ, overrides)
    print(chain.text(as_json), flush=True)
    return 2 if chain.failed else 0


class Doctor:
    """One run; remembers what later checks need from earlier ones."""

    def __init__(self) -> None:
        self._config: ServerConfig | None = None
        self._status: Mapping[str, Any] = {}
        #: A name that surely nobody has made, and the addresses that it has.
        self._name = f"doctor-{secrets.token_hex(4)}"
        self._addresses: list[str] = []

    @property
    def config(self) -> ServerConfig:
        assert self._config is not None
        return self._config

    def examine(self, environ: Mapping[str, str], overrides: Mapping[str, str]) -> Chain:
        """Makes the checks in their order. Blocks."""
        chain = Chain()
        chain.run(CONFIGURATION, lambda: self._read(environ, overrides))
        chain.run(NAMES, self._resolve, [CONFIGURATION])
        chain.run(SERVER, self._ask, [CONFIGURATION])
        chain.run(CONNECTION, self._connection_port, [SERVER])
        chain.run(PROXY, self._proxy_port, [SERVER])
        chain.run(HTTPS, self._https_port, [SERVER])
        chain.run("from outside: clients", self._clients_outside, [NAMES, CONNECTION])
        chain.run("from outside: visitors", self._visitors_outside, [NAMES, PROXY])
        chain.run("certificates", self._certificates, [CONFIGURATION])
        chain.run("open files", self._descriptors, [SERVER])
        chain.run("clock", clock)
        return chain

    def _read(self, environ: Mapping[str, str], overrides: Mapping[str, str]) -> str:
        try:
            config = ServerConfig.from_environ(environ, overrides)
            if config.auth_file:
                from . import tokens

                tokens.read(config)
        except TunnelError as error:
            raise Trouble(
                str(error), "correct it; 'tinytun-server --check' tells whether it is valid"
            ) from None
        self._config = config
        return f"valid, {len(config.summary().splitlines())} settings differ from the defaults"

    def _resolve(self) -> str:
        found = []
        for domain in self.config.base_domains:
            name = f"{self._name}.{domain}"
            try:
                answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError) as error:
                raise Trouble(
                    f"*.{domain} does not resolve: {getattr(error, 'strerror', None) or error}",
                    f"make an A record (and AAAA) for *.{domain} with this server's public address",
                ) from None
            addresses = list(dict.fromkeys(str(answer[4][0]) for answer in answers))
            if domain == self.config.base_domains[0]:
                self._addresses = addresses
            found.append(f"*.{domain} is {', '.join(addresses)}")
        elsewhere = [ip for ip in self._addresses if not is_local(ip)]
        note = "; no address of this machine itself, so NAT or a load balancer has to lead here"
        return "; ".join(found) + (note if elsewhere else "")

    def _ask(self) -> str:
        where = metadata_url(self.config)
        try:
            self._status = status.fetch(where)
            version, draining = str(self._status["version"]), bool(self._status["draining"])
        except (TunnelError, KeyError) as error:
            advice = "start tinytun-server; give doctor the options and variables that it has"
            what = str(error) if isinstance(error, TunnelError) else f"{where} is another version"
            raise Trouble(what, advice) from None
        if draining:
            raise Trouble("it is stopping", "wait for its successor, or start it again")
        return f"tinytun-server {version}, since {self._status.get('since')}"

    # -- ports ----------------------------------------------------------------

    def _connection_port(self) -> str:
        port = self.config.connection_port
        tls = self.config.tls_required
        answer = _http((local(self.config.bind), port), self.config.base_domains[0], tls)
        return _expect(answer, (200, 204, 401), f"port {port}")

    def _proxy_port(self) -> str:
        port = self.config.proxy_port
        answer = _http((local(self.config.bind), port), self.config.base_domains[0])
        return _expect(answer, (200, 308), f"port {port}", own=True)

    def _https_port(self) -> str:
        if not self.config.tls_dir:
            raise NotApplicable("TLS_DIR is not set")
        port, name = self.config.proxy_tls_port, f"{self._name}.{self.config.base_domains[0]}"
        answer = _http((local(self.config.bind), port), name, tls=True)
        return _expect(answer, (404,), f"port {port}", own=True)

    def _clients_outside(self) -> str:
        config = self.config
        return self._outside(
            config.connection_port,
            lambda ip: _http((ip, config.connection_port), config.base_domains[0], config.tls_required),
            (200, 204, 401),
            own=False,
        )

    def _visitors_outside(self) -> str:
        url = urlsplit(self.config.url_of(self._name))
        secure = url.scheme == "https"
        port = url.port or (443 if secure else 80)
        return self._outside(
            port, lambda ip: _http((ip, port), url.hostname or "", secure), (404, 308), own=True
        )

    def _outside(self, port: int, ask: Callable[[str], _Answer], expected: tuple[int, ...], own: bool) -> str:
        """Connects to the public addresses, which from here may be shorter than from elsewhere."""
        for ip in self._addresses:
            try:
                _expect(ask(ip), expected, f"{bracketed(ip)}:{port}", own=own)
            except Trouble as trouble:
                advice = (
                    f"open port {port} in firewalls and forward it to this server; where a router does not "
                    "let this machine reach its own public address, try from another network"
                )
                raise Trouble(str(trouble), advice) from None
        reached = ", ".join(f"{bracketed(ip)}:{port}" for ip in self._addresses)
        return f"{reached} leads to this server, tried from this machine; a firewall elsewhere is not seen"

    # -- the rest ---------------------------------------------------------------

    def _certificates(self) -> str:
        directory = self.config.tls_dir
        if not directory:
            raise NotApplicable("TLS_DIR is not set")
        from . import check, pem

        advice = "renew or replace it; 'tinytun-server --check' lists what TLS_DIR has"
        found = check.Findings()
        try:
            check.check_certificates(self.config, found)
            files = pem.Directory(directory)
            pairs, _ = files.read(files.signature())
        except (OSError, UsageError) as error:
            raise Trouble(str(error), "let this user read it") from None
        if found.errors or found.warnings:
            raise Trouble("; ".join([*found.errors, *found.warnings]), advice)
        days = {pair.title: int((pair.expires - time.time()) // DAY) for pair in pairs}
        soon = [f"{title} ends in {left} days" for title, left in days.items() if left < SOON]
        if soon:
            raise Trouble("; ".join(soon), "see why it was not renewed yet")
        return "; ".join(f"{title} for {left} more days" for title, left in days.items())

    def _descriptors(self) -> str:
        used, most = self._status.get("open_fds"), self._status.get("max_fds")
        if not isinstance(used, int) or not isinstance(most, int):
            raise NotApplicable("the server does not know their number here")
        if most < FEW_DESCRIPTORS or used > MOST_USED * most:
            advice = (
                "raise the hard limit (LimitNOFILE of systemd, minfds of supervisord) and restart the server"
            )
            raise Trouble(f"{used:,} of {most:,} are open", advice)
        return f"{used:,} of {most:,}"


class _Answer:
    """What came from a port: status and whether it is the server's own answer."""

    def __init__(self, head: bytes) -> None:
        first, _, fields = head.partition(b"\r\n")
        words = first.split(b" ")
        self.status = int(words[1]) if len(words) > 1 and words[1].isdigit() and len(words[1]) == 3 else 0
        self.own = b"\r\nx-request-id:" in (b"\r\n" + fields).lower()


def _http(address: tuple[str, int], host: str, tls: bool = False) -> _Answer:
    """The answer to ``GET /``. Blocks; raises Trouble. Certificates are another check's matter."""
    where = f"{bracketed(address[0])}:{address[1]}"
    try:
        with socket.create_connection(address, TIMEOUT) as plain:
            if not tls:
                return _Answer(_exchange(plain, host))
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            name = None if is_ip(host) else host
            with context.wrap_socket(plain, server_hostname=name) as secure:
                return _Answer(_exchange(secure, host))
    except OSError as error:
        advice = "see that the server listens there, and that no local firewall forbids it"
        raise Trouble(f"cannot reach {where}: {error.strerror or error}", advice) from None


def _exchange(sock: socket.socket, host: str) -> bytes:
    sock.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode("ascii"))
    received = b""
    while b"\r\n\r\n" not in received and len(received) < 65_536:
        data = sock.recv(4096)
        if not data:
            break
        received += data
    return received


def _expect(answer: _Answer, statuses: tuple[int, ...], what: str, own: bool = False) -> str:
    if answer.status not in statuses or (own and not answer.own):
        said = f"it answered {answer.status}" if answer.status else "it does not speak HTTP"
        raise Trouble(f"{what} is not this server: {said}", "see which program has this port")
    return f"{what} answers"


def clock() -> str:
    """Whether the system's clock is synchronized: tokens and certificates end by it."""
    if not sys.platform.startswith("linux"):
        raise NotApplicable("only Linux tells whether the clock is synchronized")
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))  # modes 0: only read
    except (OSError, AttributeError):
        raise NotApplicable("the system does not tell") from None
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    if state == _TIME_ERROR:
        advice = "run chrony or systemd-timesyncd, unless this machine's host keeps it right"
        raise Trouble(f"nothing synchronizes it, as far as the system knows; it says {now}", advice)
    if state < 0:
        raise NotApplicable("the system does not tell")
    return f"synchronized, {now}"
