"""A connection over TLS behind the interface of a plain one.

OpenSSL works on two buffers in memory, and the socket below stays a raw non-blocking one. So reading takes
what has come, sending takes what the kernel has room for, and neither costs a greenlet, as without TLS.
"""

from __future__ import annotations

import errno
import socket as native
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final
from weakref import WeakKeyDictionary

import gevent
from gevent import ssl
from gevent.hub import Hub

from tinytun_gevent import sockets
from tinytun_gevent.sockets import Buffer, PlainEnd
from tinytun_gevent.turns import let_others_run

PIECE: Final = 64 * 1024
"""Bytes encrypted, or fed to OpenSSL, at once: four records. Its buffers keep the largest size that they ever
had, and more at once is no faster."""

LONG: Final = 16 * 1024
"""Bytes of a buffer that is not copied to be put together with others: a record of its own."""

RECEIVE: Final = 256 * 1024
"""Bytes of ciphertext read at once; one buffer a hub."""

OVERHEAD: Final = 4096
"""Bytes of ciphertext read beyond those asked for: what records add, and the beginning of one."""

GOODBYE: Final = 40
"""Bytes of ciphertext that may be a close_notify: 24 in TLS 1.3, 31 in 1.2 by AES-GCM. Requests have more."""

SMALLEST: Final = 23
"""Bytes of a record with one byte of text (RFC 8446 §5.2): head, kind and tag are the others."""

USELESS: Final = 32 * 1024
"""Bytes of ciphertext beyond :data:`SMALLEST` for each byte of text, in a row, at most: a record that is not
whole yet (16,645 bytes) and tickets. A KeyUpdate is 27 bytes and costs some 20 µs; Go ends a
connection at the 17th record without content."""

OWED: Final = 4096
"""Bytes that OpenSSL has to say by itself, such as answers to KeyUpdates, of 27 bytes each, and that wait at
most for a peer who reads nothing. Honest peers cause a handful in hours."""

RECORDS_AT_ONCE: Final = 64
"""Records decrypted before others have a turn: one read may hold ten thousand with a byte each."""

_scratches: WeakKeyDictionary[Hub, tuple[memoryview, memoryview]] = WeakKeyDictionary()


def _scratch() -> tuple[memoryview, memoryview]:
    """This hub's buffers for ciphertext and for what :meth:`TlsEnd.recv` returns; nothing stays in them."""
    hub = gevent.get_hub()
    if hub not in _scratches:
        _scratches[hub] = memoryview(bytearray(RECEIVE)), memoryview(bytearray(PIECE))
    return _scratches[hub]


class TlsEnd(PlainEnd):
    """One TLS connection; call :meth:`handshake` first.

    What it has encrypted and the kernel has not taken is sent before anything else. Those bytes count as not
    sent: whoever gets less than he asked for from :meth:`send_now` offers the same bytes again, as all do who
    write to a non-blocking socket. So nothing is left here that nobody waits for.

    A peer that sends record after record without text, or reads none of the answers to its KeyUpdates, is
    left: whoever reads gets ``ConnectionAbortedError`` then.
    """

    movable = False
    __slots__ = (
        "_ahead",
        "_cipher",
        "_finished",
        "_held",
        "_incoming",
        "_left",
        "_outgoing",
        "_over",
        "_owed",
        "_stash",
        "_text",
        "_tired",
        "_tls",
        "_unfed",
        "_useless",
    )

    def __init__(
        self,
        end: PlainEnd,
        context: ssl.SSLContext,
        *,
        server_side: bool = False,
        host: str | None = None,
        received: Buffer = b"",
        session: ssl.SSLSession | None = None,
    ) -> None:
        """Takes the socket of ``end``, on which nobody may wait, and what was ``received`` on it already.

        ``host`` is for a client: whom to ask for, and whose certificate is expected. ``session`` is one to
        resume. Raises ``ValueError`` for a host that is none.
        """
        super().__init__(end.give_up())
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls: Any = context.wrap_bio(self._incoming, self._outgoing, server_side, host or None, session)
        if received:
            self._incoming.write(received)
        #: Whether something may be read without the kernel: decrypted, or about to be.
        self._held = False
        #: Whether others have to run before more of it is decrypted.
        self._tired = False
        #: Ciphertext that OpenSSL has not been fed yet: it would take all of it at once, if no text is in it.
        self._unfed = memoryview(b"")
        #: What was decrypted before it was asked for.
        self._stash = b""
        #: The peer sends nothing more; we do not, or have not begun.
        self._over = False
        self._finished = True
        #: Ciphertext that the kernel has not taken, and how many bytes that will be offered again are in it.
        self._left: Buffer = b""
        self._ahead = 0
        #: Bytes that OpenSSL had to say by itself since nothing was left.
        self._owed = 0
        #: Bytes of ciphertext that no text has come of; 0 is what makes larger pieces be fed at once.
        self._useless = 1
        self._cipher, self._text = _scratch()

    @property
    def holds(self) -> bool:  # type: ignore[override]
        """Whether records that have come were not all read."""
        return self._held and not self._over

    @property
    def protocol(self) -> str | None:
        """The protocol agreed on by ALPN (RFC 7301); None if there was no talk of it."""
        return self._tls.selected_alpn_protocol()  # type: ignore[no-any-return]

    @property
    def peer_certificate(self) -> dict[str, Any]:
        """The peer's certificate as `ssl.SSLSocket.getpeercert` has it; empty if it was not checked."""
        return self._tls.getpeercert() or {}

    @property
    def session(self) -> ssl.SSLSession | None:
        """What a client's next connection can resume. A server of TLS 1.3 sends it behind the handshake."""
        return self._tls.session  # type: ignore[no-any-return]

    @property
    def resumed(self) -> bool:
        """Whether this connection has resumed a session."""
        return bool(self._tls.session_reused)

    def handshake(self, step: Callable[[Callable[[], None]], None] | None = None) -> None:
        """Blocks until both sides agree; the caller has the deadline, and closes.

        ``step`` calls what it is given, elsewhere if that takes long. Raises ``OSError``, of which
        ``ssl.SSLError`` is one, after the alert for the other side has left.
        """
        shake = self._tls.do_handshake
        while True:
            try:
                if step is None:
                    shake()
                else:
                    step(shake)
                done = True
            except ssl.SSLWantReadError:
                done = False
            except ssl.SSLError:
                self._take_output()
                raise
            self._take_output()
            while self._left and not self._flush():
                self.wait_writable()
            if done:
                self._held = bool(self._incoming.pending)
                self._finished = False
                return
            super().wait_readable()
            if self._feed_from_kernel(LONG) == 0:  # what comes behind is not counted until it is read
                raise ConnectionResetError(errno.ECONNRESET, "closed during the TLS handshake")

    # -- reading --------------------------------------------------------------

    def wait_readable(self) -> None:
        """Blocks until something has come: not for long if some of it is here already."""
        if self._tired:
            self._tired = False
            let_others_run()
        if self.closed or not self._held:
            super().wait_readable()

    @property
    def unread(self) -> int:
        here = self._incoming.pending + len(self._unfed) + int(self._tls.pending()) + len(self._stash)
        return super().unread + here

    @property
    def at_end(self) -> bool:
        """As for a plain socket; a close_notify that is unread counts as the end if the FIN is behind it."""
        if self._stash or self._over:
            return not self._stash
        if self._held or self._incoming.pending:
            return False
        unread = sockets.unread(self.sock)
        return unread <= GOODBYE and sockets.half_closed(self.sock)

    def recv_now(self, view: memoryview) -> int:
        """As for a plain socket; -1 also if what has come is no data yet.

        A FIN without close_notify counts as the end: too many programs never send one, and what counts on
        the end of a connection to tell the end of a message has no other choice either.
        """
        if self._stash:
            return self._unstash(view)
        got = self._take_held(view)
        if got or self._over:
            return got
        if self._held:
            return -1
        try:
            count = self._raw.recv_into(self._cipher[: min(RECEIVE, len(view) + OVERHEAD)])
        except BlockingIOError:
            return -1
        if not count:
            self._over = self._held = True
            return 0
        got = self._feed(self._cipher[:count], view, scratch=True)
        return got if got or self._over else -1

    def _take_held(self, view: memoryview) -> int:
        """Fills ``view`` with what has come already; how much is in it then."""
        got = self._decrypt(view, 0)
        if not got and self._unfed and not self._over:
            unfed, self._unfed = self._unfed, self._unfed[:0]
            got = self._feed(unfed, view, scratch=False)
        return got

    def _feed(self, cipher: memoryview, view: memoryview, *, scratch: bool) -> int:
        """Feeds OpenSSL, less at once while no text comes of it; how much of ``view`` is filled then.

        ``scratch``: the bytes do not outlive the call.
        """
        start = got = 0
        while start < len(cipher):
            if got == len(view) or self._tired:
                rest = cipher[start:]
                self._unfed = memoryview(bytes(rest)) if scratch else rest
                self._held = True
                break
            piece = cipher[start : start + (LONG if self._useless else PIECE)]
            start += len(piece)
            self._incoming.write(piece)
            got = self._decrypt(view, got)
        return got

    def recv(self, size: int) -> bytes:
        view = self._text[:size]
        while True:
            self.wait_readable()
            count = self.recv_now(view)
            if count >= 0:
                return bytes(view[:count])

    def _decrypt(self, view: memoryview, got: int) -> int:
        """Fills ``view`` from ``got`` on with what OpenSSL has; how much is in it then."""
        had, waited = got, self._incoming.pending
        got = self._read_records(view, got)
        if self._unfed:
            self._held = True
        taken = waited - self._incoming.pending
        self._useless = max(0, self._useless + taken - SMALLEST * (got - had))
        if self._useless > USELESS:
            raise ConnectionAbortedError(errno.ECONNABORTED, "the peer sends TLS records without text")
        return got

    def _read_records(self, view: memoryview, got: int) -> int:
        """As :meth:`_decrypt`, which looks at what it cost."""
        incoming, read, room = self._incoming, self._tls.read, len(view)
        records = RECORDS_AT_ONCE
        try:
            while incoming.pending or self._held:
                if not records:
                    self._held = self._tired = True
                    return got
                records -= 1
                count = read(room - got, view[got:])
                if not count:
                    raise ssl.SSLZeroReturnError
                got += count
                if got == room:
                    self._held = bool(incoming.pending or self._tls.pending())
                    return got
                self._held = False
        except ssl.SSLWantReadError:
            self._held = False
            if self._outgoing.pending:
                self._answer()
        except ssl.SSLZeroReturnError:
            self._over = self._held = True
        except ssl.SSLError:
            self._take_output()
            raise
        return got

    def _unstash(self, view: memoryview) -> int:
        count = min(len(view), len(self._stash))
        view[:count] = self._stash[:count]
        self._stash = self._stash[count:]
        self._held = bool(self._stash) or self._over
        return count

    def _feed_from_kernel(self, limit: int) -> int:
        """Reads ciphertext: how much, 0 at the end, -1 if nothing came yet."""
        try:
            count = self._raw.recv_into(self._cipher[:limit])
        except BlockingIOError:
            return -1
        self._incoming.write(self._cipher[:count])
        return int(count)

    # -- sending --------------------------------------------------------------

    def send_now(self, data: Buffer) -> int:
        """Sends what the kernel takes at once; never blocks. See the class about what is offered again."""
        if self._left and not self._flush():
            return 0
        size = len(data)
        taken = min(self._ahead, size)
        self._ahead -= taken
        with memoryview(data) as view:
            while taken < size:
                count = self._tls.write(view[taken : taken + PIECE])
                self._left = self._outgoing.read()
                if not self._flush():
                    self._ahead = count
                    break
                taken += count
        return taken

    def sendmsg_now(self, buffers: Sequence[Buffer]) -> int:
        sent = 0
        for piece in _pieces(buffers):
            count = self.send_now(piece)
            sent += count
            if count < len(piece):
                break
        return sent

    def finish_writing(self) -> None:
        """Half-closes by close_notify (RFC 8446 §6.1) and FIN; reading goes on.

        Python's call also takes a record, in the hope for the other side's close_notify, and loses it if it
        is data. So what has come is decrypted before.
        """
        if self.closed or self._finished:
            return
        self._finished = True
        self._stash += self._all_decrypted()
        self._held = bool(self._stash) or self._over
        self._say_goodbye()
        if self._left and not self._flush():
            gevent.spawn(self._finish_later)
        else:
            self.sock.shutdown(native.SHUT_WR)

    def close(self) -> None:
        """As for a plain socket; says close_notify, if there is room for it at once."""
        if not self.closed and not self._finished and not self._left:
            self._finished = True
            try:
                self._say_goodbye()
                self._flush()
            except OSError:
                pass
        super().close()

    def abort(self) -> None:
        self._finished = True
        super().abort()

    def _all_decrypted(self) -> bytes:
        """What is here and was not asked for: less than one read brings."""
        pieces = []
        buffer = memoryview(bytearray(PIECE)) if self._incoming.pending or self._held else self._text[:0]
        while buffer and not self._over:
            self._tired = False
            count = self._take_held(buffer)
            if not count and not self._unfed:
                break
            pieces.append(bytes(buffer[:count]))
        return b"".join(pieces)

    def _say_goodbye(self) -> None:
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            pass  # it wants the other side's, for which nobody waits
        self._left = bytes(self._left) + self._outgoing.read()

    def _finish_later(self) -> None:
        """Half-closes when the kernel has taken the last bytes; whoever reads learns of a lost connection."""
        try:
            while self._left and not self._flush():
                self.wait_writable()
            self.sock.shutdown(native.SHUT_WR)
        except OSError:
            pass

    def _take_output(self) -> None:
        """Sends what OpenSSL itself has to say, now or before what is sent next."""
        if self._outgoing.pending:
            self._left = bytes(self._left) + self._outgoing.read()
            try:
                self._flush()
            except OSError:
                pass  # whoever reads or writes next learns of it

    def _answer(self) -> None:
        """Sends OpenSSL's answers, to KeyUpdates for example, of which only :data:`OWED` may wait."""
        if not self._left:
            self._owed = 0
        self._owed += self._outgoing.pending
        self._take_output()
        if self._left and self._owed > OWED:
            raise ConnectionAbortedError(errno.ECONNABORTED, "the peer does not read what TLS answers it")

    def _flush(self) -> bool:
        """Sends what is left; whether the kernel took all of it."""
        left = self._left
        try:
            sent = self._raw.send(left)
        except BlockingIOError:
            return False
        if sent == len(left):
            self._left = b""
            return True
        self._left = memoryview(left)[sent:]
        return False


def _pieces(buffers: Sequence[Buffer]) -> Iterator[Buffer]:
    """The bytes of ``buffers``; short ones together, for each piece costs a record and a system call."""
    short: list[Buffer] = []
    size = 0
    for buffer in buffers:
        if size and size + len(buffer) > PIECE:
            yield b"".join(short)
            short, size = [], 0
        if len(buffer) > LONG and not size:
            yield buffer
        else:
            short.append(buffer)
            size += len(buffer)
    if size:
        yield b"".join(short)
