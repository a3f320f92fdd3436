"""The examples for Prometheus and Grafana: what promtool says of them; that there are such metrics."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from server_process import DEADLINE, ROOT

from tinytun_gevent.server.config import ServerConfig
from tinytun_gevent.server.metrics import METRICS

CONF = ROOT / "conf"
RULES = CONF / "prometheus-rules.yml"
UNIT_TESTS = ROOT / "tests" / "prometheus-rules-test.yml"
DASHBOARD: dict[str, Any] = json.loads((CONF / "grafana-dashboard.json").read_text())
WIDTH = 24
"""Columns of Grafana's grid."""

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", *arguments], capture_output=True, text=True, timeout=DEADLINE, check=False
    )


def expressions() -> list[str]:
    """Every PromQL expression of the dashboard, with Grafana's variables filled in."""
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    found += [annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]]
    return [
        expr.replace("$__rate_interval", "1m").replace("$job", ".+").replace("$instance", ".+")
        for expr in found
    ]


def metrics_in(text: str) -> set[str]:
    """Metrics of this server that ``text`` names, without what a histogram adds."""
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\btinytun_\w+", text)}


# -- the rules ----------------------------------------------------------------


@needs_promtool
def test_promtool_takes_the_configuration_and_its_rules() -> None:
    done = promtool("check", "config", str(CONF / "prometheus.yml"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 rule files found" in done.stdout


@needs_promtool
def test_each_alert_fires_when_it_should_and_not_before() -> None:
    done = promtool("test", "rules", str(UNIT_TESTS))
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_unit_test() -> None:
    alerts = re.findall(r"(?m)^ +- alert: (\w+)$", RULES.read_text())
    assert len(alerts) == len(set(alerts)) >= 10
    assert set(re.findall(r"(?m)^ +alertname: (\w+)\n +exp_alerts:\n", UNIT_TESTS.read_text())) == set(alerts)


def test_each_alert_says_how_bad_it_is_and_what_to_do() -> None:
    alerts = re.split(r"(?m)^ +- alert: ", RULES.read_text())[1:]
    for alert in alerts:
        assert re.search(r"(?m)^ +severity: (critical|warning)$", alert), alert
        assert re.search(r"(?m)^ +summary: .+", alert), alert
        assert re.search(r"(?m)^ +description: >-\n +\S", alert), alert


def test_rules_and_their_tests_use_only_metrics_that_the_server_has() -> None:
    assert metrics_in(RULES.read_text()) <= set(METRICS)
    assert metrics_in(UNIT_TESTS.read_text()) == metrics_in(RULES.read_text())


def test_what_is_scraped_is_the_metadata_port_under_the_name_that_the_rules_use() -> None:
    text = (CONF / "prometheus.yml").read_text()
    config = ServerConfig()
    assert f"- {config.metadata_bind}:{config.metadata_port}\n" in text
    (job,) = re.findall(r"job_name: (\w+)", text)
    assert f'up{{job="{job}"}}' in RULES.read_text()


# -- the dashboard ------------------------------------------------------------


def test_the_dashboard_can_be_imported_and_has_six_panels() -> None:
    assert DASHBOARD["id"] is None
    assert DASHBOARD["uid"] is None
    assert DASHBOARD["schemaVersion"] >= 36
    (source,) = DASHBOARD["__inputs"]
    assert (source["name"], source["type"]) == ("DS_PROMETHEUS", "datasource")
    panels = DASHBOARD["panels"]
    assert len(panels) == 6
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == 6
    variables = DASHBOARD["templating"]["list"]
    for part in [*panels, *variables, *(target for panel in panels for target in panel["targets"])]:
        assert part["datasource"] == {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}


def test_no_panel_lies_on_another_or_out_of_sight() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    for place in places:
        assert 0 <= place["x"] < place["x"] + place["w"] <= WIDTH
    for one, other in itertools.combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)


def test_the_dashboard_uses_only_metrics_that_the_server_has() -> None:
    used = metrics_in("\n".join(expressions()))
    assert used <= set(METRICS)
    assert len(used) >= 10
    queries = "\n".join(variable["definition"] for variable in DASHBOARD["templating"]["list"])
    assert metrics_in(queries) <= set(METRICS)


@needs_promtool
def test_every_expression_of_the_dashboard_is_valid(tmp_path: Path) -> None:
    rules = tmp_path / "rules.json"  # which is YAML as well
    recorded = [{"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(expressions())]
    rules.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": recorded}]}))
    done = promtool("check", "rules", str(rules))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(recorded)} rules found" in done.stdout


@needs_promtool
def test_promtool_finds_a_mistake_in_an_expression(tmp_path: Path) -> None:
    """Otherwise the test above says nothing."""
    rules = tmp_path / "rules.json"
    broken = [{"record": "panel:0", "expr": expressions()[0].replace(")", "", 1)}]
    rules.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": broken}]}))
    assert promtool("check", "rules", str(rules)).returncode != 0
