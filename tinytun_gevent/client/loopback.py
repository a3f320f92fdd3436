"""Finds out whether ``localhost`` is two programs on one port, and says so once.

A tunnel to a bare port goes to ``::1`` before ``127.0.0.1``, and on a computer with several users another one
may listen there. Linux tells who listens without a connection, which a service with one thread would have to
serve; elsewhere one is made, to the address that is not used, and closed at once.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

import gevent

from ..background import in_a_thread
from ..wire.handshake import Kind
from .local import LocalDialer

V4: Final = "127.0.0.1"
V6: Final = "::1"

_PLACES: Final = {V4: (V4, "0.0.0.0", "::"), V6: (V6, "::")}  # nosec B104 # compared, not bound
"""Where a program can listen that gets connections to an address; the kernel prefers those in front."""

_LISTEN: Final = "0A"
"""TCP_LISTEN in ``/proc/net/tcp``."""

MOST_SOCKETS: Final = 8192
"""Listening sockets of ``/proc/net/tcp`` that are looked at."""

PATIENCE: Final = 1.0
"""Seconds for a connection to this computer, where one has to be made."""


@dataclass(frozen=True, slots=True)
class Listening:
    """A listening socket: where, whose (user id), and its number."""

    address: str
    port: int
    user: int
    inode: int


class LoopbackCheck:
    """Looks at the service of one dialer: once the tunnel is open, and when the service has answered."""

    def __init__(self, dialer: LocalDialer, kind: Kind, say: Callable[[str], None]) -> None:
        """``say`` gets the one line that there may be; it must not block."""
        self._dialer = dialer
        self._command = "http" if kind is Kind.HTTP else "tcp"
        self._say = say
        self._is_over = dialer.target.host.lower() != "localhost"
        if not self._is_over:
            dialer.on_answer = lambda: self.look(answers=True)

    def look(self, *, answers: bool = False) -> None:
        """Begins to look, unless it has been said already; never blocks. ``answers``: the service does."""
        if not self._is_over:
            gevent.spawn(self._look, answers)

    def _look(self, answers: bool) -> None:
        used, port = self._dialer.first, self._dialer.target.port
        other = V6 if used == V4 else V4
        known = in_a_thread(lambda: owners(port, used, other))
        if known is None and answers and in_a_thread(lambda: _accepts(other, port)):
            known = ("", "")
        if known and not self._is_over:
            self._is_over = True
            self._say(self._words(used, other, *known))

    def _words(self, used: str, other: str, user: str, other_user: str) -> str:
        target = self._dialer.target
        here, there = (str(replace(target, host=host)) for host in (used, other))
        choice = f"'tinytun {self._command} {there}' chooses the other one"
        if not user:
            found = f"{target} answers at both {V6} and {V4}; visitors get {here}"
            return f"{found}; if they are two programs, {choice}"
        found = f"two programs listen at {target}: visitors get {here}, of user {user}"
        return f"{found}; {choice}, of user {other_user}"


def owners(port: int, used: str, other: str) -> tuple[str, str] | tuple[()] | None:
    """The users of two programs that listen at ``used`` and ``other``; empty if those are not two.

    None where the system does not tell. Blocks on the kernel, for milliseconds.
    """
    try:
        found = [*read_table("/proc/net/tcp"), *read_table("/proc/net/tcp6")]
    except OSError:
        return None
    one, two = (first_of(found, port, address) for address in (used, other))
    if one is None or two is None or one.inode == two.inode:
        return ()
    if one.user == two.user and not _are_two(one, two):
        return ()
    return _name_of(one.user), _name_of(two.user)


def first_of(found: Iterable[Listening], port: int, address: str) -> Listening | None:
    """Which of the listening sockets gets a connection to ``address``, as kernels choose by default."""
    at = {one.address: one for one in found if one.port == port}
    return next((at[place] for place in _PLACES[address] if place in at), None)


def read_table(path: str) -> Iterator[Listening]:
    """The listening sockets in ``/proc/net/tcp`` or ``tcp6``. Raises ``OSError``.

    Linux lists them first: what follows may be a hundred thousand connections, and is not read.
    """
    with open(path, "rb") as file:
        for line in islice(file, 1, 1 + MOST_SOCKETS):
            parts = line.decode("ascii", "replace").split()
            if len(parts) < 10 or parts[3] != _LISTEN:
                return
            try:
                host, port = parts[1].split(":")
                yield Listening(_address(host), int(port, 16), int(parts[7]), int(parts[9]))
            except ValueError:
                continue  # another kernel's form


def _address(text: str) -> str:
    """An address as the kernel writes it: words of 32 bits, each in the machine's order."""
    words = [int(text[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(text), 8)]
    return socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, b"".join(words))


def _are_two(one: Listening, two: Listening) -> bool:
    """Whether two sockets of one user are those of different programs, as far as can be seen."""
    names = {f"socket:[{one.inode}]": "one", f"socket:[{two.inode}]": "two"}
    holders: dict[str, set[str]] = {"one": set(), "two": set()}
    for process in filter(str.isdecimal, os.listdir("/proc")):
        try:
            for descriptor in os.scandir(f"/proc/{process}/fd"):
                if (name := names.get(os.readlink(descriptor.path))) is not None:
                    holders[name].add(process)
        except OSError:
            continue  # another user's, or over
    return bool(holders["one"] and holders["two"]) and not holders["one"] & holders["two"]


def _name_of(user: int) -> str:
    try:
        import pwd

        return pwd.getpwuid(user).pw_name
    except (ImportError, KeyError):
        return str(user)


def _accepts(address: str, port: int) -> bool:
    """Whether somebody listens there, by a connection that is closed at once."""
    try:
        socket.create_connection((address, port), PATIENCE).close()
    except OSError:
        return False
    return True
