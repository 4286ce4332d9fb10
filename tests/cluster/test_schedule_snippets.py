"""Texts for crontab, Airflow and Dagster, cluster/schedule/snippets.py."""

from __future__ import annotations

import ast
import shlex
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cluster.schedule.cron import CronSchedule
from cluster.schedule.snippets import airflow_dag, crontab, dagster_definitions
from schemas.errors import UsageError

NIGHTLY = CronSchedule("0 2 * * *", "Europe/Berlin")
ODD = '/data/it\'s 100% "new"/relabel.yaml'
NOW = datetime(2026, 11, 23, 23, 30, tzinfo=UTC)  # the 24th in Berlin


def literals(text: str) -> dict[str, object]:
    """Keyword arguments of all calls in a Python text, as far as they are literals; compiles it first."""
    compile(text, "snippet.py", "exec")
    found: dict[str, object] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            found[str(node.arg)] = node.value.value
    return found


def run_command(command: str, folder: Path, status: int) -> tuple[int, list[str]]:
    """Exit status and arguments of a stand-in for masklake that the shell runs."""
    stand_in = folder / "masklake"
    stand_in.write_text(f'#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\nexit {status}\n')
    stand_in.chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin"}
    done = subprocess.run(
        ["/bin/sh", "-c", command], env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout.splitlines()


def test_a_crontab_line_runs_the_spec_from_its_folder(tmp_path: Path) -> None:
    work = tmp_path / "50% off"
    work.mkdir()
    *comments, zone, line = crontab(NIGHTLY, "nightly", str(work), ODD, deadline_s=60).splitlines()
    assert all(comment.startswith("# ") for comment in comments)
    assert zone == "CRON_TZ=Europe/Berlin"
    assert line.startswith("0 2 * * * cd ")
    command = line.removeprefix("0 2 * * * ")
    assert "%" not in command.replace(r"\%", "")  # cron would end the command there
    assert run_command(command.replace(r"\%", "%"), tmp_path, 5) == (5, [str(work), "relabel", ODD])


def test_the_crontab_says_what_status_5_means() -> None:
    assert "Status 5: another run holds the lease" in crontab(NIGHTLY, "n", "/", "/r.yaml", deadline_s=60)


def test_a_path_with_a_line_break_is_no_second_line_of_a_crontab() -> None:
    with pytest.raises(UsageError, match="control characters"):
        crontab(NIGHTLY, "nightly", "/", "/a\n* * * * * rm -r /", deadline_s=60)


def test_an_airflow_dag_skips_where_another_run_holds_the_lease(tmp_path: Path) -> None:
    text = airflow_dag(NIGHTLY, "nightly", str(tmp_path), ODD, now=NOW, deadline_s=60)
    found = literals(text)
    assert (found["dag_id"], found["timezone"], found["max_active_runs"]) == ("nightly", "Europe/Berlin", 1)
    assert (found["catchup"], found["skip_on_exit_code"]) == (False, 5)
    assert "CronTriggerTimetable('0 2 * * *'" in text
    assert "pendulum.datetime(2026, 11, 24, tz='Europe/Berlin')" in text
    assert run_command(str(found["bash_command"]), tmp_path, 0) == (0, [str(tmp_path), "relabel", ODD])


@pytest.mark.parametrize("path", ["/data/{{ ds }}.yaml", "/data/{% x %}.yaml", "/data/relabel.sh"])
def test_a_path_that_airflow_would_expand_is_refused(path: str) -> None:
    with pytest.raises(UsageError, match="for a template"):
        airflow_dag(NIGHTLY, "nightly", "/", path, now=NOW, deadline_s=60)


def test_dagster_definitions_have_the_schedule_and_no_hyphens() -> None:
    text = dagster_definitions(NIGHTLY, "my-nightly", "/data/it's", ODD, deadline_s=60)
    found = literals(text)
    assert (found["cron_schedule"], found["execution_timezone"]) == ("0 2 * * *", "Europe/Berlin")
    assert (found["cwd"], found["name"]) == ("/data/it's", "my_nightly_schedule")
    command = next(
        ast.literal_eval(node.value) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assign)
    )
    assert command == ["timeout", "--kill-after=120", "60", "masklake", "relabel", ODD]
    assert "if status == 5:" in text


def test_a_run_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    line = crontab(NIGHTLY, "nightly", "/", "/r.yaml", deadline_s=90).splitlines()[-1]
    words = shlex.split(line)
    assert words[words.index("timeout") :][:4] == ["timeout", "--kill-after=120", "90", "masklake"]
