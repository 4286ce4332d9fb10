"""`masklake schedule`, jobs/relabel/schedule_command.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from jobs.relabel.schedule_command import Target, schedule
from schemas.errors import MasklakeError, UsageError

app = typer.Typer()
app.command()(schedule)

SPEC = "source: {uri: s3://photos/}  # hunter2\nmodel: {uri: alias:champion}\nlake: {uri: s3://lake}\n"
CLUSTER = ["--image", "masklake:1"]


@pytest.fixture
def spec_file(tmp_path: Path) -> str:
    path = tmp_path / "relabel.yaml"
    path.write_text(SPEC)
    return str(path)


def run(
    spec_file: str, *arguments: str, cron: str = "0 2 * * *", zone: str = "Europe/Berlin"
) -> tuple[str, str]:
    result = CliRunner().invoke(app, [spec_file, "--cron", cron, "--timezone", zone, *arguments])
    if isinstance(result.exception, MasklakeError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


@pytest.mark.parametrize("target", ["kubernetes", "raycronjob"])
def test_manifests_go_to_stdout_and_the_next_five_runs_to_stderr(target: str, spec_file: str) -> None:
    stdout, stderr = run(spec_file, "--for", target, *CLUSTER, "--secret", "keys", "--worker-gpus", "1")
    *_, last = yaml.load_all(stdout, yaml.CSafeLoader)
    assert last["kind"] == {"kubernetes": "CronJob", "raycronjob": "RayCronJob"}[target]
    title, *lines = stderr.splitlines()
    assert title == "next runs of '0 2 * * *' in Europe/Berlin:"
    runs = [line for line in lines if line.startswith("  ")]
    assert len(runs) == 5
    # 02:00 in Berlin is 01:00 UTC in winter, 00:00 in summer.
    assert all(("02:00 CET" in line) == line.endswith("01:00 UTC") for line in runs)
    assert "hunter2" not in stdout  # comments stay here


def test_the_preview_says_what_a_change_of_the_clocks_does(spec_file: str) -> None:
    for target, options, spring, autumn in (
        ("kubernetes", CLUSTER, "does not exist: no run.", "comes twice: two runs."),
        ("crontab", [], "does not exist: a run right after.", "comes twice: one run, at the first."),
    ):
        _, stderr = run(spec_file, "--for", target, *options, cron="30 2 * * *")
        assert spring in stderr
        assert autumn in stderr
    _, stderr = run(spec_file, "--for", "crontab", zone="UTC")
    assert "clocks change" not in stderr


def test_kubernetes_is_what_a_schedule_is_for_by_itself(spec_file: str) -> None:
    assert run(spec_file, *CLUSTER) == run(spec_file, "--for", "kubernetes", *CLUSTER)


@pytest.mark.parametrize("target", ["crontab", "airflow", "dagster"])
def test_snippets_name_the_spec_by_its_whole_path(
    target: str, spec_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(spec_file).parent)
    stdout, _ = run("relabel.yaml", "--for", target)
    assert f"masklake relabel {spec_file}" in stdout or f"'relabel', '{spec_file}'" in stdout


@pytest.mark.parametrize("target", list(Target))
def test_json_holds_the_text_and_the_runs(target: Target, spec_file: str) -> None:
    options = CLUSTER if target.is_cluster else []
    plain, _ = run(spec_file, "--for", target, *options, zone="UTC")
    stdout, stderr = run(spec_file, "--for", target, *options, "--json", zone="UTC")
    answer = json.loads(stdout)
    assert answer["text"] == plain
    assert [run["utc"][-9:] for run in answer["next_runs"]] == ["02:00:00Z"] * 5
    assert answer["clock_changes"] == []
    assert stderr == ""


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--for", "kubernetes"], "wants --image"),
        ([], "--for kubernetes wants --image: an image with masklake and Ray"),
        (["--for", "crontab", "--image", "x"], "--image is for kubernetes and raycronjob"),
        (["--for", "airflow", "--workers", "2"], "--workers is for kubernetes and raycronjob"),
        (["--for", "dagster", "--secret", "x"], "--secret is for kubernetes and raycronjob"),
        (["--for", "crontab", "--name", "a\nb"], "is no name of a schedule"),
        (["--for", "crontab", "--deadline", "5s"], "less than a minute"),
        (["--for", "crontab", "--deadline", "soon"], "is no time"),
        (["--for", "crontab", "--cron", "0 0 31 2 *"], "never fires"),
        (["--for", "crontab", "--timezone", "Mars"], "is no IANA time zone"),
    ],
)
def test_wrong_input_is_refused_in_words(arguments: list[str], wanted: str, spec_file: str) -> None:
    with pytest.raises(UsageError) as refused:
        run(spec_file, *arguments)
    assert wanted in str(refused.value)


def test_a_deadline_leaves_the_budget_its_time(tmp_path: Path) -> None:
    path = tmp_path / "relabel.yaml"
    path.write_text(f"{SPEC}budget: {{time_s: 4h}}\n")
    with pytest.raises(UsageError, match=r"ends a run before its budget\.time_s of 14400 s"):
        run(str(path), "--for", "crontab", "--deadline", "4h")
    stdout, _ = run(str(path), "--for", "kubernetes", "--deadline", "5h", *CLUSTER)
    config_map, *_ = yaml.load_all(stdout, yaml.CSafeLoader)
    assert yaml.safe_load(config_map["data"]["relabel.yaml"])["budget"] == {"time_s": "4h"}


def test_a_spec_that_no_run_would_take_is_refused_before_the_first_night(tmp_path: Path) -> None:
    path = tmp_path / "relabel.yaml"
    path.write_text(f"{SPEC}gaet: {{max_lost: 5%}}\n")
    with pytest.raises(UsageError, match="gaet is not a known key"):
        run(str(path), "--for", "crontab")
    path.write_text(SPEC.replace("s3://lake", "s3://key:hunter2@lake"))
    with pytest.raises(UsageError, match="holds credentials") as refused:
        run(str(path), "--for", "kubernetes", *CLUSTER)
    assert "hunter2" not in str(refused.value)


def test_a_spec_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the spec file"):
        run(str(tmp_path / "none.yaml"), "--for", "crontab")
