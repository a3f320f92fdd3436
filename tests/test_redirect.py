"""Plain http is sent to https where HTTP_REDIRECT is on, on hosts of this server only."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from certificates import install, issue
from conftest import OpenTunnel, StartServer, StartService
from framing_corpus import request as head
from hypothesis import given
from hypothesis import strategies as st
from support import answering, connect, echo, read_response, request
from test_entrance import get, visit

from tinytun_gevent import TunnelServer
from tinytun_gevent.errors import MessageError, UsageError
from tinytun_gevent.registry import Registry
from tinytun_gevent.server.config import ServerConfig
from tinytun_gevent.server.redirect import Redirect, secure_port
from tinytun_gevent.wire.http1 import Forwarding, parse_request_head

DIRECT = Forwarding("192.0.2.1", 80)
PROXY = Forwarding("10.0.0.1", 80)


def redirect(**options: object) -> Redirect:
    config = ServerConfig(base_domains="a.org,b.org", **({"tls_dir": "/tls"} | options))  # type: ignore[arg-type]
    return Redirect(config, Registry(config.base_domains), {"10.0.0.1"}.__contains__)


def location(
    target: bytes = b"/",
    *fields: bytes,
    host: bytes = b"demo.a.org",
    direct: Forwarding = DIRECT,
    made: Redirect | None = None,
) -> str | None:
    parsed = parse_request_head(head(b"GET %b HTTP/1.1" % target, *fields, host=host))
    answer = (made or redirect()).answer(parsed, direct)
    assert answer is None or answer.status == 308
    return answer.location if answer is not None else None


@pytest.mark.parametrize(
    ("options", "port"),
    [
        ({"tls_dir": "/tls"}, 5557),
        ({"tls_dir": "/tls", "proxy_tls_port": 443}, 443),
        ({"tls_dir": "/tls", "public_url": "https://{name}.{domain}"}, 443),
        ({"tls_dir": "/tls", "public_url": "https://{name}.{domain}:8443"}, 8443),
        ({"tls_dir": "/tls", "public_url": "http://{name}.{domain}"}, 5557),
        ({"public_url": "HTTPS://{name}.{domain}"}, 443),
    ],
)
def test_the_port_is_that_of_the_urls(options: dict[str, str], port: int) -> None:
    assert secure_port(ServerConfig(**options)) == port  # type: ignore[arg-type]


def test_host_path_and_query_are_kept_and_443_is_left_out() -> None:
    assert location(b"/a%20b/?q=1&r=//x") == "https://demo.a.org:5557/a%20b/?q=1&r=//x"
    assert location(host=b"DEMO.B.ORG.:80", made=redirect(proxy_tls_port=443)) == "https://demo.b.org/"
    assert location(b"//evil.test/", host=b"a.org") == "https://a.org:5557//evil.test/"
    assert location(b"http://demo.a.org/x", host=b"evil.test") == "https://demo.a.org:5557/x"


@pytest.mark.parametrize("host", [b"evil.test", b"a.org.evil.test", b"x.demo.a.org", b"-.a.org", b"[::1]"])
def test_a_host_that_is_not_ours_is_not_redirected(host: bytes) -> None:
    assert location(host=host) is None


def test_what_is_by_https_already_or_must_stay_with_http() -> None:
    assert location(b"/.well-known/acme-challenge/token") is None
    assert location(b"/.well-known/acme-challenges") is not None
    assert location(direct=Forwarding("192.0.2.1", 5557, "https")) is None
    assert location(direct=Forwarding("192.0.2.1", 5557)) is None  # by a PROXY header


def test_only_a_trusted_proxy_is_believed_about_the_scheme() -> None:
    assert location(b"/", b"X-Forwarded-Proto: https") is not None
    assert location(b"/", b"X-Forwarded-Proto: https", direct=PROXY) is None
    assert location(b"/", b"X-Forwarded-Proto: http", direct=PROXY, host=b"a.org:5557") is not None
    assert location(b"/", b"Forwarded: for=192.0.2.1;proto=https", direct=PROXY) is None


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_it_leads_to_hosts_of_ours_whatever_is_sent(target: bytes, host: bytes) -> None:
    try:
        url = location(b"/" + target, host=host)
    except MessageError:
        return
    if url is not None:
        assert urlsplit(url).hostname in ("a.org", "b.org") or url.split("/")[2].endswith(
            (".a.org:5557", ".b.org:5557")
        )
        assert re.fullmatch("[!-~]+", url)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "needs TLS_DIR, or a PUBLIC_URL"),
        (
            {"public_url": "http://{name}.{domain}", "trusted_proxies": "10.0.0.1"},
            "needs TLS_DIR, or a PUBLIC_URL",
        ),
        ({"public_url": "https://{name}.{domain}"}, "needs TRUSTED_PROXIES"),
    ],
)
def test_a_redirect_that_leads_nowhere_or_in_a_circle_is_refused(
    options: dict[str, str], reason: str
) -> None:
    with pytest.raises(UsageError, match=f"HTTP_REDIRECT=on: .*{reason}"):
        ServerConfig(http_redirect="on", **options)  # type: ignore[arg-type]


def test_over_sockets(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel, tmp_path: Path
) -> None:
    install(tmp_path, issue("demo.localhost"))
    server: TunnelServer = start_server(tls_dir=str(tmp_path), proxy_tls_port=0, http_redirect="on")
    open_tunnel(start_service(answering(echo)), server=server)
    secure = server.core.config.proxy_tls_port
    with connect(server.proxy_port) as sock:
        for method in (b"GET", b"HEAD"):
            sock.sendall(request("demo", "/a?b", method=method))
            answer = read_response(sock, method)
            assert answer.status == 308
            assert answer.get(b"location") == f"https://demo.localhost:{secure}/a?b".encode()
            assert answer.get(b"connection") is None
        assert not answer.body
        sock.sendall(request("demo", "/.well-known/acme-challenge/x"))
        assert read_response(sock).status == 200
        sock.sendall(request("demo", "/", method=b"POST", body=b"x" * 10))
        answer = read_response(sock)
        assert json.loads(answer.body)["status"] == answer.status == 308
    with visit(secure) as tls:
        assert get(tls).status == 200
