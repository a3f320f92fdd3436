"""Files that nobody ever sees half written, and that last through a loss of power."""

from __future__ import annotations

import contextlib
import os
import stat


def replace(path: str | os.PathLike[str], data: bytes, like: os.stat_result | None = None) -> None:
    """Puts a file in the place of ``path``, or of nothing: all at once or not at all. Blocks on the disk.

    Only its user may read it, unless it is to be ``like`` another, in mode and owner. One at a time: the
    draft's name is always the same, so that a process that is killed leaves one at most. Raises ``OSError``,
    with what was there before as it was.
    """
    path = os.fspath(path)
    draft = f"{path}.new"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if os.name == "posix":
                _liken(descriptor, like)
            os.fsync(descriptor)
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise
    _flush_directory(os.path.dirname(path) or ".")


def _liken(descriptor: int, like: os.stat_result | None) -> None:
    """Gives a file another's owner and mode, or makes it its user's alone."""
    if like is not None and (like.st_uid, like.st_gid) != (os.geteuid(), os.getegid()):
        os.fchown(descriptor, like.st_uid, like.st_gid)
    os.fchmod(descriptor, 0o600 if like is None else stat.S_IMODE(like.st_mode))


def _flush_directory(path: str) -> None:
    """Makes a new name in it last, where the system can."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
