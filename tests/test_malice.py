"""Every attack of ``malice`` against a server and a client, each in a process of its own that is watched.

A session that is attacked ends in time with the right GOAWAY and one line in the log; its process needs no
memory worth mentioning for that, and everybody else is served meanwhile.
"""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from malice import (
    ATTACKS,
    CLIENT,
    DATA,
    END_HEADERS,
    HEADERS,
    REQUEST,
    SERVER,
    Attack,
    FakeServer,
    Link,
    as_client,
    frame,
    play,
)
from support import (
    DEADLINE,
    Peer,
    Service,
    answering,
    connect,
    eventually,
    get,
    request,
    respond,
)

from tinytun_gevent import Tunnel, TunnelServer

VICTIM = str(Path(__file__).with_name("victim.py"))

MEMORY = 8 * 1024
"""KiB that an attack may cost at its worst moment."""

PAUSE = 0.05
"""Seconds from one visitor of an honest tunnel to the next."""

HELD = 0.1
"""Processor seconds for which an attack may hold him, and everybody else, up at a time."""


class Victim:
    """The process under attack."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, VICTIM, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def says(self) -> str:
        """The next line of its output."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def held(self) -> float:
        """Processor seconds of the longest turn of its loop since this was asked last."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.says().split()[0])

    def forget_peak(self) -> int:
        """Begins to watch for the largest size from now on; the size now, in KiB."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        return self.size("VmRSS")

    def size(self, which: str = "VmHWM") -> int:
        """The largest size since then, in KiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"{which}:\s+(\d+) kB", status)
        assert found
        return int(found[1])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            assert self.process.wait(DEADLINE) == 0, self.log
        finally:
            self.process.kill()
            self._reader.join(DEADLINE)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip())


class Pulse:
    """Visits an honest tunnel all the time."""

    def __init__(self, port: int, name: str) -> None:
        self._where = port, name
        self._stop = threading.Event()
        #: How many visits are over, and what went wrong.
        self.count = 0
        self.errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(DEADLINE)

    def _run(self) -> None:
        while not self._stop.wait(PAUSE):
            try:
                assert get(*self._where).status == 200
            except (OSError, AssertionError) as error:
                self.errors.append(error)
            self.count += 1


class Scene:
    """A victim, and who else is there."""

    def __init__(self, victim: Victim, pulse: Pulse) -> None:
        self.victim = victim
        self._pulse = pulse

    def suffer(self, attack: Attack, connect: Callable[[], Link]) -> None:
        """Plays ``attack`` and holds the victim to all that is promised of it.

        What a process does for the first time, or has left for its next garbage collection, looks like
        a cost now and then; what an attack costs, it costs each time. So memory and time count if they are
        needed twice.
        """
        cost, held = self._play(attack, connect())
        if cost > MEMORY or held > HELD:
            cost, held = self._play(attack, connect())
        assert cost <= MEMORY, f"{cost} KiB"
        assert held <= HELD, f"nobody else was served for {held} s"

    def _play(self, attack: Attack, link: Link) -> tuple[int, float]:
        """Plays it once: KiB that the victim needed for it at its peak, and for how long it held its loop."""
        victim, pulse = self.victim, self._pulse
        lines, visits = len(victim.log), pulse.count
        victim.held()
        before = victim.forget_peak()
        with link:
            end = play(attack, link)
            assert end.code in (None, *attack.codes), end
            eventually(lambda: pulse.count > visits + 1)  # one that began after the attack
        cost, held = victim.size() - before, victim.held()
        assert not pulse.errors
        if 0 not in attack.codes:  # what ends with a goodbye is worth no warning
            self._check_log(lines, attack, link)
        after = f"{1000 * end.after:.0f} ms"
        print(f"{attack.name}: GOAWAY {end.code} after {after}, {cost} KiB, held for {held:.4f} s")
        return cost, held

    def _check_log(self, seen: int, attack: Attack, link: Link) -> None:
        """One warning, with the peer's address and the code that GOAWAY has said, or should have."""
        eventually(lambda: len(self.victim.log) > seen)
        (line,) = self.victim.log[seen:]
        found = re.match(rf"WARNING .*{re.escape(link.address)}, code (\d+): ", line)
        assert found, line
        assert int(found[1]) in attack.codes, line


@pytest.fixture(scope="module")
def honest() -> Iterator[Service]:
    """A service that everybody's tunnel leads to."""

    def answer(peer: Peer) -> None:
        with contextlib.suppress(AssertionError):  # what a malicious server sends it need not be HTTP
            answering(lambda _: respond())(peer)

    with Service(answer) as service:
        yield service


@pytest.fixture(scope="module")
def attacked_server(honest: Service) -> Iterator[tuple[Scene, int, int]]:
    """A server with an honest tunnel, its connection port and its proxy port."""
    victim = Victim("server")
    port, proxy_port, _ = map(int, victim.says().split())
    with (
        contextlib.closing(victim),
        Tunnel(honest.target, server=f"http://127.0.0.1:{port}", proxy="", subdomain="good"),
        contextlib.closing(Pulse(proxy_port, "good")) as pulse,
    ):
        eventually(lambda: pulse.count > 3)
        yield Scene(victim, pulse), port, proxy_port


@pytest.fixture(scope="module")
def attacked_client(honest: Service) -> Iterator[tuple[Scene, FakeServer]]:
    """A client with two tunnels, one of them through a malicious server."""
    ports = dict.fromkeys(("connection_port", "proxy_port", "tcp_proxy_port", "metadata_port"), 0)
    with (
        contextlib.closing(FakeServer()) as evil,
        TunnelServer(bind="127.0.0.1", base_domains="localhost", **ports) as good,
        contextlib.closing(Victim("client", evil.url, good.url, honest.target)) as victim,
    ):
        with evil.accept() as link:
            link.greet()
            assert victim.says() == "open\n", victim.log
        with contextlib.closing(Pulse(good.proxy_port, "good")) as pulse:
            eventually(lambda: pulse.count > 3)
            yield Scene(victim, pulse), evil


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if CLIENT in attack.roles])
def test_a_server_withstands_a_malicious_client(attacked_server: tuple[Scene, int, int], name: str) -> None:
    scene, port, proxy_port = attacked_server
    with contextlib.ExitStack() as visitors:

        def visit() -> None:
            visitor = visitors.enter_context(connect(proxy_port))
            visitor.sendall(request("evil"))

        scene.suffer(ATTACKS[name], lambda: as_client(port, "evil", visit))


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if SERVER in attack.roles])
def test_a_client_withstands_a_malicious_server(attacked_client: tuple[Scene, FakeServer], name: str) -> None:
    scene, evil = attacked_client
    scene.suffer(ATTACKS[name], evil.accept)


def test_a_client_that_was_attacked_serves_again_and_reaches_its_target_only(
    attacked_client: tuple[Scene, FakeServer],
) -> None:
    """Whatever else the malicious server asks for."""
    _, evil = attacked_client
    with evil.accept() as link, socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.setblocking(False)
        other = b"127.0.0.1:%d" % elsewhere.getsockname()[1]
        asked = (
            REQUEST[:2]
            + bytes([4, len(other) + 8])
            + b"http://"
            + other
            + b"/"
            + bytes([1, len(other)])
            + other
        )
        link.greet()
        link.send(frame(HEADERS, asked, END_HEADERS, 1) + frame(DATA, request("evil"), 0, 1))
        assert link.data().startswith(b"HTTP/1.1 200 ")
        with pytest.raises(BlockingIOError):
            elsewhere.accept()
