"""TLS behind the interface of a plain connection; `test_sockets` has what both do alike."""

from __future__ import annotations

import contextlib
import socket as native
from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest
import trustme
from gevent import socket, ssl
from helpers import MIB, deadline, socket_pair, tls_contexts, tls_ends, tls_pair, wait_until
from key_updates import APPLICATION_DATA, KEY_UPDATE_BYTES, Records, client_context, records_of

from tinytun_gevent import sockets, tls
from tinytun_gevent.sockets import PlainEnd, set_reset
from tinytun_gevent.tls import TlsEnd


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


@pytest.fixture
def ends(authority: trustme.CA) -> Iterator[tuple[TlsEnd, TlsEnd]]:
    one, other = tls_ends(authority)
    yield one, other
    one.close()
    other.close()


def fill(end: TlsEnd, size: int = 8 * MIB) -> int:
    """Sends until the kernel takes no more: how many bytes count as sent."""
    data = bytes(range(256)) * (size // 256)
    sent = 0
    while count := end.send_now(memoryview(data)[sent:]):
        sent += count
    return sent


def test_sending_never_waits_and_what_is_not_taken_is_offered_again(ends: tuple[TlsEnd, TlsEnd]) -> None:
    end, other = ends
    data = bytes(range(256)) * (8 * MIB // 256)
    sent = fill(end)
    assert 0 < sent < len(data)
    assert end.send_now(memoryview(data)[sent:]) == 0
    assert end.sendmsg_now([data[sent : sent + 10], data[sent + 10 :]]) == 0
    assert len(end._left) <= tls.PIECE + 1024  # what is held here is bounded

    def rest() -> None:
        end.sendall(memoryview(data)[sent:])
        end.finish_writing()

    sender = gevent.spawn(rest)
    got = bytearray()
    with deadline():
        while piece := other.recv(65536):
            got += piece
        sender.get()
    assert got == data


@pytest.mark.parametrize(
    "sizes", [[1, 2, 3], [9, 200_000], [70_000, 5, 70_000, 0, 1], [tls.PIECE, tls.PIECE]]
)
def test_buffers_leave_in_order(ends: tuple[TlsEnd, TlsEnd], sizes: list[int]) -> None:
    end, other = ends
    buffers = [bytes([number]) * size for number, size in enumerate(sizes)]
    whole, sent = b"".join(buffers), 0
    got = bytearray()
    with deadline():
        while sent < len(whole):
            rest, skip = [], sent
            for buffer in buffers:
                rest.append(buffer[skip:])
                skip = max(0, skip - len(buffer))
            sent += end.sendmsg_now([buffer for buffer in rest if buffer])
            while len(got) < sent:
                got += other.recv(65536)
    assert got == whole


def test_what_came_behind_a_full_buffer_is_told_of(ends: tuple[TlsEnd, TlsEnd]) -> None:
    """Where the buffer is full with the last byte of what OpenSSL was fed at once, and more has come."""
    end, other = ends
    added = 22  # bytes of each record beside its text (RFC 8446 §5.2)
    sizes = [16384] * 3
    sizes.append(tls.PIECE - sum(size + added for size in sizes) - added)
    view = memoryview(bytearray(sum(sizes)))
    with deadline():
        end.sendall(b"!")
        assert other.recv(1) == b"!"  # no session tickets are on their way any more
        for size in (*sizes, 100):
            assert other.send_now(b"x" * size) == size
        wait_until(lambda: end.unread == tls.PIECE + 100 + added)
        assert end.recv_now(view) == len(view)
        end.wait_readable()
        assert end.recv_now(view) == 100


def test_reading_takes_no_more_than_there_is_room_for(ends: tuple[TlsEnd, TlsEnd]) -> None:
    """What is decrypted, or about to be, is no secret: whoever waits is told of it."""
    end, other = ends
    other.sendall(b"x" * 100_000)
    view = memoryview(bytearray(1000))
    got = 0
    with deadline():
        while got < 100_000:
            end.wait_readable()
            count = end.recv_now(view)
            assert count <= 1000
            got += max(count, 0)
    assert end.recv_now(view) == -1
    assert not end._held


def test_half_a_record_is_nothing_yet(authority: trustme.CA) -> None:
    one, other = socket_pair()
    server, client = tls_contexts(authority)
    end = TlsEnd(PlainEnd(one), server, server_side=True)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    peer = client.wrap_bio(incoming, outgoing, server_hostname="localhost")
    shaking = gevent.spawn(end.handshake)
    with deadline():
        while not shaking.ready():
            with contextlib.suppress(ssl.SSLWantReadError):
                peer.do_handshake()
            if data := outgoing.read():
                other.sendall(data)
                gevent.sleep(0)
            other.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                incoming.write(other.recv(65536))
            other.setblocking(True)
            gevent.sleep(0)
        shaking.get()
        peer.write(b"whole")
        record = outgoing.read()
        other.sendall(record[:7])
        end.wait_readable()
        view = memoryview(bytearray(100))
        assert end.recv_now(view) == -1
        waiting = gevent.spawn(end.recv, 100)
        wait_until(lambda: end.awaited)
        other.sendall(record[7:])
        assert waiting.get() == b"whole"
    end.close()
    other.close()


def test_a_half_close_loses_nothing_that_comes_meanwhile(authority: trustme.CA) -> None:
    for _ in range(10):
        end, other = tls_pair(authority)
        sender = gevent.spawn(other.sendall, bytes(2 * MIB))
        got = len(end.recv(100))
        end.finish_writing()
        with deadline():
            while got < 2 * MIB:
                piece = end.recv(65536)
                assert piece, f"ended after {got} bytes"
                got += len(piece)
            sender.get()
            assert other.recv(10) == b""  # our close_notify
        end.close()
        other.close()


def test_a_half_close_leaves_behind_what_the_kernel_has_no_room_for(authority: trustme.CA) -> None:
    end, other = tls_ends(authority)
    while end.send_now(bytes(MIB)):
        pass
    end._ahead = 0  # whoever sent it gives up the rest, but not what was begun
    end.finish_writing()
    with deadline():
        while other.recv(65536):
            pass
    end.close()
    other.close()


def test_closing_says_close_notify_and_aborting_does_not(authority: trustme.CA) -> None:
    end, other = tls_pair(authority)
    end.close()
    with deadline():
        assert other.recv(10) == b""
        assert other.unwrap() is not None  # raises if no close_notify had come
    other.close()
    one, two = tls_ends(authority)
    one.abort()
    with deadline(), pytest.raises(ConnectionResetError):
        two.recv(10)
    two.close()


def test_a_fin_without_close_notify_is_an_end_and_a_reset_is_none(authority: trustme.CA) -> None:
    end, other = tls_pair(authority)
    other.sendall(b"last")
    wait_until(lambda: sockets.unread(end.sock) > 0)
    native.socket.shutdown(other._sock, native.SHUT_WR)  # type: ignore[attr-defined]
    with deadline():
        assert end.recv(10) == b"last"
        assert end.recv(10) == b""
        assert end.recv(10) == b""
        set_reset(other)
        other.close()
    end.close()


def test_broken_records_are_an_error_and_an_alert(authority: trustme.CA) -> None:
    end, other = tls_pair(authority)
    raw = socket.socket(fileno=other.detach())
    raw.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
    with deadline(), pytest.raises(ssl.SSLError):
        end.recv(100)
    raw.settimeout(60)
    assert raw.recv(100)  # the alert
    end.close()
    raw.close()


def test_a_session_is_resumed(authority: trustme.CA) -> None:
    server, client = tls_contexts(authority)
    session = None
    for resumed in (False, True):
        one, other = socket_pair()
        near = TlsEnd(PlainEnd(one), server, server_side=True)
        far = TlsEnd(PlainEnd(other), client, host="localhost", session=session)
        with deadline():
            gevent.joinall([gevent.spawn(near.handshake), gevent.spawn(far.handshake)], raise_error=True)
            near.sendall(b"tickets come before this")
            far.recv(100)
        assert far.resumed is resumed
        session = far.session
        near.close()
        far.close()


def test_a_handshake_that_is_cut_off_is_a_reset(authority: trustme.CA) -> None:
    one, other = socket_pair()
    server, _ = tls_contexts(authority)
    end = TlsEnd(PlainEnd(one), server, server_side=True)
    other.sendall(b"\x16\x03\x01")
    other.close()
    with deadline(), pytest.raises(ConnectionResetError):
        end.handshake()
    end.close()


def test_what_came_with_the_handshake_is_there(authority: trustme.CA) -> None:
    """A client's first request is in the segment of its Finished."""
    one, other = socket_pair()
    server, client = tls_contexts(authority)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    peer = client.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        peer.do_handshake()
    other.sendall(outgoing.read())
    plain = PlainEnd(one)
    with deadline():
        early = plain.recv(10)
        end = TlsEnd(plain, server, server_side=True, received=early)
        assert plain.closed
        shaking = gevent.spawn(end.handshake)
        while True:
            incoming.write(other.recv(65536))
            with contextlib.suppress(ssl.SSLWantReadError):
                peer.do_handshake()
                break
        peer.write(b"first")
        other.sendall(outgoing.read())
        shaking.get()
        assert end.recv(10) == b"first"
    end.close()
    other.close()


# -- a peer who sends KeyUpdates on and on ------------------------------------


@pytest.fixture
def flooder(authority: trustme.CA, tmp_path: Path) -> Iterator[tuple[TlsEnd, socket.socket, Records]]:
    """A server's end of ours, and the socket and the writer of records of a client that can say anything."""
    keys = tmp_path / "keys"
    one, other = socket_pair()
    server, client = tls_contexts(authority)
    end = TlsEnd(PlainEnd(one), server, server_side=True)
    peer = TlsEnd(PlainEnd(other), client_context(keys, client), host="localhost")
    with deadline():
        gevent.joinall([gevent.spawn(end.handshake), gevent.spawn(peer.handshake)], raise_error=True)
    cipher = peer._tls.cipher()
    yield end, peer.sock, records_of(keys, cipher[0])
    end.close()
    peer.close()


def text(records: Records, data: bytes) -> bytes:
    return records.record(APPLICATION_DATA, data)


def test_key_updates_are_answered_and_text_goes_on(flooder: tuple[TlsEnd, socket.socket, Records]) -> None:
    end, sock, records = flooder
    with deadline():
        for number in range(20):
            sock.sendall(b"".join(records.key_update() for _ in range(50)) + text(records, b"%d" % number))
            assert end.recv(100) == b"%d" % number


def test_a_record_that_comes_byte_by_byte_is_no_flood(
    flooder: tuple[TlsEnd, socket.socket, Records],
) -> None:
    end, sock, records = flooder
    record = text(records, b"x" * 16384)
    view = memoryview(bytearray(65536))
    with deadline():
        for _ in range(3):
            for start in range(0, len(record), 200):
                sock.sendall(record[start : start + 200])
                end.wait_readable()
                got = end.recv_now(view)
            assert got == 16384
            record = text(records, b"x" * 16384)


def test_many_small_records_are_no_flood(flooder: tuple[TlsEnd, socket.socket, Records]) -> None:
    end, sock, records = flooder
    data = bytes(range(256)) * 40
    pieces = [text(records, data[at : at + 1]) for at in range(len(data))]
    sending = gevent.spawn(sock.sendall, b"".join(pieces))
    view, got = memoryview(bytearray(MIB)), bytearray()
    with deadline():
        while len(got) < len(data):
            end.wait_readable()
            count = end.recv_now(view)
            got += view[: max(count, 0)]
        sending.get()
    assert got == data


def test_key_updates_behind_text_are_counted_too(flooder: tuple[TlsEnd, socket.socket, Records]) -> None:
    """What comes behind more records than are decrypted at once waits, and is fed little by little."""
    end, sock, records = flooder
    first = b"".join(text(records, b"x") for _ in range(tls.RECORDS_AT_ONCE + 1))
    updates = b"".join(records.key_update(answered=False) for _ in range(6 * tls.USELESS // KEY_UPDATE_BYTES))
    sending = gevent.spawn(sock.sendall, first + updates + text(records, b"end"))
    view, got = memoryview(bytearray(MIB)), [b""]
    with deadline(), pytest.raises(ConnectionAbortedError, match="without text"):
        read_all(end, view, got)
    sending.kill()
    assert got[0] == b"x" * (tls.RECORDS_AT_ONCE + 1)


def read_all(end: TlsEnd, view: memoryview, got: list[bytes]) -> None:
    wait_until(lambda: end.unread > 3 * tls.USELESS)
    while True:
        end.wait_readable()
        assert end._incoming.pending <= tls.PIECE
        count = end.recv_now(view)
        got[0] += bytes(view[: max(count, 0)])


def test_whoever_sends_nothing_but_key_updates_is_left(
    flooder: tuple[TlsEnd, socket.socket, Records],
) -> None:
    end, sock, records = flooder
    updates = b"".join(records.key_update(answered=False) for _ in range(2 * tls.USELESS // KEY_UPDATE_BYTES))
    sending = gevent.spawn(sock.sendall, updates)
    with deadline(), pytest.raises(ConnectionAbortedError, match="without text"):
        end.recv(100)
    sending.kill()


def test_whoever_reads_no_answer_to_key_updates_is_left(
    flooder: tuple[TlsEnd, socket.socket, Records],
) -> None:
    """However much text is between them: what waits for a peer who does not read is bounded."""
    end, sock, records = flooder
    end._raw = FullKernel(end._raw)
    assert end.send_now(b"x" * tls.PIECE) == 0
    sending = gevent.spawn(flood, sock, records, 3 * tls.OWED // KEY_UPDATE_BYTES)
    most = [0]
    with deadline(), pytest.raises(ConnectionAbortedError, match="does not read"):
        read_on(end, most)
    sending.kill()
    assert tls.PIECE < most[0] <= tls.PIECE + 1024 + tls.OWED


class FullKernel:
    """A socket whose peer reads nothing: the real one's buffers grow while they fill."""

    def __init__(self, sock: native.socket) -> None:
        self.recv_into = sock.recv_into
        self.recv = sock.recv

    def send(self, data: bytes) -> int:
        raise BlockingIOError


def read_on(end: TlsEnd, most: list[int]) -> None:
    while end.recv(100):
        most[0] = max(most[0], len(end._left))


def flood(sock: socket.socket, records: Records, count: int) -> None:
    for _ in range(count):
        sock.sendall(records.key_update() + text(records, b"x"))
