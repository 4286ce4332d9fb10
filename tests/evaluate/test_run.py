"""AP of the labels in a table, jobs/evaluate/run.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.evaluate.run import check_annotations, evaluate_labels, run_evaluate
from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from schemas.errors import UsageError
from tests.evaluate.truth import write_truth
from tests.relabel.two_models import NEW, OLD, SOURCE, add_rows, found, label_rows

BOX, ELSEWHERE = (4, 4, 40, 40), (50, 4, 70, 20)
OTHER = "s3://photos/2027"


@pytest.fixture
def truth(tmp_path: Path) -> str:
    return write_truth(tmp_path / "truth.json", {"a.png": BOX, "b.png": BOX})


def test_the_newest_labels_of_each_image_are_scored(
    table: LabelsTable, lake: str, storage: Storage, tmp_path: Path
) -> None:
    """Found, not found any more, failed, gone, never seen."""
    truth = write_truth(
        tmp_path / "truth.json", {f"{name}.jpg": BOX for name in ("kept", "lost", "failed", "gone", "new")}
    )
    seen: dict[str, Any] = {f"shard.tar/{name}": [found(1, BOX)] for name in ("kept", "lost", "gone", "none")}
    now: dict[str, Any] = {"shard.tar/lost": [], "shard.tar/failed": None, "shard.tar/gone": None}
    add_rows(
        table,
        storage,
        label_rows(seen, NEW),
        label_rows(now, NEW, removed=["shard.tar/gone"], at_s=1),
        label_rows({"shard.tar/new": [found(1, BOX)]}, OLD),
    )
    result = run_evaluate(lake, truth, NEW, storage)
    assert (result.images, result.failed, result.unlabelled, result.version) == (3, 1, 2, table.version)
    # One of three is found: precision 1 up to recall 1/3, that is at 34 of COCO's 101 recalls.
    assert result.segm["AP"] == pytest.approx(34 / 101)
    assert result.bbox["AP"] == pytest.approx(34 / 101)


def test_a_source_is_scored_by_itself(
    table: LabelsTable, lake: str, storage: Storage, truth: str, tmp_path: Path
) -> None:
    both: dict[str, Any] = {"a.png": [found(1, BOX)], "b.png": [found(1, BOX)]}
    none: dict[str, Any] = {"a.png": [found(1, ELSEWHERE)], "b.png": []}
    add_rows(table, storage, label_rows(both, NEW), label_rows(none, NEW, source=OTHER))
    assert run_evaluate(lake, truth, NEW, storage, SOURCE).segm["AP"] == pytest.approx(1)
    assert run_evaluate(lake, truth, NEW, storage, f"{OTHER}/").segm["AP"] == 0
    with pytest.raises(
        UsageError, match=rf"images of {SOURCE} and of {OTHER} are called '.': name the source"
    ):
        run_evaluate(lake, truth, NEW, storage)
    with pytest.raises(UsageError, match=f"is labelled by {NEW} in s3://photos/2028, by the table at {lake}"):
        run_evaluate(lake, truth, NEW, storage, "s3://photos/2028")
    elsewhere = write_truth(tmp_path / "elsewhere.json", {"c.png": BOX})
    with pytest.raises(UsageError, match=f"no image of .*elsewhere.json is labelled by {NEW} in {lake}"):
        run_evaluate(lake, elsewhere, NEW, storage)


def test_sources_that_share_a_file_are_told_apart(table: LabelsTable, storage: Storage, truth: str) -> None:
    ours = label_rows({"a.png": [found(1, BOX)], "b.png": [found(1, BOX)]}, NEW)
    theirs = label_rows({"x/a.png": [], "x/b.png": []}, NEW, source=OTHER)
    add_rows(table, storage, pa.concat_tables([ours, theirs]))
    assert evaluate_labels(table, truth, NEW, storage, SOURCE).segm["AP"] == pytest.approx(1)
    assert evaluate_labels(table, truth, NEW, storage, OTHER).segm["AP"] == 0


def test_two_images_of_one_name_are_refused(
    table: LabelsTable, lake: str, storage: Storage, truth: str
) -> None:
    add_rows(table, storage, label_rows({"x/a.png": [], "y/a.png": []}, NEW))
    with pytest.raises(UsageError, match=r"two images are called 'a': x/a\.png and y/a\.png"):
        run_evaluate(lake, truth, NEW, storage)


def test_annotations_are_held_against_images_that_nobody_labelled_yet(
    storage: Storage, truth: str, tmp_path: Path
) -> None:
    check_annotations(truth, storage, ["x/a.jpg", "c.jpg", "x/c.jpg"], are_all=True)
    check_annotations(truth, storage, ["c.jpg"], are_all=False)
    with pytest.raises(UsageError, match=r"no image of .* is in the source.*\(the JSON has 'a'\)"):
        check_annotations(truth, storage, ["c.jpg"], are_all=True)
    with pytest.raises(UsageError, match=r"two images are called 'a': x/a\.jpg and y/a\.jpg"):
        check_annotations(truth, storage, ["x/a.jpg", "y/a.jpg"], are_all=False)
    empty = tmp_path / "empty.json"
    empty.write_text(Path(truth).read_text().replace('"image_id"', '"picture_id"'))
    with pytest.raises(UsageError, match="cannot be evaluated: 'image_id'"):
        check_annotations(str(empty), storage, [], are_all=False)


def test_a_version_is_scored_as_it_was(table: LabelsTable, lake: str, storage: Storage, truth: str) -> None:
    add_rows(table, storage, label_rows({"a.png": [found(1, BOX)]}, NEW))
    add_rows(table, storage, label_rows({"a.png": [], "b.png": []}, NEW, at_s=1))
    before, now = (run_evaluate(lake, truth, None, storage, version=version) for version in (1, 2))
    assert (before.version, before.images, now.version, now.images) == (1, 1, 2, 2)
    assert [before.segm["AP"], now.segm["AP"]] == pytest.approx([1, 0])
    with pytest.raises(UsageError, match="no version 3"):
        run_evaluate(lake, truth, None, storage, version=3)
