"""Every figure of the tables: its name, its unit, the scenario that brings it, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass

MORE = "more"
LESS = "less"


@dataclass(frozen=True)
class Measure:
    """One row of the tables."""

    key: str
    section: str
    title: str
    unit: str
    scenario: str  # that brings it
    better: str = MORE


def _requests(connections: int, suffix: str = "", words: str = "") -> list[Measure]:
    name = f"keepalive-{connections}{suffix}"
    who = f"{connections} kept connection{'s' if connections > 1 else ''}{words}"
    return [
        Measure(name, "Requests", f"requests on {who}", "a second", name),
        Measure(f"{name}-p50", "Requests", f"… latency, {who}, median", "ms", name, LESS),
        Measure(f"{name}-p99", "Requests", f"… latency, {who}, 99 %", "ms", name, LESS),
        Measure(f"{name}-cpu", "CPU", f"10,000 requests on {who}", "s", name, LESS),
    ]


def _crowd(visitors: int) -> list[Measure]:
    name = f"visitors-{visitors}"
    return [
        Measure(name, "Requests", f"requests of {visitors:,} visitors", "a second", name),
        Measure(f"{name}-cpu", "CPU", f"10,000 requests of {visitors:,} visitors", "s", name, LESS),
    ]


def _websockets(sockets: int) -> list[Measure]:
    name = f"websocket-{sockets}"
    who = f"{sockets} WebSocket{'s' if sockets > 1 else ''}"
    return [
        Measure(name, "Messages", f"messages there and back, {who}", "a second", name),
        Measure(f"{name}-p50", "Messages", f"… latency, {who}, median", "ms", name, LESS),
        Measure(f"{name}-p99", "Messages", f"… latency, {who}, 99 %", "ms", name, LESS),
        Measure(f"{name}-cpu", "CPU", f"10,000 messages, {who}", "s", name, LESS),
    ]


def _idle(visitors: int) -> list[Measure]:
    name = f"idle-{visitors}"
    beside = f"beside {visitors:,} idle visitors"
    return [
        Measure(f"{name}-memory", "Memory", f"an idle visitor, of {visitors:,}", "KiB", name, LESS),
        Measure(f"{name}-rate", "Memory", f"requests on 1 connection {beside}", "a second", name),
        Measure(f"{name}-p99", "Memory", f"… latency {beside}, 99 %", "ms", name, LESS),
        Measure(f"{name}-cpu", "CPU", f"10,000 requests {beside}", "s", name, LESS),
    ]


def _far(path: str, words: str) -> list[Measure]:
    one, eight = f"far-{path}-1", f"far-{path}-8"
    return [
        measure
        for name, who in ((one, "one visitor"), (eight, "eight visitors"))
        for measure in (
            Measure(name, "Long paths", f"download over {words}, {who}", "MB/s", name),
            Measure(f"{name}-first", "Long paths", "… in its first second", "MB/s", name),
        )
    ]


_STALLED = "download-20-stalled"

MEASURES: tuple[Measure, ...] = (
    Measure("download", "Bulk", "download", "GB/s", "download"),
    Measure("upload", "Bulk", "upload", "GB/s", "upload"),
    Measure("download-20", "Bulk", "20 downloads at once", "GB/s", "download-20"),
    Measure(_STALLED, "Bulk", "20 downloads beside a stalled one", "GB/s", _STALLED),
    Measure("stalled-ratio", "Bulk", "… of what they get without it", "times", _STALLED),
    Measure("stalled-memory", "Memory", "one that never read, of 8", "MiB", _STALLED, LESS),
    Measure("stalled-late-memory", "Memory", "one that stopped reading after 1 s", "MiB", _STALLED, LESS),
    *_requests(1),
    *_requests(1, "-whole", ", answers in one packet"),
    Measure("added", "Requests", "… added by the tunnel, 1 kept connection", "ms", "keepalive-1", LESS),
    *_requests(32),
    *_requests(256),
    Measure("connections", "Requests", "new connections, 32 at a time", "a second", "connections"),
    Measure("connections-p99", "Requests", "… latency, new connections, 99 %", "ms", "connections", LESS),
    *_crowd(10),
    *_crowd(100),
    *_crowd(1000),
    *_websockets(1),
    *_websockets(100),
    Measure("chunks", "Messages", "chunks of 100 bytes", "a second", "chunks"),
    Measure("mixed-p50", "Requests", "latency beside a download, median", "ms", "mixed", LESS),
    Measure("mixed-p99", "Requests", "latency beside a download, 99 %", "ms", "mixed", LESS),
    Measure("mixed-download", "Requests", "… the download meanwhile", "GB/s", "mixed"),
    Measure("download-cpu", "CPU", "a GB down", "s", "download", LESS),
    Measure("upload-cpu", "CPU", "a GB up", "s", "upload", LESS),
    Measure("download-20-cpu", "CPU", "a GB down, 20 at once", "s", "download-20", LESS),
    Measure("connections-cpu", "CPU", "10,000 new connections", "s", "connections", LESS),
    Measure("chunks-cpu", "CPU", "a million chunks", "s", "chunks", LESS),
    *_idle(2000),
    *_idle(10000),
    Measure("tunnel-memory", "Memory", "an idle tunnel of 1,000, server", "KiB", "tunnels-1000", LESS),
    Measure("first-byte", "Long paths", "first byte, new visitor, 50 ms, median", "ms", "first-byte", LESS),
    Measure("burst-p99", "Long paths", "first byte, 32 at once, 50 ms, 99 %", "ms", "burst", LESS),
    Measure("far-request-p50", "Long paths", "kept connection, 50 ms, median", "ms", "far-request", LESS),
    Measure("far-request-p99", "Long paths", "kept connection, 50 ms, 99 %", "ms", "far-request", LESS),
    *_far("50ms", "50 ms"),
    *_far("50ms-4MiB", "50 ms, 4 MiB in flight a connection"),
    *_far("50ms-1Gbit", "50 ms, 1 Gbit/s"),
    *_far("100ms", "100 ms"),
    *_far("100ms-1Gbit", "100 ms, 1 Gbit/s"),
    Measure("far-mixed-p99", "Long paths", "beside a download, 1 Gbit/s, 99 %", "ms", "far-mixed", LESS),
    Measure("far-mixed-added", "Long paths", "… how much later than without it", "ms", "far-mixed", LESS),
    Measure("far-mixed-download", "Long paths", "… the download meanwhile", "MB/s", "far-mixed"),
    Measure("start", "Start", "client process start to first answered request", "s", "start", LESS),
    Measure("version", "Start", "`tinytun --version`", "s", "version", LESS),
)  # fmt: skip

SECTIONS = tuple(dict.fromkeys(measure.section for measure in MEASURES))
