"""Log lines on a full disk, and in a pipe that nobody reads: they stop, the traffic goes on."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from free_ports import free_ports
from helpers import REPO, Process
from server_process import COMMAND, ServerProcess, environment
from support import Service, eventually, get, in_time

from tinytun_gevent.lines import LineHandler, line_handler


def logger_for(handler: logging.Handler) -> logging.Logger:
    logger = logging.Logger("test")
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger.addHandler(handler)
    return logger


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe; Linux's takes 64 KiB."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_lines_arrive_whole(pipe: tuple[int, int]) -> None:
    log = logger_for(LineHandler(pipe[1]))
    log.info("one %d", 1)
    log.error("x" * 2000 + "\udcff")
    assert os.read(pipe[0], 4096) == b"INFO one 1\nERROR " + b"x" * 2000 + b"\\udcff\n"


def test_a_pipe_that_nobody_reads_blocks_nobody(pipe: tuple[int, int]) -> None:
    log = logger_for(LineHandler(pipe[1]))
    in_time(lambda: [log.info("y" * 99) for _ in range(1000)])
    first = os.read(pipe[0], 65536)
    log.info("after")
    lost = 1000 - first.count(b"\n")
    assert os.read(pipe[0], 65536).lstrip(b"\n").splitlines() == [
        b"%d log lines are missing: nobody read them" % lost,
        b"INFO after",
    ]
    log.info("and")
    assert os.read(pipe[0], 65536) == b"INFO and\n"


def test_a_full_disk_and_a_mistaken_call_raise_nothing(
    pipe: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        log = logger_for(LineHandler(full))
        log.info("lost")
        log.info("%d", "lost as well")
        os.dup2(pipe[1], full)
        log.info("%d", "no number")
    finally:
        os.close(full)
    told, mistake = os.read(pipe[0], 4096).decode().splitlines()
    assert told == f"2 log lines are missing: {os.strerror(errno.ENOSPC)}"
    assert mistake.startswith("a log line could not be put together: TypeError")
    assert capsys.readouterr() == ("", "")


def test_a_stream_without_a_descriptor_is_written_to() -> None:
    stream = io.StringIO()
    logger_for(line_handler(stream)).info("hello")
    assert stream.getvalue() == "INFO hello\n"


# -- the commands ----------------------------------------------------------------------------------

ON_A_SMALL_DISK = 'mount -t tmpfs -o size=64k none "$0" && exec "$@" 2> "$0/log"'


def small_disk() -> tuple[str, ...]:
    """The command in front of one that is to have a disk of its own; nothing where that is not allowed."""
    for unshare in (("unshare", "-m"), ("unshare", "-Urm")):
        try:
            subprocess.run(
                [*unshare, "mount", "-t", "tmpfs", "none", "/mnt"], check=True, capture_output=True
            )
        except (OSError, subprocess.CalledProcessError):
            continue
        return (*unshare, "sh", "-c", ON_A_SMALL_DISK)
    return ()


def fill(disk: Path) -> None:
    """Leaves not a byte."""
    with (disk / "filler").open("ab", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(512)):
            pass


def test_a_full_disk_stops_the_log_and_not_the_traffic(tmp_path: Path) -> None:
    """Both programs log what they can to a disk that is full; where no disk can be had, to /dev/full."""
    ports = free_ports(4)
    names = ("CONNECTION_PORT", "PROXY_PORT", "TCP_PROXY_PORT", "METADATA_PORT")
    given = dict(zip(names, map(str, ports), strict=True))
    environ = environment(LOG_LEVEL="debug", STATE_DIR=str(tmp_path / "state"), **given)
    wrap = small_disk()
    at = tmp_path / "disk"
    at.mkdir()
    with (
        Path("/dev/full").open("w") as full,
        subprocess.Popen(
            [*wrap, *([str(at)] if wrap else []), *COMMAND],
            env=environ,
            stderr=full,
            stdout=subprocess.DEVNULL,
        ) as server,
        Service() as service,
    ):
        client = None
        try:
            eventually(lambda: psutil.Process(server.pid).children())
            disk = Path(f"/proc/{server.pid}/root{at}")
            if wrap:
                log = disk / "log"
                eventually(lambda: log.exists() and b" serves: " in log.read_bytes())
                fill(disk)
            client = Process(
                "tinytun", "http", service.target, "-s", "demo", "--server", f"http://127.0.0.1:{ports[0]}"
            )
            client.wait_line("http://demo\\.", stderr=False)
            for _ in range(300):
                assert get(ports[1]).status == 200
            if wrap:
                logged = (disk / "log").read_bytes()
                assert logged.count(b"exchange over") < 100, "its last page had some room, but not so much"
                (disk / "filler").unlink()
                assert get(ports[1]).status == 200
                eventually(lambda: b"log lines are missing: No space left" in (disk / "log").read_bytes())
                assert (disk / "log").read_bytes().count(b"log lines are missing") == 1
            assert server.poll() is None
        finally:
            if client is not None:
                client.kill()
            server.terminate()
            server.wait(60)


def test_a_client_whose_log_cannot_be_written_serves_on() -> None:
    with ServerProcess().wait_serving() as server, Service() as service, Path("/dev/full").open("w") as full:
        command = [sys.executable, str(REPO / "bin" / "tinytun"), "http", service.target, "-s", "demo"]
        command += ["--server", server.url, "--log-level", "debug"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=full, text=True) as client:
            try:
                assert client.stdout is not None
                assert "demo" in client.stdout.readline()
                for _ in range(20):
                    assert get(server.proxy_port).status == 200
                assert client.poll() is None
            finally:
                client.kill()
