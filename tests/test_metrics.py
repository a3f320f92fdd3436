"""The metrics as Prometheus reads them: names, labels, values, both formats; no stranger's words."""

from __future__ import annotations

import http.client
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from certificates import install, issue
from conftest import OpenTunnel, StartServer, StartService
from prometheus_client import REGISTRY, Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from support import DEADLINE, eventually, get

from tinytun_gevent import TunnelServer, __version__
from tinytun_gevent.server.metrics import METRICS
from tinytun_gevent.server.sight import PORTS
from tinytun_gevent.server.tally import EXCHANGE_BOUNDS, GOAWAY_REASONS, Refusal

OPENMETRICS = "application/openmetrics-text; version=1.0.0"

LABELS: dict[str, dict[str, set[str]]] = {
    "tinytun_tunnels": {"kind": {"http", "tcp"}},
    "tinytun_visitors": {"kind": {"http", "tcp"}},
    "tinytun_connections": {"port": {"connection", "proxy", "proxy_tls", "tcp_proxy", "metadata", "tcp"}},
    "tinytun_exchanges_total": {"class": {"1xx", "2xx", "3xx", "4xx", "5xx", "none"}},
    "tinytun_bytes_total": {"direction": {"in", "out"}},
    "tinytun_exchange_seconds_bucket": {"le": {*map(str, EXCHANGE_BOUNDS), "+Inf"}},
    "tinytun_refusals_total": {"reason": {reason.value for reason in Refusal}},
    "tinytun_goaways_total": {"direction": {"sent", "received"}, "reason": set(GOAWAY_REASONS)},
    "tinytun_build_info": {"version": {__version__}},
}
"""Every label there is, but the loop lag's bounds and the names of certificates."""


def scrape(server: TunnelServer, accept: str = "") -> tuple[str, str]:
    """The media type and the text of the metrics."""
    connection = http.client.HTTPConnection("127.0.0.1", server.metadata_port, timeout=DEADLINE)
    connection.request("GET", "/metrics", headers={"Accept": accept} if accept else {})
    answer = connection.getresponse()
    assert answer.status == 200
    body = answer.read().decode()
    connection.close()
    return answer.headers["Content-Type"], body


def values(families: Iterable[Metric]) -> dict[str, dict[tuple[str, ...], float]]:
    """The samples by name and label values."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in families:
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def read(server: TunnelServer) -> dict[str, dict[tuple[str, ...], float]]:
    return values(parse_text(scrape(server)[1]))


def test_every_metric_is_there_from_the_start_with_its_meaning(server: TunnelServer) -> None:
    _, text = scrape(server)
    names = set(re.findall(r"(?m)^# TYPE (\S+) ", text))
    assert names == set(METRICS) - {"tinytun_certificate_expiry_seconds"}
    for name in names:
        assert f"# HELP {name} {METRICS[name]}\n" in text


def test_labels_have_a_fixed_vocabulary_all_of_which_is_exported(server: TunnelServer) -> None:
    seen: dict[str, dict[str, set[str]]] = {}
    for family in parse_text(scrape(server)[1]):
        for sample in family.samples:
            for label, value in sample.labels.items():
                seen.setdefault(sample.name, {}).setdefault(label, set()).add(value)
    seen.pop("tinytun_loop_lag_seconds_bucket")
    assert seen == LABELS
    assert set(PORTS) == LABELS["tinytun_connections"]["port"]


def test_the_values_are_what_happened(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    open_tunnel(start_service())
    for name, count in (("demo", 3), ("nobody", 2)):
        for _ in range(count):
            get(server.proxy_port, name)
    eventually(lambda: sum(server.core.tally.statuses) == 5)
    found = read(server)
    assert found["tinytun_tunnels"] == {("http",): 1, ("tcp",): 0}
    assert found["tinytun_sessions"] == {(): 1}
    assert found["tinytun_exchanges_total"][("2xx",)] == 3
    assert found["tinytun_exchanges_total"][("4xx",)] == 2
    assert found["tinytun_exchange_seconds_count"] == {(): 5}
    assert found["tinytun_exchange_seconds_bucket"][("+Inf",)] == 5
    assert found["tinytun_bytes_total"][("in",)] == server.core.tally.bytes_in > 0
    assert found["tinytun_connections"][("connection",)] == 1
    assert found["tinytun_connections"][("metadata",)] == 1
    assert found["tinytun_tunnels_opened_total"] == {(): 1}
    assert 5 < found["tinytun_open_fds"][()] <= found["tinytun_max_fds"][()]
    assert found["tinytun_draining"] == {(): 0}
    buckets = [found["tinytun_exchange_seconds_bucket"][(str(bound),)] for bound in EXCHANGE_BOUNDS]
    assert buckets == sorted(buckets)


def test_a_stranger_s_words_are_nowhere(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    open_tunnel(start_service(), "stranger")
    get(server.proxy_port, "stranger", "/stranger?stranger", b"User-Agent: stranger")
    get(server.proxy_port, "stranger-too", "/")
    assert "stranger" not in scrape(server)[1]


def test_openmetrics_is_spoken_to_who_asks_for_it(server: TunnelServer) -> None:
    media_type, text = scrape(server, OPENMETRICS)
    assert media_type.startswith("application/openmetrics-text")
    found = values(parse_openmetrics(text))
    assert found["tinytun_build_info"] == {(__version__,): 1}
    assert found["tinytun_refusals_total"].keys() == {(reason.value,) for reason in Refusal}
    assert scrape(server)[0].startswith("text/plain; version=")


def test_the_certificates_that_are_shown_are_the_server_s(start_server: StartServer, tmp_path: Path) -> None:
    install(tmp_path, issue("*.localhost", "localhost"))
    server = start_server(tls_dir=str(tmp_path), proxy_tls_port=0)
    assert server.core.certificates is not None
    found = read(server)["tinytun_certificate_expiry_seconds"]
    assert found == {(name,): end for name, end in server.core.certificates.ends().items()}
    assert found.keys() == {("*.localhost",), ("localhost",)}
    assert min(found.values()) > time.time()


def test_nothing_is_registered_for_the_whole_process(server: TunnelServer) -> None:
    scrape(server)
    assert not [name for name in REGISTRY._names_to_collectors if name.startswith("tinytun")]
    text = scrape(server)[1]
    assert "python_info" not in text
    assert "process_" not in text


def test_two_servers_in_one_process_count_apart(server: TunnelServer, start_server: Any) -> None:
    other = start_server()
    get(server.proxy_port, "nobody")
    eventually(lambda: read(server)["tinytun_exchanges_total"][("4xx",)] == 1)
    assert read(other)["tinytun_exchanges_total"][("4xx",)] == 0


def test_prometheus_s_library_is_not_imported_before_the_first_scrape() -> None:
    program = "import sys, tinytun_gevent.server.worker; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
