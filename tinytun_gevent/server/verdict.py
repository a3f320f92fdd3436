"""How a reload went: a worker tells the master through a pipe, the master tells who asked in a file.

The file, in the server's own directory, has the number of the newest reload. Who wants one reads it, sends
HUP, and waits for a higher number: that reload began after the question, whoever else asked for it too.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Self

from .. import files
from ..errors import UsageError
from .statedir import StateLock, lock_directory

FILE: Final = "reload.json"
"""The file's name in the directory."""

MAX_FILE: Final = 1 << 20
"""Bytes that are read of it, and of what a worker says."""


@dataclass(slots=True)
class Report:
    """What a new worker says of itself."""

    #: Whether it serves; if not, why.
    serves: bool = False
    reason: str = ""
    #: Variables that have other values now, and keep the old ones until a restart.
    restart: list[str] = field(default_factory=list)
    #: What of the configuration file does not count, a line each.
    overridden: list[str] = field(default_factory=list)
    #: What it has read from the file, for a worker that has to replace it.
    file: dict[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """What `encode` made; a worker that said nothing does not serve. Raises nothing."""
        if data == b"1":  # the word of an earlier version
            return cls(serves=True)
        try:
            said = json.loads(data)
            return cls(**{option.name: said[option.name] for option in fields(cls)})
        except (ValueError, TypeError, KeyError):
            return cls(reason="the new worker ended before it served; the log has more")


class Ready:
    """How a new worker tells the master that it serves, or why it cannot: a report through a pipe."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def tell(self, report: Report | None = None) -> None:
        """In the worker: it serves now, or says why not. Later calls do nothing."""
        if self._write >= 0:
            data = memoryview((report or Report(serves=True)).encode())
            while data:
                data = data[os.write(self._write, data) :]
            self._close_write()

    def wait(self, timeout: float) -> Report:
        """In the master: what the worker said before it died or ``timeout`` seconds passed."""
        self._close_write()
        until = time.monotonic() + timeout
        said = b""
        try:
            while len(said) < MAX_FILE:
                if not select.select([self._read], [], [], max(0.0, until - time.monotonic()))[0]:
                    return Report(reason=f"the new worker did not serve within {timeout:g} s")
                data = os.read(self._read, 1 << 16)
                if not data:
                    break
                said += data
        finally:
            os.close(self._read)
        return Report.decode(said)

    def _close_write(self) -> None:
        os.close(self._write)
        self._write = -1


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the file says of the newest reload."""

    #: Of the server; see `statedir.StateLock`.
    id: str = ""
    #: How many reloads there were, this one included.
    number: int = 0
    is_over: bool = True
    serves: bool = False
    reason: str = ""
    restart: tuple[str, ...] = ()
    overridden: tuple[str, ...] = ()

    def write(self, directory: str) -> None:
        """Puts it into the file, all at once. Raises ``OSError``."""
        files.replace(os.path.join(directory, FILE), json.dumps(asdict(self)).encode())


class Record:
    """The master's: writes down how reloads went, where the server's directory can be used."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._lock: StateLock | None = None
        self._number = 0

    @property
    def is_locked(self) -> bool:
        """Whether the directory is this server's."""
        return self._lock is not None

    def lock(self, lock: StateLock | None, ports: Sequence[int]) -> None:
        """The directory is locked, if it can be: says in it who serves, on which ``ports``."""
        self._lock = lock
        if lock is not None:
            with contextlib.suppress(OSError):  # a full disk; the worker complains of what matters
                lock.publish(ports)

    def claim(self, ports: Sequence[int]) -> None:
        """Takes the directory if nobody has it any more. Never waits."""
        with contextlib.suppress(UsageError):
            self.lock(lock_directory(self._directory, 0), ports)

    def begin(self) -> None:
        """A reload begins."""
        self._number += 1
        self._write(Report(), is_over=False)

    def end(self, report: Report) -> None:
        """It has ended so."""
        self._write(report, is_over=True)

    def close(self) -> None:
        """Lets go of the directory; idempotent."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()

    def _write(self, report: Report, *, is_over: bool) -> None:
        if self._lock is None:
            return
        lists = tuple(report.restart), tuple(report.overridden)
        verdict = Verdict(self._lock.id, self._number, is_over, report.serves, report.reason, *lists)
        with contextlib.suppress(OSError):
            verdict.write(self._directory)


def read(directory: str, server: str) -> Verdict:
    """The newest reload of the server with the id ``server``; number 0 if there was none. Raises nothing."""
    try:
        with open(os.path.join(directory, FILE), "rb") as file:
            said: dict[str, Any] = json.loads(file.read(MAX_FILE))
        if said["id"] != server or type(said["number"]) is not int:
            return Verdict(server)
        texts = {name: tuple(map(str, said[name])) for name in ("restart", "overridden")}
        is_over, serves, reason = bool(said["is_over"]), bool(said["serves"]), str(said["reason"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return Verdict(server)
    return Verdict(server, said["number"], is_over, serves, reason, **texts)
