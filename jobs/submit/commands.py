"""The commands `masklake submit` and `masklake jobs …`; jobs.cli hangs them in."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from enum import StrEnum
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
    from ray.job_submission import JobDetails

    from cluster.jobs_api import JobsApi
    from cluster.kubernetes.pools import RayCluster
    from jobs.submit.outcome import Outcome

# Each a new cluster that goes on from the last commit, as in cluster/examples.py.
_RETRIES = 3

app = typer.Typer(name="jobs", help="Jobs on a cluster: list, status, logs, stop.", no_args_is_help=True)


class Job(StrEnum):
    """What runs on a cluster."""

    INFER = "infer"
    RELABEL = "relabel"
    TRAIN = "train"


class Render(StrEnum):
    """What is written instead of submitting."""

    KUBERAY = "kuberay"


Address = Annotated[
    str | None,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS",
        help="the head's dashboard, such as http://head:8265",
        show_envvar=True,
    ),
]
SubmissionId = Annotated[str, typer.Argument(help="as `masklake submit` printed it")]
Json = Annotated[
    bool, typer.Option("--json", help="print the result as one JSON object, the last line of stdout")
]


def submit(
    job: Annotated[Job, typer.Argument(help="what to run")],
    spec_file: Annotated[str, typer.Argument(help="spec file (YAML); --set overrides it")],
    address: Address = None,
    overrides: Annotated[list[str], typer.Option("--set", help="override one setting of the spec")] = [],  # noqa: B006 - Typer reads the default, nobody changes it
    wait: Annotated[bool, typer.Option("--wait", help="until it ends; its exit status becomes ours")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="--wait, and print its log as it comes")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print what would be sent; send nothing")
    ] = False,
    submission_id: Annotated[
        str | None, typer.Option(help="of your own, such as a scheduler's run id")
    ] = None,
    env: Annotated[
        list[str],
        typer.Option("--env", help="NAME=VALUE of the driver and its workers; no secrets; repeatable"),
    ] = [],  # noqa: B006 - likewise
    render: Annotated[Render | None, typer.Option(help="print a manifest instead, and send nothing")] = None,
    name: Annotated[str | None, typer.Option(help="manifest: of the RayJob (masklake-JOB)")] = None,
    deadline: Annotated[
        str | None, typer.Option(help=f"manifest: a try that takes longer is ended ({DEADLINE})")
    ] = None,
    image: Image = None,
    namespace: Namespace = None,
    secret: Secrets = None,
    service_account: ServiceAccount = None,
    allow_endpoint: AllowedEndpoints = None,
    workers: Workers = None,
    worker_cpu: WorkerCpu = None,
    worker_memory: WorkerMemory = None,
    worker_gpus: WorkerGpus = None,
    as_json: Json = False,
) -> None:
    """Run infer, relabel or train on a cluster that is there: the same command, through Ray's Jobs API."""
    from jobs.submit.request import checked_spec, make_request, parse_variables

    spec = checked_spec(job.value, spec_file, overrides)
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
    if render is not None:
        sent = {"env": env, "submission-id": submission_id, "wait": wait, "follow": follow}
        if of_sending := _first_given(sent | {"dry-run": dry_run, "json": as_json}):
            raise UsageError(
                f"--{of_sending} is of a job that is sent, and --render {render} sends none: leave it out; "
                "variables of the pods come from a Secret (--secret)"
            )
        cluster = options.cluster(
            name or f"masklake-{job}",
            deadline_seconds(deadline or DEADLINE),
            retries=_RETRIES,
            wanted_by=f"--render {render}",
        )
        print(_ray_job(job.value, spec, cluster), end="")
        return
    of_manifest = _first_given({"name": name, "deadline": deadline})
    if given := options.first_given() or (of_manifest and f"--{of_manifest}"):
        raise UsageError(f"{given} is of a manifest: give it with --render kuberay")
    request = make_request(job.value, spec, parse_variables(env), submission_id)
    where = _needed(address)
    if dry_run:
        print(json.dumps(request.to_dict(where), indent=1))
        return
    api = _open(where)
    api.submit(request.submission_id, request.entrypoint, request.env_vars, request.metadata)
    if not (wait or follow):
        _print_submitted(api, request.submission_id, as_json)
        return
    from jobs.submit.following import wait_for

    _note(f"submitted {request.submission_id} to {api.address}")
    _print_outcome(wait_for(api, request.submission_id, _note, follow=follow), as_json)


@app.command("list")
def list_jobs(address: Address = None, as_json: Json = False) -> None:
    """Show the jobs that were submitted since the cluster started, the newest last."""
    jobs = [_described(job) for job in _open(_needed(address)).jobs()]
    if as_json:
        print(json.dumps({"jobs": jobs}))
        return
    from jobs.terminal_table import print_table

    columns = ["submission_id", "job", "status", "started", "ended", "exit_code"]
    print_table(columns, [[_cell(job[column]) for column in columns] for job in jobs])


@app.command()
def status(submission_id: SubmissionId, address: Address = None, as_json: Json = False) -> None:
    """Show one job: its state, times and exit status."""
    job = _described(_open(_needed(address)).job(submission_id))
    if as_json:
        print(json.dumps(job))
        return
    from jobs.terminal_table import print_table

    print_table(None, [[key, _cell(value)] for key, value in job.items()])


@app.command()
def logs(
    submission_id: SubmissionId,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="until it ends; Ctrl-C only ends the looking")
    ] = False,
) -> None:
    """Print a job's log."""
    from jobs.submit.following import print_log

    print_log(_open(_needed(address)), submission_id, follow=follow)


@app.command()
def stop(submission_id: SubmissionId, address: Address = None) -> None:
    """Ask a job to commit what is finished and end. The same command again goes on from there."""
    from jobs.submit.following import ask_to_stop

    print(ask_to_stop(_open(_needed(address)), submission_id))


def _needed(address: str | None) -> str:
    from cluster.jobs_api import checked_address

    if address is None:
        raise UsageError(
            "give --address http://HEAD:8265 (the cluster's dashboard), or set RAY_API_SERVER_ADDRESS"
        )
    return checked_address(address)


def _open(address: str) -> JobsApi:
    from cluster.jobs_api import JobsApi

    api = JobsApi(address)
    api.check_version()
    return api


def _first_given(options: dict[str, Any]) -> str | None:
    return next((name for name, value in options.items() if value), None)


def _ray_job(job: str, spec: dict[str, Any], cluster: RayCluster) -> str:
    from cluster.kubernetes.ray_job import ray_job_manifests
    from cluster.kubernetes.yaml_text import to_yaml

    return to_yaml(ray_job_manifests(job, cluster, spec))


def _print_submitted(api: JobsApi, submission_id: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"submission_id": submission_id, "address": api.address}))
        return
    print(
        f"submitted {submission_id} to {api.address}\n"
        f"log   masklake jobs logs {submission_id} --follow --address {api.address}\n"
        f"stop  masklake jobs stop {submission_id} --address {api.address}"
    )


def _print_outcome(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        print(outcome.to_json())
    outcome.raise_if_failed()
    if not as_json:
        from jobs.terminal_table import print_table

        shown = {
            key: value for key, value in (outcome.summary or {}).items() if isinstance(value, (str, int))
        }
        print_table(
            None, [["job", outcome.submission_id], *([key, _cell(value)] for key, value in shown.items())]
        )


def _described(job: JobDetails) -> dict[str, Any]:
    """What is worth showing; not its variables."""
    from jobs.submit.request import JOB_KEY

    return {
        "submission_id": job.submission_id,
        "job": (job.metadata or {}).get(JOB_KEY),
        "status": job.status.value,
        "started": _time(job.start_time),
        "ended": _time(job.end_time),
        "exit_code": job.driver_exit_code,
        "entrypoint": job.entrypoint,
        "message": next(iter((job.message or "").strip().splitlines()[-1:]), None),
    }


def _time(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return (
        datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    )


def _cell(value: object) -> str:
    return "–" if value is None else str(value)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
