"""From one worker to the next: names, listening ports and visitors change hands, nobody notices.

The new worker asks the old one, on a Unix socket in the server's own directory::

    new                         old
     │ ── wants ──────────────► │   stops accepting
     │ ◄── names, ports ─────── │
     │ ── serves ─────────────► │   says GOAWAY to its clients, who come to the new one
     │ ◄── goes ─────────────── │
     │ ◄── visitors ─────────── │   each when his exchange is over

If the new one is gone before it serves, the old one goes on as if nothing had been. (Sharing the ports
by SO_REUSEPORT instead would reset the connections that wait in the old one's queues.)
"""

from __future__ import annotations

import base64
import logging
import os
import socket as native
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import gevent
from gevent import socket

from ..registry import Record
from ..sockets import BareSocket
from .channel import MOST_DESCRIPTORS, Channel
from .storage import read_record, record_fields

log = logging.getLogger("tinytun_gevent.server")

VERSION: Final = 1
"""Of what is said here. A worker of another version gets nothing, and starts from the lease file."""

PATIENCE: Final = 5.0
"""Seconds for one step of the other process, which may be busy."""

FILE: Final = "worker.sock"
"""Where the worker that serves is asked."""


@dataclass(slots=True)
class Moved:
    """A visitor's connection between two requests, on its way to another process."""

    #: The TCP tunnel's port; None for the HTTP edge.
    port: int | None
    #: Who he is.
    address: tuple[str, int]
    #: The public port that he used, as the local service is told.
    public_port: int
    #: Bytes that were read from him and belong to what comes next.
    early: bytes
    #: Whether a PROXY header may still begin his connection.
    fresh: bool = False
    #: What he speaks there: ``http`` or ``https``.
    proto: str = "http"
    #: Whether his connection ends with the next answer: the old process carries its bytes.
    last: bool = False


class Old(Protocol):
    """What a server lets its successor do with it; nothing of it blocks."""

    def pause(self) -> tuple[list[Record], dict[int, int]]:
        """Stops accepting: the names, and the TCP tunnels' ports with their listening descriptors."""

    def resume(self) -> None:
        """Accepts again: the successor did not come up."""

    def hand_over(self, successor: Successor) -> None:
        """Ends serving, and lets the successor have what may change hands, soon."""


class Successor:
    """The worker that serves now, as the old one sees it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def take(self, sock: Any, moved: Moved) -> bool:
        """Gives it a visitor's connection; whether it has it. Blocks. The caller closes his copy."""
        message = {
            "visitor": moved.port,
            "address": moved.address,
            "public_port": moved.public_port,
            "early": base64.b64encode(moved.early).decode(),
            "fresh": moved.fresh,
            "proto": moved.proto,
            "last": moved.last,
        }
        try:
            self._channel.send(message, [sock.fileno()])
        except OSError as error:
            log.debug("a visitor could not be passed on: %s", error)
            self._channel.close()  # behind half a message, a whole one would be taken for nonsense
            return False
        return True


class Predecessor:
    """The worker that served until now, as the new one sees it: what it left."""

    def __init__(self, channel: Channel, records: list[Record], ports: dict[int, int]) -> None:
        self._channel = channel
        #: The names that clients will ask for again.
        self.records = records
        #: Listening descriptors of TCP tunnels, by port; they are the new worker's.
        self.ports = ports

    def confirm(self) -> None:
        """Tells it that this worker serves, and waits until it has heard. Raises ``OSError``.

        The master may tell it to stop from then on: before, it would send its visitors away.
        """
        self._channel.send({"serves": VERSION})
        if _word(self._channel, "goes") != VERSION:
            raise OSError("it did not agree")
        self._channel.keep_waiting()

    def visitors(self) -> Iterator[tuple[Any, Moved]]:
        """The connections that it passes on, until it ends. Blocks; each socket is the caller's."""
        try:
            while (received := self._channel.receive()) is not None:
                message, descriptors = received
                for descriptor in descriptors:
                    yield _bare(descriptor), _moved(message)
        except OSError as error:
            log.debug("the previous worker passes no more visitors on: %s", error)
        finally:
            self._channel.close()


def take_over(directory: Path, master: int) -> Predecessor | None:
    """What a worker of the process ``master`` that still serves leaves to this one. Blocks.

    None if there is none: also while two masters serve side by side, which would take from each other
    for ever.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(PATIENCE)
        sock.connect(str(directory / FILE))
        if not _same_user(sock):
            raise OSError("it is another user's")
    except OSError:  # nobody serves, or did until he was killed
        sock.close()
        return None
    channel = Channel(sock, PATIENCE)
    ports: dict[int, int] = {}
    try:
        channel.send({"wants": [VERSION, master]})
        records: list[Record] = []
        while True:
            received = channel.receive()
            if received is None:
                raise OSError("it refused")
            message, descriptors = received
            ports.update(zip(message["ports"], descriptors, strict=True))
            if "names" in message:
                records = [_record(fields) for fields in message["names"]]
                return Predecessor(channel, records, ports)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the previous worker handed nothing over: %s", error)
        channel.close()
        for descriptor in ports.values():
            os.close(descriptor)
        return None


class Handover:
    """Waits for the worker that is to follow, for as long as this one serves."""

    def __init__(self, directory: Path, master: int, old: Old) -> None:
        self._master = master
        self._path = directory / FILE
        self._old = old
        self._listener: socket.socket | None = None
        self._greenlet: gevent.Greenlet[[socket.socket], None] | None = None

    def start(self) -> None:
        """Can be asked from now on. Where that is impossible, a reload is less smooth, and says so."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._path.unlink(missing_ok=True)
            listener.bind(str(self._path))
            self._path.chmod(0o600)
            listener.listen(1)
        except OSError as error:
            listener.close()
            log.warning("%s: %s; a reload will interrupt visitors for a moment", self._path, error)
            return
        self._listener = listener
        self._greenlet = gevent.spawn(self._serve, listener)

    def stop(self) -> None:
        """Can be asked no longer. The socket's file may be a successor's by now, so it stays."""
        if self._listener is not None:
            self._listener.close()
        if self._greenlet is not None and self._greenlet is not gevent.getcurrent():
            self._greenlet.kill()

    def _serve(self, listener: socket.socket) -> None:
        """The greenlet that answers, until somebody has taken over."""
        over = False
        while not over:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            channel = Channel(sock, PATIENCE)
            try:
                over = _same_user(sock) and self._answer(channel)
            except OSError as error:
                log.debug("a worker that wanted to follow is gone: %s", error)
            if not over:
                channel.close()
        listener.close()

    def _answer(self, channel: Channel) -> bool:
        """Hands over to whoever is at the other end; whether he serves now."""
        if _word(channel, "wants") != [VERSION, self._master]:
            return False
        records, ports = self._old.pause()
        serves: bool = False
        try:
            numbers = list(ports)
            for start in range(0, len(numbers), MOST_DESCRIPTORS):
                some = numbers[start : start + MOST_DESCRIPTORS]
                channel.send({"ports": some}, [ports[number] for number in some])
            channel.send({"ports": [], "names": [_fields(record) for record in records]})
            serves = bool(_word(channel, "serves") == VERSION)
        finally:
            if not serves:
                self._old.resume()
        if serves:
            self._old.hand_over(Successor(channel))  # switches no greenlets: no visitor overtakes this
            channel.send({"goes": VERSION})
        return serves


def _word(channel: Channel, name: str) -> Any:
    """What the next message says of ``name``; it must have come without descriptors."""
    received = channel.receive()
    if received is None:
        raise OSError("it ended")
    message, descriptors = received
    for descriptor in descriptors:
        os.close(descriptor)
    return message.get(name)


def _same_user(sock: socket.socket) -> bool:
    """Whether the other process is ours; where the system does not tell, the directory's mode must do."""
    if not hasattr(native, "SO_PEERCRED"):
        return True
    credentials = sock.getsockopt(native.SOL_SOCKET, native.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return bool(user == os.geteuid())


def _fields(record: Record) -> dict[str, Any]:
    return {**record_fields(record), "resumable": record.resumable}


def _record(fields: dict[str, Any]) -> Record:
    return read_record(fields, resumable=bool(fields["resumable"]))


def _moved(message: dict[str, Any]) -> Moved:
    address, early = message["address"], base64.b64decode(message["early"])
    return Moved(
        message["visitor"],
        (address[0], address[1]),
        message["public_port"],
        early,
        bool(message["fresh"]),
        str(message.get("proto", "http")),  # a worker that knows no TLS says nothing of it
        bool(message.get("last")),
    )


def _bare(descriptor: int) -> BareSocket:
    """The connection behind a descriptor, as an acceptor would have made it."""
    sock = BareSocket(fileno=descriptor)
    sock.setblocking(False)
    return sock
