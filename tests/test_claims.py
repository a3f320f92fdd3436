"""The table of fields that say who a visitor is: none of them arrives from a visitor, in any spelling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import OpenTunnel, StartServer, StartService
from framing_corpus import request
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Request as Got
from support import answering, connect, eventually, read_response, respond
from support import request as visitor_s
from test_peers import FakePeer, has

from tinytun_gevent import TunnelServer
from tinytun_gevent.errors import MessageError, UsageError
from tinytun_gevent.server.config import ServerConfig
from tinytun_gevent.wire.claims import (
    HONEST,
    OWN,
    TABLE,
    TrustedFields,
    canonical,
    check_trusted,
    is_claim,
)
from tinytun_gevent.wire.http1 import Forwarding, build_request_head, parse_request_head

SECURITY = Path(__file__).resolve().parent.parent / "SECURITY.md"
NAMES = [name for row in TABLE for name in row.names]
PARTING = "!#$%&'*+-.^_`|~"
"""What a field name may have beside letters and digits (RFC 9110 section 5.6.2)."""


# -- the table -----------------------------------------------------------------------------------


def test_the_table_is_that_of_the_promise() -> None:
    lines = SECURITY.read_text("utf-8").splitlines()
    expected = [f"| {row.source} | {', '.join(f'`{name}`' for name in row.names)} |" for row in TABLE]
    at = lines.index("| Set or believed by | Fields |") + 2
    assert lines[at : at + len(expected)] == expected
    assert not lines[at + len(expected)]
    assert all(f"`{name}`" in SECURITY.read_text("utf-8") for name in (*HONEST, *OWN))


def test_no_row_repeats_another() -> None:
    assert len(set(map(str.lower, NAMES))) == len(NAMES)
    assert len({row.source for row in TABLE}) == len(TABLE)
    beginnings = [name[:-1].lower() for name in NAMES if name.endswith("*")]
    for name in NAMES:
        covering = [start for start in beginnings if name.lower().startswith(start)]
        assert covering == ([name[:-1].lower()] if name.endswith("*") else [])
    assert all(is_claim(name.rstrip("*").encode()) for name in OWN)


HONEST_REQUESTS = {
    "browsers": """Accept Accept-Charset Accept-Encoding Accept-Language Authorization Cache-Control
        Content-Type Cookie DNT Expect From If-Match If-Modified-Since If-None-Match If-Range
        Last-Event-ID Origin Pragma Priority Purpose Range Referer Save-Data Sec-CH-UA Sec-CH-UA-Mobile
        Sec-CH-UA-Platform Sec-Fetch-Dest Sec-Fetch-Mode Sec-Fetch-Site Sec-Fetch-User Sec-GPC Sec-Purpose
        Sec-WebSocket-Extensions Sec-WebSocket-Key Sec-WebSocket-Protocol Sec-WebSocket-Version
        Upgrade-Insecure-Requests User-Agent X-Client-Data X-Requested-With""",
    "applications' own clients": """API-Key ApiKey Idempotency-Key HX-Request HX-Target
        Next-Router-State-Tree Next-Router-Prefetch RSC Turbo-Frame X-API-Key X-Access-Token X-Auth-Key
        X-Auth-Token X-CSRF-Token X-CSRFToken X-Client-Info X-Client-Version X-HTTP-Method-Override
        X-Inertia X-Method-Override X-Middleware-Prefetch X-Nextjs-Data X-Tenant-ID X-User-Agent
        X-User-Email X-User-Id X-XSRF-Token X-Hasura-Role X-Hasura-User-Id X-Scope-OrgID Impersonate-User
        Apollo-Require-Preflight ngrok-skip-browser-warning Bypass-Tunnel-Reminder X-Upload-Content-Length
        Tus-Resumable Upload-Offset X-Amz-Date X-Amz-Content-Sha256 X-Ms-Date X-Ms-Version
        X-Ms-Client-Request-Id X-Goog-Api-Key X-Firebase-AppCheck X-Forwarder SSLKey Remote XForwardedFor""",
    "tracing": """B3 Baggage CDN-Loop Sentry-Trace Traceparent Tracestate Via X-Amzn-Trace-Id X-B3-TraceId
        X-B3-SpanId X-Cloud-Trace-Context X-Correlation-Id X-Datadog-Trace-Id X-Request-Id X-Request-Start""",
    "GitHub, GitLab, Bitbucket": """X-GitHub-Delivery X-GitHub-Event X-GitHub-Hook-ID
        X-GitHub-Hook-Installation-Target-ID X-Hub-Signature X-Hub-Signature-256 X-Gitlab-Event
        X-Gitlab-Token X-Gitlab-Instance X-Event-Key X-Hook-UUID X-Attempt-Number X-Request-UUID""",
    "Stripe, Slack, Twilio, Shopify, PayPal": """Stripe-Signature X-Slack-Signature
        X-Slack-Request-Timestamp X-Slack-Retry-Num X-Slack-Retry-Reason X-Twilio-Signature
        I-Twilio-Idempotency-Token X-Home-Region X-Shopify-Hmac-Sha256 X-Shopify-Shop-Domain
        X-Shopify-Topic PAYPAL-AUTH-ALGO PAYPAL-CERT-URL PAYPAL-TRANSMISSION-ID PAYPAL-TRANSMISSION-SIG
        X-Square-HmacSha256-Signature""",
    "other webhooks": """Webhook-Id Webhook-Signature Webhook-Timestamp Svix-Id Svix-Signature
        X-Signature-Ed25519 X-Signature-Timestamp X-Telegram-Bot-Api-Secret-Token X-Zm-Signature
        X-Line-Signature Linear-Signature X-Webhook-Signature X-Netlify-Event X-Vercel-Signature
        Tailscale-Webhook-Signature CF-Webhook-Auth X-Amz-Sns-Message-Type X-Amz-Sns-Topic-Arn
        X-Goog-Channel-ID X-Goog-Resource-State X-Goog-Signature X-CloudTasks-QueueName X-CloudScheduler
        Ce-Id Ce-Source Ce-Type Aeg-Event-Type Aeg-Sas-Token WebHook-Request-Origin Sentry-Hook-Resource
        X-MS-Signature""",
}


@pytest.mark.parametrize("sender", HONEST_REQUESTS)
def test_what_honest_visitors_send_is_passed_on(sender: str) -> None:
    names = HONEST_REQUESTS[sender].split()
    lines = [f"{name}: 100-continue" for name in names]
    head = parse_request_head(request(b"GET / HTTP/1.1", *(line.encode() for line in lines)))
    assert [name.decode() for name, _ in head.fields] == names
    assert head.claims == []


# -- spellings -----------------------------------------------------------------------------------


@st.composite
def spellings_of(draw: st.DrawFn) -> list[bytes]:
    """A name of the table in some spellings: case, what parts its words, and what its ``*`` stands for."""
    name = draw(st.sampled_from(NAMES))
    if name.endswith("*"):
        name = name[:-1] + draw(st.sampled_from(["", "user", "id-token", "-", "x-y", "A" * 60]))
    parting = draw(st.sampled_from(PARTING))
    changed = draw(st.lists(st.integers(0, 2 ** len(name) - 1), min_size=1, max_size=3))
    return [
        "".join(
            char if char.isdigit() or not bits >> at & 1 else char.swapcase() if char.isalpha() else parting
            for at, char in enumerate(name)
        ).encode()
        for bits in changed
    ]


@given(spellings_of(), st.booleans())
@settings(max_examples=300, deadline=None)  # a busy machine is no failure
def test_no_spelling_of_a_name_of_the_table_is_passed_on(spellings: list[bytes], in_connection: bool) -> None:
    """Whatever its case, whatever parts its words, several times, named in Connection or not."""
    named = [b"Connection: " + spellings[-1]] if in_connection else []
    lines = [name + b": 203.0.113.9" for name in spellings]
    head = parse_request_head(request(b"GET / HTTP/1.1", *named, b"X-Own: 1", *lines))
    assert head.fields == [(b"X-Own", b"1")]
    assert [name for name, _ in head.claims] == spellings
    built = build_request_head(head, Forwarding("192.0.2.7", 5555))
    assert b"203.0.113.9" not in built
    assert built.count(b"X-Forwarded-For: 192.0.2.7\r\n") == 1


@given(st.text(st.sampled_from("aAzZ09" + PARTING), min_size=1, max_size=60).map(str.encode))
@settings(deadline=None)
def test_the_answer_depends_on_the_canonical_name_alone(name: bytes) -> None:
    assert is_claim(name) == is_claim(canonical(name)) == is_claim(name.swapcase())
    assert canonical(canonical(name)) == canonical(name)
    assert len(canonical(name)) == len(name)


@given(st.lists(st.sampled_from([name.rstrip("*") + "x" for name in NAMES] + NAMES + ["X-Own", "Accept"])))
@settings(deadline=None)
def test_the_removal_leaves_nothing_to_remove(names: list[str]) -> None:
    lines = [f"{name}: x".encode() for name in names if name[-1] != "*"]
    once = parse_request_head(request(b"GET / HTTP/1.1", *lines))
    again = parse_request_head(request(b"GET / HTTP/1.1", *(b": ".join(pair) for pair in once.fields)))
    assert (again.fields, again.claims) == (once.fields, [])


@pytest.mark.parametrize("field", [b"Content.Length: 5", b"content_length: 5", b"Transfer~Encoding: chunked"])
def test_a_field_that_a_program_may_take_for_the_framing_is_refused(field: bytes) -> None:
    with pytest.raises(MessageError):
        parse_request_head(request(b"POST / HTTP/1.1", field))


# -- what trusted proxies may set ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("trusted", "sent", "kept"),
    [
        ("X-Auth-Request-*", b"x-auth-request-user", True),
        ("X-Auth-Request-*", b"X-Auth-Request-Preferred-Username", True),
        ("X-Auth-Request-*", b"X-Auth-Request-Preferred_Username", False),
        ("X-Auth-Request-*", b"X_Auth_Request_User", False),
        ("X-Auth-Request-User", b"X-AUTH-REQUEST-USER", True),
        ("X-Auth-Request-User", b"X-Auth-Request-User-2", False),
        ("X-Auth-Request-User", b"X-Auth-Request_User", False),
        ("remote-*", b"Remote-User", True),
        ("remote-*", b"X-Remote-User", False),
        ("OIDC_CLAIM_*", b"OIDC_CLAIM_given_name", True),
        ("OIDC_CLAIM_*", b"OIDC-CLAIM-given-name", False),
        ("SM_USER", b"SM_USER", True),
        ("$WS*", b"$WSCC", True),
        ("X-Forwarded-*", b"X-Forwarded-User", True),
        ("X-Forwarded-*", b"X-Forwarded-For", False),
        ("X-Real-IP", b"x-real-ip", True),
    ],
)
def test_a_trusted_field_is_kept_as_it_is_named(trusted: str, sent: bytes, kept: bool) -> None:
    check_trusted(trusted)
    pair = (sent, b"alice")
    assert TrustedFields(["Proxy", trusted]).kept([(b"CF-Ray", b"1"), pair]) == ([pair] if kept else [])
    assert TrustedFields([]).kept([pair]) == []


@given(spellings_of())
@settings(deadline=None)
def test_what_the_server_writes_itself_is_kept_from_nobody(spellings: list[bytes]) -> None:
    everything = TrustedFields([name for name in NAMES if name != "X-Tinytun-*"])
    for name, _ in everything.kept([(name, b"x") for name in spellings]):
        assert canonical(name) not in {canonical(own.encode()) for own in OWN}
        assert not canonical(name).startswith(b"x-tinytun-")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("X-My-User", "which any visitor may send"),
        ("*", "not '*'"),
        ("X-Auth-*", "which any visitor may send"),
        ("CF-Webhook-Auth", "which any visitor may send"),
        ("X-Forwarded-For", "which this server writes itself"),
        ("x_forwarded_host", "which this server writes itself"),
        ("X-Tinytun-Hop", "which this server writes itself"),
        ("X-Tinytun-*", "which this server writes itself"),
        ("X-Auth-Request User", "not 'X-Auth-Request User'"),
        ("X-Auth-*-User", "not 'X-Auth-*-User'"),
        ("X-Réal-IP", "not 'X-Réal-IP'"),
        ("X-Auth-Request-" + "u" * 100, "not 'X-Auth-Request-u"),
    ],
)
def test_trusted_fields_are_checked_at_the_start(name: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        ServerConfig(trusted_proxies="127.0.0.1", trusted_fields=f"Remote-User, {name}")  # type: ignore[arg-type]
    assert str(caught.value).startswith("TRUSTED_FIELDS=Remote-User, ")
    assert "SECURITY.md lists" in str(caught.value)
    assert said in str(caught.value)


def test_trusted_fields_need_somebody_who_is_trusted() -> None:
    with pytest.raises(UsageError, match=r"TRUSTED_FIELDS: .*TRUSTED_PROXIES"):
        ServerConfig(trusted_fields="Remote-User")  # type: ignore[arg-type]
    assert ServerConfig(peers="127.0.0.1", trusted_fields="Remote-User")  # type: ignore[arg-type]
    fields = ServerConfig(trusted_proxies="127.0.0.1", trusted_fields="Remote-User,x-ssl-*, remote-user")  # type: ignore[arg-type]
    assert fields.trusted_fields == ("remote-user", "x-ssl-*")


# -- through the real edge -----------------------------------------------------------------------


def echo(got: Got) -> bytes:
    """Answers with the names and values of the fields that came."""
    return respond(json.dumps([[name.decode(), value.decode()] for name, value in got.fields]).encode())


def told(server: TunnelServer, *fields: bytes) -> list[tuple[str, str]]:
    """What the service is told when a visitor sends ``fields``, but for what every request has."""
    with connect(server.proxy_port) as sock:
        sock.sendall(visitor_s("demo", "/", *fields))
        pairs = json.loads(read_response(sock).body)
    return [(name, value) for name, value in pairs if name.lower() not in ("host", "accept")]


FORWARDED = ["X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Forwarded-Port"]
CLAIMED = (
    b"X-Auth-Request-User: eve",
    b"X_Auth_Request.User: eve",
    b"Remote-User: eve",
    b"SCRIPT_NAME: /eve",
)


def test_no_claim_of_a_visitor_reaches_the_service(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    open_tunnel(start_service(answering(echo)))
    for fields in (CLAIMED, (*CLAIMED, b"X-Padding: " + b"x" * 4000)):  # remembered, and too long for that
        seen = told(server, *fields, b"Connection: X-Auth-Request-User")
        assert [name for name, _ in seen if name != "X-Padding"] == FORWARDED
        assert not any("eve" in value for _, value in seen)


@pytest.mark.parametrize(
    ("trusted", "kept"),
    [
        ("", []),
        ("X-Auth-Request-*", [("X-Auth-Request-User", "eve")]),
        ("X-Auth-Request-*,Remote-User", [("X-Auth-Request-User", "eve"), ("Remote-User", "eve")]),
    ],
)
def test_a_trusted_proxy_sets_what_is_named_and_nothing_else(
    start_server: StartServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
    trusted: str,
    kept: list[tuple[str, str]],
) -> None:
    server = start_server(trusted_proxies="127.0.0.1", trusted_fields=trusted)
    open_tunnel(start_service(answering(echo)), server=server)
    for _ in range(2):  # the second time they are remembered
        seen = told(server, *CLAIMED, b"X-Forwarded-For: 192.0.2.7", b"Connection: X-Auth-Request-User")
        assert [pair for pair in seen if pair[0] not in FORWARDED] == kept
        assert [name for name, _ in seen if name in FORWARDED] == FORWARDED
        assert ("X-Forwarded-For", "192.0.2.7") in seen


def test_trusted_fields_are_nobody_else_s(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    server = start_server(trusted_proxies="192.0.2.1", trusted_fields="X-Auth-Request-*")
    open_tunnel(start_service(answering(echo)), server=server)
    assert [name for name, _ in told(server, *CLAIMED)] == FORWARDED
    with connect(server.proxy_port) as sock:  # what a proxy said goes for its own connections only
        sock.sendall(visitor_s("demo", "/", *CLAIMED))
        assert b"eve" not in read_response(sock).body


def test_what_one_server_has_added_passes_through_the_next(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """A request of a peer server: what it says of the visitor counts, and what its proxy set is kept."""
    peer = FakePeer(has("elsewhere"))
    server = start_server(peers=f"127.0.0.1:{peer.port}", trusted_fields="X-Auth-Request-*")
    eventually(lambda: server.core.peers.is_peer("127.0.0.1"))
    open_tunnel(start_service(answering(echo)), server=server)
    seen = dict(
        told(
            server,
            *(b"X-Auth-Request-User: alice", b"X-Forwarded-For: 192.0.2.7", b"X-Forwarded-Proto: https"),
            *(b"X-Forwarded-Host: demo.localhost", b"X-Forwarded-Port: 443", b"X-Tinytun-Hop: 1"),
        )
    )
    peer.close()
    assert seen == {
        "X-Auth-Request-User": "alice",
        **dict(zip(FORWARDED, ("192.0.2.7", "https", "demo.localhost", "443"), strict=True)),
    }
