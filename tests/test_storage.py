"""The server's own directory: a secret that stays, a lease file that is whole or absent."""

from __future__ import annotations

import json
import logging
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytun_gevent.registry import Record
from tinytun_gevent.server.storage import Storage, build_leases, parse_leases
from tinytun_gevent.wire.handshake import Kind
from tinytun_gevent.wire.options import Options, Rewrite

ID = "0123456789abcdef" * 2
APP = Record(Kind.HTTP, "app", ID, "", True)
PORT = Record(Kind.TCP, 30000, ID[::-1], "somebody", True)
OPTIONS = Options(rewrite=Rewrite("http://localhost:3000"), forwarded_host=False)
REWRITTEN = Record(Kind.HTTP, "web", "f" * 32, "", True, "localhost:3000", OPTIONS)


def test_the_secret_stays_and_nobody_else_reads_it(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    secret = Storage(str(place)).secret
    assert len(secret) == 32
    assert Storage(str(place)).secret == secret
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert stat.S_IMODE((place / "secret").stat().st_mode) == 0o600


def test_without_a_directory_each_process_has_a_secret_of_its_own() -> None:
    storage = Storage("")
    assert storage.directory is None
    assert storage.secret != Storage("").secret
    storage.write_leases([APP])
    assert storage.read_leases() == []


def test_a_directory_that_cannot_be_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    storage = Storage(str(tmp_path / "file" / "x"))
    assert storage.directory is None
    assert storage.read_leases() == []
    (line,) = caplog.messages
    assert "STATE_DIR" in line


def test_a_damaged_secret_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "secret").write_bytes(b"short")
    secret = Storage(str(tmp_path)).secret
    assert "damaged" in caplog.text
    assert "short" not in caplog.text
    assert Storage(str(tmp_path)).secret == secret


def test_leases_are_read_as_they_were_written(tmp_path: Path) -> None:
    Storage(str(tmp_path)).write_leases([APP, PORT, REWRITTEN])
    assert Storage(str(tmp_path)).read_leases() == [APP, PORT, REWRITTEN]
    Storage(str(tmp_path)).write_leases([])
    assert Storage(str(tmp_path)).read_leases() == []


@pytest.mark.parametrize("words", ["belongs to another user", "everybody may write"])
def test_a_directory_that_others_may_fill_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, words: str
) -> None:
    (tmp_path / "secret").write_bytes(b"x" * 32)
    uid = os.geteuid()
    if words == "everybody may write":
        tmp_path.chmod(0o1777)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    storage = Storage(str(tmp_path))
    assert storage.directory is None
    assert storage.secret != b"x" * 32
    assert words in caplog.text


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_leases([APP])
    (tmp_path / "leases.json.new").mkdir()
    with pytest.raises(OSError):
        storage.write_leases([APP, PORT])
    assert Storage(str(tmp_path)).read_leases() == [APP]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"version": 2, "names": []}',
        b'{"version": 1, "names": 5}',
        b'{"version": 1, "names": [1]}',
        b"[" * 100_000,
        b"\xff",
        *(
            json.dumps(
                {"version": 1, "names": [{"kind": "http", "name": "a", "id": ID, "opener": ""} | bad]}
            ).encode()
            for bad in (
                {"kind": "x"},
                {"name": 5},
                {"kind": "tcp"},
                {"kind": "tcp", "name": True},
                {"id": "x"},
                {"id": 5},
                {"opener": None},
            )
        ),
    ],
)
def test_what_makes_no_sense_is_put_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    (tmp_path / "leases.json").write_bytes(content)
    caplog.set_level(logging.WARNING)
    assert Storage(str(tmp_path)).read_leases() == []
    assert "leases.json" in caplog.text
    assert (tmp_path / "leases.damaged").read_bytes() == content
    assert not (tmp_path / "leases.json").exists()


names = st.one_of(
    st.tuples(st.just(Kind.HTTP), st.text(min_size=1, max_size=63)),
    st.tuples(st.sampled_from([Kind.TCP, Kind.TCP_PORT]), st.integers(0, 65535)),
)


@settings(max_examples=30)
@given(
    st.lists(
        st.builds(
            lambda kn, i, o, s: Record(*kn, i, o, True, source=s),
            names,
            st.integers(0, 2**128 - 1).map("{:032x}".format),
            st.text(max_size=40),
            st.text(max_size=40),
        ),
        max_size=20,
    )
)
def test_any_names_survive(records: list[Record]) -> None:
    assert parse_leases(build_leases(records)) == records


@given(st.binary(max_size=300))
def test_anything_else_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        parse_leases(data)
