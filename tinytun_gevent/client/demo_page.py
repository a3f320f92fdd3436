"""The page that ``tinytun demo`` serves, by a web server of fifty lines.

It answers what a browser or curl asks for, and is reached through the tunnel's server only.
"""

from __future__ import annotations

import html

from gevent import socket

from .dial import read_head

#: Bytes of a request head that the page's server reads.
MAX_HEAD = 16384


def serve_page(sock: socket.socket) -> None:
    """Answer the requests on one connection, each with the page; closes the socket."""
    with sock:
        try:
            while answer := _answer(read_head(sock, MAX_HEAD)):
                sock.sendall(answer)
                if b"\r\nConnection: close\r\n" in answer:
                    return
        except (OSError, EOFError, ValueError):
            return


def _answer(received: tuple[bytes, bytes]) -> bytes:
    """The response to one request; the connection ends where a body would have to be read."""
    head, rest = received
    lines = head.decode("latin-1").split("\r\n")
    method, _, target = lines[0].rpartition(" ")[0].partition(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    has_body = bool(rest) or "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
    found = target.partition("?")[0] == "/"
    body = page(method, target, headers).encode()
    response = [
        "HTTP/1.1 200 OK" if found else "HTTP/1.1 404 Not Found",
        "Content-Type: text/html; charset=utf-8",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        *(["Connection: close"] if has_body or headers.get("connection", "").lower() == "close" else []),
    ]
    return "\r\n".join([*response, "", ""]).encode("latin-1") + (b"" if method == "HEAD" else body)


#: The fields of a request that the page shows, and what it calls them.
_SHOWN = {
    "host": "host",
    "x-forwarded-for": "visitor",
    "x-forwarded-proto": "scheme",
    "user-agent": "browser",
}


def page(method: str, target: str, headers: dict[str, str]) -> str:
    """The page: what the service behind the tunnel saw of this very request."""
    rows = [("request", f"{method} {target}")]
    rows += [(label, headers[name]) for name, label in _SHOWN.items() if name in headers]
    cells = "".join(f"<dt>{html.escape(a)}<dd>{html.escape(b[:300])}" for a, b in rows)
    return _PAGE.replace("ROWS", cells)


_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,">
<title>tinytun demo</title>
<style>
:root { --ink: #1d2733; --soft: #5d6b7a; --paper: #f6f7f9; --card: #fff; --line: #dfe4ea; --blue: #1769e0 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ebf1; --soft: #93a1b0; --paper: #10151b; --card: #18202a; --line: #2a3542;
    --blue: #6aa7ff }
}
* { box-sizing: border-box }
body { margin: 0; font: 1.05rem/1.6 system-ui, sans-serif; color: var(--ink); background: var(--paper) }
main { max-width: 42rem; margin: 0 auto; padding: 12vh 1.5rem 4rem }
h1 { font-size: clamp(1.8rem, 6vw, 2.7rem); line-height: 1.15; letter-spacing: -.02em; margin: 0 0 .6em }
p { margin: 0 0 1em; color: var(--soft) }
.path { display: flex; align-items: center; gap: .6rem; margin: 2rem 0; font-size: .95rem }
.path b { padding: .5rem .8rem; border: 1px solid var(--line); border-radius: .6rem; background: var(--card);
  font-weight: 500; white-space: nowrap }
.path i { flex: 1; height: 2px; min-width: 1rem; background:
  repeating-linear-gradient(90deg, var(--blue) 0 .5rem, transparent .5rem 1rem) 0 / 1rem;
  animation: run .7s linear infinite }
@keyframes run { to { background-position-x: 1rem } }
@media (prefers-reduced-motion: reduce) { .path i { animation: none } }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; margin: 0 0 2rem;
  padding: 1.1rem 1.3rem; border: 1px solid var(--line); border-radius: .8rem; background: var(--card);
  font-size: .92rem }
dt { color: var(--soft) }
dd { margin: 0; overflow-wrap: anywhere; font-family: ui-monospace, monospace }
pre { margin: 0; padding: 1.1rem 1.3rem; border-radius: .8rem; overflow-x: auto; color: #e6ebf1;
  background: #18202a;  font: .9rem/1.7 ui-monospace, monospace }
</style>
<main>
<h1>This page came through a tunnel</h1>
<p>A small web server on this computer made it. It listens on a port that nobody else knows; you reached
it by the name of its tunnel.</p>
<div class="path">
<b>your browser</b><i></i><b>tinytun-server</b><i></i><b>tinytun</b><i></i><b>this page</b>
</div>
<p>What the web server saw of your request:</p>
<dl>ROWS</dl>
<p>Now your own:</p>
<pre>tinytun demo --target 3000</pre>
</main>
</html>
"""
