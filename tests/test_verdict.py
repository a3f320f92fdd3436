"""How a reload went: through the pipe, and in the file."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fcntl")

from tinytun_gevent.server import verdict
from tinytun_gevent.server.statedir import lock_directory
from tinytun_gevent.server.verdict import Ready, Record, Report, Verdict


def spoken(report: Report | None) -> Report:
    """What the master hears if a worker says ``report``, or only dies."""
    ready = Ready()
    worker = os.fork()
    if not worker:
        if report is not None:
            ready.tell(report)
        os._exit(0)
    try:
        return ready.wait(60)
    finally:
        os.waitpid(worker, 0)


@pytest.mark.parametrize(
    "report",
    [
        Report(serves=True),
        Report(reason="é\n" * 100),
        Report(True, "", ["BIND"], ["x"], {"PEERS": "a," * 100_000}),
    ],
)
def test_the_master_hears_what_the_worker_says(report: Report) -> None:
    assert spoken(report) == report


def test_a_worker_that_dies_or_is_silent_does_not_serve() -> None:
    assert "ended before it served" in spoken(None).reason
    ready = Ready()
    kept = os.dup(ready._write)
    assert ready.wait(0).reason == "the new worker did not serve within 0 s"
    os.close(kept)


def test_a_worker_of_an_earlier_version_serves() -> None:
    assert Report.decode(b"1") == Report(serves=True)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_report(data: bytes) -> None:
    assert Report.decode(data).serves == (data == b"1")


@pytest.fixture
def directory(tmp_path: Path) -> str:
    directory = tmp_path / "state"
    directory.mkdir(mode=0o700)
    return str(directory)


def test_reloads_are_numbered_and_told_when_they_are_over(directory: str) -> None:
    lock = lock_directory(directory)
    assert lock is not None
    record = Record(directory)
    record.begin()  # nobody would find it
    assert verdict.read(directory, lock.id) == Verdict(lock.id)
    record.lock(lock, [])
    record.begin()
    assert verdict.read(directory, lock.id) == Verdict(lock.id, 2, is_over=False)
    record.end(Report(True, "", ["BIND"], ["a line"], {"PEERS": "x"}))
    expected = Verdict(lock.id, 2, True, True, "", ("BIND",), ("a line",))
    assert verdict.read(directory, lock.id) == expected
    record.begin()
    record.end(Report(reason="why"))
    assert verdict.read(directory, lock.id) == Verdict(lock.id, 3, True, False, "why")
    assert verdict.read(directory, "another") == Verdict("another")
    record.close()


def test_the_directory_is_claimed_when_its_server_has_left(directory: str) -> None:
    old, new = Record(directory), Record(directory)
    old.claim([])
    new.claim([])
    assert (old.is_locked, new.is_locked) == (True, False)
    old.close()
    new.claim([])
    assert new.is_locked
    new.close()


@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_any_file_is_a_verdict(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    directory = tmp_path_factory.mktemp("state")
    (directory / verdict.FILE).write_bytes(data)
    assert verdict.read(str(directory), "id") == Verdict("id")


def test_a_later_word_is_not_said() -> None:
    ready = Ready()
    listening: list[Report] = []
    kept = os.dup(ready._read)
    ready.tell(Report(serves=True))
    ready.tell(Report(reason="later"))
    reader = threading.Thread(target=lambda: listening.append(Report.decode(os.read(kept, 4096))))
    reader.start()
    reader.join(60)
    assert listening == [Report(serves=True)]
    os.close(kept)
