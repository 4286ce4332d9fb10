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

from jobs.cluster_options import (
    DEADLINE,
    AllowedEndpoints,
    ClusterOptions,
    Image,
    Namespace,
    Secrets,
    ServiceAccount,
    WorkerCpu,
    WorkerGpus,
    WorkerMemory,
    Workers,
    deadline_seconds,
)
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
    deadline: Annotated[str, typer.Option(help="a run that takes longer is ended: 90m, 24h, …")] = DEADLINE,
    image: Image = None,
    namespace: Namespace = None,
    secret: Secrets = None,
    service_account: ServiceAccount = None,
    allow_endpoint: AllowedEndpoints = None,
    workers: Workers = None,
    worker_cpu: WorkerCpu = None,
    worker_memory: WorkerMemory = None,
    worker_gpus: WorkerGpus = None,
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
    options = ClusterOptions(
        image,
        namespace,
        secret,
        service_account,
        allow_endpoint,
        workers,
        worker_cpu,
        worker_memory,
        worker_gpus,
    )
    deadline_s = deadline_seconds(deadline)
    if budget_s is not None and budget_s >= deadline_s:
        raise UsageError(
            f"--deadline {deadline} ends a run before its budget.time_s of {budget_s:g} s does, and not "
            "after a commit: wanted a longer one"
        )
    now = datetime.now(UTC)
    if target.is_cluster:
        # A night that failed is left to the next one.
        cluster = options.cluster(name, deadline_s, retries=0, wanted_by=f"--for {target}")
        text = _manifests(target, parsed, cluster, spec)
    elif given := options.first_given():
        raise UsageError(
            f"{given} is for kubernetes and raycronjob; --for {target} runs on the scheduler's own machine"
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
