"""What a client keeps to get its name back, and where."""

from __future__ import annotations

import errno
import logging
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.client import state
from tinytun_gevent.client.state import Claim, remove_old, state_directory

TOKEN = "0123456789abcdef" * 4
OTHER = "fedcba9876543210" * 4


def claim(
    directory: Path, name: str | int | None = "app", server: str = "a.test:5554", kind: str = "http"
) -> Claim:
    return Claim(str(directory), server, kind, name)


def kept(directory: Path, name: str = "app") -> Path:
    """The file of a client that was killed: it has a token, and nobody uses it."""
    one = claim(directory, name)
    one.show()
    one.keep(TOKEN)
    one.release(freed=False)
    return Path(one._path)


# -- where -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "environ", "directory"),
    [
        ("linux", {"HOME": "/h"}, "/h/.local/state/tinytun"),
        ("linux", {"HOME": "/h", "XDG_STATE_HOME": "/x"}, "/x/tinytun"),
        ("linux", {"HOME": "/h", "XDG_STATE_HOME": "x"}, "/h/.local/state/tinytun"),
        ("linux", {"HOME": "/h", "XDG_STATE_HOME": "/x", "TINYTUN_STATE_DIR": "/mine"}, "/mine"),
        ("linux", {"HOME": "/h", "TINYTUN_STATE_DIR": ""}, "/h/.local/state/tinytun"),
        ("linux", {}, None),
        ("linux", {"HOME": "relative"}, None),
        ("darwin", {"HOME": "/h", "XDG_STATE_HOME": "/x"}, "/h/Library/Application Support/tinytun"),
        ("darwin", {}, None),
        ("win32", {"HOME": "/h", "LOCALAPPDATA": "/l"}, "/l/tinytun"),
        ("win32", {"HOME": "/h"}, None),
    ],
)
def test_the_platforms_own_place(platform: str, environ: dict[str, str], directory: str | None) -> None:
    assert state_directory(environ, platform) == directory


def test_each_name_at_each_server_has_a_file_of_its_own(tmp_path: Path) -> None:
    claims = [
        claim(tmp_path),
        claim(tmp_path, "other"),
        claim(tmp_path, server="b.test:5554"),
        claim(tmp_path, kind="tcp"),
        claim(tmp_path, 30000, kind="tcp"),
    ]
    assert len({one._path for one in claims}) == len(claims)
    assert claim(tmp_path, server="A.test:5554")._path == claims[0]._path


@given(st.text(min_size=1), st.text())
def test_any_name_makes_a_safe_file_name(name: str, server: str) -> None:
    try:
        path = Claim("/state", server, "http", name)._path
    except UnicodeEncodeError:
        pytest.fail("a name that cannot be encoded")
    assert os.path.dirname(path) == "/state"
    assert os.path.basename(path).removesuffix(".token").isalnum()


# -- keeping and showing ---------------------------------------------------------------------------


def test_the_first_time_a_token_is_asked_for_and_nothing_is_written(tmp_path: Path) -> None:
    one = claim(tmp_path / "new")
    assert one.show() == ""
    one.release(freed=False)
    assert not (tmp_path / "new").exists()


def test_nothing_is_said_of_a_directory_that_is_not_there_yet(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    assert claim(tmp_path / "new").show() == ""
    assert caplog.records == []


def test_a_token_is_shown_by_this_client_and_by_the_next_one(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "new"
    one = claim(directory)
    one.show()
    one.keep(TOKEN)
    assert one.show() == TOKEN
    (file,) = directory.iterdir()
    assert file.read_text() == f"{TOKEN}\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert directory.stat().st_mode & 0o777 == 0o700
    one.release(freed=False)
    assert claim(directory).show() == TOKEN


def test_a_second_client_beside_the_first_has_nothing_to_show(tmp_path: Path) -> None:
    kept(tmp_path)
    first, second = claim(tmp_path), claim(tmp_path)
    assert first.show() == TOKEN
    assert second.show() == ""
    second.keep(OTHER)  # the server gave it the name all the same
    assert second.show() == OTHER
    second.release(freed=True)
    first.release(freed=False)
    assert claim(tmp_path).show() == TOKEN, "the first one's file is the first one's"


def test_another_token_replaces_the_first(tmp_path: Path) -> None:
    one = claim(tmp_path)
    one.show()
    one.keep(TOKEN + TOKEN)
    one.keep(OTHER)
    one.release(freed=False)
    assert claim(tmp_path).show() == OTHER


def test_a_name_that_is_free_again_leaves_no_file(tmp_path: Path) -> None:
    one = claim(tmp_path)
    one.show()
    one.keep(TOKEN)
    one.release(freed=True)
    one.release(freed=True)
    assert list(tmp_path.iterdir()) == []


def test_a_dropped_token_is_not_shown_again_and_not_found_again(tmp_path: Path) -> None:
    kept(tmp_path)
    one = claim(tmp_path)
    assert one.show() == TOKEN
    one.drop()
    assert one.show() == ""
    assert claim(tmp_path).show() == "", "the file is still in use"
    one.release(freed=False)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_gives_no_tokens_is_shown_none(tmp_path: Path) -> None:
    kept(tmp_path)
    one = claim(tmp_path)
    assert one.show() == TOKEN
    one.keep(None)
    assert one.show() == ""
    one.release(freed=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [None, ""])
def test_a_random_name_is_in_memory_only(tmp_path: Path, name: str | None) -> None:
    one = claim(tmp_path, name)
    assert one.show() == ""
    one.keep(TOKEN)
    assert one.show() == TOKEN
    assert list(tmp_path.iterdir()) == []


# -- what goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        TOKEN.encode(),  # cut short: the end of the line is missing
        b"short\n",
        f"{TOKEN}\n{TOKEN}\n".encode(),
        f"{TOKEN}\nrest of a longer one\n".encode(),
        b"\0" * 65 + b"\n",
        f"{TOKEN}\r\n".encode(),
        b"a" * 257 + b"\n",
        b"a" * 1_000_000,
        "é".encode() * 32 + b"\n",
    ],
)
def test_what_is_no_token_is_ignored_and_replaced(tmp_path: Path, content: bytes) -> None:
    kept(tmp_path).write_bytes(content)
    one = claim(tmp_path)
    assert one.show() == ""
    one.keep(OTHER)
    one.release(freed=False)
    assert claim(tmp_path).show() == OTHER


@pytest.mark.parametrize("what", ["link", "pipe", "directory"])
def test_what_is_not_our_file_is_left_alone(tmp_path: Path, what: str) -> None:
    path = kept(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    match what:
        case "link":
            path.symlink_to(elsewhere)
        case "pipe":
            os.mkfifo(path)
        case _:
            path.mkdir()
    one = claim(tmp_path)
    assert one.show() == ""
    one.keep(OTHER)
    assert one.show() == OTHER
    one.release(freed=True)
    assert elsewhere.read_text() == f"{TOKEN}\n"
    assert path.is_symlink() or path.exists()


def test_a_file_of_another_user_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 123_456)
    assert claim(tmp_path).show() == ""


def test_others_cannot_read_a_file_that_is_used(tmp_path: Path) -> None:
    path = kept(tmp_path)
    path.chmod(0o644)
    assert claim(tmp_path).show() == TOKEN
    assert path.stat().st_mode & 0o777 == 0o600


def test_without_a_usable_directory_the_token_is_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    one = claim(tmp_path / "file" / "below")
    assert one.show() == ""
    one.keep(TOKEN)
    assert one.show() == TOKEN
    one.release(freed=True)


def test_on_a_full_disk_the_token_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    one = claim(tmp_path)
    one.show()
    with monkeypatch.context() as broken:
        broken.setattr(os, "write", full)
        one.keep(TOKEN)
    assert one.show() == TOKEN
    assert list(tmp_path.iterdir()) == []
    one.keep(TOKEN)  # at the next 101, when there is room again
    one.release(freed=False)
    assert claim(tmp_path).show() == TOKEN


def test_a_file_that_its_last_user_removes_meanwhile_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = kept(tmp_path)
    lock = state._lock

    def remove_first(descriptor: int) -> None:
        monkeypatch.setattr(state, "_lock", lock)
        path.unlink()
        lock(descriptor)

    monkeypatch.setattr(state, "_lock", remove_first)
    one = claim(tmp_path)
    one.keep(OTHER)
    assert path.read_text() == f"{OTHER}\n"
    assert claim(tmp_path).show() == "", "the lock is on the file that is there"


def test_old_files_are_removed_unless_they_are_in_use(tmp_path: Path) -> None:
    paths = {name: kept(tmp_path, name) for name in ("old", "used", "young", "ours")}
    (tmp_path / "notes.txt").touch()
    long_ago = time.time() - state.OLD - 60
    for path in (paths["old"], paths["used"], paths["ours"], tmp_path / "notes.txt"):
        os.utime(path, (long_ago, long_ago))
    used, ours = claim(tmp_path, "used"), claim(tmp_path, "ours")
    assert used._open(create=False)
    assert ours.show() == TOKEN, "the one that is asked for, however old"
    assert not paths["old"].exists()
    assert paths["used"].exists()
    assert paths["young"].exists()
    assert (tmp_path / "notes.txt").exists()
    assert paths["ours"].exists()


def test_removing_looks_at_so_many_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        kept(tmp_path, f"n{number}")
    monkeypatch.setattr(state, "MOST_FILES", 3)
    monkeypatch.setattr(state, "OLD", -60.0)
    remove_old(str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


def test_the_token_is_told_to_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    (tmp_path / "file").touch()
    kept(tmp_path)
    for directory in (tmp_path, tmp_path / "file" / "below"):
        first, second = claim(directory), claim(directory)
        for one in (first, second):
            one.show()
            one.keep(TOKEN)
            assert TOKEN not in repr(one)
        first.release(freed=False)
    assert caplog.records, "that a file could not be used"
    assert TOKEN not in caplog.text
