"""Certificates as their makers leave them, for tests."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import trustme

AUTHORITY = trustme.CA(key_type=trustme.KeyType.ECDSA)
"""Who signs all of them."""


def issue(
    *names: str, days: float = 60, authority: trustme.CA = AUTHORITY, rsa: bool = False
) -> trustme.LeafCert:
    """A certificate for ``names`` that ends after so many days."""
    ends = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    kind = trustme.KeyType.RSA if rsa else trustme.KeyType.ECDSA
    begins = ends - datetime.timedelta(days=90 if days < 90 else days + 1)
    return authority.issue_cert(*names, not_before=begins, not_after=ends, key_type=kind)


def chain_of(certificate: trustme.LeafCert) -> bytes:
    return b"".join(pem.bytes() for pem in certificate.cert_chain_pems)


def key_of(certificate: trustme.LeafCert) -> bytes:
    return certificate.private_key_pem.bytes()


def put(path: Path, content: bytes) -> None:
    """Writes a file as a careful program does: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name("." + path.name)
    new.write_bytes(content)
    os.replace(new, path)


def install(directory: Path, certificate: trustme.LeafCert, name: str = "site") -> None:
    """A pair as certbot names it, in ``directory/name``; the key first."""
    put(directory / name / "privkey.pem", key_of(certificate))
    put(directory / name / "fullchain.pem", chain_of(certificate))


def trust_file(path: Path) -> Path:
    """What a client must trust, in a file."""
    AUTHORITY.cert_pem.write_to_path(str(path))
    return path
