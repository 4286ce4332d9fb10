"""`masklake diff`, jobs/relabel/diff_command.py."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from jobs.relabel.diff_command import diff
from schemas.errors import UsageError
from tests.evaluate.truth import write_truth
from tests.relabel.two_models import NEW, OLD, add_rows, found, label_rows

BOX = (4, 4, 40, 40)
app = typer.Typer(pretty_exceptions_enable=False)
app.command()(diff)


def run(table: LabelsTable, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["--lake", table.uri.removesuffix("/labels"), *arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def run_json(table: LabelsTable, *arguments: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(run(table, *arguments, "--json").splitlines()[-1])
    return answer


def test_two_models_are_compared_and_scored(table: LabelsTable, storage: Storage, tmp_path: Path) -> None:
    source = f"file://{tmp_path}/photos"
    old: dict[str, Any] = {"a.png": [found(1, BOX)], "b.png": []}
    new: dict[str, Any] = {"a.png": [], "b.png": [], "c.png": []}
    rows = [label_rows(old, OLD, source=source), label_rows(new, NEW, source=source)]
    add_rows(table, storage, *rows)
    text = run(table, OLD, NEW)
    assert f"old      {OLD}\n" in text
    assert "           2  compared\n" in text
    assert "           1  labelled by the new model only\n" in text
    assert "a.png: 1 object became 0: 1 lost" in text

    truth = write_truth(tmp_path / "truth.json", {"a.png": BOX})
    answer = run_json(table, OLD, NEW, "--annotations", f"coco:{truth}", "--out", str(tmp_path / "out"))
    assert answer["ap"] == pytest.approx([1.0, 0.0])
    assert (answer["total"]["lost"], answer["masks"]) == (1, True)
    assert answer["report"] == f"file://{tmp_path}/out/diff.md"
    assert (tmp_path / "out" / "diff.md").exists()
    assert run_json(table, OLD, NEW, "--boxes-only", "--min-score", "0.95")["total"]["old"] == 0


def test_the_source_is_named_where_there_are_several(table: LabelsTable, storage: Storage) -> None:
    for source in ("s3://one", "s3://two"):
        add_rows(
            table,
            storage,
            label_rows({"a": []}, OLD, source=source),
            label_rows({"a": []}, NEW, source=source),
        )
    add_rows(table, storage, label_rows({"a": []}, OLD, source="s3://old"))
    with pytest.raises(UsageError, match=r"labelled: s3://one, s3://two; name one with --source"):
        run(table, OLD, NEW)
    with pytest.raises(UsageError, match=r"labelled: s3://one, s3://two; s3://old is not among them"):
        run(table, OLD, NEW, "--source", "s3://old/")
    assert run_json(table, OLD, NEW, "--source", "s3://two/")["source"] == "s3://two"


def test_what_cannot_be_compared_is_refused(table: LabelsTable, storage: Storage) -> None:
    add_rows(table, storage, label_rows({"a": []}, OLD, source="s3://one"))
    add_rows(table, storage, label_rows({"a": []}, NEW, source="s3://two"))
    with pytest.raises(UsageError, match="labelled: none; a source is not among them"):
        run(table, OLD, NEW)
    with pytest.raises(UsageError, match=f"are both {OLD}: name two models"):
        run(table, OLD, OLD)
    with pytest.raises(UsageError, match="no model 'resnet' has labels"):
        run(table, OLD, "resnet")
