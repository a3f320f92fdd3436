"""Which certificate is shown for which name, and what a change of files comes to."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gevent
import pytest
from certificates import AUTHORITY, chain_of, install, issue, key_of, put, self_signed
from gevent import ssl
from helpers import deadline, socket_pair, wait_until

from tinytun_gevent.server import certificates as module
from tinytun_gevent.server.certificates import Certificates
from tinytun_gevent.sockets import PlainEnd
from tinytun_gevent.tls import TlsEnd

Load = Callable[..., Certificates]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    monkeypatch.setattr(module, "LOOK", 0.01)
    made: list[Certificates] = []

    def load(*domains: str) -> Certificates:
        made.append(Certificates(str(tmp_path), domains or ("example.com",)))
        made[-1].load()
        return made[-1]

    yield load
    for certificates in made:
        certificates.stop()


def shake(
    certificates: Certificates,
    name: str | None,
    session: ssl.SSLSession | None = None,
    client: ssl.SSLContext | None = None,
) -> TlsEnd:
    """A client's end that has asked for ``name``."""
    one, other = socket_pair()
    near = TlsEnd(PlainEnd(one), certificates.context, server_side=True)
    far = TlsEnd(PlainEnd(other), client or client_context(), host=name, session=session)
    with deadline():
        shaking = [gevent.spawn(near.handshake), gevent.spawn(far.handshake)]
        gevent.joinall(shaking)
        for greenlet in reversed(shaking):
            greenlet.get()
        near.sendall(b"!")
        far.recv(1)
    near.close()
    return far


def client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    AUTHORITY.configure_trust(context)
    return context


def shown(certificates: Certificates, name: str | None) -> set[str]:
    """The names of the certificate that a client gets who asks for ``name``."""
    far = shake(certificates, name)
    certificate = far._tls.getpeercert()
    far.close()
    return {value for _, value in certificate["subjectAltName"]}


# -- which one ----------------------------------------------------------------


def test_the_exact_name_then_the_wildcard_then_the_default(tmp_path: Path, load: Load) -> None:
    install(tmp_path, issue("*.example.com"), "b")
    install(tmp_path, issue("app.example.com"), "c")
    install(tmp_path, issue("other.org"), "a")
    certificates = load()
    assert shown(certificates, "app.example.com") == {"app.example.com"}
    assert shown(certificates, "APP.example.com") == {"app.example.com"}
    assert shown(certificates, "x.example.com") == {"*.example.com"}
    assert shown(certificates, "other.org") == {"other.org"}
    for name in ("a.b.example.com", "unknown.net", None):
        assert shown(certificates, name) == {"*.example.com"}


def test_without_one_for_the_base_domain_the_first_by_path_is_the_default(tmp_path: Path, load: Load) -> None:
    install(tmp_path, issue("two.org"), "b")
    install(tmp_path, issue("one.org"), "a")
    assert shown(load("example.com"), "x.example.com") == {"one.org"}
    assert shown(load("two.org"), "x.example.com") == {"two.org"}


def test_of_several_for_a_name_the_one_that_is_valid_for_longest(tmp_path: Path, load: Load) -> None:
    install(tmp_path, issue("x.test", "long", days=80), "b")
    install(tmp_path, issue("x.test", "short", days=20), "a")
    install(tmp_path, issue("x.test", "short", days=30), "c")
    assert "long" in shown(load(), "x.test")


def test_one_that_does_not_hold_yet_waits_for_its_time(tmp_path: Path, load: Load) -> None:
    install(tmp_path, issue("x.test", "now.test", days=30), "a")
    install(tmp_path, issue("x.test", "later.test", days=95), "b")
    certificates = load()
    pairs = {loaded.pair.names[1]: loaded.pair for loaded in certificates._store.loaded}
    assert pairs["later.test"].begins < time.time()
    future = pairs["later.test"].begins - 1
    best = module._best(certificates._store.loaded, future)
    assert best["x.test"].pair.names[1] == "now.test"
    assert "later.test" in shown(certificates, "x.test")


def test_without_any_certificate_nobody_is_let_in(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        certificates = load()
    assert "has no certificate with its key" in caplog.text
    with pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
        shake(certificates, "x.test")


# -- changes ------------------------------------------------------------------


def test_a_renewed_certificate_is_in_use_and_its_sessions_are_resumed(tmp_path: Path, load: Load) -> None:
    install(tmp_path, issue("x.test", "one.test"))
    certificates = load()
    certificates.start()
    client = client_context()
    before = shake(certificates, "x.test", client=client)
    install(tmp_path, issue("x.test", "two.test", days=90))
    with deadline():
        wait_until(lambda: "two.test" in shown(certificates, "x.test"))
    after = shake(certificates, "x.test", before.session, client)
    assert after.resumed
    assert not before.resumed
    for end in (before, after):
        end.close()


def test_resumption_does_not_depend_on_the_name_s_certificate(tmp_path: Path, load: Load) -> None:
    install(tmp_path, issue("one.test"), "a")
    install(tmp_path, issue("two.test"), "b")
    certificates = load("one.test")
    client = client_context()
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        client.minimum_version = client.maximum_version = version
        for name in ("one.test", "two.test"):
            first = shake(certificates, name, client=client)
            second = shake(certificates, name, first.session, client)
            assert (first.resumed, second.resumed) == (False, True), (name, version)
            first.close()
            second.close()


def test_a_broken_file_is_told_of_once_and_changes_nothing(
    tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    install(tmp_path, issue("x.test"))
    certificates = load()
    with caplog.at_level(logging.WARNING):
        for path in ("privkey.pem", "fullchain.pem"):
            broken = tmp_path / "site" / path
            good = broken.read_bytes()
            put(broken, good[: len(good) // 2])
            for _ in range(3):
                certificates.load()
                os.utime(broken)
            assert shown(certificates, "x.test") == {"x.test"}
            assert caplog.text.count(f"{broken} cannot be used") == 1
            put(broken, good)
    certificates.load()
    assert not certificates._store.broken


def test_what_breaks_again_is_told_of_again(
    tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    install(tmp_path, issue("x.test"))
    certificates = load()
    key = tmp_path / "site" / "privkey.pem"
    good = key.read_bytes()
    with caplog.at_level(logging.WARNING):
        for times in (1, 2):
            put(key, good[: len(good) // 2])
            certificates.load()
            assert caplog.text.count(f"{key} cannot be used") == times
            tmp_path.rename(tmp_path.with_name("away"))
            for _ in range(2):
                certificates.load()
            assert caplog.text.count("No such file") == times
            tmp_path.with_name("away").rename(tmp_path)
            put(key, good)
            certificates.load()


def test_half_a_renewal_changes_nothing(tmp_path: Path, load: Load) -> None:
    """The new certificate is there, its key is not yet."""
    install(tmp_path, issue("other.test"), "other")
    install(tmp_path, issue("x.test", "old.test"))
    certificates = load()
    new = issue("x.test", "new.test", days=80)
    put(tmp_path / "site" / "fullchain.pem", chain_of(new))
    certificates.load()
    assert "old.test" in shown(certificates, "x.test")
    put(tmp_path / "site" / "privkey.pem", key_of(new))
    certificates.load()
    assert "new.test" in shown(certificates, "x.test")
    assert len(certificates._store.loaded) == 2


def test_a_file_that_is_emptied_and_written_in_place_is_shown_all_the_while(
    tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    """As acme.sh does it, with ``cat > file``; certificate and key may be in one."""
    both = tmp_path / "both.pem"
    old, new = issue("x.test", "old.test"), issue("x.test", "new.test", days=80)
    put(both, chain_of(old) + key_of(old))
    install(tmp_path, issue("other.test"), "other")
    certificates = load()
    with caplog.at_level(logging.WARNING):
        both.write_bytes(b"")
        for _ in range(3):
            certificates.load()
            assert "old.test" in shown(certificates, "x.test")
        assert caplog.text.count(f"{both} is empty") == 1
        both.write_bytes(chain_of(new))
        certificates.load()
        assert "old.test" in shown(certificates, "x.test")
        both.write_bytes(chain_of(new) + key_of(new))
        certificates.load()
        assert "old.test" in shown(certificates, "x.test")
        certificates.load()
    assert "new.test" in shown(certificates, "x.test")
    assert "cannot be used" not in caplog.text


def test_a_new_file_is_shown_when_it_was_the_same_at_two_looks(tmp_path: Path, load: Load) -> None:
    """Of one that is copied into the directory there may be half, without the certificate of its issuer."""
    install(tmp_path, issue("x.test", "old.test"), "a")
    certificates, new = load(), issue("x.test", "new.test", days=80)
    put(tmp_path / "b" / "privkey.pem", key_of(new))
    chain = chain_of(new) + AUTHORITY.cert_pem.bytes()
    for length in (len(chain_of(new)), len(chain)):
        (tmp_path / "b" / "fullchain.pem").write_bytes(chain[:length])
        certificates.load()
        assert "old.test" in shown(certificates, "x.test")
    certificates.load()
    assert "new.test" in shown(certificates, "x.test")


def test_a_file_that_stays_empty_is_gone_in_the_end(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, issue("x.test"), "a")
    install(tmp_path, issue("y.test"), "b")
    certificates = load("y.test")
    monkeypatch.setattr("tinytun_gevent.filechange.EMPTY_SECONDS", 0.0)
    for name in ("privkey.pem", "fullchain.pem"):
        (tmp_path / "a" / name).write_bytes(b"")
    certificates.load()
    assert shown(certificates, "x.test") == {"x.test"}
    certificates.load()
    assert shown(certificates, "x.test") == {"y.test"}


def test_a_new_process_is_told_of_a_file_that_was_emptied_a_moment_ago(tmp_path: Path, load: Load) -> None:
    install(tmp_path, issue("x.test"))
    assert load().problem() is None
    key = tmp_path / "site" / "privkey.pem"
    key.write_bytes(b"")
    assert str(key) in str(load().problem())


def test_what_is_removed_is_shown_no_longer_unless_it_is_all_there_is(tmp_path: Path, load: Load) -> None:
    install(tmp_path, issue("one.test"), "a")
    install(tmp_path, issue("two.test"), "b")
    certificates = load("two.test")
    shutil.rmtree(tmp_path / "a")
    certificates.load()
    assert shown(certificates, "one.test") == {"two.test"}
    shutil.rmtree(tmp_path / "b")
    certificates.load()
    assert shown(certificates, "two.test") == {"two.test"}
    tmp_path.rmdir()
    certificates.load()  # as when a disk goes away
    assert shown(certificates, "two.test") == {"two.test"}
    tmp_path.mkdir()


def test_nothing_is_read_again_that_has_not_changed(tmp_path: Path, load: Load) -> None:
    install(tmp_path, issue("x.test"), "a")
    install(tmp_path, issue("y.test"), "b")
    certificates = load()
    store = certificates._store
    certificates.load()
    assert certificates._store is store
    install(tmp_path, issue("y.test", days=80), "b")
    certificates.load()
    assert certificates._store.by_name["x.test"] is store.by_name["x.test"]
    assert certificates._store.by_name["y.test"] is not store.by_name["y.test"]


def test_ticket_keys_do_not_live_for_ever(tmp_path: Path, load: Load) -> None:
    install(tmp_path, issue("x.test"))
    certificates = load()
    certificates.start()
    before = certificates.context
    certificates._tickets_until = 0.0
    with deadline():
        wait_until(lambda: certificates.context is not before)
    assert shown(certificates, "x.test") == {"x.test"}


@pytest.mark.parametrize(("days", "said"), [(15, None), (10, "expires on"), (-1, "has expired on")])
def test_the_end_of_a_certificate_is_told_of_once(
    tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture, days: float, said: str | None
) -> None:
    install(tmp_path, issue("*.example.com", days=days))
    with caplog.at_level(logging.WARNING):
        certificates = load()
        certificates.load()
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == (said is not None)
    assert said is None or said in warnings[0]


def test_a_domain_that_no_certificate_is_for_is_told_of(
    tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    install(tmp_path, issue("*.example.com"))
    with caplog.at_level(logging.WARNING):
        load("example.com", "other.org")
    assert [record.message for record in caplog.records] == ["no certificate in TLS_DIR is for *.other.org"]


def test_a_certificate_with_a_common_name_only_is_told_of(
    tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path / "old.pem", self_signed("*.example.com", alternative=False))
    with caplog.at_level(logging.WARNING):
        certificates = load()
    assert any("no client accepts it" in record.message for record in caplog.records)
    assert not certificates._store.by_name
    assert certificates._store.default is not None  # for whoever does not look at names


# -- what is spoken -----------------------------------------------------------


@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_versions_are_not_spoken(tmp_path: Path, load: Load, version: str) -> None:
    install(tmp_path, issue("x.test"))
    client = client_context()
    client.set_ciphers("ALL:@SECLEVEL=0")
    client.minimum_version = client.maximum_version = ssl.TLSVersion[version]
    with pytest.raises(ssl.SSLError):
        shake(load(), "x.test", client=client)


@pytest.mark.parametrize("cipher", ["ECDHE+AESGCM", "ECDHE+CHACHA20"])
def test_modern_ciphers_are_spoken_in_tls_1_2(tmp_path: Path, load: Load, cipher: str) -> None:
    install(tmp_path, issue("x.test"))
    client = client_context()
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    client.set_ciphers(cipher)
    end = shake(load(), "x.test", client=client)
    assert end._tls.version() == "TLSv1.2"
    end.close()


@pytest.mark.parametrize("cipher", ["DHE-RSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES128-SHA256", "RSA+AESGCM"])
def test_others_are_not(tmp_path: Path, load: Load, cipher: str) -> None:
    install(tmp_path, issue("x.test", long="RSA" in cipher))
    client = client_context()
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    client.set_ciphers(cipher)
    with pytest.raises(ssl.SSLError):
        shake(load(), "x.test", client=client)
