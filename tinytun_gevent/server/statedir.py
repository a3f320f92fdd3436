"""The server's own directory: where it is, its lock, and which process holds that.

The lock is the kernel's (``flock``), so it is gone with its holder; the file says which process that is.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from .. import files
from ..errors import UsageError

LOCK: Final = "lock"
"""The file's name in the directory."""

PATIENCE: Final = 0.5
"""Seconds that a lock is tried for: who only looks whether a server runs has it for a moment."""

MAX_LOCK: Final = 4096
"""Bytes of the file that are read."""


def default_directory(port: int) -> str:
    """Where a server keeps its state that was not told: for each connection port a place of its own.

    systemd's if it offers one, the user's own, and for root, or who has no home, the system's.
    """
    given = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    state = os.environ.get("XDG_STATE_HOME", "")
    home = os.path.expanduser("~")
    if given:
        base = given
    elif os.geteuid() and (os.path.isabs(state) or os.path.isabs(home)):
        base = os.path.join(state if os.path.isabs(state) else f"{home}/.local/state", "tinytun-server")
    else:
        base = "/var/lib/tinytun-server"
    return os.path.join(base, str(port))


@dataclass(frozen=True, slots=True)
class StateLock:
    """A locked state directory; the lock ends with the process, or with `close` in all that have it."""

    directory: str
    descriptor: int
    #: What tells this server from one before it in the same directory.
    id: str

    def publish(self, ports: Sequence[int]) -> None:
        """Says in the file which process serves, on which ``ports``. Raises ``OSError``."""
        pid = os.getpid()
        text = json.dumps({"pid": pid, "started": _started(pid), "id": self.id, "ports": list(ports)})
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, text.encode() + b"\n", 0)

    def close(self) -> None:
        os.close(self.descriptor)


def lock_directory(path: str, patience: float = PATIENCE) -> StateLock | None:
    """Keeps other servers out of a state directory; None if it cannot be used, which the worker says.

    Two would take each other's names for their own. Blocks for ``patience`` seconds at most; raises
    UsageError if another server is there.
    """
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        files.check_directory(path)
        lock = os.open(os.path.join(path, LOCK), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError:
        return None
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                os.close(lock)
                text = f"STATE_DIR={path}: another tinytun-server uses it; each needs its own"
                raise UsageError(text) from None
            time.sleep(0.02)
        else:
            return StateLock(path, lock, secrets.token_hex(8))


@dataclass(frozen=True, slots=True)
class Running:
    """A server that runs: its master."""

    directory: str
    pid: int
    #: When it started, as the system says it; blank where it does not.
    started: str
    id: str
    ports: tuple[int, ...]

    def is_there(self) -> bool:
        """Whether that process still runs, and is not another one by now."""
        if self.started:
            return _started(self.pid) == self.started
        try:
            os.kill(self.pid, 0)
        except PermissionError:
            return True
        except OSError:
            return False
        return True

    def hang_up(self) -> None:
        """Sends HUP to it, and to no other process. Raises ``OSError``: ProcessLookupError if it is gone."""
        try:
            handle = os.pidfd_open(self.pid)
        except (AttributeError, OSError):  # not Linux, an old kernel, or a sandbox
            if not self.is_there():
                raise ProcessLookupError from None
            os.kill(self.pid, signal.SIGHUP)
            return
        try:
            if not self.is_there():
                raise ProcessLookupError
            signal.pidfd_send_signal(handle, signal.SIGHUP)
        finally:
            os.close(handle)


def find(directory: str) -> Running | None:
    """The server that has ``directory``; None if none runs. Raises UsageError where that cannot be told.

    The file of a server that was killed names nobody: the lock is free, or held by what is left of it, and
    the process of that number is not the one that started then.
    """
    try:
        lock = os.open(os.path.join(directory, LOCK), os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        text = f"STATE_DIR={directory}: {error.strerror or error}; say this as the server's user, or as root"
        raise UsageError(text) from None
    try:
        return _holder(directory, lock)
    finally:
        os.close(lock)


def _holder(directory: str, lock: int) -> Running | None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            return None
        running = _parsed(directory, os.pread(lock, MAX_LOCK, 0))
        if running is not None:
            ours = _owner(running.pid) in (None, os.fstat(lock).st_uid)  # or root would signal anybody's
            return running if ours and running.is_there() else None
        if time.monotonic() >= until:  # a server that has just started says it soon
            text = "a server of another version runs there; send HUP to its master by yourself"
            raise UsageError(f"STATE_DIR={directory}: {text}")
        time.sleep(0.02)


def _parsed(directory: str, data: bytes) -> Running | None:
    """What :meth:`StateLock.publish` wrote; None for anything else."""
    try:
        said: dict[str, Any] = json.loads(data)
        pid, ports = said["pid"], said["ports"]
        if type(pid) is not int or not 0 < pid < 1 << 30 or not all(type(p) is int for p in ports):
            return None
        return Running(directory, pid, str(said["started"]), str(said["id"]), tuple(ports))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _started(pid: int) -> str:
    """When a process started, in the kernel's ticks since boot; blank where nobody says."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read(MAX_LOCK).rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError, ValueError):
        return ""


def _owner(pid: int) -> int | None:
    """Whose process that is; None where nobody says."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None
