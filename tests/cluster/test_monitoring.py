"""Alerts, dashboard and PodMonitor: what they ask for exists, parses, fires, and is in the runbook."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from cluster.metrics import METRICS, PREFIX
from cluster.monitoring.alerts import ALERTS, RUNBOOK, rule_groups
from cluster.monitoring.dashboard import ROWS, dashboard
from cluster.monitoring.files import monitoring_files
from cluster.monitoring.pod_monitor import pod_monitor, prometheus_rule
from cluster.monitoring.queries import CLUSTER

ROOT = Path(__file__).parents[2]
LABELS = {"release": "prometheus"}
PANELS = [panel for row in ROWS.values() for panel in row]
DRAWN = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]
EXPRESSIONS = [alert.expr for alert in ALERTS] + DRAWN
# Of Ray's C++, where no name is written down but in the programs: gcs_server's and the raylet's.
NATIVE = {
    "node_failure_total": "gcs/gcs_server",
    "object_store_memory": "raylet/raylet",
    "resources": "raylet/raylet",
}


def names_in(expression: str) -> set[str]:
    """Names of metrics, by a parser of PromQL's grammar; ValueError where it is none."""
    promql = importlib.import_module("promql_parser")
    found: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, promql.VectorSelector):
            found.add(node.name)
        elif isinstance(node, promql.MatrixSelector):
            found.add(node.vector_selector.name)

    promql.walk(promql.parse(expression), pre_visit=visit)
    return found


def names_of_ray() -> Iterator[str]:
    """What the installed Ray exports, of what we may ask for."""
    package = ray.__path__[0]
    stages = (Path(package) / "data/_internal/execution/interfaces/op_runtime_metrics.py").read_text()
    yield from (
        f"data_{name}" for name in re.findall(r"^    (\w+): .* = metric_field\($", stages, re.MULTILINE)
    )
    agent = (Path(package) / "dashboard/modules/reporter/reporter_agent.py").read_text()
    yield from re.findall(r'^    "(\w+)": Gauge\($', agent, re.MULTILINE)
    for name, program in NATIVE.items():
        content = (Path(package) / "core/src/ray" / program).read_bytes()
        if b"\0" + name.encode() + b"\0" in content:
            yield name


def test_every_name_that_is_asked_for_is_exported_by_us_or_by_ray() -> None:
    asked = set().union(*(names_in(expression) for expression in EXPRESSIONS))
    ours = {metric.exported for metric in METRICS}
    of_ray = {f"{PREFIX}{name}" for name in names_of_ray()}
    assert asked - ours - of_ray == set()
    assert ours - asked == set(), "a metric that nobody looks at"


def test_the_parser_refuses_what_is_no_promql() -> None:
    with pytest.raises(ValueError, match=r"\S"):
        names_in("sum by (a) (rate(x[5m])")


def test_every_alert_has_its_section_in_the_runbook_and_every_section_its_alert() -> None:
    text = (ROOT / "docs/runbook.md").read_text()
    sections = re.findall(r"^### (Masklake\w+)$", text, re.MULTILINE)
    assert sorted(sections) == sorted(alert.name for alert in ALERTS)
    assert {rule["annotations"]["runbook_url"] for rule in rule_groups()["groups"][0]["rules"]} == {
        f"{RUNBOOK}#{section.lower()}" for section in sections
    }


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_a_summary_asks_for_labels_that_its_expression_leaves(alert: Any) -> None:
    asked = set(re.findall(r"\$labels\.(\w+)", alert.summary))
    left = re.findall(r"by \(([^)]*)\)", alert.expr)
    assert all(asked <= set(labels.split(", ")) for labels in left)
    assert all(CLUSTER in labels.split(", ") for labels in left)


def test_panels_have_places_of_their_own_and_ask_for_the_chosen_cluster() -> None:
    model = dashboard()
    assert model["schemaVersion"] >= 38  # Grafana 10
    assert len({panel["id"] for panel in model["panels"]}) == len(model["panels"]) == len(PANELS) + len(ROWS)
    squares = [
        (x, y)
        for place in (panel["gridPos"] for panel in model["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(squares) == len(set(squares))
    assert max(x for x, _ in squares) < 24  # columns of Grafana's grid
    assert all('ray_io_cluster=~"$cluster"' in expression for expression in DRAWN)
    assert all(
        panel["datasource"]["uid"] == "${datasource}" for panel in model["panels"] if "targets" in panel
    )


@pytest.mark.parametrize("manifest", [pod_monitor("vision", LABELS), prometheus_rule("vision", LABELS)])
def test_the_operators_crds_take_the_manifests(
    manifest: dict[str, Any], problems: Callable[[dict[str, Any]], list[str]]
) -> None:
    assert problems(manifest) == []
    manifest["spec"]["podMetricsEndpoint"] = []
    assert problems(manifest) != []


def test_files_are_yaml_and_json_of_the_same_rules() -> None:
    files = monitoring_files("vision", LABELS, "# made\n")
    assert yaml.safe_load(files["monitoring/alerts.yaml"]) == rule_groups()
    assert yaml.safe_load(files["monitoring/prometheus-rule.yaml"])["spec"] == rule_groups()
    assert json.loads(files["monitoring/dashboard.json"]) == dashboard()
    assert files["monitoring/pod-monitor.yaml"].startswith("# made\n")


# For each alert: series under which it is silent, series under which it fires, and when it is looked at. A
# sample a minute, as promtool writes them: 0+60x5 grows by 60 five times, _ is no sample.
STAGE = 'operator="MapBatches(_LabelActor)_4"'
SCENES: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    "MasklakeNoCommit": (
        {"ray_masklake_last_commit_timestamp_seconds": "0x9 480x40"},
        {"ray_masklake_last_commit_timestamp_seconds": "0x60"},
        "20m",
    ),
    "MasklakeRunGone": (
        {
            'ray_masklake_run_info{run_id="r", command="infer"}': "1x4 _x20",
            'ray_masklake_runs_ended_total{run_id="r", command="infer", status="done"}': "_x4 1x20",
        },
        {'ray_masklake_run_info{run_id="r", command="infer"}': "1x4 stale _x20"},
        "12m",
    ),
    "MasklakeRunFailed": (
        {
            'ray_masklake_runs_ended_total{run_id="r", command="infer", status="done"}': "_x39 1x20",
            'ray_masklake_runs_ended_total{run_id="s", command="infer", status="failed"}': "1x60",
        },
        {'ray_masklake_runs_ended_total{run_id="r", command="infer", status="failed"}': "_x39 1x20"},
        "40m",
    ),
    "MasklakeFailureBudget": (
        {"ray_masklake_failure_budget_used_ratio": "0.7x20"},
        {"ray_masklake_failure_budget_used_ratio": "0.9x20"},
        "10m",
    ),
    "MasklakeActorsPending": (
        {
            f"ray_data_num_pending_actors{{{STAGE}}}": "2x20",
            'ray_resources{Name="GPU", State="AVAILABLE"}': "0x20",
        },
        {
            f"ray_data_num_pending_actors{{{STAGE}}}": "2x20",
            'ray_resources{Name="GPU", State="AVAILABLE"}': "1x20",
        },
        "15m",
    ),
    "MasklakeGpusIdle": (
        {
            'ray_masklake_network_seconds_total{WorkerId="a"}': "0+50x40",
            'ray_masklake_network_seconds_total{WorkerId="gone"}': "500x40",
            f"ray_data_num_alive_actors{{{STAGE}}}": "1x40",
            'ray_resources{Name="GPU", State="USED"}': "1x40",
        },
        {
            'ray_masklake_network_seconds_total{WorkerId="a"}': "0+20x40",
            f"ray_data_num_alive_actors{{{STAGE}}}": "1x40",
            'ray_resources{Name="GPU", State="USED"}': "1x40",
        },
        "35m",
    ),
    "MasklakeObjectStoreSpilling": (
        {'ray_object_store_memory{Location="MMAP_SHM"}': "20000000000x20"},
        {'ray_object_store_memory{Location="SPILLED"}': "20000000000x20"},
        "15m",
    ),
    "MasklakeNodeLost": (
        {"ray_node_failure_total": "_x29 1x10", f"ray_data_num_restarting_actors{{{STAGE}}}": "0x40"},
        {"ray_node_failure_total": "_x29 1x10", f"ray_data_num_restarting_actors{{{STAGE}}}": "0x28 2 0x10"},
        "31m",
    ),
    "MasklakeTrainingStalled": (
        {"ray_masklake_train_last_report_timestamp_seconds": "0x9 480x40"},
        {"ray_masklake_train_last_report_timestamp_seconds": "0x60"},
        "20m",
    ),
    "MasklakeTrainingRestarts": (
        {'ray_masklake_train_starts_total{run_id="r"}': "_x9 1x10 2x10 3x40"},
        {'ray_masklake_train_starts_total{run_id="r"}': "_x9 1x10 2x10 3x10 4x40"},
        "50m",
    ),
    "MasklakeTrainingLossNotFinite": (
        {'ray_masklake_train_nonfinite_losses_total{run_id="r"}': "2x60"},
        {'ray_masklake_train_nonfinite_losses_total{run_id="r"}': "_x39 1x20"},
        "45m",
    ),
    "MasklakeTrainingDataWait": (
        {"ray_masklake_train_data_wait_ratio": "0.1x40"},
        {"ray_masklake_train_data_wait_ratio": "0.3x40"},
        "25m",
    ),
}


def test_every_alert_has_its_scenes() -> None:
    assert SCENES.keys() == {alert.name for alert in ALERTS}


@pytest.mark.slow
def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.fail("no promtool here: apt-get install --no-install-recommends prometheus")
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(rule_groups()))
    tests = []
    for alert in ALERTS:
        silent, firing, at = SCENES[alert.name]
        for series, fires in ((silent, False), (firing, True)):
            labels = {CLUSTER: "c", "instance": "i"}
            expected = [{"exp_labels": _fired(alert, series), "exp_annotations": _texts(alert, series)}]
            tests.append(
                {
                    "name": f"{alert.name} {'fires' if fires else 'is silent'}",
                    "interval": "1m",
                    "input_series": [
                        {"series": _with(selector, labels), "values": values}
                        for selector, values in series.items()
                    ],
                    "alert_rule_test": [
                        {
                            "eval_time": at,
                            "alertname": alert.name,
                            "exp_alerts": expected if fires else [],
                        }
                    ],
                }
            )
    content = {"rule_files": ["alerts.yaml"], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(content))
    command = [promtool, "test", "rules", "tests.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _with(selector: str, labels: dict[str, str]) -> str:
    name, _, own = selector.partition("{")
    more = ", ".join(f'{key}="{value}"' for key, value in labels.items())
    return f"{name}{{{more}{', ' + own if own else '}'}"


def _kept(alert: Any, series: dict[str, str]) -> dict[str, str]:
    """Labels of the alert's own series: those that its expression keeps, with the values of the scene."""
    (first, *_) = series
    own = dict(re.findall(r'(\w+)="([^"]*)"', first)) | {CLUSTER: "c"}
    kept = re.findall(r"by \(([^)]*)\)", alert.expr)[0].split(", ")
    return {label: own[label] for label in kept}


def _fired(alert: Any, series: dict[str, str]) -> dict[str, str]:
    return _kept(alert, series) | {"severity": alert.severity}


def _texts(alert: Any, series: dict[str, str]) -> dict[str, str]:
    text = alert.summary
    for label, value in _kept(alert, series).items():
        text = text.replace(f"{{{{ $labels.{label} }}}}", value)
    return {"summary": text, "runbook_url": f"{RUNBOOK}#{alert.anchor}"}
