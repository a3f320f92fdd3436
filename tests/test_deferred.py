"""Bytes of an answer that take long to look at: in order, with others running, the end behind them."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import wait_until

from tinytun_gevent.errors import SessionError, StreamResetError
from tinytun_gevent.server.deferred import SLICE, Deferred


class SlowExchange:
    """Takes a few bytes at a time."""

    def __init__(self, most: int = 1000) -> None:
        self.most = most
        self.taken = bytearray()
        self.calls = 0
        self.over = False
        self.ends: list[Any] = []

    def take(self, view: memoryview) -> int:
        self.calls += 1
        if self.over:
            return len(view)
        used = min(self.most, len(view))
        self.taken += view[:used]
        return used

    def eof(self) -> None:
        self.ends.append("eof")

    def aborted(self, error: SessionError) -> None:
        self.ends.append(error)


class Stream:
    receiver: Any = None


def deferred(exchange: SlowExchange, rest: bytes) -> tuple[Any, Stream]:
    stream = Stream()
    return Deferred(exchange, stream, memoryview(rest)), stream  # type: ignore[arg-type]


def test_bytes_pass_in_order_and_the_exchange_hears_again() -> None:
    exchange = SlowExchange()
    waiting, stream = deferred(exchange, b"a" * 5000)
    waiting.data(memoryview(b"b" * 3 * SLICE))
    assert not exchange.taken  # not in the session's reader
    wait_until(lambda: stream.receiver is exchange)
    assert exchange.taken == b"a" * 5000 + b"b" * 3 * SLICE
    assert exchange.ends == []


@pytest.mark.parametrize("error", [None, StreamResetError(8, remote=True)])
def test_the_end_waits_behind_the_bytes(error: StreamResetError | None) -> None:
    exchange = SlowExchange()
    waiting, _ = deferred(exchange, b"a" * 5000)
    if error is None:
        waiting.eof()
    else:
        waiting.aborted(error)
    assert not exchange.ends
    wait_until(lambda: exchange.ends)
    assert exchange.ends == ["eof" if error is None else error]
    assert exchange.taken == b"a" * 5000


def test_it_ends_with_the_exchange() -> None:
    exchange = SlowExchange()
    _, stream = deferred(exchange, b"a" * 5000)
    exchange.over = True
    wait_until(lambda: stream.receiver is exchange)
    assert not exchange.taken
    assert exchange.calls == 1  # what is left is bytes behind an answer
