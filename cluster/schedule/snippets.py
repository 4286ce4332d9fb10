"""Texts for schedulers that run a command on a machine of theirs: crontab, Airflow, Dagster.

Enters: a CronSchedule, a name, and the command's folder and spec file on that machine. Leaves: text; the
Python texts hold values as literals. GNU timeout ends a run that takes too long, with status 124.

Exit status 5 says that another run holds the lease: nothing is wrong, and nothing was done. Airflow takes it
as skipped, Dagster as done with a warning, and cron mails the line that names the holder.
"""

import re
import shlex
from datetime import datetime

from cluster.schedule.cron import CronSchedule
from schemas.errors import UsageError
from schemas.spec_problems import show

_LEASE_HELD = 5

_AIRFLOW = '''\
"""Runs `masklake relabel` on schedule. Needs Airflow 3 and masklake on the worker."""

import pendulum
from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG
from airflow.timetables.trigger import CronTriggerTimetable

with DAG(
    dag_id={name!r},
    schedule=CronTriggerTimetable({cron!r}, timezone={timezone!r}),
    start_date=pendulum.datetime({year}, {month}, {day}, tz={timezone!r}),
    catchup=False,
    max_active_runs=1,
):
    BashOperator(
        task_id="relabel",
        bash_command={command!r},
        append_env=True,
        skip_on_exit_code={lease_held},  # another run holds the lease
    )
'''

_DAGSTER = '''\
"""Runs `masklake relabel` on schedule. Needs Dagster 1 and masklake where its runs are."""

import subprocess

import dagster as dg

COMMAND = {argv!r}


@dg.op
def relabel(context: dg.OpExecutionContext) -> None:
    status = subprocess.run(COMMAND, cwd={folder!r}, check=False).returncode
    if status == {lease_held}:
        context.log.warning("another run holds the lease: nothing was done")
    elif status:
        raise dg.Failure(f"masklake relabel ended with status {{status}}; its last line says why")


@dg.job(name={name!r})
def relabel_job() -> None:
    relabel()


defs = dg.Definitions(
    schedules=[
        dg.ScheduleDefinition(
            name={schedule_name!r},
            job=relabel_job,
            cron_schedule={cron!r},
            execution_timezone={timezone!r},
            default_status=dg.DefaultScheduleStatus.RUNNING,
        )
    ]
)
'''


def crontab(schedule: CronSchedule, name: str, folder: str, spec_path: str, *, deadline_s: int) -> str:
    """Lines for `crontab -e`, for cronie; the comment says what another cron needs.

    Raises:
        UsageError: a path has a line break.
    """
    if not (folder + spec_path).isprintable():
        raise UsageError(f"the path {show(spec_path)} has control characters, which a crontab cannot hold")
    # cron ends the command at a bare %.
    command = _shell_command(folder, spec_path, deadline_s).replace("%", r"\%")
    return (
        f"# {name}. Status {_LEASE_HELD}: another run holds the lease, so this one did nothing; the mailed "
        "line names it.\n"
        f"# cronie (Fedora, RHEL, SUSE, Arch) reads CRON_TZ; Debian's and Ubuntu's cron does not: there the "
        f"machine must\n# be set to {schedule.timezone}. cron's PATH is short: a line PATH=… above names the "
        "folder of a masklake in a virtual environment.\n"
        f"CRON_TZ={schedule.timezone}\n"
        f"{schedule.expression} {command}\n"
    )


def airflow_dag(
    schedule: CronSchedule, name: str, folder: str, spec_path: str, *, now: datetime, deadline_s: int
) -> str:
    """A DAG file. Runs of before `now` are not made up for.

    Raises:
        UsageError: a path that Airflow would take for a template.
    """
    command = _shell_command(folder, spec_path, deadline_s)
    if re.search(r"\{[{%#]", command) or command.endswith((".sh", ".bash")):
        raise UsageError(f"Airflow would take the path {show(spec_path)} for a template: rename it")
    today = now.astimezone(schedule.zone)
    return _AIRFLOW.format(
        name=name,
        cron=schedule.expression,
        timezone=schedule.timezone,
        year=today.year,
        month=today.month,
        day=today.day,
        command=command,
        lease_held=_LEASE_HELD,
    )


def dagster_definitions(
    schedule: CronSchedule, name: str, folder: str, spec_path: str, *, deadline_s: int
) -> str:
    """A file of Dagster definitions."""
    job = name.replace("-", "_")  # Dagster's names have no hyphens
    return _DAGSTER.format(
        argv=_argv(spec_path, deadline_s),
        folder=folder,
        lease_held=_LEASE_HELD,
        name=job,
        schedule_name=f"{job}_schedule",
        cron=schedule.expression,
        timezone=schedule.timezone,
    )


def _argv(spec_path: str, deadline_s: int) -> list[str]:
    return ["timeout", "--kill-after=120", str(deadline_s), "masklake", "relabel", spec_path]


def _shell_command(folder: str, spec_path: str, deadline_s: int) -> str:
    return f"cd {shlex.quote(folder)} && {shlex.join(_argv(spec_path, deadline_s))}"
