"""Files that nobody sees half written."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tinytun_gevent import files


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


def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.replace(path, b"one")
    (tmp_path / "file.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        files.replace(path, b"two")
    assert path.read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["file"]


def test_a_directory_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.replace(tmp_path / "none" / "file", b"")
