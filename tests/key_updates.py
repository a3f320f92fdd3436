"""A TLS 1.3 client that says what OpenSSL's never would: KeyUpdate, again and again (RFC 8446 §4.6.3)."""

from __future__ import annotations

import ssl
import struct
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

HANDSHAKE: Final = 22
APPLICATION_DATA: Final = 23
KEY_UPDATE: Final = b"\x18\x00\x00\x01"
"""The head of the message; whether an answer is wanted follows."""

KEY_UPDATE_BYTES: Final = 27
"""Bytes of the record that has it."""

SUITES: Final = {
    "TLS_AES_128_GCM_SHA256": (hashes.SHA256, AESGCM, 16),
    "TLS_AES_256_GCM_SHA384": (hashes.SHA384, AESGCM, 32),
    "TLS_CHACHA20_POLY1305_SHA256": (hashes.SHA256, ChaCha20Poly1305, 32),
}


class Records:
    """Writes the records of one direction, from its first application traffic secret on (RFC 8446 §5, §7)."""

    def __init__(self, suite: str, secret: bytes) -> None:
        self._hash, self._cipher, self._key_size = SUITES[suite]
        self._use(secret)

    def _use(self, secret: bytes) -> None:
        self._secret = secret
        self._key = self._cipher(self._expand("key", self._key_size))
        self._iv = int.from_bytes(self._expand("iv", 12), "big")
        self._count = 0

    def _expand(self, label: str, size: int) -> bytes:
        full = b"tls13 " + label.encode()
        info = struct.pack("!HB", size, len(full)) + full + b"\0"
        return HKDFExpand(self._hash(), size, info).derive(self._secret)

    def record(self, kind: int, text: bytes) -> bytes:
        """One record of the content type ``kind``."""
        head = struct.pack("!BHH", APPLICATION_DATA, 0x0303, len(text) + 17)
        nonce = (self._iv ^ self._count).to_bytes(12, "big")
        self._count += 1
        return head + self._key.encrypt(nonce, text + bytes([kind]), head)

    def key_update(self, *, answered: bool = True) -> bytes:
        """A KeyUpdate, after which the next key is used."""
        update = self.record(HANDSHAKE, KEY_UPDATE + bytes([answered]))
        self._use(self._expand("traffic upd", self._hash.digest_size))
        return update


def client_context(keys: Path, trust: ssl.SSLContext) -> ssl.SSLContext:
    """``trust``, a client's, with TLS 1.3 only and its secrets written to ``keys``."""
    trust.minimum_version = ssl.TLSVersion.TLSv1_3
    trust.keylog_filename = str(keys)
    return trust


def records_of(keys: Path, suite: str) -> Records:
    """The client's records of the connection whose secrets are the last ones in ``keys``."""
    lines = [line.split() for line in keys.read_text().splitlines()]
    secrets = [line[2] for line in lines if line[0] == "CLIENT_TRAFFIC_SECRET_0"]
    return Records(suite, bytes.fromhex(secrets[-1]))
