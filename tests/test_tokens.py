"""The file of tokens on the disk, and how ``tinytun-server token`` changes it."""

from __future__ import annotations

import errno
import io
import os
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tinytun_gevent.errors import UsageError
from tinytun_gevent.filechange import mark_of
from tinytun_gevent.server import tokens
from tinytun_gevent.server.authfile import digest
from tinytun_gevent.server.config import ServerConfig

WORDS = "new list revoke <token> --label --names --ports --reserve --reserve-ports --expires"
NOTHING: dict[str, Any] = dict.fromkeys(WORDS.split())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.toml"


def command(path: Path, what: str, **options: str) -> int:
    flags = {"--" + name.replace("_", "-"): value for name, value in options.items() if name != "which"}
    arguments = {**NOTHING, what: True, "<token>": options.get("which"), **flags}
    return tokens.run(ServerConfig(auth_file=str(path)), arguments)


def entries(path: Path) -> list[dict[str, Any]]:
    return list(tomllib.loads(path.read_text()).get("tokens", []))


def test_a_new_token_is_shown_once_and_its_hash_kept(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"names": "Anna, a-*", "ports": "20000-20009,25565", "reserve": "shop", "expires": "2027-01-31"}
    command(path, "new", label="anna", **options)
    shown = capsys.readouterr()
    token = shown.out.strip()
    assert token.startswith(tokens.PREFIX)
    assert token not in path.read_text() + shown.err
    (grant,) = tokens.read(ServerConfig(auth_file=str(path)))
    assert grant.sha256 == digest(token)
    allowed = ["anna", "a-1", "shop", 20009, 25565]
    assert [name for name in (*allowed, "b", 20010) if grant.account.rights.allows(name)] == allowed
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    command(path, "list")
    listed = capsys.readouterr().out
    assert "anna, a-*; reserved: shop" in listed
    assert "2027-01-31" in listed


def test_a_file_of_an_editor_of_windows_is_read_and_changed(path: Path) -> None:
    path.write_bytes(b'\xef\xbb\xbf[[tokens]]\r\nlabel = "bob"\r\nsha256 = "%s"\r\n' % digest("x").encode())
    path.chmod(0o600)
    config = ServerConfig(auth_file=str(path))
    assert [grant.account.label for grant in tokens.read(config)] == ["bob"]
    command(path, "new", label="anna")
    assert [grant.account.label for grant in tokens.read(config)] == ["bob", "anna"]


def test_what_else_is_in_the_file_stays_and_so_do_mode_and_links(path: Path, tmp_path: Path) -> None:
    real = tmp_path / "real.toml"
    real.write_text("# ours\n")
    real.chmod(0o640)
    path.symlink_to(real)
    command(path, "new", label="anna")
    command(path, "new", label="bob")
    command(path, "revoke", which="anna")
    assert path.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert real.read_text().startswith("# ours\n")
    assert [entry["label"] for entry in entries(path)] == ["bob"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["real.toml", "tokens.toml"]


@pytest.mark.parametrize("exists", [False, True])
def test_no_token_is_shown_that_cannot_be_kept(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], exists: bool
) -> None:
    if exists:
        path.touch()
    tmp_path.chmod(0o1777)
    with pytest.raises(UsageError, match="everybody may write in the directory"):
        command(path, "new", label="anna")
    assert capsys.readouterr().out == ""
    assert path.exists() is exists


def test_a_token_is_revoked_by_the_beginning_of_its_hash(path: Path) -> None:
    for label in ("one", "two"):
        command(path, "new", label=label)
    command(path, "revoke", which=entries(path)[0]["sha256"][:8].upper())
    assert [entry["label"] for entry in entries(path)] == ["two"]


@pytest.mark.parametrize(
    ("what", "options", "says"),
    [
        ("new", {"label": "anna"}, "anna has a token already"),
        ("new", {"label": "a b"}, "label: "),
        ("new", {"label": "x", "names": "a_b"}, "names.0.: 'a_b'"),
        ("new", {"label": "x", "ports": "x"}, "ports.0.: 'x'"),
        ("new", {"label": "x", "expires": "soon"}, "--expires 'soon': not a date"),
        ("new", {"label": 'x"\n', "names": 'a"'}, "TOML|label"),
        ("revoke", {"which": "nobody"}, "no token has this label"),
        ("revoke", {"which": "abc"}, "fits several: b1, b2"),
    ],
)
def test_a_mistake_changes_nothing(path: Path, what: str, options: dict[str, str], says: str) -> None:
    command(path, "new", label="anna")
    text = path.read_text()
    for number in (1, 2):
        text += f'[[tokens]]\nlabel = "b{number}"\nsha256 = "abcdef{number:058x}"\n'
    path.write_text(text)
    if options.get("which") == "abc":
        options = {"which": "abcdef"}
    with pytest.raises(UsageError, match=says) as error:
        command(path, what, **options)
    assert str(path) in str(error.value)
    assert path.read_text() == text


def test_a_token_that_could_not_be_shown_is_told_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the file then, which must not be denied."""

    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sys.stdout", Full())
    with pytest.raises(UsageError, match=r"could not be shown: No space left.*; revoke anna") as error:
        command(path, "new", label="anna")
    assert "nothing was changed" not in str(error.value)
    assert [entry["label"] for entry in entries(path)] == ["anna"]


def test_a_file_that_cannot_be_written_stays_as_it_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(path, "new", label="anna")
    text = path.read_text()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="No space left on device; nothing was changed"):
        command(path, "new", label="bob")
    assert path.read_text() == text
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_several_at_once_lose_nothing(path: Path) -> None:
    code = "import sys; from tinytun_gevent.cli import server; sys.argv[0] = 'tinytun-server'; server()"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, "token", "new", "--label", f"t{n}", "--auth-file", str(path)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for n in range(6)
    ]
    assert [process.wait(60) for process in running] == [0] * 6
    assert {entry["label"] for entry in entries(path)} == {f"t{n}" for n in range(6)}


@pytest.mark.parametrize("damage", [b"\xff", b"x" * ((1 << 20) + 1), None])
def test_what_cannot_be_read_is_said_with_its_name(path: Path, damage: bytes | None) -> None:
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(UsageError, match=f"AUTH_FILE={path}: "):
        tokens.read(ServerConfig(auth_file=str(path)))


def test_a_token_given_in_place_of_its_label_is_not_repeated(path: Path) -> None:
    command(path, "new", label="anna")
    with pytest.raises(UsageError, match="no token has this label") as error:
        command(path, "revoke", which="tt_a-secret")
    assert "secret" not in str(error.value)


def test_a_file_whose_last_token_is_revoked_is_not_empty(path: Path) -> None:
    """A server takes an empty one for a file that is being written, and waits."""
    command(path, "new", label="anna")
    command(path, "revoke", which="anna")
    mark = mark_of(path)
    assert mark is not None
    assert not mark.is_empty
    assert entries(path) == []
    command(path, "new", label="bob")
    assert [entry["label"] for entry in entries(path)] == ["bob"]
