"""The local service that a tunnel leads to, as the user names it."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from ..errors import UsageError
from .address import bracketed, is_loopback, parse_port, split_host_port

FORMS = "PORT, HOST:PORT, [IPV6]:PORT, unix:/PATH, http://HOST[:PORT] or https://HOST[:PORT]"

#: Why there is nothing behind the port; what every form of a target says.
WHOLE_SERVICE = "a tunnel leads to a whole service, without path, query or password"

#: What ``--verify-target`` may say.
Verify = Literal["auto", "always", "never"]

#: sun_path holds 108 bytes with its final zero on Linux, 104 on macOS.
MAX_UNIX_PATH = 103


@dataclass(frozen=True, slots=True)
class Target:
    """Where the local service listens, and how to speak to it.

    ``host`` is a name or a numeric address without brackets, empty for a Unix socket,
    whose ``path`` is set instead. ``tls`` means TLS to the service, ``verify`` that its
    certificate is checked.
    """

    host: str
    port: int
    path: str = ""
    tls: bool = False
    verify: bool = False

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"{'https://' if self.tls else ''}{bracketed(self.host)}:{self.port}"

    @property
    def host_header(self) -> str:
        """The service's own ``Host``: what ``--host-header rewrite`` stands for."""
        if self.path:
            return "localhost"
        default = 443 if self.tls else 80
        host = bracketed(self.host.partition("%")[0])  # a zone means nothing to others (RFC 6874 §1)
        return host + ("" if self.port == default else f":{self.port}")

    @property
    def scheme(self) -> str:
        """``http`` or ``https``."""
        return "https" if self.tls else "http"


def parse_target(text: str, verify: Verify = "auto") -> Target:
    """Read ``<target>``; raises UsageError, which lists what is allowed.

    With ``verify`` at ``auto`` the certificate of an ``https`` target is checked unless its
    host is this machine: nobody is in between there, and development servers sign their own.
    """
    try:
        return _parse(text.strip(), verify)
    except ValueError as error:
        raise UsageError(f"target {text!r}: {error}; allowed: {FORMS}") from None


def _parse(text: str, verify: Verify) -> Target:
    if text.startswith("unix:"):
        return _unix_target(text)
    if "://" in text:
        return _url_target(text, verify)
    if text.isdecimal():
        return Target("localhost", parse_port(text))
    if text.startswith(("/", ".", "~")):
        raise ValueError(
            "that is a path of files, and a tunnel leads to a program that listens: 'python3 -m http.server' "
            "serves a folder, and a Unix socket is written unix:/PATH"
        )
    if any(mark in text for mark in "/?#@"):
        raise ValueError(WHOLE_SERVICE)
    host, port = split_host_port(text)
    if port is None:
        raise ValueError("the port is missing")
    return Target(host, port)


def _unix_target(text: str) -> Target:
    path = text.removeprefix("unix:")
    if path.startswith("//"):  # unix:///run/app.sock, as in a URL
        path = path[2:]
    if not hasattr(socket, "AF_UNIX"):
        raise ValueError("this system has no Unix sockets")
    if not path or "\0" in path:
        raise ValueError("the path of the socket is missing")
    if len(path.encode()) > MAX_UNIX_PATH:
        raise ValueError(f"the path of a socket has at most {MAX_UNIX_PATH} bytes")
    return Target("", 0, path=path)


def _url_target(text: str, verify: Verify) -> Target:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"{parts.scheme}:// is unknown")
    if parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc:
        raise ValueError(WHOLE_SERVICE)
    host, port = split_host_port(parts.netloc)
    tls = parts.scheme == "https"
    check = tls and (verify == "always" or (verify == "auto" and not is_loopback(host)))
    return Target(host, port or (443 if tls else 80), tls=tls, verify=check)
