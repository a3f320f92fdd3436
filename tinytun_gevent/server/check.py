"""``tinytun-server --check``: whether the server could run, and what would surprise its operator.

What it finds is an error, with which visitors or clients would be turned away, or a warning. Beside a running
server it knows that one by the lock of its directory. Blocks on disk and names; needs no gevent.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from ipaddress import ip_address
from typing import Final

from .. import files
from ..errors import UsageError
from . import statedir
from .addresses import bracketed, is_ip, is_loopback, listen_all
from .config import ServerConfig, notice
from .given import Given, overridden
from .required import require_files
from .statedir import Running

NAMES: Final = 5.0
"""Seconds for all names of PEERS together to resolve."""


@dataclass(slots=True)
class Findings:
    """What there is to say, a line each."""

    notes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """All of it, as it is printed."""
        yield from self.notes
        yield from (f"error: {text}" for text in self.errors)
        yield from (f"warning: {text}" for text in self.warnings)

    @property
    def count(self) -> str:
        """How many there are, in words; blank if there are none."""
        counts = ((len(self.errors), "error"), (len(self.warnings), "warning"))
        return ", ".join(f"{number} {what}{'s' * (number > 1)}" for number, what in counts if number)


def run(overrides: Mapping[str, str], strict: bool = False) -> int:
    """Prints what was found; returns the exit code. With ``strict`` a warning is an error.

    Raises UsageError where the server would not start, and for errors.
    """
    given = ServerConfig.given(os.environ, overrides)
    config = ServerConfig.of(given)
    require_files(config)
    running = find_itself(config)
    ports = check_ports(config, running)
    found = examine(config, given)
    print("\n".join(filter(None, (config.summary(), *found.lines()))))
    if found.errors or (found.warnings and strict):
        raise UsageError(f"not as it should be: {found.count}" + "; --strict" * (not found.errors))
    print(f"the configuration is valid, {ports}" + (f"; {found.count}" if found.count else ""), flush=True)
    return 0


def examine(config: ServerConfig, given: Given) -> Findings:
    """All that can be found without the ports."""
    found = Findings(notes=overridden(fields(ServerConfig), given), warnings=list(given.ignored))
    if text := notice(config):
        found.notes.append(text)
    if config.tls_dir:
        check_certificates(config, found)
    check_directories(config, found)
    check_addresses(config, given, found)
    check_tokens(config, found)
    check_peers(config, found)
    return found


# -- its own ports ------------------------------------------------------------


def find_itself(config: ServerConfig) -> Running | None:
    """The server that runs with this configuration's directory; None if none does, or that cannot be told."""
    with contextlib.suppress(UsageError):
        return statedir.find(config.state_dir or statedir.default_directory(config.connection_port))
    return None


def check_ports(config: ServerConfig, running: Running | None) -> str:
    """What there is to say of the ports, in words. Raises UsageError if another program has one of them."""
    own = 0
    for wanted in config.listeners():
        try:
            for sock in listen_all([wanted], config.backlog):
                sock.close()
        except UsageError as error:
            in_use = isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE
            if not in_use or running is None or wanted[2] not in running.ports:
                raise
            own += 1
    if running is None:
        return "its ports are free"
    several = f"{own} of its ports are" if own else "its ports are free, none is"
    return f"this server runs (process {running.pid}): {several} its own"


# -- certificates -------------------------------------------------------------


def check_certificates(config: ServerConfig, found: Findings) -> None:
    """What is wrong in ``TLS_DIR``, with the file that lacks something. Raises UsageError."""
    from . import pem  # not for those who have no certificates

    directory, now = pem.Directory(config.tls_dir), time.time()
    try:
        pairs, broken = directory.read(directory.signature())
    except OSError as error:
        raise UsageError(f"TLS_DIR={config.tls_dir}: {error.strerror or error}") from None
    found.notes += [f"certificate for {p.title}, until {p.until}: {p.certificate}" for p in pairs]
    found.errors += [f"{file} cannot be used: {reason}" for file, reason in broken.items()]
    found.errors += [f"{path} cannot be read: {reason}" for path, reason in closed(config.tls_dir)]
    good = {name for pair in pairs if pair.begins <= now < pair.expires for name in pair.names}
    for pair in pairs:
        if pair.expires <= now:
            replaced = bool(pair.names) and good.issuperset(pair.names)
            severity = found.warnings if replaced else found.errors
            severity.append(f"{pair.certificate} has expired" + "; another one is shown" * replaced)
        elif pair.begins > now:
            found.warnings.append(f"{pair.certificate} is not valid yet")
        if not pair.names:
            found.warnings.append(f"{pair.certificate}: {pem.NAMELESS}")
    lonely = found.errors if config.tls_required else found.warnings
    lonely += [f"{path} {lack}" for path, lack in directory.lonely()]
    if not pairs:
        lonely.append(f"TLS_DIR={config.tls_dir}: there is no certificate with its key")
    for domain in config.base_domains:
        if pairs and not any(pem.covers(pair.names, domain) for pair in pairs):
            found.warnings.append(f"no certificate is for *.{domain}")


def closed(path: str, depth: int = 8, left: int = 4096) -> list[tuple[str, str]]:
    """Directories and links below ``path`` that this user may not follow, and why; among ``left`` files."""
    found: list[tuple[str, str]] = []
    waiting = [(path, depth)]
    while waiting and left > 0:
        here, depth = waiting.pop()
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except PermissionError as error:
            found.append((here, error.strerror or "permission denied"))
            continue
        except OSError:
            continue
        for entry in entries[:left]:
            left -= 1
            try:
                entry.stat()
            except PermissionError as error:
                found.append((entry.path, error.strerror or "permission denied"))
            except OSError:
                continue  # a link to nothing
            if entry.is_dir(follow_symlinks=False) and depth > 0 and not entry.name.startswith("."):
                waiting.append((entry.path, depth - 1))
    return found


# -- the rest -----------------------------------------------------------------


def check_directories(config: ServerConfig, found: Findings) -> None:
    """Directories that the server would write to, and cannot."""
    state = config.state_dir or statedir.default_directory(config.connection_port)
    if problem := unwritable(state, its_own=True):
        found.warnings.append(f"STATE_DIR={state}: {problem}; names will not outlive a restart")
    if config.access_log not in ("", "-"):
        parent = os.path.dirname(config.access_log)
        problem = unwritable(parent) if os.path.isdir(parent) else "there is no such directory"
        if not problem and os.path.exists(config.access_log) and not os.access(config.access_log, os.W_OK):
            problem = "this user may not write in it"
        if problem:
            found.warnings.append(f"ACCESS_LOG={config.access_log}: {problem}")


def unwritable(path: str, *, its_own: bool = False) -> str:
    """Why nothing can be written in a directory, or it not be made; blank if it can. Changes nothing."""
    try:
        if its_own and os.path.isdir(path):
            files.check_directory(path)
    except OSError as error:
        return error.strerror or str(error)
    there = path
    while not os.path.lexists(there) and there != os.path.dirname(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there):
        return f"{there} is not a directory"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"this user may not write in {there}"


def check_addresses(config: ServerConfig, given: Given, found: Findings) -> None:
    """Ports and names that lead elsewhere than one would think."""
    address = ip_address(config.metadata_bind)
    if address.is_unspecified or address.is_global:
        text = (
            "lists everybody's tunnels to whoever reaches it; keep it on loopback or the nodes' own network"
        )
        place = f"METADATA_BIND={bracketed(config.metadata_bind)}"
        found.warnings.append(f"{place}: port {config.metadata_port} {text}")
    if "BASE_DOMAIN" not in given.origins and not is_loopback(config.bind):
        text = "is the default, and leads visitors to their own computer; say the domain of this server"
        found.warnings.append(f"BASE_DOMAIN={config.base_domains[0]} {text}")
    for variable, _, port in config.listeners():
        if config.tcp_listen and port in config.tcp_ports:
            shown = f"{config.tcp_ports.start}-{config.tcp_ports.stop - 1}"
            found.warnings.append(f"TCP_PORTS={shown}: {port} among them is {variable}; no tunnel gets it")
    if config.tls_dir and config.public_url.lower().startswith("http:"):
        text = "shows http addresses, although TLS_DIR is set; https://… if visitors are to use it"
        found.warnings.append(f"PUBLIC_URL={config.public_url} {text}")


def check_tokens(config: ServerConfig, found: Findings) -> None:
    """Tokens that nobody has, or that everybody on the way can read."""
    if not config.auth_file:
        return
    from . import tokens  # not for those who have none

    if not tokens.read(config):
        hint = "'tinytun-server token new --label NAME' makes one"
        found.warnings.append(f"AUTH_FILE={config.auth_file} is empty: nobody gets a tunnel; {hint}")
    if not (config.tls_dir or config.trusted_proxies or is_loopback(config.bind)):
        text = "clients show their tokens unencrypted, or not at all; set TLS_DIR, or put a proxy in front"
        found.warnings.append(f"CONNECTION_PORT={config.connection_port}: {text}")


def check_peers(config: ServerConfig, found: Findings) -> None:
    """Names of other nodes that do not resolve, and nodes that cannot ask us."""
    names = list(dict.fromkeys(peer.host for peer in config.peers if not is_ip(peer.host)))
    problems: dict[str, str] = dict.fromkeys(names, f"no answer within {NAMES:g} s")

    def look(name: str) -> None:
        try:
            socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            problems.pop(name)
        except OSError as error:
            problems[name] = error.strerror or str(error)

    looking = [threading.Thread(target=look, args=(name,), daemon=True) for name in names]
    for thread in looking:
        thread.start()
    until = time.monotonic() + NAMES
    for thread in looking:
        thread.join(max(0.0, until - time.monotonic()))
    found.warnings += [f"PEERS: {name} does not resolve: {why}" for name, why in dict(problems).items()]
    if config.deaf_to_peers:
        place = f"METADATA_BIND={bracketed(config.metadata_bind)}"
        found.warnings.append(
            f"{place}: PEERS cannot ask this server for its tunnels; take their network's address"
        )
