"""``tinytun demo``: a server, a small page and a tunnel to it, all on this computer.

Nothing in it is special: it is the server that production runs, and the client that users
run, which also makes it a quick check of an installation.
"""

from __future__ import annotations

import logging
import socket as native
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import gevent
from gevent.server import StreamServer

from ..errors import TunnelError, UsageError
from ..server.app import TunnelServer
from ..server.config import ServerConfig
from .agent import Agent, StoppedError
from .config import make_config
from .demo_page import serve_page
from .dial import connect, read_head
from .events import State
from .text import duration
from .ui import Ui

#: The demo's name; it is the only tunnel of its server.
NAME = "demo"

#: Browsers resolve every name under it to this computer (RFC 6761 §6.3).
DOMAIN = "localhost"

#: Seconds for the tunnel to open and for the check through the public side.
TIMEOUT = 10.0

#: Bytes of the answer that the check reads.
MAX_ANSWER = 1 << 20

PORTS = {"connection_port": 5554, "proxy_port": 5555, "tcp_proxy_port": 5556, "metadata_port": 5553}


@dataclass(frozen=True, slots=True)
class Check:
    """What came back through the public side: ``status`` and the time it took, in seconds."""

    status: int
    seconds: float
    body: bytes = field(repr=False)


@dataclass(slots=True)
class Demo:
    """A running demo; see `open_demo`."""

    server: TunnelServer
    agent: Agent
    url: str
    check: Check


def run_demo(target: str | None, make_ui: Callable[[str], Ui], on_signals: Callable[..., None]) -> int:
    """Open the demo, say what to do next, serve until a signal; blocks. Returns the exit code.

    ``on_signals`` is given the agent and the terminal. Raises TunnelError.
    """
    logging.getLogger("tinytun_gevent.server").setLevel(logging.WARNING)
    with make_ui(target or "a page of its own") as ui:
        try:
            with open_demo(target, ui, on_signals) as demo:
                print(next_steps(demo, target), file=sys.stderr, flush=True)
                ui.watch(demo.agent)
                demo.agent.wait()
        except StoppedError:
            pass  # while it was opening
    return 0


@contextmanager
def open_demo(
    target: str | None, ui: Ui, on_signals: Callable[[Agent, Ui], None] | None = None
) -> Iterator[Demo]:
    """The server, the page (unless there is a ``target``), the tunnel, and one request through it all.

    Blocks until that has worked; leaving closes everything. Raises TunnelError.
    """
    with start_server() as server, local_page(target) as local:
        config = make_config(local, server=server.url, subdomain=NAME, proxy="", environ={})
        agent = Agent(config, ui)
        if on_signals is not None:
            on_signals(agent, ui)
        agent.start()
        try:
            agent.wait_connected(TIMEOUT)
            check = fetch(f"{NAME}.{DOMAIN}", server.proxy_port, agent)
            if target is None and check.status != 200:
                raise TunnelError(f"the demo's own page came back through the tunnel as {check.status}")
            yield Demo(server, agent, str(agent.url), check)
        finally:
            agent.stop()


def start_server() -> TunnelServer:
    """A server on loopback, on the default ports where they are free."""
    ports = {name: port if _is_free(port) else 0 for name, port in PORTS.items()}
    try:
        return TunnelServer(_server_config(ports)).start()
    except UsageError:  # somebody took one just now
        return TunnelServer(_server_config(dict.fromkeys(PORTS, 0))).start()


def _server_config(ports: dict[str, int]) -> ServerConfig:
    options: dict[str, Any] = {"bind": "127.0.0.1", "base_domains": (DOMAIN,), "tcp_listen": False, **ports}
    return ServerConfig(**options)


def _is_free(port: int) -> bool:
    with native.socket() as sock:
        if sys.platform != "win32":  # there it means something else: two listeners on one port
            sock.setsockopt(native.SOL_SOCKET, native.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def fetch(host: str, port: int, agent: Agent) -> Check:
    """What a visitor of ``http://host:port/`` on this computer gets; blocks.

    Raises TunnelError; StoppedError if ``agent`` was stopped meanwhile.
    """
    began = time.monotonic()
    late = TunnelError(f"no answer through the tunnel within {TIMEOUT:.0f} s")
    try:
        with gevent.Timeout(TIMEOUT, late), connect((int(native.AF_INET), ("127.0.0.1", port))) as sock:
            sock.sendall(f"GET / HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
            head, body = read_head(sock, 1 << 16)
            while len(body) < MAX_ANSWER and (data := sock.recv(65536)):
                body += data
        return Check(int(head.split(b" ", 2)[1]), time.monotonic() - began, body)
    except (OSError, EOFError, ValueError, IndexError) as error:
        if agent.state in (State.CLOSING, State.CLOSED):
            raise StoppedError("stopped while it was tried") from None
        raise TunnelError(f"the request through the tunnel failed: {error}") from None


def next_steps(demo: Demo, target: str | None) -> str:
    """What the user is told."""
    took = f"{demo.check.status} in {duration(demo.check.seconds)}"
    if demo.check.status == 502 and demo.agent.local.problem:
        found = f"The tunnel is open, but nothing answers behind it: {demo.agent.local.problem}"
    else:
        found = f"It works: {target or 'a page'} came through the tunnel ({took})."
    yours = "" if target else "  with your own service   tinytun demo --target 3000\n"
    return f"""
{found}

  open in a browser       {demo.url}
{yours}
  for the internet, on a machine that it reaches, with *.tunnel.example.com pointing there:
                          BASE_DOMAIN=tunnel.example.com tinytun-server
  and here:               tinytun http 3000 --server http://tunnel.example.com:5554

Ctrl-C ends it.
"""


@contextmanager
def local_page(target: str | None) -> Iterator[str]:
    """The target of the demo: the user's, or a page that is served meanwhile."""
    if target is not None:
        yield target
        return
    service = StreamServer(("127.0.0.1", 0), lambda sock, _: serve_page(sock))
    service.start()
    try:
        yield f"127.0.0.1:{service.server_port}"
    finally:
        service.stop(timeout=0)
