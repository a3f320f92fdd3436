"""Streams that rest: for their owner at once, for others a turn later, for nobody once something came."""

from __future__ import annotations

import time
from typing import Any

import gevent
import pytest
from support import DEADLINE
from test_pool import FakeSession, FakeStream, Queue, give_back, make_pool, turns

from tinytun_gevent.server import deadlines, starvation
from tinytun_gevent.server import pool as pool_module

ANN, BEN = "ann", "ben"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No stream ends for another one that waits for its answer: that is ``test_relief``'s."""
    monkeypatch.setattr(starvation, "PATIENCE", 3600.0)


def test_the_same_visitor_may_use_it_at_once_and_others_a_turn_later() -> None:
    pool, _ = make_pool(10)
    stream = pool.acquire()
    pool.release(stream, owner=ANN)
    assert pool.acquire(reuse=True, owner=ANN) is stream
    pool.release(stream, owner=ANN)
    turns()
    assert pool.acquire(reuse=True, owner=BEN) is stream


def test_another_visitor_waits_for_the_turn_instead_of_opening_a_stream() -> None:
    pool, [session] = make_pool(10)
    streams = [pool.acquire() for _ in range(2)]
    for stream in streams:
        pool.release(stream, owner=stream)
    visitors = [gevent.spawn(pool.acquire, reuse=True, owner=number) for number in range(3)]
    gevent.joinall(visitors, timeout=DEADLINE, raise_error=True)
    assert {visitor.value for visitor in visitors} > set(streams)
    assert session.stream_count == 3, "for the third one there was nothing to wait for"


def test_what_comes_behind_an_answer_within_a_turn_ends_the_stream() -> None:
    pool, _ = make_pool(10)
    stream = pool.acquire()
    pool.release(stream, owner=ANN)
    victim = gevent.spawn(pool.acquire, reuse=True, owner=BEN)
    stream.receiver.data(memoryview(b"HTTP/1.1 200 OK"))
    victim.join(DEADLINE)
    assert victim.value not in (None, stream)
    assert stream.was_reset
    assert pool.idle_count == 0


def test_a_reader_that_pauses_has_not_seen_what_comes_behind() -> None:
    pool, [session] = make_pool(10)
    stream = pool.acquire()
    session.behind = True
    pool.release(stream, owner=ANN)
    turns()
    assert pool.acquire(reuse=True, owner=BEN) is not stream
    session.behind = False
    turns()
    assert pool.acquire(reuse=True, owner=BEN) is stream


def test_what_is_not_shared_is_its_owner_s_for_good() -> None:
    pool, _ = make_pool(10)
    stream = pool.acquire()
    give_back(pool, stream, owner=ANN, shared=False)
    assert pool.acquire(reuse=True, owner=BEN) is not stream
    assert pool.acquire(reuse=True, owner=ANN) is stream


@pytest.mark.parametrize("shared", [False, True])
def test_what_a_visitor_leaves_behind(shared: bool) -> None:
    pool, _ = make_pool(10)
    stream = pool.acquire()
    pool.release(stream, owner=ANN, shared=shared)
    pool.leave(ANN)
    pool.leave(ANN)
    turns()
    assert stream.local_ended is not shared
    assert (pool.acquire(reuse=True, owner=BEN) is stream) is shared


def test_what_is_for_nobody_ends() -> None:
    pool, _ = make_pool(10)
    stream = pool.acquire()
    pool.release(stream, owner=None, shared=False)
    assert stream.local_ended


def test_a_kept_stream_ages_like_any_other() -> None:
    pool, _ = make_pool(10)
    stream = pool.acquire()
    give_back(pool, stream, owner=ANN, shared=False)
    now = time.monotonic()
    pool.tick(now + pool_module.IDLE_LIFE - deadlines.TICK - 0.5)
    assert not stream.local_ended
    pool.tick(now + pool_module.IDLE_LIFE - deadlines.TICK + 0.1)
    assert stream.local_ended, "at the next look it would be too old"
    assert pool.acquire(reuse=True, owner=ANN) is not stream


def test_a_kept_stream_s_place_is_given_to_who_waits() -> None:
    pool, _ = make_pool(1)
    stream = pool.acquire()
    queue = Queue(pool)
    queue.ask("waits", reuse=True, owner=BEN)
    pool.release(stream, owner=ANN, shared=False)
    queue.wait(1)
    assert stream.was_reset
    assert queue.got[0][1] is not stream


def test_a_stream_that_settles_is_not_given_up_for_its_place() -> None:
    pool, _ = make_pool(1)
    stream = pool.acquire()
    queue = Queue(pool)
    queue.ask("waits", reuse=True, owner=BEN)
    pool.release(stream, owner=ANN)
    queue.wait(1)
    assert queue.got[0][1] is stream


def test_a_kept_stream_that_is_too_old_for_a_request_makes_place_for_another() -> None:
    pool, _ = make_pool(10)
    kept, shared = pool.acquire(), pool.acquire()
    give_back(pool, shared)
    give_back(pool, kept, owner=ANN, shared=False)
    kept.receiver.since -= 2 * pool_module.FRESH_LIFE
    shared.receiver.since += DEADLINE  # however slow this is
    assert pool.acquire(reuse=True, retriable=False, owner=ANN) is shared
    assert not kept.local_ended
    assert pool.acquire(reuse=True, retriable=False, owner=ANN) not in (kept, shared)
    assert kept.local_ended


def test_a_visitor_keeps_one_stream_and_the_older_one_ends() -> None:
    pool, _ = make_pool(10)
    kept, shared = pool.acquire(), pool.acquire()
    give_back(pool, shared)
    give_back(pool, kept, owner=ANN, shared=False)
    kept.receiver.since -= 2 * pool_module.FRESH_LIFE
    shared.receiver.since += DEADLINE
    assert pool.acquire(reuse=True, retriable=False, owner=ANN) is shared
    give_back(pool, shared, owner=ANN)
    assert kept.local_ended
    kept.end()
    pool.leave(ANN)
    assert pool.idle_count == 1
    assert pool.acquire(reuse=True, owner=BEN) is shared


def test_counts() -> None:
    pool, [session] = make_pool(10)
    streams: list[Any] = [pool.acquire() for _ in range(4)]
    pool.release(streams[0], owner=ANN)
    pool.release(streams[1], owner=BEN, shared=False)
    pool.release(streams[2])
    assert (pool.idle_count, pool.in_use) == (3, 1)
    pool.leave(BEN)
    assert (pool.idle_count, pool.in_use) == (2, 1), "one is leaving"
    streams[1].end()
    assert session.stream_count == 3
    assert (pool.idle_count, pool.in_use) == (2, 1)
    pool.end_idle()
    assert (pool.idle_count, pool.in_use) == (0, 1)


def test_a_stream_that_its_session_took_along_does_not_settle() -> None:
    pool, [session] = make_pool(10)
    stream = pool.acquire()
    pool.release(stream, owner=ANN)
    stream.reset()
    pool.remove(session)
    other = FakeSession(1)
    pool.add(other)
    turns()
    assert pool.idle_count == 0
    assert isinstance(pool.acquire(reuse=True, owner=ANN), FakeStream)
    assert other.stream_count == 1
