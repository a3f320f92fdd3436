"""The server's own directory: its secret, and the names that are leased after a restart.

Without a directory, everything is kept in memory and forgotten with the process.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from .. import files
from ..registry import Record
from ..wire.handshake import Kind, is_host
from ..wire.options import build_options, parse_options

log = logging.getLogger("tinytun_gevent.server")

SECRET_BYTES: Final = 32
"""As long as what HMAC-SHA256 makes of it; more would add nothing."""

MAX_FILE: Final = 64 * 1024 * 1024
"""Bytes of a lease file that are read: a million names are less."""

_ID: Final = re.compile(r"[0-9a-f]{32}\Z")


class Storage:
    """What of a server outlives its process, in the directory ``path`` (None: nothing does).

    A directory that cannot be used is told to the log, once, and then done without.
    """

    def __init__(self, path: str | None) -> None:
        self._path = Path(path) if path else None
        #: What makes this server's resume tokens.
        self.secret = secrets.token_bytes(SECRET_BYTES)
        if self._path is not None:
            try:
                self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
                files.check_directory(self._path)  # a secret that others have put there is none
                self.secret = self._load_secret(self._path / "secret")
            except OSError as error:
                log.warning("STATE_DIR=%s: %s; names will not outlive a restart", path, _reason(error))
                self._path = None

    @property
    def directory(self) -> Path | None:
        """The directory; None if there is none that can be used."""
        return self._path

    def read_leases(self) -> list[Record]:
        """The names that the last process had; none if there was none. Raises nothing.

        A file that makes no sense is put aside, with a warning.
        """
        if self._path is None:
            return []
        file = self._path / "leases.json"
        try:
            with file.open("rb") as stream:
                return parse_leases(stream.read(MAX_FILE))
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            log.warning("%s: %s; its names are free", file, _reason(error))
            _put_aside(file)
            return []

    def write_leases(self, records: Iterable[Record]) -> None:
        """Replaces the names that are kept, all at once or not at all. Blocks; raises ``OSError``."""
        if self._path is not None:
            files.replace(self._path / "leases.json", build_leases(records))

    def _load_secret(self, file: Path) -> bytes:
        """This directory's secret, made at its first use."""
        try:
            secret = file.read_bytes()
            if len(secret) == SECRET_BYTES:
                return secret
            log.warning("%s is damaged and made anew: who was promised a name has to do without it", file)
        except FileNotFoundError:
            pass
        secret = secrets.token_bytes(SECRET_BYTES)
        files.replace(file, secret)
        return secret


def build_leases(records: Iterable[Record]) -> bytes:
    """The lease file's text."""
    names = [record_fields(record) for record in records]
    return json.dumps({"version": 1, "names": names}, indent=0).encode() + b"\n"


def parse_leases(data: bytes) -> list[Record]:
    """What :func:`build_leases` wrote. Raises ``ValueError`` for anything else."""
    try:
        content = json.loads(data)
        if content["version"] != 1:
            raise ValueError("it is of another version")
        return [_leased(name) for name in content["names"]]
    except (RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ValueError("it is not a list of names") from error


def record_fields(record: Record) -> dict[str, Any]:
    """What JSON has of a name, but for ``resumable``."""
    fields = {"kind": record.kind.value, "name": record.name, "id": record.id, "opener": record.opener}
    if record.host_header is not None:
        fields["host_header"] = record.host_header
    if record.source:
        fields["source"] = record.source
    if record.options is not None:
        fields["options"] = build_options(record.options)
    return fields


def read_record(fields: dict[str, Any], *, resumable: bool) -> Record:
    """The name that `record_fields` wrote. Raises ``ValueError``, ``KeyError`` or ``TypeError``."""
    kind, options = Kind(fields["kind"]), fields.get("options")
    return Record(
        kind,
        fields["name"],
        fields["id"],
        fields["opener"],
        resumable,
        fields.get("host_header"),
        None if options is None else parse_options(options, http=kind is Kind.HTTP),
        str(fields.get("source", "")),
    )


def _leased(fields: dict[str, Any]) -> Record:
    record = read_record(fields, resumable=True)
    wanted = str if record.kind is Kind.HTTP else int
    if type(record.name) is not wanted or not _ID.match(record.id) or not isinstance(record.opener, str):
        raise ValueError("it has a name that makes no sense")
    if record.host_header is not None and not is_host(record.host_header):
        raise ValueError("it has a Host that makes no sense")
    return record


def _put_aside(file: Path) -> None:
    try:
        os.replace(file, file.with_suffix(".damaged"))
    except OSError:
        log.debug("%s could not be put aside", file)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
