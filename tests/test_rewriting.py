"""Rewriting: what becomes the service's, what becomes public, and what stays as it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.wire.fields import Fields
from tinytun_gevent.wire.forwarded import Forwarding
from tinytun_gevent.wire.options import Options, Rewrite
from tinytun_gevent.wire.origin import Origin, parse_origin
from tinytun_gevent.wire.request import RequestHead, build_request_head, parse_request_head
from tinytun_gevent.wire.rewriting import Links, Rewriting, rewriting_of

PUBLIC = "https://app.example.com"


def origin(text: str) -> Origin:
    found = parse_origin(text.encode())
    assert found is not None
    return found


def asked(host: str = "app.example.com", *fields: bytes) -> RequestHead:
    return parse_request_head(b"\r\n".join((b"GET / HTTP/1.1", b"Host: " + host.encode(), *fields, b"", b"")))


def rewriting(target: str = "http://localhost:3000", published: str | None = PUBLIC) -> Rewriting:
    made = rewriting_of(Options(rewrite=Rewrite(target)), published)
    assert made is not None
    return made


def sent(
    value: str, name: str = "Origin", host: str = "app.example.com", proto: str = "https", **kwargs: str
) -> str:
    """What the service gets as ``name`` of a request for ``host`` by ``proto``."""
    fields, _ = rewriting(**kwargs).request(
        asked(host, f"{name}: {value}".encode()), Forwarding("192.0.2.1", 443, proto)
    )
    return dict(fields)[name.encode()].decode()


def links(
    target: str = "http://localhost:3000", public: str = PUBLIC, published: str | None = PUBLIC
) -> Links:
    return Links(origin(target), origin(public), None if published is None else origin(published))


def answered(name: str, value: str, **kwargs: str) -> str:
    """What the visitor gets as ``name`` of an answer."""
    ((_, got),) = links(**kwargs).fields([(name.encode(), value.encode())])
    return got.decode()


# -- requests -----------------------------------------------------------------


def test_nothing_asked_for_is_nothing_made() -> None:
    assert rewriting_of(None, PUBLIC) is None
    assert rewriting_of(Options(), PUBLIC) is None


@pytest.mark.parametrize("name", ["Origin", "origin", "ORIGIN"])
def test_the_tunnels_own_origin_becomes_the_services(name: str) -> None:
    assert sent(PUBLIC, name) == "http://localhost:3000"


@pytest.mark.parametrize(
    ("value", "host"),
    [
        ("HTTPS://App.Example.COM", "app.example.com"),
        ("https://app.example.com:443", "app.example.com"),
        ("https://app.example.com", "app.example.com:443"),
        ("https://app.example.com.", "app.example.com"),
        ("https://app.example.com", "APP.example.com."),
        ("https://app.example.com:8443 ", "app.example.com:8443"),
    ],
)
def test_spellings_of_the_own_origin_are_recognised(value: str, host: str) -> None:
    assert sent(value, host=host, published="") == "http://localhost:3000"


@pytest.mark.parametrize(
    "value",
    [
        *("null", "https://evil.test", "https://app.example.com.evil.test", "https://other.example.com"),
        *("http://app.example.com", "https://app.example.com:8443", "https://app.example.com/"),
        *("https://example.com", "https://app.example.com, https://evil.test", "https://a@app.example.com"),
        *("app.example.com", "//app.example.com", "https://", "x"),
    ],
)
def test_any_other_origin_stays(value: str) -> None:
    assert sent(value) == value


def test_a_referer_keeps_its_path() -> None:
    for rest in ("", "/", "/a/b?c=https://app.example.com/#d", "?x"):
        assert sent(PUBLIC + rest, "Referer") == "http://localhost:3000" + rest
    for other in (
        "https://evil.test/https://app.example.com/",
        "https://app.example.com@evil.test/",
        "/a",
        "//x",
    ):
        assert sent(other, "Referer") == other


def test_the_published_origin_counts_where_tls_ends_in_front_unseen() -> None:
    assert sent(PUBLIC, proto="http") == "http://localhost:3000"
    assert sent(PUBLIC, proto="http", published="https://app.example.com/") == "http://localhost:3000"
    assert sent("http://app.example.com", proto="http") == "http://localhost:3000"


def test_a_published_origin_without_tls_does_not_count_for_visitors_with() -> None:
    """Whoever is on the way can write pages of ``http://``: they must not act as those of ``https://``."""
    plain = "http://app.example.com"
    assert sent(plain, proto="https", published=plain) == plain


def test_other_fields_and_the_original_head_are_left_alone() -> None:
    head = asked("app.example.com", b"Origin: https://app.example.com", b"X-Url: https://app.example.com")
    before = list(head.fields)
    got, _ = rewriting().request(head, Forwarding("192.0.2.1", 443, "https"))
    assert head.fields == before
    assert got == [(b"Origin", b"http://localhost:3000"), (b"X-Url", b"https://app.example.com")]


def test_the_host_that_a_trusted_proxy_names_is_the_public_one() -> None:
    forwarding = Forwarding("192.0.2.1", 443, "https", b"shop.example")
    got, _ = rewriting().request(asked("inner", b"Origin: https://shop.example"), forwarding)
    assert dict(got)[b"Origin"] == b"http://localhost:3000"


def test_what_is_not_asked_for_is_not_rewritten() -> None:
    made = rewriting_of(Options(rewrite=Rewrite("http://localhost:1", requests=False)), PUBLIC)
    assert made is not None
    head = asked("app.example.com", b"Origin: https://app.example.com")
    forwarding = Forwarding("192.0.2.1", 443, "https")
    assert made.request(head, forwarding) == (head.fields, forwarding)
    assert made.links(head, forwarding) is not None
    made = rewriting_of(Options(rewrite=Rewrite("http://localhost:1", links=False)), PUBLIC)
    assert made is not None
    assert made.links(head, forwarding) is None


def test_the_public_address_is_told_unless_it_is_not_to_be() -> None:
    head, forwarding = asked(), Forwarding("192.0.2.1", 443, "https")
    made = rewriting_of(Options(forwarded_host=False), PUBLIC)
    assert made is not None
    assert made.links(head, forwarding) is None
    names = {
        line.partition(b":")[0]
        for line in build_request_head(head, made.request(head, forwarding)[1]).split(b"\r\n")
        if line.startswith(b"X-")
    }
    assert names == {b"X-Forwarded-For"}
    assert b"X-Forwarded-Host: app.example.com\r\n" in build_request_head(head, forwarding)


# -- answers ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Location", "content-location"])
@pytest.mark.parametrize("rest", ["", "/", "/a?b=c#d", "?a", "#a"])
@pytest.mark.parametrize("url", ["http://localhost:3000", "https://localhost:3000", "HTTP://LocalHost.:3000"])
def test_links_to_the_service_become_public(name: str, url: str, rest: str) -> None:
    assert answered(name, url + rest) == PUBLIC + rest


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "[0:0:0:0:0:0:0:1]", "0.0.0.0"])
@pytest.mark.parametrize("target", ["http://localhost:3000", "http://127.0.0.1:3000", "http://[::1]:3000"])
def test_a_local_service_may_call_itself_by_any_name_of_this_computer(host: str, target: str) -> None:
    assert answered("Location", f"http://{host}:3000/x", target=target) == PUBLIC + "/x"


def test_links_by_the_scheme_that_the_visitor_came_by() -> None:
    plain = "http://app.example.com:5555"
    assert answered("Location", "http://localhost:3000/", public=plain) == plain + "/"
    assert answered("Location", "//localhost:3000/x") == "//app.example.com/x"
    assert answered("Location", "//localhost:3000/x", public=plain) == "//app.example.com:5555/x"


def test_a_redirect_to_https_leads_there_and_not_back() -> None:
    plain = "http://app.example.com"
    assert answered("Location", "https://localhost:3000/", public=plain) == PUBLIC + "/"
    assert answered("Location", "https://localhost:3000/", public=plain, published=plain) == plain + "/"
    other = "https://app.other.example"
    assert answered("Location", "https://localhost:3000/", public=other) == other + "/"


def test_a_service_on_its_schemes_port_is_known_by_both() -> None:
    for url in (
        "http://localhost/a",
        "https://localhost/a",
        "http://localhost:443/a",
        "http://localhost:80/a",
    ):
        assert answered("Location", url, target="http://localhost") == PUBLIC + "/a"


@pytest.mark.parametrize(
    "value",
    [
        *(
            "/",
            "/login",
            "a/b",
            "?x",
            "",
            "https://evil.test/",
            "http://localhost/",
            "http://localhost:3001/",
        ),
        *("http://localhost:3000.evil.test/", "http://localhost:3000@evil.test/", "http://a@localhost:3000/"),
        *("ftp://localhost:3000/", "http:/localhost:3000/", "https://app.example.com/", "//evil.test/"),
        *("/?next=http://localhost:3000/", "http://sub.localhost:3000/", "javascript:alert(1)", "http://"),
    ],
)
def test_other_links_stay(value: str) -> None:
    assert answered("Location", value) == value
    assert answered("X-Link", "http://localhost:3000/") == "http://localhost:3000/"


def test_another_host_is_known_by_its_own_name_only() -> None:
    assert answered("Location", "http://127.0.0.1:8080/", target="http://shop.test:8080") != PUBLIC + "/"
    assert answered("Location", "http://SHOP.test:8080/", target="http://shop.test:8080") == PUBLIC + "/"


def test_a_backslash_ends_the_host_as_it_does_for_browsers() -> None:
    assert answered("Location", "http://localhost:3000\\@evil.test/") == PUBLIC + "\\@evil.test/"
    assert answered("Location", "http://evil.test\\@localhost:3000/") == "http://evil.test\\@localhost:3000/"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0;url=http://localhost:3000/x", f"0;url={PUBLIC}/x"),
        ("5; URL='http://localhost:3000/x'", f"5; URL='{PUBLIC}/x'"),
        ('5; url = "http://127.0.0.1:3000"', f'5; url = "{PUBLIC}"'),
        ("5", "5"),
        ("5; url=/x", "5; url=/x"),
        ("5; url=https://evil.test/?url=http://localhost:3000/", None),
    ],
)
def test_refresh(value: str, expected: str | None) -> None:
    assert answered("Refresh", value) == (expected or value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a=1; Domain=localhost; Path=/", "a=1; Path=/"),
        ("a=1; path=/; DOMAIN = .LocalHost", "a=1; path=/"),
        ("a=1;domain=127.0.0.1;Secure", "a=1;Secure"),
        ("a=1; Domain=localhost; Domain=localhost; HttpOnly", "a=1; HttpOnly"),
        ("a=1", "a=1"),
        ("a=domain=localhost; Path=/", "a=domain=localhost; Path=/"),
        ("domain=localhost; Path=/", "domain=localhost; Path=/"),
        ("a=1; Domain=example.com", "a=1; Domain=example.com"),
        ("a=1; Domain=evil.test", "a=1; Domain=evil.test"),
        ("a=1; Domain=", "a=1; Domain="),
        ("a=1; Domain", "a=1; Domain"),
        ("a=1; Path=/domain=localhost", "a=1; Path=/domain=localhost"),
    ],
)
def test_cookies(value: str, expected: str) -> None:
    assert answered("Set-Cookie", value) == expected


def test_a_cookie_of_the_services_parent_domain_is_kept_only_where_it_is_the_publics_too() -> None:
    target = "https://a.shop.test"
    assert answered("Set-Cookie", "a=1; Domain=.shop.test", target=target) == "a=1"
    public = "https://b.shop.test"
    kept = "a=1; Domain=.shop.test"
    assert answered("Set-Cookie", kept, target=target, public=public) == kept
    assert answered("Set-Cookie", "a=1; Domain=hop.test", target=target) == "a=1; Domain=hop.test"


def test_fields_keep_their_order_and_number() -> None:
    fields: Fields = [(b"Set-Cookie", b"a=1; Domain=localhost"), (b"X", b"1"), (b"Set-Cookie", b"b=2")]
    assert links().fields(fields) == [(b"Set-Cookie", b"a=1"), (b"X", b"1"), (b"Set-Cookie", b"b=2")]


values = st.one_of(
    st.binary(max_size=60),
    st.lists(
        st.sampled_from(
            (
                *(
                    b"http:",
                    b"https:",
                    b"//",
                    b"/",
                    b"\\",
                    b"localhost",
                    b":3000",
                    b"app.example.com",
                    b"@",
                    b"?",
                ),
                *(b"#", b"[::1]", b"127.0.0.1", b"; Domain=", b"url=", b"'", b" ", b";", b"evil.test", b"."),
            )
        ),
        max_size=8,
    ).map(b"".join),
)


@given(values)
def test_an_answer_never_leads_elsewhere_than_it_did_or_to_the_public_origin(value: bytes) -> None:
    rewritten = links().link(value)
    if rewritten != value:
        rest = rewritten.removeprefix(PUBLIC.encode()) if b":" in rewritten[:6] else rewritten[17:]
        assert rest[:1] in (b"", b"/", b"?", b"#", b"\\", b"'")
        assert value.endswith(rest)
    for rewrite in (links().refresh, links().cookie):
        assert b"\r" not in rewrite(value.replace(b"\r", b"").replace(b"\n", b""))


@given(values)
def test_a_foreign_origin_is_never_made_the_services(value: bytes) -> None:
    head = asked()
    head.fields = [(b"Origin", value), (b"Referer", value)]
    got, _ = rewriting().request(head, Forwarding("192.0.2.1", 443, "https"))
    (_, sent_origin), (_, sent_referer) = got
    if sent_origin != value:
        assert parse_origin(value.rstrip(b" \t")) == origin(PUBLIC)
    if sent_referer != value:
        assert value.lower().startswith(b"https://app.example.com")
