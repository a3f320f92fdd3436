"""Whether ``localhost`` is two programs on one port: told once, and found without a connection."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gevent
import pytest
from conftest import StartServer
from helpers import deadline, wait_until
from support import eventually

from tinytun_gevent import Tunnel
from tinytun_gevent.client import loopback
from tinytun_gevent.client.dial import connect
from tinytun_gevent.client.events import Listener
from tinytun_gevent.client.local import LocalDialer
from tinytun_gevent.client.loopback import V4, V6, Listening, LoopbackCheck, first_of, owners, read_table
from tinytun_gevent.client.target import parse_target
from tinytun_gevent.wire.handshake import Kind

ME = os.getuid()

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode"
V4_LINE = "   0: {address}:0BB8 00000000:0000 {state} 0:0 00:00000000 00000000 {uid}        0 {inode} 1"
V6_LINE = V4_LINE.replace("00000000:0000 ", "00000000000000000000000000000000:0000 ", 1)


def written(address: str) -> str:
    """An address as the kernel writes it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    packed = socket.inet_pton(family, address)
    words = [packed[at : at + 4] for at in range(0, len(packed), 4)]
    return "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has the kernel say which sockets listen on port 3000: address, user, number."""

    def put(*sockets: tuple[str, int, int], state: str = "0A") -> None:
        lines: dict[str, list[str]] = {"tcp": [HEAD], "tcp6": [HEAD]}
        for address, uid, inode in sockets:
            name, form = ("tcp6", V6_LINE) if ":" in address else ("tcp", V4_LINE)
            lines[name].append(form.format(address=written(address), state=state, uid=uid, inode=inode))
        for name, rows in lines.items():
            (tmp_path / name).write_text("\n".join(rows) + "\n")

    def read(path: str) -> Iterator[Listening]:
        return read_table(str(tmp_path / Path(path).name))

    monkeypatch.setattr(loopback, "read_table", read)
    return put


@pytest.mark.parametrize(
    ("sockets", "two"),
    [
        ([], False),
        ([(V6, 1, 10)], False),
        ([(V4, 1, 10)], False),
        ([("::", 1, 10)], False),  # both, on one socket
        ([(V6, 1, 10), (V4, 2, 11)], True),
        ([(V6, 1, 10), ("0.0.0.0", 2, 11)], True),
        ([("::", 1, 10), (V4, 2, 11)], True),
        ([("::", 1, 10), (V6, 2, 11)], True),
        ([("::", 1, 10), ("0.0.0.0", 2, 11)], True),
        ([("192.0.2.1", 1, 10), ("2001:db8::1", 2, 11)], False),
        ([(V6, 0, 10), (V4, 0, 11)], False),  # one user, and nothing that says that they are two
    ],
)
def test_two_users_at_one_port(
    tables: Callable[..., None], sockets: list[tuple[str, int, int]], two: bool
) -> None:
    tables(*sockets)
    assert bool(owners(3000, V6, V4)) is two
    assert bool(owners(3000, V4, V6)) is two
    assert owners(3001, V6, V4) == ()


def test_connections_are_no_listeners(tables: Callable[..., None]) -> None:
    tables((V6, 1, 10), (V4, 2, 11), state="01")
    assert owners(3000, V6, V4) == ()


def test_who_is_named_first_is_used(tables: Callable[..., None]) -> None:
    tables((V6, 987_654, 10), (V4, 987_655, 11))
    assert owners(3000, V6, V4) == ("987654", "987655")
    assert owners(3000, V4, V6) == ("987655", "987654")


def test_lines_of_another_form_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "tcp"
    path.write_text(f"{HEAD}\nnonsense\n" + "x " * 12 + "\n0: zz:1 0:0 0A 0 0 0 0 0 0\n")
    assert list(read_table(str(path))) == []


def test_what_stands_behind_the_listening_sockets_is_not_read(tmp_path: Path) -> None:
    """With 10,000 connections it would take 20 ms of the processor, for each tunnel."""
    line = V4_LINE.format(address=written(V4), state="{state}", uid=ME, inode=7)
    path = tmp_path / "tcp"
    path.write_text("\n".join([HEAD, *(line.format(state=state) for state in ("0A", "01", "0A"))]))
    assert len(list(read_table(str(path)))) == 1


def test_the_more_precise_address_wins() -> None:
    anywhere, here = Listening("::", 3000, 1, 10), Listening(V6, 3000, 2, 11)
    assert first_of([anywhere, here], 3000, V6) is here
    assert first_of([anywhere, here], 3000, V4) is anywhere


# -- real sockets -------------------------------------------------------------


@contextmanager
def listening(address: str, port: int = 0) -> Iterator[int]:
    """A program of its own that listens; its port."""
    code = (
        "import socket, sys; family = socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET\n"
        "s = socket.create_server((sys.argv[1], int(sys.argv[2])), family=family)\n"
        "print(s.getsockname()[1], flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, address, str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.communicate()


def test_two_programs_of_one_user_are_two() -> None:
    with listening(V4) as port, listening(V6, port):
        assert owners(port, V6, V4) == (loopback._name_of(ME),) * 2


def test_one_program_with_two_sockets_is_one() -> None:
    """As Puma and nginx listen."""
    with socket.create_server((V4, 0)) as four:
        port = four.getsockname()[1]
        with socket.create_server((V6, port), family=socket.AF_INET6):
            assert owners(port, V6, V4) == ()


class Warnings(Listener):
    def __init__(self) -> None:
        self.said: list[str] = []

    def warning(self, text: str) -> None:
        self.said.append(text)


def test_it_is_said_once_and_costs_the_service_no_connection(start_server: StartServer) -> None:
    server, warnings = start_server(), Warnings()
    with (
        socket.create_server((V4, 0)) as service,
        listening(V6, service.getsockname()[1]) as port,
        Tunnel(port, server=server.url, subdomain="demo", events=warnings),
    ):
        eventually(lambda: warnings.said)
        service.setblocking(False)
        with pytest.raises(BlockingIOError):
            service.accept()
    (said,) = warnings.said
    user = loopback._name_of(ME)
    assert said == (
        f"two programs listen at localhost:{port}: visitors get [::1]:{port}, of user {user}; "
        f"'tinytun http 127.0.0.1:{port}' chooses the other one, of user {user}"
    )


def test_it_looks_again_when_the_service_has_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been started after the tunnel."""
    found: list[tuple[()] | tuple[str, str]] = [(), ("anna", "bert")]
    monkeypatch.setattr(loopback, "owners", lambda *_: found.pop(0))
    with socket.create_server((V4, 0)) as service:
        port = service.getsockname()[1]
        dialer, said = LocalDialer(parse_target(f"https://localhost:{port}", "never")), list[str]()
        check = LoopbackCheck(dialer, Kind.TCP, said.append)
        with deadline():
            check.look()
            wait_until(lambda: len(found) == 1)
            dialer._connect(connect).close()
            wait_until(lambda: said)
            dialer._connect(connect).close()
            check.look()
            gevent.idle()
    assert said == [
        f"two programs listen at https://localhost:{port}: "
        f"visitors get https://127.0.0.1:{port}, of user anna; "
        f"'tinytun tcp https://[::1]:{port}' chooses the other one, of user bert"
    ]


def test_where_the_system_does_not_tell_the_other_address_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopback, "owners", lambda *_: None)
    with socket.create_server((V4, 0)) as service:
        port = service.getsockname()[1]
        dialer, said = LocalDialer(parse_target(str(port))), []
        check = LoopbackCheck(dialer, Kind.HTTP, said.append)
        with deadline():
            check._look(answers=False)
            assert not said
            for _ in range(2):
                check._look(answers=True)
    assert said == [
        f"localhost:{port} answers at both ::1 and 127.0.0.1; visitors get [::1]:{port}; "
        f"if they are two programs, 'tinytun http 127.0.0.1:{port}' chooses the other one"
    ]


@pytest.mark.parametrize("target", ["127.0.0.1:3000", "[::1]:3000", "example.test:3000"])
def test_whoever_chose_is_told_nothing(target: str) -> None:
    dialer = LocalDialer(parse_target(target))
    check = LoopbackCheck(dialer, Kind.HTTP, pytest.fail)
    assert dialer.on_answer is None
    check.look()
