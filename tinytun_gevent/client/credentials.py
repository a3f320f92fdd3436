"""The user's token: where it comes from, where it is kept between two commands, and where it may go.

A token opens tunnels in its holder's name. It is in no log, no error and no ``repr``.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import logging
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from ipaddress import ip_address
from typing import Final, TypeVar

from .. import files
from ..errors import UsageError
from ..wire.handshake import MAX_TOKEN, is_token
from .places import place

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

T = TypeVar("T")

TOKEN_VARIABLE: Final = "TINYTUN_TOKEN"

FILE: Final = "tokens.json"

MOST_BYTES: Final = 1 << 20
"""Bytes read of a file of settings: the tokens of some hundreds of servers, or the paths of thousands."""

PLAIN: Final = (
    "is not reached by TLS: whoever is on the way could read the token; "
    "use https://, or --insecure to send it all the same"
)


def config_directory(environ: Mapping[str, str], platform: str = sys.platform) -> str | None:
    """Where the user's settings are kept; None where the environment does not tell."""
    return place(environ, "XDG_CONFIG_HOME", ".config", "APPDATA", platform)


def choose_token(
    token: str | None, token_file: str | os.PathLike[str] | None, server: str, environ: Mapping[str, str]
) -> str | None:
    """The token for ``server`` (``host:port``): given, in a file, in the environment, or of a login; or none.

    Raises UsageError for one that cannot be a token, which is not shown.
    """
    if token is not None and token_file is not None:
        raise UsageError("--token and --token-file do not go together")
    if token is not None:
        return check_token(token, "--token")
    if token_file is not None:
        return _read_token(os.fspath(token_file))
    if environ.get(TOKEN_VARIABLE, "").strip():
        return check_token(environ[TOKEN_VARIABLE], TOKEN_VARIABLE)
    directory = config_directory(environ)
    return Logins(directory).get(server) if directory is not None else None


def check_token(text: str, source: str) -> str:
    """``text`` without the space around it, if it can be a token; raises UsageError naming ``source``."""
    token = text.strip()
    if not is_token(token):
        raise UsageError(
            f"{source}: that is no token: allowed are letters, digits and -._~+/, at most {MAX_TOKEN} of them"
        )
    return token


class Logins:
    """The tokens that ``tinytun login`` keeps, by server, in a file that only its user can read."""

    def __init__(self, directory: str) -> None:
        """Touches nothing yet."""
        self.path = os.path.join(directory, FILE)

    def get(self, server: str) -> str | None:
        token = self._load().get(server.lower())
        return token if token is not None and is_token(token) else None

    def put(self, server: str, token: str) -> None:
        """Raises UsageError where it cannot be kept."""
        with one_at_a_time(self.path):
            self._save({**self._load(strict=True), server.lower(): token})

    def remove(self, server: str | None) -> bool:
        """Forgets one server's token, or with None all; whether there was any. Raises UsageError."""
        if not os.path.exists(self.path):
            return False
        with one_at_a_time(self.path):
            tokens = self._load(strict=True)
            found = bool(tokens) if server is None else server.lower() in tokens
            if found:
                self._save({} if server is None else {k: v for k, v in tokens.items() if k != server.lower()})
            return found

    def _load(self, *, strict: bool = False) -> dict[str, str]:
        with contextlib.suppress(OSError), open(self.path, "rb") as stream:
            warn_if_open(stream.fileno(), self.path)
        return read_kept(self.path, parse_logins, {}, "the tokens", strict=strict)

    def _save(self, tokens: dict[str, str]) -> None:
        """All at once or not at all; without tokens there is no file."""
        try:
            if tokens:
                files.replace(self.path, json.dumps({"tokens": tokens}, indent=1).encode())
            else:
                os.unlink(self.path)
        except OSError as error:
            raise UsageError(f"{self.path}: {error.strerror or error}") from None


@contextlib.contextmanager
def one_at_a_time(path: str) -> Iterator[None]:
    """One command at a time changes files beside ``path``, or one would undo what another did; blocks.

    The lock is on the directory, which stays while files in it are replaced. Windows cannot lock one.
    Raises UsageError where there can be no such directory.
    """
    directory = os.path.dirname(path)
    descriptor: int | None = None
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        if sys.platform != "win32":
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if descriptor is None:
            raise UsageError(f"{path}: {error.strerror or error}") from None
        log.debug("%s cannot be locked: %s", directory, error)  # some network file systems
    try:
        yield
    finally:
        if descriptor is not None:
            # A patched os.close may wait for gevent's loop to turn: the lock must not.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def read_kept(
    path: str, parse: Callable[[bytes], T], nothing: T, what: str, *, strict: bool = False
) -> T:
    """Reads a file of the user's settings; one that makes no sense is told to the log, and is ``nothing``.

    ``parse`` gets one byte more than :data:`MOST_BYTES` at most, and raises ValueError. ``what`` is in it,
    in words. With ``strict`` it raises UsageError instead: nothing that may still be of use is written over.
    """
    try:
        with open(path, "rb") as stream:
            return parse(stream.read(MOST_BYTES + 1))
    except (FileNotFoundError, NotADirectoryError):
        return nothing
    except OSError as error:
        reason = error.strerror or str(error)
    except ValueError as error:
        reason = str(error)
    if strict:
        raise UsageError(f"{path}: {reason}; remove it to begin anew")
    log.warning("%s: %s; %s in it are not used", path, reason, what)
    return nothing


def parse_logins(data: bytes) -> dict[str, str]:
    """The tokens by server in the file's content; raises ValueError, which repeats nothing of it."""
    if len(data) > MOST_BYTES:
        raise ValueError("it is too large")
    try:
        tokens = json.loads(data)["tokens"]
    except (ValueError, LookupError, TypeError, RecursionError):
        tokens = None
    if not isinstance(tokens, dict) or not all(isinstance(token, str) for token in tokens.values()):
        raise ValueError("it is damaged")
    return tokens


def warn_if_open(descriptor: int, path: str) -> None:
    """Tells the log that others can read a file with a token in it."""
    if os.name == "posix" and stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o077:
        log.warning("%s: others can read the token in it; 'chmod 600' keeps them out", path)


def must_hide(host: str) -> bool:
    """Whether a token must not go to an address in the clear: it may be another machine's."""
    try:
        return not ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return True


def _read_token(path: str) -> str:
    try:
        with open(path, "rb") as stream:
            warn_if_open(stream.fileno(), path)
            data = stream.read(4 * MAX_TOKEN)  # UTF-16 takes two bytes for each
    except OSError as error:
        raise UsageError(f"--token-file {path!r}: {error.strerror or error}") from None
    return check_token(decode_token(data), f"--token-file {path!r}")


def decode_token(data: bytes) -> str:
    """A token's text as editors and shells write it: ASCII, or UTF-8 or UTF-16 that say so in front (BOM)."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace")
    return data.removeprefix(codecs.BOM_UTF8).decode("ascii", "replace")
