"""What says that a name is ours, kept beyond this process: one small file for each name.

The token that a server has given for a name is shown to it when the name is asked for again: after a loss by
this process, after a crash by the next one. While a client uses a file it holds a lock on it, which the
kernel drops with the process; so a second client that is started by mistake has nothing to show.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import sys
import time
from collections.abc import Mapping
from typing import Final

from ..wire.handshake import is_resume_token
from .places import place

log = logging.getLogger(__name__)

DIRECTORY_VARIABLE: Final = "TINYTUN_STATE_DIR"

SUFFIX: Final = ".token"

OLD: Final = 86_400.0
"""Seconds after which a file that no client uses is removed: servers keep names for minutes at most."""

MOST_FILES: Final = 1000
"""Files looked at when old ones are removed, so that a strange directory does not delay the start."""

MOST_BYTES: Final = 512
"""Bytes read of a file; a token has at most 256."""

TRIES: Final = 3
"""Attempts at a file that is removed by its last user while it is opened here."""

if sys.platform == "win32":
    import msvcrt

    FAR: Final = 1 << 20  # a locked byte cannot be read there, so one that no file has

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, FAR, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

    def _is_ours(descriptor: int) -> bool:
        return stat.S_ISREG(os.fstat(descriptor).st_mode)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        """Locks without waiting; raises OSError if another opening of the file has the lock."""
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _is_ours(descriptor: int) -> bool:
        """Whether it is a file of this user; nobody else can read it from now on."""
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return False
        os.fchmod(descriptor, 0o600)
        return True


def state_directory(environ: Mapping[str, str], platform: str = sys.platform) -> str | None:
    """Where clients keep such files; None where the environment does not tell where the user's things are."""
    if given := environ.get(DIRECTORY_VARIABLE):
        return os.path.abspath(given)
    return place(environ, "XDG_STATE_HOME", os.path.join(".local", "state"), "LOCALAPPDATA", platform)


class Claim:
    """The token of one name: in memory, and in a file if there is a directory and the user chose the name.

    Nothing that goes wrong with a file is an error: the token is kept in memory then, and a log line at debug
    level says so. Files are small and local, so its methods count as not blocking.
    """

    def __init__(self, directory: str | None, server: str, kind: str, name: str | int | None) -> None:
        """Touches no file yet. ``server`` is ``host:port``; without a ``name`` there is no file."""
        self._directory = directory if name else None
        about = f"{server.lower()} {kind} {name}"  # hashed, since a file's name cannot be any text
        self._path = os.path.join(directory or "", hashlib.sha256(about.encode()).hexdigest()[:32] + SUFFIX)
        self._token = ""  # nosec B105 # none
        #: Open and locked while this client is the one that uses it.
        self._file: int | None = None
        self._began = False

    def show(self) -> str:
        """The token to show with the next CONNECT; empty if there is none, which asks for one."""
        if self._directory is not None and not self._began:
            self._began = True
            if self._open(create=False):
                self._token = self._read()
            remove_old(self._directory)
        return self._token

    def keep(self, token: str | None) -> None:
        """Remember what the last 101 said; None is from a server that gives no tokens."""
        if token is None:
            self.drop()
        elif token != self._token or self._file is None:
            self._token = token
            if self._directory is not None and (self._file is not None or self._open(create=True)):
                self._write(token)

    def drop(self) -> None:
        """Never show the token again: it is somebody else's as well, or its name is given up."""
        self._token = ""  # nosec B105 # none
        if self._file is not None:
            self._write("")

    def release(self, *, freed: bool) -> None:
        """Let go of the file; ``freed``: the name is nobody's now, so that nothing is to be shown for it."""
        if self._file is None:
            return
        if freed or not self._token:
            self._token = ""  # nosec B105 # none
            _remove(self._path, self._file)
        else:
            os.close(self._file)
        self._file = None

    def _open(self, create: bool) -> bool:
        """Opens and locks the file; whether it is this client's now."""
        try:
            if create and self._directory is not None:
                os.makedirs(self._directory, mode=0o700, exist_ok=True)
            self._file = _open_locked(self._path, os.O_CREAT if create else 0)
        except FileNotFoundError:
            return False
        except OSError as error:
            log.debug("%s: %s; the name is kept by this process alone", self._path, error.strerror or error)
            return False
        return True

    def _read(self) -> str:
        """The token that is in the file; empty if it is no whole one, or something else."""
        assert self._file is not None
        try:
            os.lseek(self._file, 0, os.SEEK_SET)
            text = os.read(self._file, MOST_BYTES).decode("ascii", "replace")
        except OSError:
            return ""
        token, end, rest = text.partition("\n")
        return token if end and not rest and is_resume_token(token) else ""

    def _write(self, token: str) -> None:
        """Makes it the file's content; one that is cut short on the way has no token."""
        assert self._file is not None
        content = f"{token}\n".encode() if token else b""
        try:
            os.lseek(self._file, 0, os.SEEK_SET)
            written = os.write(self._file, content)
            os.ftruncate(self._file, written)
        except OSError as error:
            log.debug("%s: %s; the name is kept by this process alone", self._path, error.strerror or error)
            _remove(self._path, self._file)
            self._file = None


def remove_old(directory: str) -> None:
    """Remove the files of clients that ended long ago without a goodbye; none that is in use."""
    before = time.time() - OLD
    try:
        with os.scandir(directory) as entries:
            for _, entry in zip(range(MOST_FILES), entries, strict=False):
                if entry.name.endswith(SUFFIX) and entry.stat(follow_symlinks=False).st_mtime < before:
                    with contextlib.suppress(OSError):
                        _remove(entry.path, _open_locked(entry.path))
    except FileNotFoundError:
        pass
    except OSError as error:
        log.debug("%s: %s", directory, error.strerror or error)


def _open_locked(path: str, flags: int = 0) -> int:
    """A descriptor of the file, with its lock. Raises OSError if that is another's or the file not ours."""
    for guard in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):  # no link, no pipe; no line ends changed
        flags |= getattr(os, guard, 0)
    for _ in range(TRIES):
        descriptor = os.open(path, flags | os.O_RDWR, 0o600)
        try:
            if not _is_ours(descriptor):
                raise OSError("it is not a file of this user's")
            _lock(descriptor)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last user has removed it meanwhile
    raise OSError("it is removed again and again")


def _remove(path: str, descriptor: int) -> None:
    """Removes a file and closes it; whoever waits for its name finds none, or a new one."""
    if sys.platform == "win32":  # where an open file cannot be removed
        os.close(descriptor)
    with contextlib.suppress(OSError):
        os.unlink(path)
    if sys.platform != "win32":
        os.close(descriptor)
