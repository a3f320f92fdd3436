"""The server's directory: where it is, its lock, and which process has that."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("fcntl")

from server_process import DEADLINE

from tinytun_gevent.errors import UsageError
from tinytun_gevent.server import statedir


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "state"
    directory.mkdir(mode=0o700)
    return directory


def test_the_holder_of_the_lock_is_found(directory: Path) -> None:
    assert statedir.find(str(directory)) is None
    lock = statedir.lock_directory(str(directory))
    assert lock is not None
    lock.publish([1, 2])
    running = statedir.find(str(directory))
    assert running is not None
    assert (running.pid, running.id, running.ports) == (os.getpid(), lock.id, (1, 2))
    assert running.is_there()
    with pytest.raises(UsageError, match="another tinytun-server uses it"):
        statedir.lock_directory(str(directory), 0)
    lock.close()
    assert statedir.find(str(directory)) is None
    again = statedir.lock_directory(str(directory), 0)
    assert again is not None
    assert again.id != lock.id
    again.close()


def test_a_server_that_is_gone_is_not_signalled(directory: Path) -> None:
    """The lock is still held, by what is left of it, and its number is another process's now."""
    lock = statedir.lock_directory(str(directory))
    assert lock is not None
    lock.publish([])
    said = json.loads((directory / "lock").read_text())
    if not said["started"]:
        pytest.skip("no /proc here")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        (directory / "lock").write_text(json.dumps(said | {"pid": other.pid}))
        assert statedir.find(str(directory)) is None
        stale = statedir.Running(str(directory), other.pid, said["started"], lock.id, ())
        assert not stale.is_there()
        with pytest.raises(ProcessLookupError):
            stale.hang_up()
        assert other.poll() is None
        other.communicate(b"\n", DEADLINE)
        assert other.returncode == 0
    with pytest.raises(ProcessLookupError):
        stale.hang_up()
    lock.close()


def test_hup_reaches_the_process_that_is_meant() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        statedir.Running("", other.pid, statedir._started(other.pid), "", ()).hang_up()
        assert other.wait(DEADLINE) == -signal.SIGHUP


@pytest.mark.parametrize(
    "text", ["", "123", "{}", '{"pid": -1, "started": "", "id": "", "ports": []}', "[" * 4000]
)
def test_a_lock_that_names_nobody_is_told(directory: Path, text: str) -> None:
    (directory / "lock").write_text(text)
    assert statedir.find(str(directory)) is None
    with (directory / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another version"):
            statedir.find(str(directory))


def test_one_who_only_looks_keeps_no_server_from_starting(directory: Path) -> None:
    (directory / "lock").touch()
    found: list[statedir.StateLock | None] = []
    starting = threading.Thread(
        target=lambda: found.append(statedir.lock_directory(str(directory), DEADLINE))
    )
    with (directory / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        starting.start()
    starting.join(DEADLINE)
    (lock,) = found
    assert lock is not None
    lock.close()


def test_a_lock_that_is_a_link_is_not_made_elsewhere(tmp_path: Path, directory: Path) -> None:
    (directory / "lock").symlink_to(tmp_path / "elsewhere")
    assert statedir.lock_directory(str(directory)) is None
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("variables", "user", "expected"),
    [
        ({"STATE_DIRECTORY": "/run/s:/run/t", "XDG_STATE_HOME": "/x"}, 0, "/run/s/5554"),
        ({}, 0, "/var/lib/tinytun-server/5554"),
        ({"XDG_STATE_HOME": "/x"}, 1000, "/x/tinytun-server/5554"),
        ({"XDG_STATE_HOME": "relative", "HOME": "/home/a"}, 1000, "/home/a/.local/state/tinytun-server/5554"),
    ],
)
def test_the_state_directory_is_where_the_system_wants_it(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], user: int, expected: str
) -> None:
    for name in ("STATE_DIRECTORY", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(statedir.os, "geteuid", lambda: user)
    assert statedir.default_directory(5554) == expected
