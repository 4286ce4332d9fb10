"""The command `masklake schedule`: what a scheduler takes, on stdout; the next runs, on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schemas.durations import parse_duration
from schemas.errors import UsageError

if TYPE_CHECKING:
    from cluster.kubernetes.pools import RayCluster
    from cluster.schedule.cron import ClockChange, CronSchedule

_NUM_RUNS = 5
# Of a time that the clocks leave out, and of one that comes twice. Kubernetes: its issue 121594 and pull
# request 541 of robfig/cron, which KubeRay uses too. Others: as run, cronsim 2.8, Airflow 3.3, Dagster 1.13.
_CLOCK_RULES = {
    "kubernetes": ("no run", "two runs"),
    "raycronjob": ("no run", "two runs"),
    "crontab": ("a run right after", "one run, at the first"),
    "airflow": ("a run later by as much", "one run, at the second"),
    "dagster": ("a run right after", "one run, at the second"),
}


class Target(StrEnum):
    """What starts the runs."""

    KUBERNETES = "kubernetes"
    RAYCRONJOB = "raycronjob"
    CRONTAB = "crontab"
    AIRFLOW = "airflow"
    DAGSTER = "dagster"

    @property
    def is_cluster(self) -> bool:
        return self in (Target.KUBERNETES, Target.RAYCRONJOB)


def schedule(
    spec_file: Annotated[Path, typer.Argument(help="spec file (YAML) of masklake relabel")],
    cron: Annotated[str, typer.Option(help="minute, hour, day of month, month, day of week: '0 2 * * *'")],
    timezone: Annotated[str, typer.Option(help="IANA time zone of --cron")] = "UTC",
    target: Annotated[Target, typer.Option("--for", help="what starts the runs")] = Target.KUBERNETES,
    name: Annotated[str, typer.Option(help="of the schedule; one for each")] = "masklake-relabel",
    deadline: Annotated[str, typer.Option(help="a run that takes longer is ended: 90m, 24h, …")] = "24h",
    image: Annotated[str | None, typer.Option(help="cluster: image with masklake and Ray")] = None,
    namespace: Annotated[str | None, typer.Option(help="cluster: namespace (default)")] = None,
    secret: Annotated[
        list[str] | None, typer.Option(help="cluster: Secret that becomes environment variables; repeatable")
    ] = None,
    service_account: Annotated[str | None, typer.Option(help="cluster: of the Ray pods")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="cluster: worker pods (1)")] = None,
    worker_cpu: Annotated[str | None, typer.Option(help="cluster: of each worker (4)")] = None,
    worker_memory: Annotated[str | None, typer.Option(help="cluster: of each worker (16Gi)")] = None,
    worker_gpus: Annotated[int | None, typer.Option(min=0, help="cluster: of each worker (0)")] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="print text and next runs as one JSON object, the last line of stdout"),
    ] = False,
) -> None:
    """Print what makes a scheduler re-label: a manifest, a crontab line, a Python file. Starts nothing."""
    from cluster.kubernetes.pools import check_name
    from cluster.schedule.cron import CronSchedule
    from schemas.relabel_spec import RelabelSpec
    from schemas.spec_file import read_spec_file
    from schemas.spec_loader import parse_spec

    spec = read_spec_file(str(spec_file))
    budget_s = parse_spec(RelabelSpec, spec, str(spec_file)).budget.time_s
    parsed = CronSchedule.parse(cron, timezone)
    check_name(name)
    cluster_options = {
        "image": image,
        "namespace": namespace,
        "secrets": tuple(secret) if secret else None,
        "service_account": service_account,
        "num_workers": workers,
        "worker_cpu": worker_cpu,
        "worker_memory": worker_memory,
        "worker_gpus": worker_gpus,
    }
    given = {key: value for key, value in cluster_options.items() if value is not None}
    deadline_s = int(parse_duration(deadline))
    if deadline_s < 60:
        raise UsageError(f"--deadline {deadline} is less than a minute, in which no run does anything")
    if budget_s is not None and budget_s >= deadline_s:
        raise UsageError(
            f"--deadline {deadline} ends a run before its budget.time_s of {budget_s:g} s does, and not "
            "after a commit: wanted a longer one"
        )
    now = datetime.now(UTC)
    if target.is_cluster:
        text = _manifests(target, parsed, _cluster(target, name, deadline_s, given), spec)
    elif given:
        raise UsageError(
            f"{_flag(next(iter(given)))} is for kubernetes and raycronjob; --for {target} runs on the "
            "scheduler's own machine"
        )
    else:
        text = _snippet(target, parsed, name, spec_file, now, deadline_s)
    runs = parsed.next_runs(now, _NUM_RUNS, as_cron=not target.is_cluster)
    changes = parsed.clock_changes(now)
    if as_json:
        print(json.dumps({"text": text, **_preview_dict(runs, changes)}))
        return
    print(text, end="")
    print(_preview_text(target, parsed, runs, changes), file=sys.stderr)


def _cluster(target: Target, name: str, deadline_s: int, given: Mapping[str, Any]) -> RayCluster:
    from cluster.kubernetes.pools import Pool, RayCluster

    if "image" not in given:
        raise UsageError(
            f"--for {target} wants --image: an image with masklake and Ray that its nodes can pull; "
            "without a cluster, --for crontab needs none"
        )
    number = given.get("num_workers", 1)
    size = {key: given[f"worker_{key}"] for key in ("cpu", "memory", "gpus") if f"worker_{key}" in given}
    workers = Pool("workers", min_nodes=number, max_nodes=number, **size)
    of_cluster = {key: given[key] for key in ("image", "secrets", "service_account") if key in given}
    namespace = given.get("namespace", "default")
    return RayCluster(name, namespace, pools=(workers,), deadline_s=deadline_s, **of_cluster)


def _manifests(target: Target, parsed: CronSchedule, cluster: RayCluster, spec: Mapping[str, Any]) -> str:
    from cluster.kubernetes.cron_job import cron_job_manifests, ray_cron_job_manifests
    from cluster.kubernetes.yaml_text import to_yaml

    render = cron_job_manifests if target is Target.KUBERNETES else ray_cron_job_manifests
    return to_yaml(render(parsed, cluster, spec))


def _snippet(
    target: Target, parsed: CronSchedule, name: str, spec_file: Path, now: datetime, deadline_s: int
) -> str:
    from cluster.schedule.snippets import airflow_dag, crontab, dagster_definitions

    # Relative URIs of the spec count from where the command is given.
    folder, path = str(Path.cwd()), str(spec_file.absolute())
    if target is Target.CRONTAB:
        return crontab(parsed, name, folder, path, deadline_s=deadline_s)
    if target is Target.AIRFLOW:
        return airflow_dag(parsed, name, folder, path, now=now, deadline_s=deadline_s)
    return dagster_definitions(parsed, name, folder, path, deadline_s=deadline_s)


def _preview_dict(runs: list[datetime], changes: list[ClockChange]) -> dict[str, Any]:
    return {
        "next_runs": [
            {"local": run.isoformat(), "utc": run.astimezone(UTC).isoformat().replace("+00:00", "Z")}
            for run in runs
        ],
        "clock_changes": [
            {"local": change.wall.isoformat(), "is_missing": change.is_missing} for change in changes
        ],
    }


def _preview_text(
    target: Target, parsed: CronSchedule, runs: list[datetime], changes: list[ClockChange]
) -> str:
    lines = [f"next runs of {parsed.expression!r} in {parsed.timezone}:"]
    lines += [f"  {run:%a %Y-%m-%d %H:%M %Z}  {run.astimezone(UTC):%Y-%m-%d %H:%M} UTC" for run in runs]
    if_missing, if_twice = _CLOCK_RULES[target]
    for change in changes:
        what = f"does not exist: {if_missing}" if change.is_missing else f"comes twice: {if_twice}"
        lines.append(
            f"clocks change: {change.wall:%Y-%m-%d %H:%M} {what}. Another hour, or UTC, is undisturbed"
        )
    return "\n".join(lines)


def _flag(option: str) -> str:
    names = {"num_workers": "--workers", "secrets": "--secret"}
    return names.get(option, f"--{option.replace('_', '-')}")
