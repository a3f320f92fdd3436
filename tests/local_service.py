"""A local web service for tests: pages at once, and pages that end when the test says so."""

from __future__ import annotations

import http.server
import json
import threading
from types import TracebackType
from typing import Self

DEADLINE = 60.0


class LocalService:
    """Answers ``/`` with the request's fields as JSON; ``/slow`` begins, and ends after `finish`."""

    def __init__(self) -> None:
        service = self
        #: Set when a request for ``/slow`` has begun.
        self.begun = threading.Event()
        self._finish = threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                slow = self.path == "/slow"
                body = json.dumps({name.lower(): value for name, value in self.headers.items()}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.flush()
                if slow:
                    service.begun.set()
                    service._finish.wait(DEADLINE)
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])

    def finish(self) -> None:
        """Lets the slow pages end."""
        self._finish.set()

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()
        self._server.shutdown()
        self._server.server_close()
