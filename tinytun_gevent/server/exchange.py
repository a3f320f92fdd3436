"""One exchange of the HTTP edge: a request that was sent to the local service, and its answer.

The exchange is the receiver of its stream, so everything in here runs in the session's
reader and never blocks: heads are parsed and rebuilt, bodies are framed and passed on as
they arrive, straight to the visitor's socket.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

from tinytun_gevent.errors import (
    MessageError,
    NotHttpError,
    SessionClosedError,
    SessionError,
    StreamResetError,
)
from tinytun_gevent.rare import Rare
from tinytun_gevent.server.deferred import Deferred
from tinytun_gevent.server.pages import Failure, new_request_id
from tinytun_gevent.stream import CANCEL
from tinytun_gevent.wire import http1
from tinytun_gevent.wire.answer_codes import AnswerCode, start_code
from tinytun_gevent.wire.body import Body, Bytes, UntilCloseBody, body_of, feed_some, taken_of

if TYPE_CHECKING:
    from tinytun_gevent.registry import Tunnel
    from tinytun_gevent.server.edge import Visitor
    from tinytun_gevent.server.usage import TunnelBudget
    from tinytun_gevent.stream import Upstream
    from tinytun_gevent.wire.rewriting import Links

log = logging.getLogger(__name__)
rare = Rare(log)

JOIN: Final = 64 * 1024
"""Longest body part, in bytes, that is copied behind its head to leave in one system call."""


_NOT_HTTP: Final = {
    AnswerCode.NOT_HTTP: "does not speak HTTP: what is no web service needs a TCP tunnel (tinytun tcp PORT)",
    AnswerCode.TLS: "speaks TLS: its tunnel has to be opened for its https URL (tinytun http https://HOST:PORT)",
}


def _check_start(received: bytearray) -> None:
    """Raises ``NotHttpError`` if an answer cannot begin like that."""
    code = start_code(received)
    if code is not None:
        raise NotHttpError(_NOT_HTTP[code], code)


class Exchange:
    """The response side of one request; ``visitor`` has the request side.

    It ends exactly once: by :meth:`_complete` when the answer was delivered, or by
    :meth:`fail`, :meth:`abandon` or :meth:`_cut` when it cannot be. ``visitor.exchange_over`` is called then.
    """

    __slots__ = (
        "_body",
        "_framed",
        "_id",
        "_interim",
        "_partial",
        "body_bytes",
        "budget",
        "close",
        "failure",
        "links",
        "losses",
        "over",
        "pooled",
        "replay",
        "request",
        "request_sent",
        "response",
        "response_bytes",
        "sending",
        "started",
        "started_at",
        "status",
        "stream",
        "tunnel",
        "upgraded",
        "visitor",
        "waiting_since",
    )

    def __init__(self, visitor: Visitor, request: http1.RequestHead, tunnel: Tunnel | None = None) -> None:
        self.visitor = visitor
        self.request = request
        #: Which tunnel it is for; None if for none of this server's.
        self.tunnel = tunnel
        #: Where this visitor is counted, once he has been let in.
        self.budget: TunnelBudget | None = None
        #: What the server answered itself, if it did.
        self.failure: Failure | None = None
        self.stream: Upstream | None = None
        #: Whether the stream had carried an exchange before.
        self.pooled = False
        #: The whole request, while it is short enough to be at hand, for another try.
        self.replay: bytes | None = None
        #: How many times it was lost with the session that carried it, and sent again.
        self.losses = 0
        #: Whether the whole request has been sent, so far as there is a body to wait for.
        self.request_sent = not request.length
        #: Bytes of its body that were read from the visitor since the first ones.
        self.body_bytes = 0
        #: Whether a greenlet is still sending on the stream, whose end an early answer overtakes.
        self.sending = False
        #: Whether the visitor has got any byte of a final answer.
        self.started = False
        self.response: http1.ResponseHead | None = None
        self.status = 0
        #: Bytes of the response's body so far.
        self.response_bytes = 0
        self.upgraded = False
        #: What makes the links in the answer public; None if they stay as they are.
        self.links: Links | None = None
        #: Whether the visitor's connection ends with this exchange.
        self.close = not request.keep_alive or request.minor == 0
        self.over = False
        self.started_at = time.monotonic()
        #: Since when the answer is waited for, in monotonic seconds: the queue and the body come first.
        self.waiting_since = self.started_at
        self._id = ""
        #: What has come of a response's head.
        self._partial = bytearray()
        self._interim = 0
        self._body: Body | None = None
        self._framed = False

    @property
    def request_id(self) -> str:
        """Its name on a failure's page and in the logs: made when somebody asks, and then the same."""
        if self.failure is not None:
            return self.failure.request_id
        self._id = self._id or new_request_id()
        return self._id

    @property
    def tunnel_id(self) -> str:
        return "" if self.tunnel is None else self.tunnel.id

    @property
    def client(self) -> str:
        """The visitor's IP address, as the local service is told it."""
        return self.visitor.client_of(self.request)

    def attach(self, stream: Upstream, *, pooled: bool) -> None:
        """Becomes the receiver of the stream that the request is about to be sent on."""
        self.stream = stream
        self.pooled = pooled
        self.sending = True
        self.waiting_since = time.monotonic()
        self.visitor.sink.stream = stream
        stream.receiver = self

    def sent_on(self, stream: Upstream) -> None:
        """Nobody sends on ``stream`` any more; another one may have taken its place."""
        if stream is self.stream:
            self.sending = False

    # -- the receiver ---------------------------------------------------------

    def data(self, view: memoryview) -> None:
        used = self.take(view)
        if used < len(view) and self.stream is not None:
            Deferred(self, self.stream, view[used:])

    def take(self, view: memoryview) -> int:
        """Takes received bytes: how many, which are fewer than there are where they take long."""
        try:
            if self.upgraded:
                self.visitor.sink.write(view, len(view))
            elif self._framed or self.over:
                self._excess(len(view))
            elif self._body is not None:
                return self._take_body(self._body, view)
            else:
                return self._take_heads(view)
        except MessageError as error:
            self._malformed(error)
        except Exception:
            failure = Failure(500, "This server made a mistake; it has been logged.")
            fields = {"request_id": failure.request_id}
            rare.exception("request %s failed by an internal error", failure.request_id, extra=fields)
            self.fail(failure)
        return len(view)

    def eof(self) -> None:
        if self.over or self._framed:
            return
        if self.upgraded:
            self.visitor.sink.finish()
        elif isinstance(self._body, UntilCloseBody):
            self._finish_body()
        elif self._untouched and self.visitor.forwarder.retry(self):
            if self.stream is not None:
                self.stream.shutdown()
        else:
            self._broken_off("The local service closed the connection before its answer was complete.")

    def aborted(self, error: SessionError) -> None:
        if self.over:
            return
        if self._framed:
            if not self.visitor.sink.keep():  # else it is over when the visitor has taken it
                self._cut()
        elif self._untouched and self.visitor.forwarder.retry(
            self, refused=error.is_refusal, lost=isinstance(error, SessionClosedError)
        ):
            pass
        elif self.upgraded:
            self._cut()
        elif error.is_refusal:
            self.fail(Failure(503, "The tunnel's client takes no more connections now.", retry_after=5))
        elif isinstance(error, StreamResetError):
            self._broken_off("The local service refused the connection or reset it.")
        else:
            self._gone(error)

    # -- heads ----------------------------------------------------------------

    def _take_heads(self, view: memoryview) -> int:
        """Looks for the response's head, passing interim ones on (RFC 9110 §15.2); as :meth:`take`."""
        limits, size = self.visitor.answer_limits, len(view)
        while view:
            held = len(self._partial)
            head = self._partial
            head += view[: limits.bytes + 1 - held]
            if not head.startswith(b"HTTP/"):
                _check_start(head)
            end = http1.response_head_end(head, held)
            if end < 0:
                if len(head) > limits.bytes:
                    raise http1.response_too_large(limits.bytes)
                self._consumed(len(view))
                return size
            self._partial = bytearray()
            credit, view = end - held, view[end - held :]
            del head[end:]
            response = http1.parse_response_head(
                bytes(head), self.request.method, bool(self.request.upgrade), limits
            )
            if self.links is not None:
                response.fields = self.links.fields(response.fields)
            if response.status >= 200:
                return size - self._begin(response, view, credit)
            if response.status == 101:
                self._switch(response, view, credit)
                return size
            self._pass_interim(response, credit)
        return size

    def _pass_interim(self, response: http1.ResponseHead, credit: int) -> None:
        self._interim += 1
        if self._interim > self.visitor.most_interim:
            raise MessageError(f"the service sent more than {self._interim - 1} interim answers", 502)
        if self.request.minor == 0:
            self._consumed(credit)
            return
        self.visitor.sink.write(http1.build_response_head(response, close=False, minor_visitor=1), credit)

    def _begin(self, response: http1.ResponseHead, rest: memoryview, credit: int) -> int:
        """Sends the final head, and with it what came of the body; how much of that has to wait."""
        self.response = response
        self.status = response.status
        if response.length == http1.UNTIL_CLOSE or not self.request_sent or self.visitor.draining:
            self.close = True
        self._note_first_byte()
        head = http1.build_response_head(response, close=self.close, minor_visitor=self.request.minor)
        body: Body | None = None
        if 0 <= response.length <= len(rest):
            used, whole = response.length, True
        else:
            plain = self.request.minor == 0  # HTTP/1.0 has no chunks
            body = self._body = body_of(
                response.length, response=True, withheld=response.withheld, plain=plain
            )
            used = feed_some(body, rest) if rest else 0
            whole = body.done
        self.started = True
        self.response_bytes += used
        sink = self.visitor.sink
        if used <= JOIN:
            part = bytes(rest[:used]) if body is None else taken_of(body, rest, used)
            sink.write(head + part, credit + used)
        else:
            sink.write(head, credit)
            self._pass_body(rest, used, None if body is None else body.rewritten)
        if not whole:
            return len(rest) - used
        self._finish_body()
        if used < len(rest):
            self._excess(len(rest) - used)
        return 0

    def _note_first_byte(self) -> None:
        if not self.pooled and self.stream is not None:
            self.visitor.forwarder.answered(self.stream)

    def _switch(self, response: http1.ResponseHead, rest: memoryview, credit: int) -> None:
        """The service agreed to an upgrade: the connection is opaque from here on."""
        self.response = response
        self.status = 101
        self.upgraded = self.started = self.close = True
        self._note_first_byte()
        head = http1.build_response_head(response, close=False, minor_visitor=self.request.minor)
        self.visitor.sink.write(head + bytes(rest), credit + len(rest))
        self.visitor.wake()

    def end_upgraded(self) -> None:
        """Both directions of an upgraded connection have ended."""
        if self._claim_end():
            self.visitor.exchange_over(self)

    # -- bodies ---------------------------------------------------------------

    def _take_body(self, body: Body, view: memoryview) -> int:
        used = feed_some(body, view)
        self.response_bytes += used
        self._pass_body(view, used, body.rewritten)
        if not body.done:
            return used
        self._finish_body()
        if used < len(view):
            self._excess(len(view) - used)
        return len(view)

    def _pass_body(self, view: memoryview, used: int, pieces: list[Bytes] | None) -> None:
        """Delivers the first ``used`` bytes of a view, or the pieces that stand for them."""
        sink = self.visitor.sink
        if pieces is None:
            sink.write(view[:used] if used < len(view) else view, used)
            return
        for piece in pieces:
            credit = min(used, len(piece))
            used -= credit
            sink.write(memoryview(piece), credit)
        self._consumed(used)  # what does not pass waits nowhere

    def _excess(self, count: int) -> None:
        """Bytes behind the answer are no second one: the stream is of no further use."""
        stream = self.stream
        self._consumed(count)
        if stream is not None:
            stream.reset(CANCEL)

    def _finish_body(self) -> None:
        """The answer is framed to its end; it is complete when the visitor's kernel has it."""
        self._framed = True
        if self.visitor.sink.idle or self.visitor.sink.done:
            self._complete()

    def drained(self) -> None:
        """The visitor has taken what had piled up."""
        if self._framed:
            self._complete()

    def _complete(self) -> None:
        if self._claim_end():
            self._give_back_stream()
            self.visitor.exchange_over(self)

    def _claim_end(self) -> bool:
        """Whether the exchange ends here: once, though what ends it may report an end in turn."""
        claimed, self.over = not self.over, True
        return claimed

    def _give_back_stream(self) -> None:
        stream, response = self.stream, self.response
        if stream is None or response is None:
            return
        if self.sending:  # what is left of this request would get into the next one
            stream.reset(CANCEL)
            return
        if not self.request_sent:
            stream.reset(CANCEL)
        elif stream.remote_ended:
            stream.shutdown()
        else:
            self.visitor.forwarder.give_back(stream, self, response)

    # -- failures -------------------------------------------------------------

    @property
    def _untouched(self) -> bool:
        """Whether nothing of an answer has come yet, so that another try is possible."""
        return not self.started and not self._interim and not self._partial and self._body is None

    @property
    def awaits_continue(self) -> bool:
        """Whether the visitor may be waiting for the service's 100 with his body."""
        return self.request.expect_continue and not self._interim and not self.body_bytes

    def fail(self, failure: Failure, code: AnswerCode | None = None) -> None:
        """Answers for the service, if no answer has begun; otherwise cuts the visitor off.

        ``code`` is for the tunnel's client, where the service's answer is to blame.
        """
        if self.started:
            self._cut(code)
            return
        if not self._claim_end():
            return
        self.failure = failure
        self.status = failure.status
        self.started = True
        self._drop_stream(code)
        self.close = self.close or not self.request_sent or self.visitor.wants_too_much
        self.response_bytes = self.visitor.answer(
            failure, self.request.accept, close=self.close, head_only=self._is_head
        )
        self.visitor.exchange_over(self)

    @property
    def _is_head(self) -> bool:
        return self.request.method == b"HEAD"

    def abandon(self) -> None:
        """The visitor has left: the service need not go on."""
        if self._claim_end():
            self.close = True
            if not self.upgraded:
                self.status = 0
            self._drop_stream()
            self.visitor.exchange_over(self)

    def _malformed(self, error: MessageError) -> None:
        if isinstance(error, NotHttpError):
            self.fail(Failure(502, f"The local service {error}."), AnswerCode(error.code))
            return
        code = AnswerCode.BAD_HEAD if self._body is None else AnswerCode.BAD_BODY
        self.fail(Failure(error.status, f"The local service's answer is malformed: {error}."), code)

    def _broken_off(self, reason: str) -> None:
        self.fail(Failure(502, reason), AnswerCode.INCOMPLETE)

    def _gone(self, error: SessionError) -> None:
        self.fail(Failure(503, "The tunnel's client has just gone away.", retry_after=2))

    def _cut(self, code: AnswerCode | None = None) -> None:
        """Ends the visitor's connection by a reset behind what has come: it must not look like the whole."""
        if self._claim_end():
            self.close = True
            self._drop_stream(code)
            self.visitor.cut()
            self.visitor.exchange_over(self)

    def _drop_stream(self, code: AnswerCode | None = None) -> None:
        if self.stream is None:
            return
        if code is None:
            self.stream.reset(CANCEL)
        else:
            self.stream.blame(code)

    def _consumed(self, count: int) -> None:
        if self.stream is not None:
            self.stream.consumed(count)
