"""Greenlets that are used again: who runs what, what is left after an error, how all of them end."""

from __future__ import annotations

import logging

import gevent
import pytest
from gevent.event import Event
from helpers import deadline

from tinytun_gevent import workers
from tinytun_gevent.workers import Workers


def test_a_greenlet_that_has_finished_serves_the_next_task() -> None:
    crew, seen = Workers(), []
    with deadline():
        for number in range(3):
            worker = crew.spawn(lambda n: seen.append((n, gevent.getcurrent())), number)
            assert len(crew) == 1
            assert crew.join(60)
            assert seen[number] == (number, worker)
    assert len({worker for _, worker in seen}) == 1


def test_tasks_run_side_by_side() -> None:
    crew, gate, running = Workers(), Event(), []

    def task() -> None:
        running.append(gevent.getcurrent())
        gate.wait()

    with deadline():
        for _ in range(10):
            crew.spawn(task)
        while len(running) < 10:
            gevent.sleep(0)
        assert not crew.join(0.01)
        gate.set()
        assert crew.join(60)
    assert len(set(running)) == 10
    assert len(crew) == 0


def test_no_more_wait_for_a_task_than_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "IDLE", 2)
    crew = Workers()
    with deadline():
        made = [crew.spawn(gevent.sleep, 0) for _ in range(5)]
        assert crew.join(60)
        for _ in range(10):
            gevent.sleep(0)
    assert sum(not worker.dead for worker in made) == 2


def test_an_error_is_logged_and_the_greenlet_lives_on(caplog: pytest.LogCaptureFixture) -> None:
    crew = Workers()

    def fail() -> None:
        raise ValueError("of no use")

    with deadline(), caplog.at_level(logging.ERROR):
        first = crew.spawn(fail)
        assert crew.join(60)
        assert crew.spawn(lambda: None) is first
        assert crew.join(60)
    assert "of no use" in caplog.text


def test_kill_ends_those_that_run_those_that_begin_and_those_that_wait() -> None:
    crew, ended = Workers(), []

    def task(name: str) -> None:
        try:
            Event().wait()
        finally:
            ended.append(name)

    with deadline():
        waiting = crew.spawn(lambda: None)
        assert crew.join(60)
        running = [crew.spawn(task, "reused"), crew.spawn(task, "running")]
        gevent.sleep(0.01)
        running.append(crew.spawn(task, "beginning"))
        crew.kill()
        assert crew.join(60)
        while not all(worker.dead for worker in (waiting, *running)):
            gevent.sleep(0)
    assert sorted(ended) == ["beginning", "reused", "running"]
