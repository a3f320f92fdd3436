"""Visitors who leave, dawdle, stall or only sit there, and a machine that runs short."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from ..loads.outcome import Outcome
from ..loads.streams import Downloads, stalled
from ..loads.visitors import Visitors
from ..loads.wrk import WrkResult, run_wrk
from ..processes import BenchmarkError, Process, memory_bytes
from ..services import SMALL_PAGE
from ..way import Endpoint
from .base import Group, Measured
from .peak import Peak, descriptors, mebibytes
from .site import LOCAL, PATIENCE, Site, status_of
from .suite import support
from .watch import Watch

group = Group("visitors")

MIB = 1 << 20
ABORTS = 20_000
ASKERS, ASKED, ASK_ROUNDS = 10, 200_000, 10
ASK_LIMIT = 0.1  # seconds
STORM_ABORTS, STORM_SLOW, STORM_IDLE = 3_000, 300, 200
STORM_P99 = 1000.0  # milliseconds
IDLE = 10_000
IDLE_KIB = 20.0
IDLE_P99 = 50.0  # milliseconds
READERS = 20
READ_SECONDS = 6.0
STALLED_MIB = 24
SLOW_BODIES = 100
BODY = 40  # bytes
FILES = 256  # descriptors
TOO_MANY = 400  # visitors, more than there are descriptors
SETTLE = 0.5  # seconds between the last event and a look at memory or descriptors
_RESET = struct.pack("ii", 1, 0)


def _up(site: Site, *options: str) -> tuple[Process, Endpoint]:
    """A server and a client that serve the page; the client and where visitors go."""
    site.start_server(*options)
    client = site.open_tunnel("app", None, "-c", "16384")
    site.until_served("app")
    return client, site.endpoint("app")


def _connect(endpoint: Endpoint) -> socket.socket:
    return socket.create_connection((LOCAL, endpoint.port), timeout=PATIENCE)


def _abort(endpoint: Endpoint, count: int, path: str) -> None:
    """So many visitors come and reset their connections: silent, within a head, a body, or an answer."""
    head = endpoint.request(path)
    post = head.replace(b"GET", b"POST").replace(b"\r\n\r\n", b"\r\nContent-Length: 100000\r\n\r\nhalf")
    said = (b"", head[:-5], post, head)
    for number in range(count):
        with _connect(endpoint) as visitor:
            visitor.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            visitor.sendall(said[number % len(said)])


@contextmanager
def _beside(work: Callable[[], None]) -> Iterator[None]:
    """``work`` is done in a thread; the block's end waits for it and raises what it raised."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join()
    if errors:
        raise BenchmarkError(f"the visitors could not do their work: {errors[0]}")


def _verdict(result: WrkResult | None, outcome: Outcome, limit: float) -> Measured:
    """What wrk saw meanwhile: no failure, and its 99 % within ``limit`` milliseconds."""
    if result is None:
        return Measured("; ".join(outcome.reasons), False)
    text = f"{result.p99:.0f} ms, {outcome.failures} failed of {outcome.attempts:,}"
    return Measured(text, result.p99 <= limit and not outcome.failures)


@group.case(
    f"{ABORTS:,} visitors who reset their connections before, within and behind a request",
    "nobody else's request fails, and no descriptor is left behind",
    seconds=25,
)
def aborted(site: Site) -> Measured:
    client, endpoint = _up(site)
    roots = [site.server.pid, client.pid]
    before = descriptors(roots)
    with Watch(endpoint) as others:
        _abort(endpoint, ABORTS, site.services.bulk.name)
    took = site.until(lambda: descriptors(roots) <= before + 4, PATIENCE, "descriptors are left behind")
    slowest = f"the slowest took {others.slowest:.2f} s"
    return Measured(f"{others.summary()}, {slowest}; all free after {took:.1f} s", not others.wrong)


def _ask_on(endpoint: Endpoint, reads: bool) -> None:
    """Connections that ask for a tunnel that is not there as often as the server takes it."""
    asked = b"GET / HTTP/1.1\r\nHost: nobody.%b\r\n\r\n" % endpoint.host.partition(".")[2].encode()
    for _ in range(ASK_ROUNDS):
        with ExitStack() as stack:
            askers = [stack.enter_context(_connect(endpoint)) for _ in range(ASKERS)]
            for asker in askers:
                with suppress(OSError):  # the server ends what asks on and on
                    asker.sendall(asked * (ASKED // ASKERS // ASK_ROUNDS))
                    while reads and asker.recv(65536):
                        pass


@group.case(
    f"{ASKERS} visitors who ask {ASKED:,} times for a tunnel that is not there, reading and not reading",
    f"nobody else's request fails, or takes {ASK_LIMIT:g} s",
    seconds=15,
)
def asking_on(site: Site) -> Measured:
    _, endpoint = _up(site)
    with Watch(endpoint) as others:
        for reads in (True, False):
            _ask_on(endpoint, reads)
    text = f"{others.summary()}, the slowest took {others.slowest:.3f} s"
    return Measured(text, not others.wrong and others.slowest < ASK_LIMIT)


@group.case(
    f"{STORM_ABORTS:,} aborts, {STORM_SLOW} slow heads and {STORM_IDLE} idle visitors at once",
    f"99 % of others' requests within {STORM_P99 / 1000:g} s, none fails",
    seconds=10,
    programs=("wrk",),
)
def storm(site: Site) -> Measured:
    _, endpoint = _up(site)
    outcome = Outcome()
    over = threading.Event()
    with ExitStack() as stack:
        idle = [stack.enter_context(_connect(endpoint)) for _ in range(STORM_IDLE)]
        for visitor in idle:
            visitor.sendall(endpoint.request(SMALL_PAGE))
        slow = [stack.enter_context(_connect(endpoint)) for _ in range(STORM_SLOW)]

        def dawdle() -> None:
            for byte in endpoint.request(SMALL_PAGE)[:-2]:
                for visitor in slow:
                    visitor.sendall(bytes((byte,)))
                if over.wait(0.1):
                    return

        with (
            _beside(dawdle),
            _beside(lambda: _abort(endpoint, STORM_ABORTS, site.services.bulk.name)),
        ):
            result = run_wrk(endpoint, 8, 5, outcome)
            over.set()
    return _verdict(result, outcome, STORM_P99)


@group.case(
    f"{IDLE:,} visitors who keep their connections and do nothing",
    f"at most {IDLE_KIB:g} KiB each in both programs, 99 % of others' requests within {IDLE_P99:g} ms",
    seconds=15,
    programs=("wrk",),
)
def idle(site: Site) -> Measured:
    client, endpoint = _up(site)
    outcome, roots = Outcome(), [site.server.pid, client.pid]
    with Visitors(endpoint, outcome) as crowd:
        crowd.come(100)
        time.sleep(SETTLE)
        before, already = memory_bytes(roots), len(crowd.held)
        crowd.come(IDLE)
        time.sleep(SETTLE)
        if len(crowd.held) < already + IDLE:
            return Measured(f"only {len(crowd.held) - already:,} came: {'; '.join(outcome.reasons)}", False)
        each = (memory_bytes(roots) - before) / IDLE / 1024
        result = run_wrk(endpoint, 1, 3, outcome)
    measured = _verdict(result, outcome, IDLE_P99)
    return Measured(f"{each:.1f} KiB each, {measured.text}", measured.kept and each <= IDLE_KIB)


@group.case(
    f"one visitor who stops reading his download, beside {READERS} others",
    f"theirs go on, and no process needs more than {STALLED_MIB} MiB for him",
    seconds=14,
)
def stalled_reader(site: Site) -> Measured:
    client, endpoint = _up(site)
    path, outcome = site.services.bulk.name, Outcome()
    with Downloads(endpoint, path, READERS, outcome) as others:
        others.read(READ_SECONDS / 2)  # what they themselves need is there by then
        peak = Peak({"server": site.server.pid, "client": client.pid})
        with ExitStack() as stack:
            stalled(stack, endpoint, path)
            flow = others.read(READ_SECONDS)
            grown = peak.growth()
    text = f"{flow.rate / 1e9:.2f} GB/s, {outcome.failures} cut off; {mebibytes(grown)}"
    return Measured(text, not outcome.failures and max(grown.values()) <= STALLED_MIB * MIB)


@group.case(
    f"{SLOW_BODIES} visitors whose uploads come a byte at a time",
    f"99 % of others' requests within {STORM_P99 / 1000:g} s, none fails, and the uploads arrive",
    seconds=8,
    programs=("wrk",),
)
def slow_bodies(site: Site) -> Measured:
    _, endpoint = _up(site)
    outcome, answered = Outcome(), 0
    with ExitStack() as stack:
        service = stack.enter_context(support.Service())
        site.open_tunnel("slow", service.port)
        slow = [stack.enter_context(_connect(endpoint)) for _ in range(SLOW_BODIES)]
        for visitor in slow:
            visitor.sendall(support.request("slow", "/", b"Content-Length: %d" % BODY, method=b"POST"))

        def drip() -> None:
            for _ in range(BODY):
                for visitor in slow:
                    visitor.sendall(b"x")
                time.sleep(0.1)  # the pace of the visitors; nothing is waited for

        with _beside(drip):
            result = run_wrk(endpoint, 8, 4, outcome)
        for visitor in slow:
            answered += support.read_response(visitor).status == 200
    measured = _verdict(result, outcome, STORM_P99)
    return Measured(f"{measured.text}; {answered} uploads arrived", measured.kept and answered == SLOW_BODIES)


@group.case(
    f"{TOO_MANY} visitors of a server that may have {FILES} descriptors",
    "it goes on, and serves at once when they have left",
    seconds=8,
)
def few_descriptors(site: Site) -> Measured:
    site.start_server(wrapper=("sh", "-c", f'ulimit -n {FILES}; exec "$@"', "sh"))
    site.open_tunnel("app")
    site.until_served("app")
    endpoint = site.endpoint("app")
    with ExitStack() as stack:
        for _ in range(TOO_MANY):
            visitor = stack.enter_context(_connect(endpoint))
            visitor.sendall(endpoint.request(SMALL_PAGE))
        time.sleep(SETTLE)
        meanwhile = len(site.tunnels())
        complaints = site.server.said(r"(?i)descriptors|too many open files")
    back = site.until_served("app", PATIENCE)
    text = f"served {back:.1f} s after they left, {complaints} lines in the log"
    return Measured(text, back <= 2 and complaints <= 5 and meanwhile in (0, 1) and not site.server.ended())


@group.case(
    "a disk that is full: nothing can be logged",
    "both programs start and serve",
    seconds=4,
)
def full_disk(site: Site) -> Measured:
    nowhere = ("sh", "-c", 'exec "$@" >/dev/full 2>&1', "sh")
    site.start_server(wrapper=nowhere, silent=True)
    client = site.start_client("app", wrapper=nowhere)
    took = site.until_served("app")
    with Watch(site.endpoint("app"), 0.01) as visitor:
        site.until(lambda: len(visitor.visits) >= 100, PATIENCE, "visitors are too slow")
    missing = status_of(site.endpoint("nobody"))
    kept = not visitor.wrong and missing == 404 and not client.ended() and not site.server.ended()
    return Measured(f"served after {took:.1f} s; {visitor.summary()}", kept)
