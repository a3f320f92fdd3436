"""Where visitors go, and whether what they get there is right."""

from __future__ import annotations

import http.client
import ssl
from dataclasses import dataclass

from .processes import BenchmarkError
from .services import SMALL


@dataclass(frozen=True)
class Endpoint:
    """Where visitors go on 127.0.0.1, and the Host they ask for."""

    port: int
    host: str = "localhost"
    tls: bool = False  # for curl and wrk, who do not look at certificates; our own generators are plain

    def url(self, path: str) -> str:
        return f"http{'s' * self.tls}://127.0.0.1:{self.port}/{path}"

    def request(self, path: str) -> bytes:
        """A GET, as our own load generators send it."""
        return f"GET /{path} HTTP/1.1\r\nHost: {self.host}\r\n\r\n".encode()


def check_way(endpoint: Endpoint) -> None:
    """Fetches the small page and looks at every byte; BenchmarkError if it is not that."""
    if endpoint.tls:
        context = ssl._create_unverified_context()  # nosec B323 # a contender of ours, on this machine, is measured
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            "127.0.0.1", endpoint.port, timeout=10, context=context
        )
    else:
        connection = http.client.HTTPConnection("127.0.0.1", endpoint.port, timeout=10)
    try:
        connection.request("GET", "/small", headers={"Host": endpoint.host})
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise BenchmarkError(f"no answer: {error}") from None
    finally:
        connection.close()
    if response.status != 200 or body != b"x" * (SMALL - 1) + b"\n":
        raise BenchmarkError(f"a wrong answer: {response.status}, {len(body)} bytes")
