"""What the status block learns of the requests that pass."""

from __future__ import annotations

from tinytun_gevent.client.observe import Asked, Exchange, Observer


class Seen:
    """What an observer reported, with a clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waiting: list[Asked] = []
        self.rows: list[Exchange] = []
        self.observer = Observer(
            self.rows.append, lambda: self.now, on_asked=self.waiting.append, on_over=self.waiting.remove
        )


def test_a_request_is_under_way_until_its_answer_begins() -> None:
    seen = Seen()
    seen.observer.to_service(b"GET /a?secret=1 HTTP/1.1\r\n\r\n")
    assert [(asked.method, asked.path) for asked in seen.waiting] == [("GET", "/a")]
    seen.now = 2.0
    seen.observer.to_visitor(memoryview(b"HTTP/1.1 100 Continue\r\n\r\n"))
    assert seen.waiting
    seen.observer.to_visitor(memoryview(b"HTTP/1.1 200 OK\r\n\r\n"))
    assert not seen.waiting
    assert seen.rows == [Exchange("GET", "/a", 200, 2.0)]


def test_a_visitor_that_leaves_waits_no_longer() -> None:
    seen = Seen()
    seen.observer.to_service(b"GET /a HTTP/1.1\r\n\r\n")
    seen.observer.left()
    seen.observer.left()
    assert (seen.waiting, seen.rows) == ([], [])


def test_a_failed_answer_ends_the_request_once() -> None:
    seen = Seen()
    seen.observer.failed(502, "no request was seen")
    seen.observer.to_service(b"GET /a HTTP/1.1\r\n\r\n")
    seen.observer.failed(502, "no HTTP")
    seen.observer.left()
    assert not seen.waiting
    assert seen.rows == [Exchange("GET", "/a", 502, 0.0, "no HTTP")]
