"""Messages with descriptors over a Unix socket."""

from __future__ import annotations

import os
import socket as native
import struct
from collections.abc import Iterator
from typing import Any

import gevent
import pytest
from gevent import socket
from helpers import deadline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinytun_gevent.server.channel import HEAD, MAX_MESSAGE, MOST_DESCRIPTORS, Channel

Pair = tuple[Channel, Channel, socket.socket]


def connected() -> Pair:
    """Two ends, and the socket of the first."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(one, 5), Channel(other, 5), one


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = connected()
    yield made
    for end in made[:2]:
        end.close()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.dictionaries(st.text(max_size=8), json_values, max_size=4), max_size=5))
def test_messages_come_as_they_went(messages: list[dict[str, Any]]) -> None:
    near, far, _ = connected()
    for message in messages:
        near.send(message)
    near.close()
    with deadline():
        assert [far.receive() for _ in messages] == [(message, []) for message in messages]
        assert far.receive() is None
    far.close()


def test_descriptors_come_with_their_message(pair: Pair) -> None:
    near, far, _ = pair
    pipes = [os.pipe() for _ in range(3)]
    near.send({"n": 0})
    near.send({"n": 1}, [pipes[0][1], pipes[1][1]])
    near.send({"n": 2}, [pipes[2][1]])
    for _, write in pipes:
        os.close(write)
    with deadline():
        assert far.receive() == ({"n": 0}, [])
        for n, some in ((1, pipes[:2]), (2, pipes[2:])):
            received = far.receive()
            assert received is not None
            assert received[0] == {"n": n}
            assert len(received[1]) == len(some)
            for descriptor, (read, _) in zip(received[1], some, strict=True):
                os.write(descriptor, b"x")
                os.close(descriptor)
                assert os.read(read, 2) == b"x"
                os.close(read)


def test_as_many_descriptors_as_there_may_be(pair: Pair) -> None:
    near, far, _ = pair
    with open(os.devnull) as file, deadline():
        near.send({}, [file.fileno()] * MOST_DESCRIPTORS)
        received = far.receive()
        assert received is not None
        for descriptor in received[1]:
            os.close(descriptor)
        assert len(received[1]) == MOST_DESCRIPTORS


def test_a_message_larger_than_the_kernel_takes_at_once(pair: Pair) -> None:
    near, far, _ = pair
    message = {"text": "x" * 3_000_000}
    with deadline():
        sender = gevent.spawn(near.send, message)
        assert far.receive() == (message, [])
        sender.get()


def test_many_greenlets_send_whole_messages(pair: Pair) -> None:
    near, far, _ = pair
    with deadline():
        senders = [gevent.spawn(near.send, {"n": n, "pad": "x" * 200_000}) for n in range(10)]
        received = [far.receive() for _ in senders]
        assert sorted(message["n"] for message, _ in filter(None, received)) == list(range(10))


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        HEAD.pack(2, 0),
        HEAD.pack(2, 0) + b"{",
        HEAD.pack(2, 0) + b"[]",
        HEAD.pack(1, 0) + b"x",
        HEAD.pack(1, 0) + b"\xff",
        HEAD.pack(2, 1) + b"{}",
        HEAD.pack(MAX_MESSAGE + 1, 0) + b"{}",
    ],
)
def test_anything_else_is_an_error(pair: Pair, data: bytes) -> None:
    near, far, sock = pair
    sock.sendall(data)
    near.close()
    with deadline(), pytest.raises(OSError):
        far.receive()


def test_descriptors_of_what_is_no_message_are_closed(pair: Pair) -> None:
    _, far, sock = pair
    read, write = os.pipe()
    rights = struct.pack("i", write)
    sock.sendmsg([HEAD.pack(2, 1)], [(native.SOL_SOCKET, native.SCM_RIGHTS, rights)])
    sock.sendall(b"[]")
    os.close(write)
    with deadline(), pytest.raises(OSError):
        far.receive()
    assert os.read(read, 1) == b"", "nobody has the other end any more"
    os.close(read)
