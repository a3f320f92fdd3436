"""New code while visitors are served: HUP under load."""

from __future__ import annotations

import os
import signal
import threading
import time

from ..loads.outcome import Outcome
from ..loads.wrk import WrkResult, run_wrk
from ..way import Endpoint
from .base import Group, Measured
from .site import PATIENCE, Site

group = Group("upgrade")

SECONDS = 30
CONNECTIONS = 32
RELOADS = (5.0, 13.0, 21.0)  # seconds into the load


def _under_load(site: Site, endpoint: Endpoint) -> Measured:
    outcome = Outcome()
    results: list[WrkResult | None] = []
    load = threading.Thread(
        target=lambda: results.append(run_wrk(endpoint, CONNECTIONS, SECONDS, outcome)), daemon=True
    )
    began = time.monotonic()
    load.start()
    for at in RELOADS:
        load.join(max(0.0, began + at - time.monotonic()))
        os.kill(site.server.pid, signal.SIGHUP)
    load.join(SECONDS + PATIENCE)
    result = results[0] if results else None
    if result is None:
        return Measured("; ".join(outcome.reasons) or "wrk did not end", False)
    errors, wrong = result.socket_errors, result.wrong_status
    text = f"{result.requests:,} requests, {errors} socket errors, {wrong} not 2xx"
    return Measured(text, not errors and not wrong)


@group.case(
    f"three HUPs under `wrk -c{CONNECTIONS}` for {SECONDS} s, through an HTTP tunnel",
    "0 socket errors, 0 answers that are not 2xx",
    seconds=SECONDS + 3,
    programs=("wrk",),
)
def reload_http(site: Site) -> Measured:
    site.start_server()
    site.open_tunnel("app")
    site.until_served("app")
    return _under_load(site, site.endpoint("app"))


@group.case(
    f"three HUPs under `wrk -c{CONNECTIONS}` for {SECONDS} s, on a TCP tunnel's port",
    "0 socket errors, 0 answers that are not 2xx",
    seconds=SECONDS + 3,
    programs=("wrk",),
)
def reload_tcp(site: Site) -> Measured:
    site.start_server()
    client = site.open_tunnel("tcp", kind="tcp")
    port = int(client.expect(r"^tcp://[^\s:]+:(\d+)$")[1])
    site.until_listening(port)
    return _under_load(site, Endpoint(port))
