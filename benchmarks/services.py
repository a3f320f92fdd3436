"""What stands behind every contender, the same for all: nginx, a sink for uploads, an echo for messages."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from .processes import BenchmarkError, Process, Workspace, find, free_port
from .tools import Tools, start_echo

NGINX = "nginx"
SINK = "sink"
ECHO = "echo"

SMALL_PAGE = "small"
#: The same, but nginx sends head and body in one packet instead of two.
WHOLE_PAGE = "whole"

SMALL = 1024  # bytes of an answer to a small request
BULK = 1 << 30  # bytes of a bulk transfer
WARM = 64 << 20  # bytes of the transfer that warms up a bulk cell
LONG = 4 << 30  # bytes of a transfer that is not to end while something else is measured
CHUNK = 100  # bytes of a chunk of the echo service's ``/chunks``

_CONFIG = """\
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log stderr warn;
worker_rlimit_nofile {files};
events {{ worker_connections {connections}; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    sendfile on;
    tcp_nodelay on;
    keepalive_requests 1000000000;
    keepalive_timeout 3600s;
    open_file_cache max=16;
    server {{
        listen 127.0.0.1:{port} backlog=2048;
        root {folder}/www;
        add_header X-Number $arg_number;
        location = /whole {{ tcp_nopush on; }}
    }}
}}
"""


@dataclass(frozen=True)
class Services:
    """The local services: their ports by name (`NGINX`, `SINK`, `ECHO`), and why any is missing."""

    ports: dict[str, int]
    missing: dict[str, str]
    #: Sparse files of `BULK`, `WARM` and `LONG` bytes; downloads and uploads use them.
    bulk: Path
    warm: Path
    long: Path


def start_services(
    workspace: Workspace, files: int, tools: Tools | None = None, *, long_file: bool = False
) -> Services:
    """Starts them; ``files`` is how many descriptors a process may have. They end with the workspace.

    ``long_file``: whether the longest file will be fetched, and should be in the page cache by then.
    """
    folder = workspace.folder / "www"
    folder.mkdir()
    for name in (SMALL_PAGE, WHOLE_PAGE):
        (folder / name).write_bytes(b"x" * (SMALL - 1) + b"\n")
    bulk, warm, long = folder / "bulk", folder / "warm", folder / "long"
    for path, size in ((bulk, BULK), (warm, WARM), (long, LONG)):
        with path.open("wb") as file:
            file.truncate(size)
        if path != long or long_file:
            _read_once(path)
    ports: dict[str, int] = {}
    missing: dict[str, str] = {}
    sink = workspace.start("sink", [sys.executable, str(Path(__file__).with_name("sink.py"))])
    ports[SINK] = int(sink.expect(r"^port (\d+)$")[1])
    program = find("nginx")
    if program is None:
        missing[NGINX] = "nginx is not installed"
    else:
        ports[NGINX] = _start_nginx(workspace, program, files)
    if tools is None:
        missing[ECHO] = "its C programs could not be built"
    else:
        ports[ECHO] = start_echo(workspace, tools)[1]
    return Services(ports, missing, bulk, warm, long)


def _read_once(path: Path) -> None:
    """Takes the file into the page cache, or the first contender to be measured would wait for that."""
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _start_nginx(workspace: Workspace, program: str, files: int) -> int:
    last = ""
    for _ in range(3):  # a port that was free may be taken by the time it is used
        port = free_port()
        config = workspace.folder / "nginx.conf"
        connections = min(files, 16384) - 64
        config.write_text(
            _CONFIG.format(folder=workspace.folder, port=port, files=files, connections=connections)
        )
        arguments = [program, "-p", str(workspace.folder), "-e", "stderr", "-c", str(config)]
        process: Process = workspace.start("nginx", arguments)
        try:
            process.expect_port(port)
        except BenchmarkError as error:
            last = str(error)
            workspace.stop([process])
        else:
            return port
    raise BenchmarkError(last)
