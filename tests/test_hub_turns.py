"""The measure of how long a hub is held: it sees work, and nothing else."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import gevent
import pytest
from hub_turns import REQUEST, HubTurns, hub_turns

from tinytun_gevent.background import run_in_hub


def work(seconds: float) -> None:
    """Uses so much of a processor, and lets nobody else run."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_the_hub_of_servers_is_measured_from_another_thread() -> None:
    def scene() -> None:
        with hub_turns() as turns:
            for _ in range(10):
                run_in_hub(work, 0.02)
            assert turns.count >= 5
            assert 0.02 <= turns.take() < 0.2
            run_in_hub(work, 0.2)
        assert turns.longest >= 0.2

    with ThreadPoolExecutor(1) as elsewhere:  # this thread may have a hub of its own, that of its tests
        elsewhere.submit(scene).result()


def test_what_a_request_waits_is_several_turns_in_a_row() -> None:
    with ThreadPoolExecutor(1) as elsewhere:
        elsewhere.submit(_requests).result()


def _requests() -> None:
    with hub_turns() as turns:
        for _ in range(2 * REQUEST):
            run_in_hub(work, 0.01)
    assert turns.longest < 0.08
    assert turns.take_request() >= 0.01 * (REQUEST - 1)
    assert turns.take_request() == 0


def test_waiting_holds_nobody() -> None:
    """Whatever it is for: the clock on the wall does not count."""
    with hub_turns() as turns:
        time.sleep(0.3)
        gevent.sleep(0.01)
    assert turns.longest < 0.2


def test_the_turn_of_the_start_does_not_count_and_that_of_the_end_does() -> None:
    turns = HubTurns()
    work(0.1)
    turns.start()
    work(0.1)
    while not turns.count:
        gevent.sleep(0.001)
    assert turns.longest < 0.1
    work(0.1)
    turns.stop()
    turns.stop()
    assert turns.longest >= 0.1


@pytest.mark.parametrize("greenlets", [1, 20])
def test_many_that_yield_are_one_turn_no_longer_than_gevent_lets_it(greenlets: int) -> None:
    def rounds() -> None:
        for _ in range(20):
            work(0.002)
            gevent.sleep(0)

    with hub_turns() as turns:
        gevent.joinall([gevent.spawn(rounds) for _ in range(greenlets)], raise_error=True)
    assert turns.longest < 0.1
