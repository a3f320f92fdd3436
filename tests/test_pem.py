"""Certificates in directories of all makers: found by content, paired by key."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from certificates import AUTHORITY, chain_of, install, issue, key_of, put, self_signed
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from tinytun_gevent.server import pem
from tinytun_gevent.server.pem import Directory, Pair


def read(path: Path) -> tuple[list[Pair], dict[str, str]]:
    directory = Directory(str(path))
    return directory.read(directory.signature())


def test_certbot_s_directory_with_its_links(tmp_path: Path) -> None:
    certificate = issue("*.example.com", "example.com")
    leaf = certificate.cert_chain_pems[0].bytes()
    archive, live = tmp_path / "archive" / "example.com", tmp_path / "live" / "example.com"
    for name, content in (
        ("cert1.pem", leaf),
        ("chain1.pem", AUTHORITY.cert_pem.bytes()),
        ("fullchain1.pem", leaf + AUTHORITY.cert_pem.bytes()),
        ("privkey1.pem", key_of(certificate)),
    ):
        put(archive / name, content)
    live.mkdir(parents=True)
    for name in ("cert", "chain", "fullchain", "privkey"):
        (live / f"{name}.pem").symlink_to(f"../../archive/example.com/{name}1.pem")
    put(live / "README", b"Do not touch -----BEGIN anything-----")
    (pair,), broken = read(tmp_path / "live")
    assert pair.certificate == str(live / "fullchain.pem")
    assert pair.key == str(live / "privkey.pem")
    assert set(pair.names) == {"*.example.com", "example.com"}
    assert pair.chain == 2
    assert not broken


def test_caddy_s_and_acme_sh_s_directories(tmp_path: Path) -> None:
    one, two = issue("*.caddy.test"), issue("acme.test", long=True)
    caddy = tmp_path / "certificates" / "acme-v02.api" / "wildcard_.caddy.test"
    put(caddy / "wildcard_.caddy.test.crt", chain_of(one))
    put(caddy / "wildcard_.caddy.test.key", key_of(one))
    put(caddy / "wildcard_.caddy.test.json", b'{"sans":["*.caddy.test"]}')
    acme = tmp_path / "acme.test_ecc"
    put(acme / "acme.test.cer", two.cert_chain_pems[0].bytes())
    put(acme / "fullchain.cer", two.cert_chain_pems[0].bytes() + AUTHORITY.cert_pem.bytes())
    put(acme / "ca.cer", AUTHORITY.cert_pem.bytes())
    put(acme / "acme.test.key", key_of(two))
    pairs, broken = read(tmp_path)
    found = {pair.names: (Path(pair.certificate).name, Path(pair.key).name) for pair in pairs}
    assert found == {
        ("*.caddy.test",): ("wildcard_.caddy.test.crt", "wildcard_.caddy.test.key"),
        ("acme.test",): ("fullchain.cer", "acme.test.key"),
    }
    assert not broken


def test_names_of_files_mean_nothing(tmp_path: Path) -> None:
    """Two pairs whose keys have each other's names, one of them in one file."""
    one, two = issue("one.test"), issue("two.test")
    put(tmp_path / "one.crt", chain_of(one))
    put(tmp_path / "two.key", key_of(one))
    put(tmp_path / "one.key", key_of(two) + chain_of(two))
    pairs, _ = read(tmp_path)
    keys = {pair.names[0]: Path(pair.key).name for pair in pairs}
    assert keys == {"one.test": "two.key", "two.test": "one.key"}


def test_of_a_key_s_copies_it_is_the_one_beside_the_certificate(tmp_path: Path) -> None:
    certificate = issue("x.test")
    put(tmp_path / "a" / "copy.key", key_of(certificate))
    install(tmp_path, certificate, "b")
    (pair,), _ = read(tmp_path)
    assert pair.key == str(tmp_path / "b" / "privkey.pem")


def test_a_certificate_without_its_key_is_none(tmp_path: Path) -> None:
    put(tmp_path / "alone.pem", chain_of(issue("alone.test")))
    put(tmp_path / "other.key", key_of(issue("other.test")))
    assert read(tmp_path) == ([], {})


@pytest.mark.parametrize("content", ["cut", "garbage", "password"])
def test_what_is_broken_is_told_with_its_path(tmp_path: Path, content: str) -> None:
    certificate = issue("fine.test")
    install(tmp_path, certificate)
    key = key_of(certificate)
    if content == "cut":
        bad = key[: len(key) // 2]
    elif content == "garbage":
        bad = b"-----BEGIN CERTIFICATE-----\nbm90aGluZw==\n-----END CERTIFICATE-----\n"
    else:
        encryption = BestAvailableEncryption(b"secret")
        bad = load_pem_private_key(key, None).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    put(tmp_path / "bad.pem", bad)
    pairs, broken = read(tmp_path)
    assert [pair.names for pair in pairs] == [("fine.test",)]
    (path,) = broken
    assert path == str(tmp_path / "bad.pem")
    assert broken[path]
    assert "\n" not in broken[path]


@pytest.mark.parametrize("content", ["version", "twice", "names"])
def test_a_certificate_of_an_unheard_of_kind_is_told_with_its_path(tmp_path: Path, content: str) -> None:
    """The library has errors without a base in common for these."""
    certificate = issue("fine.test")
    install(tmp_path, certificate)
    der = ssl.PEM_cert_to_DER_cert(certificate.cert_chain_pems[0].bytes().decode())
    names, usage = bytes.fromhex("0603551d11"), bytes.fromhex("0603551d0f")
    before, after = {
        "version": (bytes.fromhex("a003020102"), bytes.fromhex("a003020104")),
        "twice": (usage, names),
        "names": (b"\x82\x09fine.test", b"\xa3\x09fine.test"),  # an X.400 address
    }[content]
    assert before in der
    put(tmp_path / "bad.pem", ssl.DER_cert_to_PEM_cert(der.replace(before, after, 1)).encode())
    pairs, broken = read(tmp_path)
    assert [pair.names for pair in pairs] == [("fine.test",)]
    assert list(broken) == [str(tmp_path / "bad.pem")]


def test_what_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the keys of certbot are by anybody but root, who runs tests as well."""
    certificate = issue("fine.test")
    install(tmp_path, certificate)

    def forbidden(path: str, mode: str) -> object:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(pem, "open", forbidden, raising=False)
    pairs, broken = read(tmp_path)
    assert not pairs
    assert set(broken.values()) == {"Permission denied"}


def test_only_what_has_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, issue("one.test"), "one")
    install(tmp_path, issue("two.test"), "two")
    directory = Directory(str(tmp_path))
    directory.read(directory.signature())
    seen: list[str] = []
    original = pem._read
    monkeypatch.setattr(pem, "_read", lambda path: seen.append(path) or original(path))
    install(tmp_path, issue("new.test"), "two")
    pairs, _ = directory.read(directory.signature())
    assert {pair.names[0] for pair in pairs} == {"one.test", "new.test"}
    assert {Path(path).parent.name for path in seen} == {"two"}


def test_it_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In files, in their size, in depth; and links that lead back lead nowhere."""
    certificate = issue("deep.test")
    deep = tmp_path / "/".join("d" * 1 for _ in range(pem.DEPTH + 1))
    put(deep / "too-deep.pem", chain_of(certificate))
    put(tmp_path / "large.pem", key_of(certificate) + bytes(pem.MOST_BYTES))
    put(tmp_path / "..hidden", key_of(certificate))
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "dead").symlink_to(tmp_path / "nothing")
    directory = Directory(str(tmp_path))
    assert directory.signature() == {}
    for number in range(20):
        put(tmp_path / f"{number:02}.txt", b"x")
    monkeypatch.setattr(pem, "MOST_FILES", 10)
    assert len(directory.signature()) <= 10
    with pytest.raises(FileNotFoundError):
        Directory(str(tmp_path / "nowhere")).signature()


def test_a_common_name_is_no_name(tmp_path: Path) -> None:
    put(tmp_path / "old.pem", self_signed("*.old.test", alternative=False))
    (pair,), _ = read(tmp_path)
    assert pair.names == ()
