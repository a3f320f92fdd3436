"""Files that nobody sees half written."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinytun_gevent import files

Plant = Callable[[Any, Any], None]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_is_made_for_its_user_alone_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"one", b"", b"three"):
        files.replace(path, content)
        assert path.read_bytes() == content
        assert mode(path) == 0o600
    assert os.listdir(tmp_path) == ["file"]


def test_a_draft_that_a_killed_process_has_left_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "file.new").write_bytes(b"half of a longer text")
    (tmp_path / "file.new").chmod(0o644)
    files.replace(tmp_path / "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert mode(tmp_path / "file") == 0o600


def test_it_may_be_like_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    path.chmod(0o640)
    files.replace(path, b"two", path.stat())
    assert (path.read_bytes(), mode(path)) == (b"two", 0o640)


def test_a_full_disk_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    files.replace(path, b"one")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        files.replace(path, b"two")
    assert path.read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["file"]


def no_space(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_directory_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.replace(tmp_path / "none" / "file", b"")


def test_a_name_without_a_directory_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files.replace("file", b"one")
    assert (tmp_path / "file").read_bytes() == b"one"


# -- other users --------------------------------------------------------------


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file that somebody wants us to write over."""
    path = tmp_path / "victim"
    path.write_bytes(b"precious")
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "directory"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on the disk belongs to another user than this one from now on."""
    uid = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: uid)


@pytest.mark.parametrize("plant", [os.symlink, os.link])
def test_a_planted_draft_is_not_written_through(directory: Path, victim: Path, plant: Plant) -> None:
    plant(victim, directory / "file.new")
    files.replace(directory / "file", b"ours")
    assert victim.read_bytes() == b"precious"
    assert (directory / "file").read_bytes() == b"ours"
    assert not (directory / "file").is_symlink()
    assert os.listdir(directory) == ["file"]


def test_a_draft_that_is_planted_again_at_once_is_an_error(
    directory: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "unlink", lambda *_, **__: None)  # as if it were back before the next call
    (directory / "file.new").symlink_to(victim)
    with pytest.raises(FileExistsError):
        files.replace(directory / "file", b"ours")
    assert victim.read_bytes() == b"precious"


def test_a_file_that_is_a_link_is_replaced_itself(directory: Path, victim: Path) -> None:
    (directory / "file").symlink_to(victim)
    files.replace(directory / "file", b"ours")
    assert victim.read_bytes() == b"precious"
    assert (directory / "file").read_bytes() == b"ours"


@pytest.mark.usefixtures("stranger")
def test_nothing_is_put_into_another_users_directory(directory: Path) -> None:
    with pytest.raises(PermissionError, match=r"the directory belongs to another user \(uid \d+\)"):
        files.replace(directory / "file", b"ours")
    with pytest.raises(PermissionError, match="belongs to another user"):
        files.check_directory(directory)
    assert not os.listdir(directory)


@pytest.mark.usefixtures("stranger")
def test_root_may_replace_a_file_in_the_directory_of_its_user(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = directory / "file"
    path.write_bytes(b"one")
    monkeypatch.setattr(os, "fchown", lambda *_: None)
    files.replace(path, b"two", path.stat())
    assert path.read_bytes() == b"two"


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_nothing_is_put_where_everybody_may_write(directory: Path, mode: int) -> None:
    directory.chmod(mode)
    with pytest.raises(PermissionError, match="everybody may write in the directory"):
        files.replace(directory / "file", b"ours")
    assert not os.listdir(directory)


def test_a_file_to_append_to_is_made(directory: Path) -> None:
    for mode in (0o700, 0o1777):
        directory.chmod(mode)
        for text in (b"one", b"two"):
            descriptor = files.open_to_append(str(directory / "log"), 0o600)
            os.write(descriptor, text)
            os.close(descriptor)
        assert (directory / "log").read_bytes() == b"onetwo"
        (directory / "log").unlink()


def test_it_may_be_a_link_where_not_everybody_may_write(directory: Path, victim: Path) -> None:
    (directory / "log").symlink_to(victim)
    os.close(files.open_to_append(str(directory / "log"), 0o600))


def test_nothing_is_appended_through_a_link_that_anybody_can_have_planted(
    directory: Path, victim: Path
) -> None:
    directory.chmod(0o1777)
    (directory / "log").symlink_to(victim)
    with pytest.raises(PermissionError, match="a link, in a directory where everybody may write"):
        files.open_to_append(str(directory / "log"), 0o600)


def test_nothing_is_appended_to_another_users_file_where_everybody_may_write(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.chmod(0o1777)
    path = directory / "log"
    path.write_bytes(b"")
    other = os.stat_result((0o100666, 0, 0, 1, os.geteuid() + 1, 0, 0, 0, 0, 0))
    monkeypatch.setattr(os, "fstat", lambda _: other)
    with pytest.raises(PermissionError, match=r"a file of another user's \(uid \d+\), in a directory"):
        files.open_to_append(str(path), 0o600)
