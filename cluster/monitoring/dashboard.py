"""What is drawn: a dashboard for Grafana 10 and later.

Enters: nothing. Leaves: the dashboard's JSON model, to be imported. Data source and cluster are asked for at
its top; sums are over the cluster that was chosen.

Source of the fields: Grafana's dashboard JSON model, schemaVersion 39 (Grafana 10.4).
"""

from dataclasses import dataclass
from typing import Any

from cluster import metrics
from cluster.monitoring.queries import (
    ACTORS,
    CLUSTER,
    PENDING_ACTORS,
    SPILLED_BYTES,
    UNITS_WAITING,
    busy_share,
    newest,
    oldest,
    per_cluster,
    rate,
)

SCHEMA_VERSION = 39
_WINDOW = "5m"
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 3
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    """A chart. lines: legend -> PromQL, before it is narrowed to a cluster; unit: one of Grafana's."""

    title: str
    lines: dict[str, str]
    unit: str = "short"
    help: str = ""


LABELLING = (
    Panel(
        "Images committed",
        {
            "{{status}} {{error_kind}}": rate(metrics.IMAGES, _WINDOW, "status", "error_kind"),
        },
        "cps",
        "Images a second, by status and error kind, counted at commits.",
    ),
    Panel(
        "Age of the last commit",
        {"age": f"time() - {oldest(metrics.LAST_COMMIT)}"},
        "s",
        "commit.every_s, and no more than a unit longer, while all is well.",
    ),
    Panel(
        "Actors' share of time",
        {
            "in the network": busy_share(_WINDOW),
            "with a unit": f"{rate(metrics.LABEL_SECONDS, _WINDOW)} / ({ACTORS} > 0)",
        },
        "percentunit",
        "Time with a unit and not in the network is decoding; time without a unit is waiting for reads.",
    ),
    Panel(
        "Waiting",
        {
            "units for actors": UNITS_WAITING,
            "images for a commit": newest(metrics.UNCOMMITTED_IMAGES),
            "actors for room": PENDING_ACTORS,
        },
        help="Units are Ray Data's blocks before the label stage.",
    ),
    Panel(
        "Bytes",
        {"read": rate(metrics.READ_BYTES, _WINDOW), "written": rate(metrics.WRITTEN_BYTES, _WINDOW)},
        "Bps",
    ),
    Panel("Failure budget used", {"used": newest(metrics.BUDGET_USED)}, "percentunit"),
    Panel("Label actors", {"alive": ACTORS}),
    Panel("Detections committed", {"detections": rate(metrics.DETECTIONS, _WINDOW)}, "cps"),
    Panel("Commits", {"commits": rate(metrics.COMMITS, _WINDOW)}, "cps"),
)
TRAINING = (
    Panel("Loss", {"loss": newest(metrics.TRAIN_LOSS)}),
    Panel("Time of a step", {"step": newest(metrics.TRAIN_STEP_SECONDS)}, "s"),
    Panel("Waiting for data", {"share": newest(metrics.TRAIN_DATA_WAIT)}, "percentunit"),
    Panel("Steps", {"step": newest(metrics.TRAIN_STEP)}),
    Panel("Workers", {"workers": newest(metrics.TRAIN_WORKERS)}),
    Panel(
        "Starts of the workers",
        {"{{run_id}}": per_cluster(metrics.TRAIN_STARTS.exported, "run_id")},
    ),
)
MACHINES = (
    Panel(
        "GPUs in use",
        {"{{instance}}": f"sum by ({CLUSTER}, instance) (ray_node_gpus_utilization)"},
        "percent",
    ),
    Panel(
        "CPUs in use", {"{{instance}}": f"sum by ({CLUSTER}, instance) (ray_node_cpu_utilization)"}, "percent"
    ),
    Panel(
        "Memory",
        {"{{instance}}": f"sum by ({CLUSTER}, instance) (ray_node_mem_used)"},
        "bytes",
    ),
    Panel("Objects on disk", {"spilled": SPILLED_BYTES}, "bytes"),
    Panel("Nodes", {"active": per_cluster("ray_cluster_active_nodes")}),
    Panel("Nodes ended", {"ended": per_cluster("ray_node_failure_total")}),
)
ROWS = {"Labelling": LABELLING, "Training": TRAINING, "Machines": MACHINES}


def dashboard() -> dict[str, Any]:
    """The JSON model."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        panels.append(_row(title, top, len(panels) + 1))
        top += 1
        for number, panel in enumerate(row):
            place = {
                "x": _WIDTH * (number % _COLUMNS),
                "y": top + _HEIGHT * (number // _COLUMNS),
                "w": _WIDTH,
                "h": _HEIGHT,
            }
            panels.append(_chart(panel, place, len(panels) + 1))
        top += _HEIGHT * -(-len(row) // _COLUMNS)
    return {
        "title": "masklake",
        "uid": "masklake",
        "tags": ["masklake", "ray"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [_source_variable(), _cluster_variable()]},
        "annotations": {"list": []},
        "panels": panels,
    }


def _row(title: str, top: int, number: int) -> dict[str, Any]:
    place = {"x": 0, "y": top, "w": _WIDTH * _COLUMNS, "h": 1}
    return {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _chart(panel: Panel, place: dict[str, int], number: int) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + index), "datasource": _SOURCE, "expr": _chosen(expr), "legendFormat": legend}
        for index, (legend, expr) in enumerate(panel.lines.items())
    ]
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.help,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True}},
        "targets": targets,
    }


def _chosen(expr: str) -> str:
    """Of the cluster that was chosen: joined, for every expression is grouped by it."""
    chosen = f'group by ({CLUSTER}) (ray_cluster_active_nodes{{{CLUSTER}=~"$cluster"}})'
    return f"({expr}) and on ({CLUSTER}) {chosen}"


def _source_variable() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}


def _cluster_variable() -> dict[str, Any]:
    query = f"label_values(ray_cluster_active_nodes, {CLUSTER})"
    return {
        "name": "cluster",
        "type": "query",
        "label": "Cluster",
        "datasource": _SOURCE,
        "definition": query,
        "query": {"query": query, "refId": "cluster"},
        "refresh": 2,
        "sort": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",  # also where there is no such label
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }
