"""Changing AUTH_FILE: one entry more or less, and everything else as the operator has written it.

The text is cut where its tables begin, never written anew. What comes out is parsed before it is written,
and has to be the tokens that were there and the change; anything else is an error.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import msgspec

from ..errors import TunnelError, UsageError
from .tokens import MAX_FILE, Token, parse_tokens

try:
    import fcntl
except ImportError:  # Windows, where the server does not run
    fcntl = None  # type: ignore[assignment]

# What a line of TOML is made of (toml.io/en/v1.0.0): strings of four kinds, comments, brackets, line ends.
_PIECE: Final = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}(?!")'
    r"|'''.*?'{3,5}(?!')"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'"
    r"|#[^\n]*|\n|[\[{]|[\]}]|[^\"'#\n\[\]{}]+|.",
    re.DOTALL,
)


def appended(text: str, entry: str) -> str:
    """``text`` with a table ``[[tokens]]`` at its end. Raises UsageError where that is impossible."""
    gap = "" if not text else "\n" if text.endswith("\n") else "\n\n"
    changed = f"{text}{gap}[[tokens]]\n{entry}"
    before, after = _tokens(text), _tokens(changed)
    if after is None or before is None or after[:-1] != before or len(after) != len(before) + 1:
        raise UsageError(
            "it does not end with a table [[tokens]], so nothing can be added to it: edit it by hand"
        )
    return changed


def without(text: str, index: int) -> str:
    """``text`` without the ``index``-th table ``[[tokens]]``; comments before and behind it stay.

    Raises UsageError where that is impossible.
    """
    tables = list(_tables(text))
    before = _tokens(text)
    if before is not None and len(tables) == len(before):
        start, end = tables[index]
        head, tail = text[:start], text[end:]
        if head.endswith("\n\n") and (not tail or tail.startswith("\n")):
            head = head[:-1]  # one empty line is enough between what was before it and behind it
        changed = head + tail
        if _tokens(changed) == before[:index] + before[index + 1 :]:
            return changed
    raise UsageError("its tokens are not tables [[tokens]] of their own: edit it by hand")


def edit(path: str, change: Callable[[str, Sequence[Token]], str]) -> None:
    """Replaces the file at ``path`` by what ``change`` makes of its text and tokens; made if it is absent.

    All at once or not at all, with its mode and owner; one edit at a time. Blocks. Raises UsageError for a
    file that makes no sense, and TunnelError where it cannot be written.
    """
    path = os.path.realpath(path)  # a link stays a link
    try:
        with _locked(os.path.dirname(path)):
            text, found = _read(path)
            try:
                tokens = parse_tokens(text.encode())
                changed = change(text, tokens)
            except ValueError as error:
                raise UsageError(f"{path}: {error}") from None
            except UsageError as error:
                raise UsageError(f"{path}: {error}") from None
            _replace(path, changed.encode(), found)
    except OSError as error:
        raise TunnelError(f"{path}: {error.strerror or error}; it is as it was") from None


def _tokens(text: str) -> tuple[Token, ...] | None:
    try:
        return parse_tokens(text.encode())
    except ValueError:
        return None


def _tables(text: str) -> Iterator[tuple[int, int]]:
    """Where each ``[[tokens]]`` begins, and where its last line that is neither empty nor a comment ends."""
    start: int | None = None
    end = 0
    for first, last, header in _lines(text):
        if header is not None and _is_tokens(header):
            if start is not None:
                yield start, end
            start = first
        if text[first:last].strip() and not text[first:last].lstrip().startswith("#"):
            end = last
    if start is not None:
        yield start, end


def _lines(text: str) -> Iterator[tuple[int, int, str | None]]:
    """Each statement of the text, which may be several lines: where it begins, where it ends, its header."""
    first, depth = 0, 0
    for match in _PIECE.finditer(text):
        piece = match[0]
        if piece in "[{":
            depth += 1
        elif piece in "]}":
            depth -= 1
        elif piece == "\n" and depth <= 0:
            yield first, match.end(), _header(text[first : match.end()])
            first = match.end()
    if first < len(text):
        yield first, len(text), _header(text[first:])


def _header(line: str) -> str | None:
    return line if line.lstrip().startswith("[") else None


def _is_tokens(header: str) -> bool:
    """Whether it is ``[[tokens]]``, however it is written."""
    try:
        return bool(msgspec.toml.decode(header) == {"tokens": [{}]})
    except msgspec.DecodeError:
        return False


@contextmanager
def _locked(directory: str) -> Iterator[None]:
    """Waits until no other edit is under way in the directory; a lock on the file would go with it."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(path: str) -> tuple[str, os.stat_result | None]:
    try:
        with open(path, "rb") as stream:
            found = os.fstat(stream.fileno())
            data = stream.read(MAX_FILE + 1)
    except FileNotFoundError:
        return "", None
    try:
        return data.decode(), found
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: it is not TOML: byte {error.start} is not UTF-8") from None


def _replace(path: str, data: bytes, found: os.stat_result | None) -> None:
    """Writes the file beside the old one, down to the disk, and puts it in its place."""
    directory, name = os.path.split(path)
    draft = os.path.join(directory, f".{name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            if found is not None:
                made = os.fstat(stream.fileno())
                if (made.st_uid, made.st_gid) != (found.st_uid, found.st_gid):
                    os.chown(draft, found.st_uid, found.st_gid)
                os.chmod(draft, stat.S_IMODE(found.st_mode))
            os.fsync(stream.fileno())
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
    kept = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(kept)  # or the new name could be lost with the power
    finally:
        os.close(kept)
