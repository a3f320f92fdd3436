"""Certificates as their makers leave them, for tests."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

AUTHORITY = trustme.CA(key_type=trustme.KeyType.ECDSA)
"""Who signs all of them."""


def issue(
    *names: str, days: float = 60, authority: trustme.CA = AUTHORITY, long: bool = False
) -> trustme.LeafCert:
    """A certificate for ``names`` that ends after so many days."""
    ends = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    kind = trustme.KeyType.RSA if long else trustme.KeyType.ECDSA
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


def self_signed(name: str, bits: int = 2048, *, alternative: bool = True) -> bytes:
    """A certificate with an RSA key, and that, in one PEM text; ``name`` is only its common name, or both."""
    key = rsa.generate_private_key(65537, bits)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), 1)
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=80))
    if alternative:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    certificate = builder.sign(key, hashes.SHA256())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return certificate.public_bytes(Encoding.PEM) + private
