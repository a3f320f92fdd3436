"""Decides from successive looks at a file when a change of it counts. No I/O but `mark_of`.

Editors and scripts rewrite a file in place: whoever reads it meanwhile finds half of it, or nothing. For a
file of tokens half means that the others are revoked, so what is read again is read when it is whole:

- A file that was put in the place of another (renamed, so it was written before) counts at once.
- One that was changed in place counts when it was the same at two looks; so does one that is missing.
- An empty one counts when it was empty at every look for `EMPTY_SECONDS`, however it came.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum
from typing import Final, Self

EMPTY_SECONDS: Final = 10.0
"""Seconds for which an empty file is taken for one that is being written. A program that has truncated a
file writes it within milliseconds; one that waits for a network or a password manager takes a few seconds."""

BLANK: Final = 2
"""Bytes of a file that is as good as empty: a line end is what ``echo > file`` leaves."""


@dataclass(frozen=True, slots=True)
class Mark:
    """State of one file, as ``stat`` tells it: a file with the same mark has not changed."""

    device: int
    inode: int
    #: In bytes.
    size: int
    #: When its content, and when anything of it, was changed last; in nanoseconds since the epoch.
    modified: int
    changed: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """The mark of a file whose status is known already."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    @property
    def is_empty(self) -> bool:
        return self.size <= BLANK

    def is_new(self, wall: float, seconds: float) -> bool:
        """Whether it was changed within the last ``seconds`` before ``wall``, in seconds since the epoch.

        For the first look, which has no earlier one to be compared with. True also where the file comes from
        the future: then one of the two clocks is wrong.
        """
        return wall - max(self.modified, self.changed) / 1e9 < seconds


def mark_of(path: str | os.PathLike[str]) -> Mark | None:
    """The mark of the file ``path`` leads to, None if there is none that can be looked at."""
    try:
        return Mark.of(os.stat(path))
    except OSError:
        return None


class Verdict(Enum):
    """What is to be done about a file after a look at it."""

    #: Nothing: it is as it was when it was read, or not settled yet.
    WAIT = "wait"
    #: It is empty since this look, which nobody may have meant: warn.
    EMPTY = "empty"
    #: It has changed for good: read it, and `FileChange.take` what was read.
    READ = "read"


class FileChange:
    """Follows one file; see this module's docstring for the rules."""

    __slots__ = ("_empty_since", "_is_read", "_last", "_taken")

    def __init__(self, taken: Mark | None = None) -> None:
        """``taken`` is the mark of what was read before the first look, if anything was."""
        self._taken = taken
        #: Whether anything was read, if only that there is no file.
        self._is_read = taken is not None
        #: What the last look saw.
        self._last = taken
        #: The first look, in monotonic seconds, of all those in a row that saw an empty file.
        self._empty_since: float | None = None

    @property
    def taken(self) -> Mark | None:
        """The mark of what counts now."""
        return self._taken

    def look(self, mark: Mark | None, now: float) -> Verdict:
        """What to do about a file that has ``mark`` at monotonic time ``now``.

        The verdict READ is repeated, look for look, until :meth:`take` says that it was followed.
        """
        before, self._last = self._last, mark
        if self._is_read and mark == self._taken:
            self._empty_since = None
            return Verdict.WAIT
        if mark is not None and mark.is_empty:
            return self._look_at_empty(now)
        self._empty_since = None
        if mark is not None and before is not None:
            replaced = (mark.device, mark.inode) != (before.device, before.inode)
            return Verdict.READ if replaced or mark == before else Verdict.WAIT
        return Verdict.READ if mark == before else Verdict.WAIT

    def _look_at_empty(self, now: float) -> Verdict:
        if self._empty_since is None:
            self._empty_since = now
            return Verdict.EMPTY
        return Verdict.READ if now - self._empty_since >= EMPTY_SECONDS else Verdict.WAIT

    def take(self, mark: Mark | None) -> None:
        """The file was read while it had ``mark``, which counts from now on."""
        self._taken = self._last = mark
        self._is_read = True
        self._empty_since = None
