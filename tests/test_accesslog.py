"""The access log's file: moved away, cut, full, unread; the traffic goes on and each line arrives once."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import OpenTunnel, StartServer, StartService
from server_process import COMMAND, ServerProcess, environment
from support import Service, connect, eventually, get, in_time, read_response, request

from tinytun_gevent import Tunnel
from tinytun_gevent.server import accesslog
from tinytun_gevent.server.accesslog import LogFile

LINE = "a line of the log\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "access.log"


@pytest.fixture
def log(path: Path) -> Iterator[LogFile]:
    file = LogFile(str(path))
    yield file
    file.close()


# -- the file ----------------------------------------------------------------------------------------


def test_lines_are_gathered_and_written_together(log: LogFile, path: Path) -> None:
    log.write(LINE)
    log.tick(0)
    assert path.read_text() == LINE
    log.write(LINE)
    assert path.read_text() == LINE
    for _ in range(accesslog.GATHER // len(LINE)):
        log.write(LINE)
    assert path.stat().st_size >= accesslog.GATHER
    log.write(LINE)
    log.close()
    assert set(path.read_text().splitlines(keepends=True)) == {LINE}


def test_only_owner_and_group_may_read_it(log: LogFile, path: Path) -> None:
    before = os.umask(0)
    try:
        log.reopen()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_it_is_added_to(log: LogFile, path: Path) -> None:
    path.write_text("before\n")
    log.write(LINE)
    log.close()
    assert path.read_text() == "before\n" + LINE


def test_a_file_that_was_moved_away_is_made_anew(log: LogFile, path: Path, tmp_path: Path) -> None:
    """logrotate's ``create`` and ``nocreate``; lines that wait belong to the old one."""
    log.write("one\n")
    log.tick(0)
    log.write("two\n")
    old = path.rename(tmp_path / "access.log.1")
    log.tick(1)
    log.write("three\n")
    log.tick(2)
    assert (old.read_text(), path.read_text()) == ("one\ntwo\n", "three\n")
    path.unlink()
    path.write_text("")
    log.write("four\n")
    log.tick(3)
    log.write("five\n")
    log.tick(4)
    assert path.read_text() == "five\n"  # "four" went with the file that was removed


def test_a_file_that_was_cut_goes_on_at_its_beginning(log: LogFile, path: Path) -> None:
    """logrotate's ``copytruncate``."""
    log.write("one\n")
    log.tick(0)
    os.truncate(path, 0)
    log.write("two\n")
    log.tick(1)
    assert path.read_bytes() == b"two\n"


def test_two_processes_add_whole_lines_to_one_file(log: LogFile, path: Path) -> None:
    other = LogFile(str(path))
    for _ in range(3000):
        log.write("x" * 30 + "\n")
        other.write("y" * 40 + "\n")
    log.close()
    other.close()
    assert set(path.read_text().splitlines()) == {"x" * 30, "y" * 40}
    assert path.read_text().count("\n") == 6000


# -- what goes wrong ---------------------------------------------------------------------------------


def test_a_full_disk_loses_lines_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(accesslog, "HOLD", 10 * len(LINE))
    link = tmp_path / "access.log"
    link.symlink_to("/dev/full")
    log = LogFile(str(link))
    for second in range(3):
        for _ in range(10):
            log.write(LINE)
        log.tick(second)
    assert log.lost == 20
    assert [made.getMessage() for made in caplog.records] == [
        f"ACCESS_LOG={link}: No space left on device; its lines wait for a moment and are then lost"
    ]
    link.unlink()  # there is room again
    log.tick(3)
    log.tick(4)
    assert link.read_text() == LINE * 10
    assert caplog.records[-1].getMessage() == f"ACCESS_LOG={link} can be written again; 20 lines are missing"
    assert len(caplog.records) == 2
    log.close()


def test_a_place_where_nothing_can_be_written_disturbs_nobody(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    log = LogFile(str(tmp_path / "missing" / "access.log"))
    log.reopen()
    assert "No such file or directory" in caplog.text
    for _ in range(5000):
        log.write(LINE)
    log.tick(0)
    (tmp_path / "missing").mkdir()
    log.tick(1)
    assert (tmp_path / "missing" / "access.log").read_text() == LINE * 5000
    log.close()


def test_a_pipe_that_nobody_reads_blocks_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, path: Path
) -> None:
    monkeypatch.setattr(accesslog, "HOLD", 64 * 1024)
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log = LogFile(str(path))

    def write() -> None:
        for _ in range(20_000):  # 360 kB; the pipe takes 64 KiB
            log.write(LINE)
        log.tick(0)

    in_time(write)
    assert log.lost > 0
    assert "nobody reads it" in caplog.text
    got = b""
    lost = log.lost
    for _ in range(10):
        while piece := read_some(reader):
            got += piece
        log.tick(1)
    assert set(got.splitlines(keepends=True)) == {LINE.encode()}
    assert got.count(b"\n") + lost == 20_000
    log.close()
    os.close(reader)


def read_some(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except BlockingIOError:
        return b""


def test_half_a_line_is_not_continued_in_another_file(path: Path, tmp_path: Path, log: LogFile) -> None:
    log.write("one\ntwo\n")
    log._waiting[:] = b"wo\nthree\n"  # as after a write that took "one\nt"
    log._torn = True
    log._stuck = True
    log.reopen()
    assert path.read_text() == "wo\nthree\n"  # the same file as before: it goes on where it stopped
    log._torn, log._waiting[:] = True, b"ur\nfive\n"
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    log.close()
    log._path = str(full)
    log._torn, log._waiting[:] = True, b"ur\nfive\n"
    log.flush()
    log._path = str(tmp_path / "next.log")
    log.reopen()
    log.close()
    assert (tmp_path / "next.log").read_text() == "five\n"


# -- in a server -------------------------------------------------------------------------------------

COMBINED = re.compile(
    r'127\.0\.0\.1 - - \[[^]]+\] "GET (\S+) HTTP/1\.1" (\d+) (\d+) "-" "-" (\S+) ([0-9a-f]{12}) [0-9.]+'
)


def test_each_exchange_has_a_line_with_the_id_that_its_page_and_the_log_have(
    start_server: StartServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
    path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG")
    server = start_server(access_log=str(path))
    open_tunnel(start_service(), server=server)
    assert get(server.proxy_port, "demo", "/a?b").status == 200
    missing = get(server.proxy_port, "nobody", "/c")
    with connect(server.proxy_port) as sock:
        sock.sendall(b"nonsense\r\n\r\n")
        malformed = read_response(sock)
    server.stop()
    lines = path.read_text().splitlines()
    ids = [(page.get(b"x-request-id") or b"").decode() for page in (missing, malformed)]
    assert COMBINED.fullmatch(lines[0])[1] == "/a"  # type: ignore[index]
    assert COMBINED.fullmatch(lines[1]).groups() == (  # type: ignore[union-attr]
        "/c",
        "404",
        str(len(missing.body)),
        "nobody.localhost",
        ids[0],
    )
    assert re.search(r'"-" 400 \d+ "-" "-" - ' + ids[1], lines[2])
    over = [made for made in caplog.records if made.getMessage().startswith("exchange over")]
    assert [made.request_id for made in over] == [line.split()[-2] for line in lines]  # type: ignore[attr-defined]
    assert len({made.request_id for made in over}) == 3  # type: ignore[attr-defined]


def test_raw_utf8_in_a_target_is_written_as_the_service_gets_it(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel, path: Path
) -> None:
    server = start_server(access_log=str(path))
    service = start_service()
    open_tunnel(service, server=server)
    assert get(server.proxy_port, "demo", "/été?q=é").status == 200
    server.stop()
    assert [got.target for got in service.requests] == [b"/%C3%A9t%C3%A9?q=%C3%A9"]
    assert COMBINED.match(path.read_text())[1] == "/%C3%A9t%C3%A9"  # type: ignore[index]


def test_the_visitor_is_whom_a_trusted_proxy_names(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel, path: Path
) -> None:
    server = start_server(access_log=str(path), trusted_proxies="127.0.0.1")
    open_tunnel(start_service(), server=server)
    for name in ("demo", "nobody"):
        get(server.proxy_port, name, "/", b"X-Forwarded-For: 192.0.2.9")
    server.stop()
    assert [line.split()[0] for line in path.read_text().splitlines()] == ["192.0.2.9", "192.0.2.9"]


def test_a_trusted_proxy_cannot_forge_a_line_by_an_address_with_a_zone(
    start_server: StartServer, path: Path
) -> None:
    server = start_server(access_log=str(path), trusted_proxies="127.0.0.1")
    get(server.proxy_port, "demo", "/", b'X-Forwarded-For: ::1%x - - [now] "forged" 200 0')
    server.stop()
    assert path.read_text().startswith("127.0.0.1 - - [")
    assert "forged" not in path.read_text()


def test_without_the_variable_nobody_observes(start_server: StartServer) -> None:
    assert len(start_server().core.observers) == 1


@pytest.mark.usefixtures("fast_clock")
def test_a_running_server_follows_its_file(
    start_server: StartServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
    path: Path,
    tmp_path: Path,
) -> None:
    server = start_server(access_log=str(path))
    open_tunnel(start_service(), server=server)
    get(server.proxy_port, "demo", "/one")
    eventually(lambda: "/one" in path.read_text())
    old = path.rename(tmp_path / "access.log.1")
    eventually(path.exists)
    get(server.proxy_port, "demo", "/two")
    eventually(lambda: "/two" in path.read_text())
    assert "/two" not in old.read_text()


def test_usr1_reopens_the_file_and_a_reload_goes_on_with_it(path: Path, tmp_path: Path) -> None:
    with (
        ServerProcess(environ=environment(ACCESS_LOG=str(path))).wait_serving() as server,
        Service() as service,
    ):
        assert path.exists()
        with Tunnel(service.port, server=server.url, subdomain="demo"):
            get(server.proxy_port, "demo", "/one")
            old = path.rename(tmp_path / "access.log.1")
            server.process.send_signal(signal.SIGUSR1)
            eventually(path.exists)
            assert "/one" in old.read_text()
            server.process.send_signal(signal.SIGHUP)
            server.wait_serving(2)
            assert get(server.proxy_port, "demo", "/two").status == 200
        server.process.send_signal(signal.SIGQUIT)  # leaves at once, but not without what it has to say
        server.wait()
    assert [line.split()[6] for line in path.read_text().splitlines()] == ["/two"]


def test_standard_output_can_be_the_file(tmp_path: Path) -> None:
    environ = environment(ACCESS_LOG="-", STATE_DIR=str(tmp_path / "state"))
    with subprocess.Popen(
        COMMAND, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stderr is not None
        assert server.stdout is not None
        while (found := re.search(r"visitors on (\d+)", server.stderr.readline())) is None:
            assert server.poll() is None
        get(int(found[1]), "nobody", "/one")
        assert '"GET /one HTTP/1.1" 404 ' in server.stdout.readline()
        server.terminate()
        server.stderr.read()
        assert server.wait(60) == 0


def test_a_server_whose_access_log_cannot_be_written_serves_on(path: Path) -> None:
    path.symlink_to("/dev/full")
    with (
        ServerProcess(environ=environment(ACCESS_LOG=str(path))).wait_serving() as server,
        Service() as service,
    ):
        with Tunnel(service.port, server=server.url, subdomain="demo"), connect(server.proxy_port) as sock:
            for _ in range(200):
                sock.sendall(request())
                assert read_response(sock).status == 200
            server.wait_line("No space left on device; its lines wait")
        server.process.terminate()
        assert server.wait() == 0
        assert server.log().count("No space left") == 1


def test_the_example_for_logrotate_is_about_the_file_of_the_example_for_the_server() -> None:
    conf = Path(__file__).resolve().parent.parent / "conf"
    named = re.search(r"(?m)^#?ACCESS_LOG=(/.+)$", (conf / "tinytun-server.env").read_text())
    assert named is not None
    rules = (conf / "logrotate.conf").read_text()
    assert re.search(r"(?m)^" + re.escape(named[1]) + r" \{$", rules)
    assert "    delaycompress\n" in rules  # what is still being written to must not be compressed
