"""Files that nobody ever sees half written, and that no other user can have put elsewhere by a link."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import Final

_NO_LINK: Final = getattr(os, "O_NOFOLLOW", 0)
_POSIX: Final = os.name == "posix"
_IN_PUBLIC: Final = ", in a directory where everybody may write"


def replace(path: str | os.PathLike[str], data: bytes, like: os.stat_result | None = None) -> None:
    """Puts a file in the place of ``path``, or of nothing: all at once or not at all. Blocks on the disk.

    Only its user may read it, unless it is to be ``like`` another, in mode and owner. One at a time: the
    draft's name is always the same, so that a process that is killed leaves one at most. The directory must
    be one that :func:`check_directory` accepts, and stays the same one until the end. Raises ``OSError``,
    with what was there before as it was.
    """
    head, name = os.path.split(os.fspath(path))
    draft = f"{name}.new"
    with _opened(head or ".") as directory:
        if directory is not None:
            _check(os.fstat(directory), like)
        here = head if directory is None else ""
        draft, name = os.path.join(here, draft), os.path.join(here, name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft, dir_fd=directory)  # a link itself, never what it leads to
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK
        descriptor = os.open(draft, flags, 0o600, dir_fd=directory)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                if _POSIX:
                    _liken(descriptor, like)
                os.fsync(descriptor)
            os.replace(draft, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(draft, dir_fd=directory)
            raise
        if directory is not None:
            os.fsync(directory)  # or the new name may be gone after a loss of power


def check_directory(path: str | os.PathLike[str], like: os.stat_result | None = None) -> None:
    """Checks that a directory is this user's, and that not everybody may write in it.

    Whoever else may put files there can put one there first, or a link to anywhere. The user of a file that
    one is to be ``like`` may own the directory too. Raises ``PermissionError``, which says why, and other
    ``OSError``; never on Windows, which has no such owners.
    """
    if _POSIX:
        _check(os.stat(path), like)


def open_to_append(path: str, mode: int) -> int:
    """Opens a file to add to it, made with ``mode`` if there is none; never blocks on a pipe.

    In a directory where everybody may write (``/tmp``), neither through a link nor into another user's file,
    like Linux where ``fs.protected_symlinks`` and ``fs.protected_regular`` are on. Raises ``OSError``.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
    if not _POSIX:
        return os.open(path, flags, mode)
    parent = os.stat(os.path.dirname(path) or ".")
    if not parent.st_mode & stat.S_IWOTH:
        return os.open(path, flags, mode)
    try:
        descriptor = os.open(path, flags | _NO_LINK, mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise PermissionError(errno.EPERM, f"a link{_IN_PUBLIC}") from None
        raise
    try:
        owner = os.fstat(descriptor).st_uid
        if owner not in (os.geteuid(), parent.st_uid):
            raise PermissionError(errno.EPERM, f"a file of another user's (uid {owner}){_IN_PUBLIC}")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check(directory: os.stat_result, like: os.stat_result | None) -> None:
    """See :func:`check_directory`."""
    owners = {os.geteuid()} | ({like.st_uid} if like is not None else set())
    if directory.st_uid not in owners:
        what = f"the directory belongs to another user (uid {directory.st_uid})"
        raise PermissionError(errno.EPERM, f"{what}: take one of this user's, or a new one below it")
    if directory.st_mode & stat.S_IWOTH:
        raise PermissionError(errno.EPERM, "everybody may write in the directory: take a new one below it")


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int | None]:
    """A directory's descriptor, where the system can go on from one."""
    if not _POSIX:
        yield None
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _liken(descriptor: int, like: os.stat_result | None) -> None:
    """Gives a file another's owner and mode, or makes it its user's alone."""
    if like is not None and (like.st_uid, like.st_gid) != (os.geteuid(), os.getegid()):
        os.fchown(descriptor, like.st_uid, like.st_gid)
    os.fchmod(descriptor, 0o600 if like is None else stat.S_IMODE(like.st_mode))
