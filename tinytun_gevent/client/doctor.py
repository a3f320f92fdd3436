"""The command ``tinytun doctor``: checks in order what a tunnel needs, up to opening one for a moment."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Final

import gevent
from gevent import socket

from ..diagnosis import Chain, NotApplicable, Trouble
from ..errors import LocalServiceError, NameTakenError, RefusedError, TunnelError
from ..sockets import End, PlainEnd
from ..tls import TlsEnd
from ..wire.handshake import MAX_HEAD, OpenRequest
from .address import bracketed
from .config import ClientConfig, config_from_arguments
from .dial import (
    DIAL_TIMEOUT,
    Address,
    check_hidden,
    connect_through,
    first_to_connect,
    make_context,
    read_head,
    resolve,
    start_tls,
)
from .link import wish_of
from .local import LocalDialer
from .opening import open_tunnel, public_url
from .text import clean, unclutter

SETTINGS: Final = "settings"
NAME: Final = "server's name"
PORT: Final = "server's port"
TLS: Final = "TLS"
SERVER: Final = "tunnel server"
TOKEN: Final = "token"  # nosec B105 # a check's name
FREE: Final = "name free"
TARGET: Final = "target"

ACCESS: Final = (401, 403)
"""Refusals that are about who asks, not about the name."""

ANSWERS: Final = (b"200", b"204", b"401")
"""What a connection port says to a health check."""


def run(arguments: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> int:
    """Makes all checks and prints them; the exit code is that of the first error, or 0. Blocks."""
    doctor = Doctor()
    chain = doctor.examine(arguments, environ)
    print(chain.text(bool(arguments["--json"])), flush=True)
    return doctor.exit_code


class Doctor:
    """One run; remembers what later checks need from earlier ones."""

    def __init__(self) -> None:
        self.exit_code = 0
        self._config: ClientConfig | None = None
        self._addresses: list[Address] = []
        #: The server's refusal of a tunnel; None if it gave one.
        self._refusal: TunnelError | None = None
        self._url = ""

    @property
    def config(self) -> ClientConfig:
        assert self._config is not None
        return self._config

    def examine(self, arguments: Mapping[str, Any], environ: Mapping[str, str]) -> Chain:
        """Makes the checks in their order. Blocks."""
        chain = Chain()

        def check(name: str, made: Callable[[], str], *needs: str) -> None:
            chain.run(name, lambda: self._tried(made), needs)

        has_target = arguments["<target>"] is not None
        check(SETTINGS, lambda: self._read(arguments, environ))
        check(NAME, self._resolve, SETTINGS)
        check(PORT, self._connect, NAME)
        secure = self._config is None or self._config.server.tls
        check(TLS, self._shake_hands, PORT)
        check(SERVER, self._greet, TLS if secure else PORT)
        check(TOKEN, self._ask, SERVER)
        check(FREE, self._name, TOKEN)
        check(TARGET, self._reach if has_target else _no_target, SETTINGS)
        return chain

    def _tried(self, check: Callable[[], str]) -> str:
        """A check whose errors become its trouble; the first one is the command's exit code."""
        try:
            with gevent.Timeout(DIAL_TIMEOUT, Trouble(f"no answer within {DIAL_TIMEOUT:.0f} s")):
                return check()
        except TunnelError as error:
            self.exit_code = self.exit_code or error.exit_code
            raise Trouble(str(error), _ADVICE.get(type(error), "")) from None
        except Trouble:
            self.exit_code = self.exit_code or 5
            raise

    def _read(self, arguments: Mapping[str, Any], environ: Mapping[str, str]) -> str:
        given = {**arguments, "<target>": arguments["<target>"] or "80", "http": arguments["--port"] is None}
        self._config = config_from_arguments(given, environ)
        through = f" through the proxy {self._config.proxy}" if self._config.proxy else ""
        return f"the server is {self._config.server}{through}"

    def _resolve(self) -> str:
        host, port = self._next
        self._addresses = resolve(host, port)
        check_hidden(self.config, self._addresses)
        return f"{host} is {', '.join(str(address[0]) for _, address in self._addresses)}"

    @property
    def _next(self) -> tuple[str, int]:
        """What is connected to: the proxy if there is one."""
        at = self.config.proxy or self.config.server
        return at.host, at.port

    def _open(self) -> socket.socket:
        """A connection to the server, before TLS; the caller closes it."""
        host, port = self._next
        try:
            sock = first_to_connect(self._addresses)
        except OSError as error:
            raise Trouble(
                f"cannot connect to {bracketed(host)}:{port}: {unclutter(error)}",
                "see whether the server runs, and which port it has for clients (5554 unless its operator "
                "says otherwise); a firewall may forbid it: try from another network, or --proxy",
            ) from None
        try:
            if self.config.proxy is not None:
                connect_through(sock, self.config.proxy, self.config.server.authority)
        except BaseException:
            sock.close()
            raise
        return sock

    def _dial(self) -> End:
        """As :meth:`_open`, with TLS where the server's URL says so."""
        sock, server = self._open(), self.config.server
        try:
            if not server.tls:
                return PlainEnd(sock)
            context = make_context(self.config.ca, self.config.insecure)
            return start_tls(sock, context, server.host, server.authority)
        except BaseException:
            sock.close()
            raise

    def _connect(self) -> str:
        self._open().close()
        host, port = self._next
        return f"{bracketed(host)}:{port} accepts connections"

    def _shake_hands(self) -> str:
        if not self.config.server.tls:
            raise NotApplicable("http:// means none: anybody on the way can read along")
        end = self._dial()
        shown = end.peer_certificate if isinstance(end, TlsEnd) else {}
        end.close()
        if self.config.insecure:
            return "encrypted, but --insecure checks no certificate"
        issuer = dict(field for part in shown.get("issuer", ()) for field in part)
        by = clean(str(issuer.get("organizationName") or issuer.get("commonName") or "an unnamed authority"))
        return (
            f"its certificate is for {self.config.server.host}, by {by}, until {shown.get('notAfter', '?')}"
        )

    def _greet(self) -> str:
        authority = self.config.server.authority
        end = self._dial()
        try:
            end.sendall(f"GET / HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode("ascii"))
            head, body = read_head(end, MAX_HEAD)
            status = head.partition(b"\r\n")[0].split(b" ")[1:2]
            body = body or (end.recv(1) if status == [b"200"] else b"")  # a web server's page
        except (OSError, EOFError, ValueError) as error:
            raise Trouble(f"{authority} does not answer as one: {unclutter(error)}", _WRONG_DOOR) from None
        finally:
            end.close()
        if not status or status[0] not in ANSWERS or (status[0] == b"200" and body):
            raise Trouble(f"{authority} is no tunnel server's connection port", _WRONG_DOOR)
        return f"{authority} is a connection port"

    def _ask(self) -> str:
        """Opens a tunnel and leaves at once: whoever may not is told so before anything else."""
        config = self.config
        request = OpenRequest(
            config.kind,
            config.server.authority,
            subdomain=config.subdomain,
            port=config.port,
            token=config.token,
        )
        end = self._dial()
        try:
            reply, _ = open_tunnel(end, request, wish_of(request))
            self._url = public_url(config, reply)
        except RefusedError as error:
            if error.status in ACCESS:
                raise
            self._refusal = error
        finally:
            end.close()
        return "accepted" if config.token is not None else "none given, and the server lets that pass"

    def _name(self) -> str:
        if self._refusal is not None:
            raise self._refusal
        return f"a tunnel would have {self._url}"

    def _reach(self) -> str:
        try:
            opened = LocalDialer(self.config.target).dial()
        except LocalServiceError as error:
            raise Trouble(str(error), "start the local service, or correct the target") from None
        opened.close()
        return f"{self.config.target} accepts connections"


_WRONG_DOOR: Final = "give --server the port for clients, 5554 unless the server's operator says otherwise"

_ADVICE: Final[Mapping[type[TunnelError], str]] = {
    NameTakenError: "if your own client has it, all is well; else ask for another one",
}


def _no_target() -> str:
    raise NotApplicable("no target was given: tinytun doctor 3000")
