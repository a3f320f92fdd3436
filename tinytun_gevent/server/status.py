"""The command ``tinytun-server status``: what the metadata API says, for a terminal or another program.

It runs in a process of its own and needs no gevent.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from ..errors import UnreachableError, UsageError
from .config import ServerConfig, metadata_url
from .logs import visible

if TYPE_CHECKING:
    from rich.console import RenderableType

TIMEOUT: Final = 5.0
"""Seconds for each step; a server on this machine takes a few milliseconds."""

LARGEST: Final = 64 * 1024 * 1024
"""Bytes of an answer; a tunnel takes 400 of them."""

COLUMNS: Final = ("tunnel", "kind", "visitors", "in", "out", "since", "from", "label")


def run(config: ServerConfig, url: str | None, as_json: bool) -> int:
    """Prints how a server is; returns the exit code.

    ``url`` is its metadata API, by default the one that ``config`` has. Raises UsageError, UnreachableError
    if nothing that makes sense comes from there.
    """
    where = url or metadata_url(config)
    status = fetch(where)
    try:
        _show(status, as_json)
    except BrokenPipeError:  # nobody reads on; the interpreter tries once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UnreachableError(f"what answers at {visible(where)} is another version") from None
    return 0


def _show(status: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(status, indent=2), flush=True)
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(*_for_a_terminal(status), sep="\n")
    else:
        print(plain(status), flush=True)


def fetch(url: str) -> dict[str, Any]:
    """What the metadata API at ``url`` says of its server. Blocks; raises UsageError or UnreachableError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--url {visible(url)}: allowed: http://HOST[:PORT] or https://HOST[:PORT]")
    connection: http.client.HTTPConnection
    try:
        if parts.scheme == "http":
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT)
        else:
            connection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=TIMEOUT, context=_context()
            )
    except ValueError:
        raise UsageError(f"--url {visible(url)}: that is no port") from None
    try:
        connection.request("GET", parts.path.rstrip("/") + "/status")
        answer = connection.getresponse()
        body = answer.read(LARGEST)
        if answer.status != 200:
            raise UnreachableError(f"{visible(url)} answers {answer.status} {visible(answer.reason)}")
        status = json.loads(body)
        if not isinstance(status, dict) or "tunnels" not in status:
            raise ValueError
    except OSError as error:
        raise UnreachableError(f"no server answers at {visible(url)}: {error.strerror or error}") from None
    except (http.client.HTTPException, ValueError):
        raise UnreachableError(f"what answers at {visible(url)} is no tinytun-server") from None
    finally:
        connection.close()
    return status


def _context() -> ssl.SSLContext:
    """The usual check of a certificate, by its alternative names only (RFC 9110 §4.3.4)."""
    context = ssl.create_default_context()
    context.hostname_checks_common_name = False
    return context


# -- in words ------------------------------------------------------------------


def amount(count: float) -> str:
    """Bytes for people: ``999 B``, ``1.5 kB`` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 9.95 else f"{count:.1f} {unit}"


def span(seconds: float) -> str:
    """A time for people: ``59 s``, ``12 min``, ``3 h``, ``2 d``."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def row(tunnel: Mapping[str, Any], now: datetime) -> tuple[str, ...]:
    """The cells of one tunnel, as :data:`COLUMNS` has them."""
    (name,) = tunnel["name"].values()
    since = (now - datetime.fromisoformat(tunnel["since"])).total_seconds()
    cells = (
        tunnel["url"] or name,
        tunnel["kind"],
        tunnel["visitors"],
        amount(tunnel["written_bytes"]),
        amount(tunnel["read_bytes"]),
        span(max(0.0, since)),
        tunnel["remote"],
        tunnel["label"] or "-",
    )
    return tuple(visible(str(cell)) for cell in cells)


def facts(status: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is said of the server as a whole, each with its heading."""
    lag, ports = status["loop_lag_seconds"], status["connections"]
    listed = (
        ("server", f"tinytun-server {status['version']}, up {span(status['uptime_seconds'])}"),
        ("state", "stopping" if status["draining"] else "serving"),
        ("tunnels", f"{len(status['tunnels'])}, {status['leased']} kept for a client that was lost"),
        ("visitors", f"{status['visitors']['http']} HTTP, {status['visitors']['tcp']} TCP"),
        ("connections", _counts(ports)),
        ("bytes", f"{amount(status['bytes']['in'])} in, {amount(status['bytes']['out'])} out"),
        ("exchanges", _counts(status["exchanges"])),
        ("refusals", _counts(status["refusals"])),
        ("descriptors", f"{status['open_fds']} of {status['max_fds']}"),
        ("loop lag", f"{lag['mean'] * 1000:.1f} ms on average, {lag['worst'] * 1000:.0f} ms at worst"),
    )
    return [(heading, visible(text)) for heading, text in listed]


def _counts(counts: Mapping[str, int]) -> str:
    """Those that are not 0."""
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"


def plain(status: Mapping[str, Any]) -> str:
    """All of it as lines of text, for a pipe or a file."""
    lines = [f"{heading + ':':<13}{text}" for heading, text in facts(status)]
    now = datetime.now(UTC)
    rows = [COLUMNS, *(row(tunnel, now) for tunnel in status["tunnels"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if len(rows) > 1:
        lines.append("")
        lines += ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows]
    return "\n".join(lines)


def _for_a_terminal(status: Mapping[str, Any]) -> list[RenderableType]:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    about = Table(box=None, show_header=False, pad_edge=False)
    for heading, text in facts(status):
        about.add_row(Text(heading, style="bold"), Text(text))
    tunnels = Table(*COLUMNS, box=box.SIMPLE)
    now = datetime.now(UTC)
    for tunnel in status["tunnels"]:
        tunnels.add_row(*map(Text, row(tunnel, now)))
    return [about, tunnels] if status["tunnels"] else [about]
