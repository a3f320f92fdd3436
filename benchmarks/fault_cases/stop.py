"""A server that is told to stop."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import ExitStack

from ..processes import Identity, family, read_stat
from .base import Group, Measured
from .site import LOCAL, PATIENCE, Site

group = Group("stop")

IDLE_GONE = 2.0  # seconds, promised
ALL_GONE = 8.0
VISITORS = 20


@group.case(
    f"`TERM` to a server with {VISITORS} idle visitors",
    f"gone after {IDLE_GONE:g} s, no process left after {ALL_GONE:g} s",
    seconds=4,
)
def idle_server(site: Site) -> Measured:
    site.start_server()
    processes = list(family([site.server.pid]))
    with ExitStack() as stack:
        for _ in range(VISITORS):
            visitor = socket.create_connection((LOCAL, site.ports["proxy"]), timeout=PATIENCE)
            stack.enter_context(visitor)
            visitor.sendall(b"GET / HTTP/1.1\r\nHost: nobody.localhost\r\n\r\n")
            visitor.recv(65536)
        began = time.monotonic()
        os.kill(site.server.pid, signal.SIGTERM)
        site.server.wait(PATIENCE)
        master = time.monotonic() - began
        site.until(lambda: not any(map(_alive, processes)), PATIENCE, "processes are left")
        everything = time.monotonic() - began
    text = f"gone after {master:.1f} s, its last process after {everything:.1f} s"
    return Measured(text, master <= IDLE_GONE and everything <= ALL_GONE)


def _alive(identity: Identity) -> bool:
    stat = read_stat(identity.pid)
    return stat is not None and stat.started == identity.started
