"""A process for a peer to attack, whose memory can be watched: a server, or a client with two tunnels.

``victim.py server [TLS_DIR]`` prints its connection, proxy and https port. ``victim.py client EVIL GOOD
TARGET [OTHER]`` opens a tunnel to TARGET through each of the two servers, the good one's to OTHER if that is
given, and says so. Both log warnings to standard error and run until standard input ends. For each line of
that they print the processor seconds of the longest turn of their loop since the line before, and of the
longest turns in a row that one request takes.
"""

from __future__ import annotations

import logging
import sys

from hub_turns import hub_turns

from tinytun_gevent import Tunnel, TunnelServer
from tinytun_gevent.client import backoff

QUICK = 0.02
"""Seconds before a lost client comes back: a test has many sessions to lose."""


def tell() -> None:
    with hub_turns() as turns:
        for _ in sys.stdin:
            print(turns.take(), turns.take_request(), flush=True)


def serve(tls_dir: str = "") -> None:
    with TunnelServer(
        bind="127.0.0.1",
        base_domains="localhost",
        connection_port=0,
        proxy_port=0,
        tcp_proxy_port=0,
        metadata_port=0,
        tls_dir=tls_dir,
        proxy_tls_port=0,
    ) as server:
        print(server.connection_port, server.proxy_port, server.proxy_tls_port, flush=True)
        tell()


def visit(evil: str, good: str, target: str, other: str = "") -> None:
    backoff.FIRST = QUICK
    bad = Tunnel(target, server=evil, proxy="", sessions=1)
    fine = Tunnel(other or target, server=good, proxy="", subdomain="good")
    bad.open()
    fine.open()
    print("open", flush=True)
    tell()
    bad.close(grace=0)
    fine.close(grace=0)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    if sys.argv[1] == "server":
        serve(*sys.argv[2:])
    else:
        visit(*sys.argv[2:])
