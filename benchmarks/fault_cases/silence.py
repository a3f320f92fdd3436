"""Peers that fall silent without a word, and one that is only slow."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .. import tools
from ..processes import BenchmarkError, Identity, Process, family
from .base import Group, Measured
from .site import LOCAL, PATIENCE, POLL, Site, status_of

group = Group("silence")

NOTICED = 10.0  # seconds, promised
LOOSE = 2 * NOTICED  # seconds after which nobody waits any more
NODE_DELAY = 1.0  # seconds, promised
NODE_SECONDS = 3.0  # for which it is asked
SLOW_RATE = 125_000  # bytes a second: 1 Mbit/s
SLOW_SECONDS = 20.0  # twice what a silent peer gets
LOST_BY_SERVER = r"tunnel app (?:lost|closed)"
LOST_BY_CLIENT = r"reconnecting"


@contextmanager
def _stopped(root: int) -> Iterator[None]:
    """A process and its descendants do not run for the length of the block."""
    members: list[Identity] = list(family([root]))
    for member in members:
        os.kill(member.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for member in members:
            with suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGCONT)


def _noticed(watcher: Process, pattern: str) -> float:
    began = time.monotonic()
    watcher.expect(pattern, LOOSE)
    return time.monotonic() - began


def _silence(site: Site, of_client: bool) -> Measured:
    """How soon one side notices that the other one is stopped."""
    server = site.start_server()
    client = site.open_tunnel("app")
    site.until_served("app")
    stopped, watcher, pattern = (
        (client, server, LOST_BY_SERVER) if of_client else (server, client, LOST_BY_CLIENT)
    )
    with _stopped(stopped.pid):
        took = _noticed(watcher, pattern)
    return Measured(f"{took:.1f} s", took <= NOTICED)


@group.case("`STOP` to the client", f"the server notices within {NOTICED:g} s", seconds=11)
def client_stopped(site: Site) -> Measured:
    return _silence(site, of_client=True)


@group.case("`STOP` to the server", f"the client notices within {NOTICED:g} s", seconds=11)
def server_stopped(site: Site) -> Measured:
    return _silence(site, of_client=False)


@group.case(
    "`STOP` to one of three servers that know each other",
    f"an answer of the others takes {NODE_DELAY:g} s at most, none is wrong",
    seconds=12,
)
def node_stopped(site: Site) -> Measured:
    nodes = [site, *(Site(site.workspace, site.services) for _ in range(2))]
    places = [f"{LOCAL}:{node.ports['metadata']}:{node.ports['proxy']}" for node in nodes]
    for node in nodes:
        node.start_server("--peers", ",".join(places))
    site.open_tunnel("app")
    nodes[1].until_served("app")
    took, wrong = [], 0
    with _stopped(nodes[2].server.pid):
        end = time.monotonic() + NODE_SECONDS
        while time.monotonic() < end:
            asked = [(node.endpoint("app"), 200) for node in nodes[:2]]
            asked.append((nodes[1].endpoint(f"nobody-{len(took)}"), 404))  # a name that was not asked for yet
            for endpoint, status in asked:
                began = time.monotonic()
                wrong += status_of(endpoint) != status
                took.append(time.monotonic() - began)
    text = f"{len(took)} answers, the slowest took {max(took):.2f} s"
    return Measured(f"{text}, {wrong} wrong" if wrong else text, not wrong and max(took) <= NODE_DELAY)


@group.case(
    f"a line of 1 Mbit/s, full of bulk for {SLOW_SECONDS:g} s",
    "nobody is taken for dead",
    seconds=SLOW_SECONDS + 4,
    programs=(tools.COMPILER,),
)
def slow_line(site: Site) -> Measured:
    server = site.start_server()
    built = tools.build(site.workspace)
    _, line = tools.start_relay(site.workspace, built, site.ports["connection"], delay=0.02, rate=SLOW_RATE)
    client = site.open_tunnel("app", port=line)
    got = _download(site, SLOW_SECONDS)
    lost = [who.name for who, said in ((server, LOST_BY_SERVER), (client, LOST_BY_CLIENT)) if who.said(said)]
    if lost:
        return Measured(f"taken for dead by the {' and the '.join(lost)}", False)
    text = f"{got / 1e6:.1f} MB in {SLOW_SECONDS:g} s, no session was lost"
    return Measured(text, got > SLOW_RATE * SLOW_SECONDS / 2)


def _download(site: Site, seconds: float) -> int:
    """Reads the largest file for ``seconds``; how many bytes came."""
    got, end = 0, time.monotonic() + seconds
    with socket.create_connection((LOCAL, site.ports["proxy"]), timeout=PATIENCE) as visitor:
        visitor.sendall(site.endpoint("app").request(site.services.bulk.name))
        while time.monotonic() < end:
            data = visitor.recv(1 << 20)
            if not data:
                raise BenchmarkError("the download ended")
            got += len(data)
    return got


@group.case(
    "the link between both goes down (network namespaces; root only)",
    f"both sides notice within {NOTICED:g} s, and it serves again when the link is back",
    seconds=14,
    programs=("ip", "unshare", "nsenter"),
)
def link_down(site: Site) -> Measured:
    if os.geteuid() != 0:
        return Measured("needs root", None)
    near, far = (_namespace(site, name) for name in ("near", "far"))
    try:
        _ip(near, f"link add wire type veth peer name wire netns {far.pid}")
    except BenchmarkError as error:
        return Measured(f"no virtual link here: {error}", None)
    for end, address in ((near, "10.0.0.1/30"), (far, "10.0.0.2/30")):
        _ip(end, f"address add {address} dev wire")
        _ip(end, "link set wire up")
    server = site.start_server(wrapper=_within(near), bind="10.0.0.1")
    client = site.open_tunnel("app", 9, wrapper=_within(far), host="10.0.0.1")
    _ip(near, "link set wire down")
    took = _both_notice(server, client)
    _ip(near, "link set wire up")
    back = site.until(lambda: server.said(r"tunnel app opened") > 1, LOOSE, "the tunnel is not back")
    if len(took) < 2:
        return Measured(f"noticed only by {', '.join(took) or 'nobody'}", False)
    seconds = ", ".join(f"the {name} after {value:.1f} s" for name, value in took.items())
    return Measured(f"{seconds}; back {back:.1f} s after the link", max(took.values()) <= NOTICED)


def _both_notice(server: Process, client: Process) -> dict[str, float]:
    """Seconds until each side has noticed; who does not is left out."""
    took: dict[str, float] = {}
    began = time.monotonic()
    while len(took) < 2 and time.monotonic() - began < LOOSE:
        for name, process, pattern in (
            ("server", server, LOST_BY_SERVER),
            ("client", client, LOST_BY_CLIENT),
        ):
            if name not in took and process.said(pattern):
                took[name] = time.monotonic() - began
        time.sleep(POLL)
    return took


def _namespace(site: Site, name: str) -> Process:
    """A network of its own, for as long as a process in it lives; nothing of the machine's is touched."""
    words = ["unshare", "--net", "sh", "-c", "ip link set lo up && echo ready && exec sleep infinity"]
    holder = site.workspace.start(name, words)
    holder.expect("^ready$")
    return holder


def _within(holder: Process) -> list[str]:
    """Words in front of a command that is to run in that network."""
    return ["nsenter", "--net", "--target", str(holder.pid)]


def _ip(holder: Process, words: str) -> None:
    done = subprocess.run(
        [*_within(holder), "ip", *words.split()],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    if done.returncode:
        raise BenchmarkError(f"ip {words}: {done.stderr.strip()}")
