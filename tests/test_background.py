"""The shared hub thread: calls from plain threads, errors, interruption, patched programs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import gevent
import gevent.event
import gevent.socket
import pytest

from tinytun_gevent.background import run_in_hub, runs_in_place

DEADLINE = 60.0


def test_a_plain_thread_gets_the_result_from_another_thread() -> None:
    assert not runs_in_place()
    assert run_in_hub(threading.get_ident) != threading.get_ident()
    assert run_in_hub(threading.get_ident) == run_in_hub(threading.get_ident)


def test_arguments_and_keywords_arrive() -> None:
    assert run_in_hub(divmod, 7, 2) == (3, 1)
    assert run_in_hub(sorted, [1, 3, 2], reverse=True) == [3, 2, 1]


def test_what_the_call_raises_is_raised_here() -> None:
    with pytest.raises(ZeroDivisionError):
        run_in_hub(divmod, 1, 0)
    with pytest.raises(SystemExit):
        run_in_hub(sys.exit, 3)


def test_a_blocked_call_does_not_hold_up_others() -> None:
    made: list[gevent.event.Event] = []
    started = threading.Event()

    def block() -> str:
        made.append(gevent.event.Event())
        started.set()
        made[0].wait()
        return "released"

    results: list[str] = []
    waiter = threading.Thread(target=lambda: results.append(run_in_hub(block)))
    waiter.start()
    assert started.wait(DEADLINE)
    assert run_in_hub(lambda: 5) == 5
    assert results == []
    run_in_hub(made[0].set)
    waiter.join(DEADLINE)
    assert results == ["released"]


def test_many_threads_at_once() -> None:
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(run_in_hub(lambda: (gevent.sleep(0), n)[1])))
        for n in range(50)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert sorted(results) == list(range(50))


def test_a_call_may_call_again_and_stays_in_place() -> None:
    def outer() -> bool:
        return runs_in_place() and run_in_hub(threading.get_ident) == threading.get_ident()

    assert run_in_hub(outer)


def test_sockets_made_there_serve_a_plain_thread() -> None:
    def listen() -> int:
        listener = gevent.socket.create_server(("127.0.0.1", 0))

        def serve() -> None:
            conn, _ = listener.accept()
            conn.sendall(conn.recv(100).upper())
            conn.close()
            listener.close()

        gevent.spawn(serve)
        return int(listener.getsockname()[1])

    import socket

    with socket.create_connection(("127.0.0.1", run_in_hub(listen)), timeout=DEADLINE) as sock:
        sock.sendall(b"hello")
        assert sock.recv(100) == b"HELLO"


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_patched_program_runs_calls_in_place() -> None:
    code = """
from gevent import monkey; monkey.patch_all()
import gevent, threading
from tinytun_gevent import background
here = gevent.getcurrent()
print(background.run_in_hub(lambda: gevent.getcurrent() is here), background._thread)
"""
    assert run_python(code) == "True None"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_starts_its_own_thread() -> None:
    code = """
import os
from tinytun_gevent.background import run_in_hub
run_in_hub(os.getpid)
pid = os.fork()
if pid == 0:
    os._exit(0 if run_in_hub(lambda: 7) == 7 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert run_python(code) == "0"


def test_an_interrupted_wait_kills_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def hang() -> None:
        try:
            gevent.event.Event().wait()
        finally:
            ended.set()

    from tinytun_gevent import background

    started = threading.Event()

    class Impatient(background.Future):  # type: ignore[type-arg, name-defined]
        def result(self, timeout: float | None = None) -> object:
            assert started.wait(DEADLINE)
            raise KeyboardInterrupt

    monkeypatch.setattr(background, "Future", Impatient)

    def announce() -> None:
        started.set()
        hang()

    with pytest.raises(KeyboardInterrupt):
        run_in_hub(announce)
    assert ended.wait(DEADLINE)


def test_the_process_ends_although_the_thread_waits() -> None:
    assert run_python("from tinytun_gevent.background import run_in_hub; print(run_in_hub(lambda: 1))") == "1"
