"""Reaching the server: addresses, TLS, proxies. Real sockets on loopback, real certificates."""

from __future__ import annotations

import shutil
import socket as native
import subprocess
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import pytest
import trustme
from certificates import self_signed
from free_ports import free_ports
from gevent import socket, ssl
from gevent.server import StreamServer

from tinytun_gevent.client import dial, reasons
from tinytun_gevent.client.config import make_config
from tinytun_gevent.client.dial import (
    HopelessError,
    dial_server,
    first_to_connect,
    make_context,
    read_head,
    resolve,
)
from tinytun_gevent.client.local import LocalDialer, error_page
from tinytun_gevent.client.opening import WrongDoorError, open_tunnel, refusal_error
from tinytun_gevent.client.reasons import Reason
from tinytun_gevent.client.target import parse_target
from tinytun_gevent.errors import (
    LocalServiceError,
    NameTakenError,
    RefusedError,
    TryLaterError,
    UnreachableError,
    UsageError,
)
from tinytun_gevent.sockets import Socket, end_of
from tinytun_gevent.wire.handshake import Kind, OpenReply, OpenRequest, Refusal, build_refusal, build_reply

DEADLINE = 60.0
V4 = int(native.AF_INET)

Handler = Callable[[socket.socket], None]


@pytest.fixture(autouse=True)
def _no_test_hangs() -> Iterator[None]:
    with gevent.Timeout(120):
        yield


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@contextmanager
def serving(handle: Handler, context: ssl.SSLContext | None = None) -> Iterator[int]:
    """A TCP (or TLS) server on 127.0.0.1; yields its port."""
    options = {} if context is None else {"ssl_context": context}
    server = StreamServer(("127.0.0.1", 0), lambda sock, _: handle(sock), **options)
    server.start()
    try:
        yield server.server_port
    finally:
        server.stop()


def server_context(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    return context


def greet(sock: socket.socket) -> None:
    """Like a tunnel server, speaks when it was spoken to."""
    sock.recv(1)
    sock.sendall(b"hello from the server")
    sock.recv(1)


def config(server: str, **options: Any) -> Any:
    options.setdefault("environ", {})
    return make_config("1", server=server, **options)


def check_greeting(sock: Socket) -> None:
    end = end_of(sock)
    try:
        end.sendall(b"x")
        assert end.recv(100) == b"hello from the server"
    finally:
        end.close()


# -- addresses ------------------------------------------------------------------


def test_a_plain_server() -> None:
    with serving(greet) as port:
        sock = dial_server(config(f"http://127.0.0.1:{port}"))
        assert sock.sock.getsockopt(native.IPPROTO_TCP, native.TCP_NODELAY)
        check_greeting(sock)


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(UnreachableError, match=r"cannot resolve no-such-host\.invalid"):
        dial_server(config("http://no-such-host.invalid:1"))


def test_a_port_where_nobody_listens() -> None:
    port = free_ports(1)[0]
    with pytest.raises(UnreachableError, match=f"cannot connect to 127.0.0.1:{port}: connection refused"):
        dial_server(config(f"http://127.0.0.1:{port}"))


def test_the_name_is_resolved_anew_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(greet) as port:
        answers = [[("127.0.0.1", free_ports(1)[0])], [("127.0.0.1", port)]]

        def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
            return [(V4, 1, 6, "", address) for address in answers.pop(0)]

        monkeypatch.setattr(dial.socket, "getaddrinfo", getaddrinfo)
        with pytest.raises(UnreachableError):
            dial_server(config("http://tunnel.example:1"))
        check_greeting(dial_server(config("http://tunnel.example:1")))


def test_addresses_alternate_between_families(monkeypatch: pytest.MonkeyPatch) -> None:
    v6, v4 = int(native.AF_INET6), V4
    found = [(v6, ("::1",)), (v6, ("::2",)), (v6, ("::2",)), (v4, ("1.1.1.1",)), (v6, ("::3",))]
    monkeypatch.setattr(
        dial.socket,
        "getaddrinfo",
        lambda *_, **__: [(family, 1, 6, "", address) for family, address in found],
    )
    assert [address[0] for _, address in resolve("x", 1)] == ["::1", "1.1.1.1", "::2", "::3"]
    found[:] = [(v4, (f"10.0.0.{n}",)) for n in range(100)]
    assert len(resolve("x", 1)) == dial.MAX_ADDRESSES


def test_a_dead_address_is_skipped_at_once_and_a_silent_one_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(greet) as port:
        dead, silent, good = (
            (V4, ("127.0.0.1", free_ports(1)[0])),
            (V4, ("silent", 1)),
            (V4, ("127.0.0.1", port)),
        )
        killed = gevent.event.Event()
        connect = dial.connect

        def maybe_silent(address: dial.Address) -> socket.socket:
            if address is silent:
                try:
                    gevent.event.Event().wait()
                finally:
                    killed.set()
            return connect(address)

        monkeypatch.setattr(dial, "connect", maybe_silent)
        check_greeting(first_to_connect([dead, dead, silent, dead, good]))
        assert killed.is_set()
        check_greeting(first_to_connect([good, silent]))


def test_all_addresses_dead() -> None:
    with pytest.raises(ConnectionRefusedError):
        first_to_connect([(V4, ("127.0.0.1", free_ports(1)[0]))] * 3)
    with pytest.raises(OSError, match="no address"):
        first_to_connect([])


def test_a_late_second_winner_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[native.socket] = []

    def connect(address: dial.Address) -> Any:
        made.append(native.socket())
        return made[-1]

    monkeypatch.setattr(dial, "connect", connect)
    winner = first_to_connect([(V4, 1), (V4, 2)], stagger=0.0)
    gevent.sleep(0)
    assert [sock.fileno() >= 0 for sock in made].count(True) == 1
    winner.close()


def test_a_silent_server_is_given_up_in_time() -> None:
    with native.create_server(("127.0.0.1", 0)) as listener:  # accepts in the kernel, says nothing
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(UnreachableError, match=r"did not answer within 1 s"):
            dial_server(config(url, insecure=True), timeout=1)


# -- TLS ------------------------------------------------------------------------


def test_tls_with_a_trusted_certificate_and_its_name(authority: trustme.CA, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca)
    context = server_context(authority, "localhost")
    asked_for: list[str | None] = []
    context.sni_callback = lambda _sock, name, _context: asked_for.append(name)
    with serving(greet, context) as port:
        check_greeting(dial_server(config(f"https://localhost:{port}", ca=ca)))
    assert asked_for == ["localhost"]


def test_the_system_store_is_used(
    authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca)
    monkeypatch.setenv("SSL_CERT_FILE", str(ca))
    with serving(greet, server_context(authority, "127.0.0.1")) as port:
        check_greeting(dial_server(config(f"https://127.0.0.1:{port}")))


def test_an_untrusted_certificate_is_hopeless(authority: trustme.CA) -> None:
    with serving(greet, server_context(authority, "localhost")) as port:
        with pytest.raises(HopelessError, match=r"certificate of localhost:\d+ is not valid.*--ca"):
            dial_server(config(f"https://localhost:{port}"))
        check_greeting(dial_server(config(f"https://localhost:{port}", insecure=True)))


def test_a_certificate_for_another_name_is_hopeless(authority: trustme.CA, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca)
    with (
        serving(greet, server_context(authority, "other.example")) as port,
        pytest.raises(HopelessError, match="not valid"),
    ):
        dial_server(config(f"https://localhost:{port}", ca=ca))


@pytest.fixture(scope="module")
def nameless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for ``localhost`` by its common name only, and its key."""
    path = tmp_path_factory.mktemp("nameless") / "pair.pem"
    path.write_bytes(self_signed("localhost", alternative=False))
    return path


def test_a_common_name_is_no_name(nameless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(nameless)
    words = r"none of its alternative names \(SAN\) is localhost; its common name does not count"
    with serving(greet, context) as port:
        with pytest.raises(HopelessError, match=words + "$"):
            dial_server(config(f"https://localhost:{port}", ca=nameless))
        monkeypatch.setenv("SSL_CERT_FILE", str(nameless))
        with pytest.raises(LocalServiceError, match=words):
            LocalDialer(parse_target(f"https://localhost:{port}", "always")).dial()


def test_tls_to_a_plain_port_says_so() -> None:
    with (
        serving(lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as port,
        pytest.raises(HopelessError, match="does not speak TLS"),
    ):
        dial_server(config(f"https://127.0.0.1:{port}"))


def test_a_ca_file_that_is_none(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text("nothing of the kind")
    with pytest.raises(UsageError, match=r"--ca '.*ca\.pem': not a PEM file"):
        dial_server(config("https://127.0.0.1:1", ca=ca))


def test_contexts_make_sockets_that_do_not_block_the_thread() -> None:
    assert isinstance(make_context(None, insecure=False), ssl.SSLContext)
    assert make_context(None, insecure=False).verify_mode == ssl.CERT_REQUIRED
    assert make_context(None, insecure=False).check_hostname
    assert make_context(None, insecure=True).verify_mode == ssl.CERT_NONE


# -- proxies --------------------------------------------------------------------


class ConnectProxy:
    """A CONNECT proxy in thirty lines, and what it was asked."""

    def __init__(self, answer: bytes | None = None) -> None:
        self.heads: list[bytes] = []
        self._answer = answer

    def __call__(self, sock: socket.socket) -> None:
        head, _ = read_head(sock, 16384)
        self.heads.append(head)
        if self._answer is not None:
            sock.sendall(self._answer)
            sock.recv(1)
            return
        host, _, port = head.split(b" ")[1].decode().rpartition(":")
        upstream = socket.create_connection((host.strip("[]"), int(port)))
        sock.sendall(b"HTTP/1.1 200 Connection established\r\nVia: test\r\n\r\n")
        back = gevent.spawn(self._copy, upstream, sock)
        self._copy(sock, upstream)
        back.join()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(native.SHUT_WR)
        except OSError:
            pass


def test_through_a_proxy_from_the_environment() -> None:
    proxy = ConnectProxy()
    with serving(greet) as port, serving(proxy) as proxy_port:
        environ = {"HTTPS_PROXY": f"http://us%65r:p%20w@127.0.0.1:{proxy_port}"}
        check_greeting(dial_server(config(f"http://127.0.0.1:{port}", environ=environ)))
        head = proxy.heads[0].decode()
        assert head.startswith(f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n")
        credentials = head.partition("Proxy-Authorization: Basic ")[2].partition("\r\n")[0]
        assert b64decode(credentials) == b"user:p w"
        environ["NO_PROXY"] = "127.0.0.0/8"
        check_greeting(dial_server(config(f"http://127.0.0.1:{port}", environ=environ)))
        assert len(proxy.heads) == 1


def test_tls_through_a_proxy(authority: trustme.CA, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca)
    proxy = ConnectProxy()
    with serving(greet, server_context(authority, "localhost")) as port, serving(proxy) as proxy_port:
        via = f"127.0.0.1:{proxy_port}"
        check_greeting(dial_server(config(f"https://localhost:{port}", ca=ca, proxy=via)))
    assert proxy.heads[0].startswith(f"CONNECT localhost:{port} ".encode())


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", HopelessError, "wants a user and password"),
        (b"HTTP/1.1 403 Filtered\x1b[m\r\n\r\n", HopelessError, r"403 Filtered\?\[m"),
        (b"HTTP/1.0 502 Bad Gateway\r\n\r\n", UnreachableError, "502 Bad Gateway"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", HopelessError, "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\n\r\nsurprise", HopelessError, "body"),
        (b"x" * 20000, HopelessError, "more than 16384 bytes"),
    ],
)
def test_a_proxy_that_says_no(answer: bytes, error: type[UnreachableError], says: str) -> None:
    with serving(ConnectProxy(answer)) as proxy_port:
        with pytest.raises(error, match=says) as caught:
            dial_server(config("http://127.0.0.1:1", proxy=f"127.0.0.1:{proxy_port}"))
        assert type(caught.value) is error
        assert str(caught.value).isprintable()


def test_wrong_credentials_are_told_from_missing_ones() -> None:
    with (
        serving(ConnectProxy(b"HTTP/1.1 407 No\r\n\r\n")) as proxy_port,
        pytest.raises(HopelessError, match="wrong user or password") as caught,
    ):
        dial_server(config("http://127.0.0.1:1", proxy=f"u:hunter2@127.0.0.1:{proxy_port}"))
    assert "hunter2" not in str(caught.value)


def test_a_proxy_that_hangs_up_or_is_away() -> None:
    with (
        serving(lambda sock: None) as proxy_port,
        pytest.raises(UnreachableError, match=r"without an answer|reset"),
    ):
        dial_server(config("http://127.0.0.1:1", proxy=f"127.0.0.1:{proxy_port}"))
    port = free_ports(1)[0]
    with pytest.raises(UnreachableError, match=f"cannot connect to proxy 127.0.0.1:{port}"):
        dial_server(config("http://127.0.0.1:1", proxy=f"127.0.0.1:{port}"))


TINYPROXY = shutil.which("tinyproxy")


@contextmanager
def tinyproxy(folder: Path, *extra: str) -> Iterator[int]:
    """The real tinyproxy on a free port; yields it when it answers."""
    port = free_ports(1)[0]
    settings = folder / "tinyproxy.conf"
    lines = [f"Port {port}", "Listen 127.0.0.1", "Timeout 30", "Allow 127.0.0.1", "MaxClients 10", *extra]
    settings.write_text("\n".join(lines) + "\n")
    process = subprocess.Popen(
        [str(TINYPROXY), "-d", "-c", str(settings)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        with gevent.Timeout(DEADLINE):
            while native.socket().connect_ex(("127.0.0.1", port)):
                gevent.sleep(0.02)
        yield port
    finally:
        process.terminate()
        process.wait()


@pytest.mark.skipif(TINYPROXY is None, reason="tinyproxy is not installed")
def test_through_the_real_tinyproxy(tmp_path: Path, authority: trustme.CA) -> None:
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca)
    with tinyproxy(tmp_path, "BasicAuth user secret") as proxy_port:
        with serving(greet) as port:
            environ = {"https_proxy": f"http://user:secret@127.0.0.1:{proxy_port}"}
            check_greeting(dial_server(config(f"http://127.0.0.1:{port}", environ=environ)))
            wrong = f"http://user:wrong@127.0.0.1:{proxy_port}"
            with pytest.raises(HopelessError, match=r"40[17]"):
                dial_server(config(f"http://127.0.0.1:{port}", proxy=wrong))
        with serving(greet, server_context(authority, "localhost")) as port:
            check_greeting(dial_server(config(f"https://localhost:{port}", ca=ca, environ=environ)))


# -- opening --------------------------------------------------------------------

REQUEST = OpenRequest(Kind.HTTP, "tunnel.example:5554", subdomain="app")


def open_with(answer: bytes, close: bool = True, timeout: float = DEADLINE) -> tuple[OpenReply, bytes]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(answer)
        if close:
            theirs.shutdown(native.SHUT_WR)
        return open_tunnel(ours, REQUEST, "subdomain 'app'", timeout=timeout)


def test_a_tunnel_is_opened_and_no_byte_behind_the_head_is_lost() -> None:
    reply = OpenReply("0" * 32, domain="app.example", subdomain="app")
    assert open_with(build_reply(reply) + b"PRI * HTTP/2") == (reply, b"PRI * HTTP/2")


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (
            build_refusal(409, "Subdomain not available"),
            NameTakenError,
            r"'app': Subdomain not available \(409\); ask for another one",
        ),
        (build_refusal(403, "Not you"), RefusedError, "Not you"),
        (build_refusal(503, "Full", retry_after=7), TryLaterError, "Full"),
        (build_refusal(429, "Slowly"), TryLaterError, "Slowly"),
        (build_refusal(500, "Oh"), UnreachableError, "Oh"),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n<html><h1>x</h1>", UnreachableError, "Bad Gateway"),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", RefusedError, "Forbidden"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", WrongDoorError, "connection port"),
        (b"HTTP/1.1 501 No\r\n\r\n", WrongDoorError, r"connection port \(it answered 501\)$"),
        (b"HTTP/1.1 400 No\r\n\r\n<html>", WrongDoorError, r"\(it answered 400\)"),
        (b"HTTP/1.1 200 OK\r\n\r\n", WrongDoorError, "no tunnel server"),
        (b'HTTP/1.1 403 No\r\n\r\n{"message": "Not you", "id": 7}', RefusedError, r": Not you \(403\)"),
        (b"220 smtp.example\r\n\r\n", HopelessError, "no tunnel server"),
        (b"x" * 20000, HopelessError, "no tunnel server"),
        (b"", UnreachableError, "without an answer"),
        (b"HTTP/1.1 101 Swi", UnreachableError, "without an answer"),
    ],
)
def test_what_else_a_server_may_answer(answer: bytes, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        open_with(answer)
    assert type(caught.value) is error
    assert str(caught.value).isprintable()


def refused_with(status: int, authority: str = "x.example:5554", has_token: bool = True) -> str:
    refusal = Refusal(status, "No")
    return str(refusal_error(refusal, Reason("No"), authority, "a name", has_token=has_token))


def test_a_wrong_door_names_the_usual_port() -> None:
    expected = "x:443 is no tunnel server's connection port (it answered 501); the usual port is 5554"
    assert refused_with(501, "x:443") == expected


def test_what_is_to_be_done_depends_on_whether_a_token_was_given() -> None:
    assert "the token was not taken" in refused_with(401)
    assert "no token was given" in refused_with(401, has_token=False)
    assert "for your token" in refused_with(403)
    assert "token" not in refused_with(403, has_token=False)


def test_retry_after_is_passed_on() -> None:
    with pytest.raises(TryLaterError) as caught:
        open_with(build_refusal(503, "Full", retry_after=7))
    assert caught.value.retry_after == 7


def test_a_server_that_never_answers_or_never_ends_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnreachableError, match="did not answer the CONNECT"):
        open_with(b"HTTP/1.1 101", close=False, timeout=0.5)
    monkeypatch.setattr(reasons, "REASON_TIMEOUT", 0.1)
    with pytest.raises(RefusedError, match="half a rea"):
        open_with(b"HTTP/1.1 403 No\r\nContent-Length: 100\r\n\r\nhalf a rea", close=False, timeout=0.5)


# -- the local service ----------------------------------------------------------


def test_tls_to_the_local_service(
    authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for: list[str | None] = []
    context = server_context(authority, "localhost")
    context.sni_callback = lambda _sock, name, _context: asked_for.append(name)
    with serving(greet, context) as port:
        check_greeting(LocalDialer(parse_target(f"https://localhost:{port}")).dial())
        assert asked_for == ["localhost"]
        with pytest.raises(LocalServiceError, match="--verify-target never"):
            LocalDialer(parse_target(f"https://localhost:{port}", "always")).dial()
        ca = tmp_path / "ca.pem"
        authority.cert_pem.write_to_path(ca)
        monkeypatch.setenv("SSL_CERT_FILE", str(ca))
        check_greeting(LocalDialer(parse_target(f"https://localhost:{port}", "always")).dial())


def test_tls_to_a_plain_local_service() -> None:
    with (
        serving(lambda sock: sock.sendall(b"HTTP/1.1 400 Bad\r\n\r\n")) as port,
        pytest.raises(LocalServiceError, match="TLS failed"),
    ):
        LocalDialer(parse_target(f"https://127.0.0.1:{port}")).dial()


def test_a_local_name_is_resolved_once_and_again_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(greet) as port:
        asked: list[str] = []

        def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
            asked.append(host)
            return [(V4, 1, 6, "", ("127.0.0.1", port))]

        monkeypatch.setattr(dial.socket, "getaddrinfo", getaddrinfo)
        dialer = LocalDialer(parse_target(f"web.internal:{port}"))
        for _ in range(3):
            check_greeting(dialer.dial())
        assert asked == ["web.internal"]
    with pytest.raises(LocalServiceError, match=r"web.internal:.*: connection refused"):
        dialer.dial()
    with pytest.raises(LocalServiceError):
        dialer.dial()
    assert len(asked) == 2


def test_a_local_name_that_does_not_exist() -> None:
    with pytest.raises(LocalServiceError, match="cannot resolve"):
        LocalDialer(parse_target("no-such-host.invalid:1")).dial()


def test_a_numeric_local_address_is_never_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        raise AssertionError("resolved")

    with serving(greet) as port:
        monkeypatch.setattr(dial.socket, "getaddrinfo", getaddrinfo)
        check_greeting(LocalDialer(parse_target(f"127.0.0.1:{port}")).dial())
        check_greeting(LocalDialer(parse_target(str(port))).dial())


def test_a_local_service_that_is_silent_is_given_up_in_time() -> None:
    with native.create_server(("127.0.0.1", 0)) as listener:
        dialer = LocalDialer(parse_target(f"https://127.0.0.1:{listener.getsockname()[1]}"), timeout=0.2)
        with pytest.raises(LocalServiceError, match="did not answer within"):
            dialer.dial()


def test_a_unix_socket_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LocalServiceError, match="no such file"):
        LocalDialer(parse_target(f"unix:{tmp_path}/none.sock")).dial()


def test_the_error_page_cannot_be_written_into() -> None:
    page = error_page("<script>alert(1)</script>\r\nX: y", b"GET / HTTP/1.1\r\naccept: text/html\r\n\r\n")
    assert b"Content-Type: text/html" in page
    assert b"<script>" not in page
    assert b"\r\nX: y" not in page
