"""Certificates and keys in a directory, whoever put them there: found by content, paired by public key.

Names of files mean nothing here, because certbot, Caddy and acme.sh have one custom each. Blocks on the
disk; no sockets, no gevent: it runs in a thread, and in the command's ``--check``.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from tinytun_gevent.filechange import EMPTY_SECONDS, FileChange, Mark, Verdict

log = logging.getLogger("tinytun_gevent.server")

NAMELESS: Final = "no client accepts it: it has no alternative name (SAN), and its common name does not count"
"""What is said of a certificate without a name that counts."""

MOST_FILES: Final = 4096
"""Files that are looked at: a thousand certificates, with what their makers put beside them."""

DEPTH: Final = 8
"""Directories below the first one; Caddy's certificates are four deep."""

MOST_BYTES: Final = 256 * 1024
"""Bytes of a file that may be one of ours; chains have less than 20 KiB."""

_KEY: Final = re.compile(rb"-----BEGIN ([A-Z0-9 ]*PRIVATE KEY)-----.*?-----END \1-----", re.DOTALL)
_CERTIFICATE: Final = b"-----BEGIN CERTIFICATE-----"
_MALFORMED: Final = (
    ValueError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
"""What a file with something wrong or unheard-of in it comes to; these have no base of their own."""

_HOST_NAME: Final = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*\Z")

Signature = Mapping[str, Mark]
"""The files that count; what tells of each that it has changed."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key."""

    #: The files that they are in.
    certificate: str
    key: str
    #: What tells this certificate from any other.
    fingerprint: bytes
    #: The host names and addresses that it is good for, lower case: its alternative names.
    names: tuple[str, ...]
    #: When it begins and ends to be valid, in seconds of Unix time.
    begins: float
    expires: float
    #: Certificates in its file, itself included.
    chain: int
    #: Whether a signature with its key takes milliseconds.
    slow: bool

    @property
    def title(self) -> str:
        """Its names, for people."""
        return ", ".join(self.names) or "no name"

    @property
    def until(self) -> str:
        """The day of its end."""
        return datetime.fromtimestamp(self.expires, UTC).strftime("%Y-%m-%d")


@dataclass(slots=True)
class Contents:
    """What one file has."""

    certificates: list[x509.Certificate] = field(default_factory=list)
    #: Public halves of the keys.
    keys: list[bytes] = field(default_factory=list)
    #: Why it could not be read, although it looked like one of ours.
    problem: str = ""


class Directory:
    """A directory with certificates; remembers files that have not changed since they were read."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._known: dict[str, tuple[Mark, Contents]] = {}
        #: By path, of what the last look saw; None before the first look.
        self._changes: dict[str, FileChange] | None = None

    def signature(self, now: float | None = None) -> Signature:
        """What counts at monotonic time ``now``. Raises ``OSError`` if the directory itself cannot be read.

        The first time that is whatever is there and not empty. Later a file that is being written counts as
        it was before, or not yet (see `filechange`); one that is gone is gone.
        """
        os.stat(os.path.join(self._path, "."))
        now = time.monotonic() if now is None else now
        found = dict(_walk(self._path, DEPTH, set(), [MOST_FILES]))
        if self._changes is None:
            changes = {path: FileChange(None if mark.is_empty else mark) for path, mark in found.items()}
        else:
            changes = {path: self._changes.get(path) or FileChange() for path in found}
        self._changes = changes
        counted = {path: self._counted(path, changes[path], mark, now) for path, mark in found.items()}
        return {path: mark for path, mark in counted.items() if mark is not None and not mark.is_empty}

    def _counted(self, path: str, change: FileChange, mark: Mark, now: float) -> Mark | None:
        """The mark that a file counts with."""
        verdict = change.look(mark, now)
        if verdict is Verdict.EMPTY and change.taken is not None:
            text = "TLS_DIR: %s is empty; what it had goes on, for %.0f s unless it is written"
            log.warning(text, path, EMPTY_SECONDS)
        elif verdict is Verdict.READ:
            change.take(mark)
        return change.taken

    def emptied(self, wall: float) -> str | None:
        """A file that was emptied within the last moments before ``wall``, seconds since the epoch; or None.

        For a process that has not seen what was in it.
        """
        found = _walk(self._path, DEPTH, set(), [MOST_FILES])
        return next((p for p, mark in found if mark.is_empty and mark.is_new(wall, EMPTY_SECONDS)), None)

    def read(self, signature: Signature) -> tuple[list[Pair], dict[str, str]]:
        """The pairs in the files of ``signature``, and the files that are broken, with the reason.

        Of one certificate that is in several files it is the longest chain.
        """
        known = {}
        for path, mark in signature.items():
            before = self._known.get(path)
            known[path] = before if before and before[0] == mark else (mark, _read(path))
        self._known = known
        contents = {path: content for path, (_, content) in sorted(known.items())}
        broken = {path: content.problem for path, content in contents.items() if content.problem}
        return _paired(contents), broken

    def lonely(self) -> list[tuple[str, str]]:
        """The files of the last :meth:`read` in which something lacks its other half, and what it lacks.

        A certificate of an authority needs no key.
        """
        contents = {path: content for path, (_, content) in sorted(self._known.items())}
        keys = {key for content in contents.values() for key in content.keys}
        shown = {path: content.certificates[0] for path, content in contents.items() if content.certificates}
        certified = {_public(certificate.public_key()) for certificate in shown.values()}
        found = [
            (path, "has a certificate, but its key is in no file")
            for path, certificate in shown.items()
            if _public(certificate.public_key()) not in keys and not _is_authority(certificate)
        ]
        for path, content in contents.items():
            if certified.isdisjoint(content.keys) and content.keys:
                found.append((path, "has a key, but its certificate is in no file"))
        return found


def covers(names: Iterable[str], domain: str) -> bool:
    """Whether a certificate for ``names`` is good for the tunnels of ``domain``."""
    return "*." + domain in names


def _walk(
    path: str, depth: int, seen: set[tuple[int, int]], left: list[int]
) -> Iterator[tuple[str, Mark]]:
    """The files below ``path`` that may be ours, ``left`` at most; through links, but nowhere twice."""
    try:
        here = os.stat(path)
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError:
        return
    if (here.st_dev, here.st_ino) in seen:
        return
    seen.add((here.st_dev, here.st_ino))
    for entry in entries:
        if entry.name.startswith("."):
            continue
        left[0] -= 1
        if left[0] < 0:
            return
        try:
            status = entry.stat()
        except OSError:
            continue  # a link to nothing
        if stat.S_ISDIR(status.st_mode):
            if depth:
                yield from _walk(entry.path, depth - 1, seen, left)
        elif stat.S_ISREG(status.st_mode) and status.st_size <= MOST_BYTES:
            yield entry.path, Mark.of(status)


def _read(path: str) -> Contents:
    """What is in a file; blank for one that is not about certificates."""
    contents = Contents()
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        contents.problem = error.strerror or "cannot be read"
        return contents
    try:
        if _CERTIFICATE in data:
            contents.certificates = x509.load_pem_x509_certificates(data)
        for block in _KEY.finditer(data):
            key = load_pem_private_key(block[0] + b"\n", None, unsafe_skip_rsa_key_validation=True)
            contents.keys.append(_public(key.public_key()))
        if b"PRIVATE KEY-----" in data and not contents.keys:
            contents.problem = "its key is not complete"
        for certificate in contents.certificates[:1]:
            _public(certificate.public_key())
            _names(certificate)
    except TypeError:
        contents.problem = "its key has a password"
    except _MALFORMED as error:
        contents.problem = str(error).partition("\n")[0][:200] or "it is malformed"
    if contents.problem:
        contents.certificates, contents.keys = [], []
    return contents


def _paired(contents: Mapping[str, Contents]) -> list[Pair]:
    keys: dict[bytes, list[str]] = {}
    for path, content in contents.items():
        for public in content.keys:
            keys.setdefault(public, []).append(path)
    found: dict[bytes, Pair] = {}
    for path, content in contents.items():
        if not content.certificates:
            continue
        first = content.certificates[0]
        holders = keys.get(_public(first.public_key()))
        if not holders:
            continue
        beside = [holder for holder in holders if os.path.dirname(holder) == os.path.dirname(path)]
        pair = _pair(path, (beside or holders)[0], first, len(content.certificates))
        known = found.get(pair.fingerprint)
        if known is None or pair.chain > known.chain:
            found[pair.fingerprint] = pair
    return list(found.values())


def _pair(path: str, key: str, certificate: x509.Certificate, chain: int) -> Pair:
    return Pair(
        certificate=path,
        key=key,
        fingerprint=certificate.fingerprint(hashes.SHA256()),
        names=_names(certificate),
        begins=certificate.not_valid_before_utc.timestamp(),
        expires=certificate.not_valid_after_utc.timestamp(),
        chain=chain,
        slow=getattr(certificate.public_key(), "key_size", 0) > 2048,
    )


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, *_MALFORMED):
        return False


def _public(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _names(certificate: x509.Certificate) -> tuple[str, ...]:
    """Its alternative names. Its common name counts for no client (RFC 9110 §4.3.4, RFC 9525)."""
    found: list[str] = []
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        pass
    else:
        found += names.get_values_for_type(x509.DNSName)
        found += [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    lower = (name.lower().rstrip(".") for name in found)
    return tuple(dict.fromkeys(name for name in lower if ":" in name or _HOST_NAME.match(name)))
