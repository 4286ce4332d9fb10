"""The current labels of a lake, jobs/lake/views.py."""

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.lake.compact import commit_compaction, merge_group, plan_compaction
from jobs.lake.current import promote, rollback
from jobs.lake.fragments import Fragment
from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from jobs.lake.views import CurrentLabels, count_missing, current_labels, current_models
from schemas.errors import UsageError
from schemas.labels import LABEL_SCHEMA

ROOT = Path(__file__).parents[2]
A, B = "lite-aaaaaaaaaaaa", "lite-bbbbbbbbbbbb"
SOURCE, OTHER = "s3://photos/2026", "s3://it's/2027"

MakeRows = Callable[..., pa.Table]
AddLabels = Callable[..., list[Fragment]]


@pytest.fixture
def table(lake: str, storage: Storage) -> LabelsTable:
    return LabelsTable.open_or_create(lake, storage)


def keys(labels: CurrentLabels) -> list[tuple[str, str, str]]:
    """(image_id, model_id, run_id) of the rows, in order."""
    return labels.relation().select("image_id, model_id, run_id").order("ALL").fetchall()


def test_an_empty_table_has_empty_views(table: LabelsTable, lake: str, storage: Storage) -> None:
    labels = current_labels(lake, storage)
    assert labels.models == {}
    assert labels.reader().read_all().equals(LABEL_SCHEMA.empty_table())
    for view in ("labels", "all_labels", "detections"):
        assert labels.connect().sql(f"SELECT count(*) FROM {view}").fetchall() == [(0,)]


def test_the_view_is_the_newest_row_of_each_image_by_each_sources_model(
    table: LabelsTable, lake: str, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    add_labels(
        table, storage, make_rows(["a", "b", "c"], A, run_id="1", at_us=1), make_rows(["z"], A, at_us=1)
    )
    add_labels(table, storage, make_rows(["a", "b"], B, run_id="2", at_us=2))
    add_labels(table, storage, make_rows(["b", "c"], A, run_id="3", at_us=3, removed=["c"]))
    add_labels(table, storage, make_rows(["a", "q"], B, run_id="4", source=OTHER, failed={"q": "io"}))
    promote(table, [SOURCE], A, None, "ana", "")
    wanted = [("a", A, "1"), ("a", B, "4"), ("b", A, "3"), ("q", B, "4"), ("z", A, "run-1")]
    assert keys(current_labels(lake, storage)) == wanted
    assert keys(current_labels(lake, storage, OTHER)) == [("a", B, "4"), ("q", B, "4")]

    merged = [merge_group(group, lake, storage) for group in plan_compaction(table)]
    assert commit_compaction(table, merged).done
    assert keys(current_labels(lake, storage)) == wanted
    assert table.to_current(A).select("image_id, run_id").order("ALL").fetchall() == [
        ("a", "1"),
        ("b", "3"),
        ("z", "run-1"),
    ]


def test_during_a_relabel_readers_see_the_old_model_whole_until_the_promotion(
    table: LabelsTable, lake: str, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    add_labels(table, storage, make_rows(["a", "b"], A, run_id="1"))
    promote(table, [SOURCE], A, None, "ana", "")
    add_labels(table, storage, make_rows(["a"], B, run_id="2"))
    assert keys(current_labels(lake, storage)) == [("a", A, "1"), ("b", A, "1")]
    assert count_missing(table, SOURCE, A, B) == 1
    add_labels(table, storage, make_rows(["b"], B, run_id="3"))
    assert count_missing(table, SOURCE, A, B) == 0
    assert keys(current_labels(lake, storage)) == [("a", A, "1"), ("b", A, "1")]
    promote(table, [SOURCE], B, None, "ana", "")
    assert keys(current_labels(lake, storage)) == [("a", B, "2"), ("b", B, "3")]
    rollback(table, [SOURCE], "ana", "")
    assert keys(current_labels(lake, storage)) == [("a", A, "1"), ("b", A, "1")]
    assert keys(current_labels(lake, storage, version=5)) == [("a", B, "2"), ("b", B, "3")]
    assert keys(CurrentLabels(table, {SOURCE: B})) == [("a", B, "2"), ("b", B, "3")]


def test_images_that_are_gone_are_not_missing(
    table: LabelsTable, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    add_labels(table, storage, make_rows(["a", "b", "c"], A, at_us=1), make_rows(["a"], A, source=OTHER))
    add_labels(
        table, storage, make_rows(["c"], A, at_us=2, removed=["c"]), make_rows(["b"], B, failed={"b": "io"})
    )
    assert count_missing(table, SOURCE, A, B) == 1
    assert count_missing(table, SOURCE, B, A) == 0
    assert count_missing(table, OTHER, A, B) == 1


def test_what_the_new_model_says_is_gone_or_knows_in_an_earlier_content_only_is_missing(
    table: LabelsTable, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    def with_content(content: bytes, model_id: str, at_us: int) -> pa.Table:
        rows = make_rows(["b"], model_id, at_us=at_us)
        place = rows.schema.get_field_index("content_hash")
        return rows.set_column(place, rows.schema.field(place), pa.array([content.ljust(16)], pa.binary(16)))

    add_labels(table, storage, make_rows(["a"], A, at_us=1), with_content(b"new", A, 2))
    add_labels(table, storage, make_rows(["a"], B, at_us=1), with_content(b"old", B, 1))
    assert count_missing(table, SOURCE, A, B) == 1
    assert count_missing(table, SOURCE, B, A) == 0  # A knows more than B
    add_labels(table, storage, make_rows(["a"], B, at_us=2, removed=["a"]))
    assert count_missing(table, SOURCE, A, B) == 2
    add_labels(table, storage, with_content(b"new", B, 3), make_rows(["a"], B, at_us=3))
    assert count_missing(table, SOURCE, A, B) == 0


def test_several_models_and_no_promotion_are_refused_by_name(
    table: LabelsTable, lake: str, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    add_labels(table, storage, make_rows(["a"], A), make_rows(["a"], B), make_rows(["a"], A, source=OTHER))
    with pytest.raises(UsageError, match=f"several models labelled {SOURCE} .*: {A}, {B}. Choose one"):
        current_labels(lake, storage)
    assert current_models(table, OTHER) == {OTHER: A}
    with pytest.raises(UsageError, match=f"no image of s3://nowhere .* labelled were: {OTHER}, {SOURCE}"):
        current_labels(lake, storage, "s3://nowhere")


def test_the_rows_come_as_labels_with_every_column(
    table: LabelsTable, lake: str, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    rows = make_rows(["a", "b", "c"], A, failed={"b": "corrupt"}, at_us=1_234_567_890_123_456)
    add_labels(table, storage, rows)
    found = current_labels(lake, storage).reader().read_all()
    assert found.schema.equals(LABEL_SCHEMA)
    assert found.sort_by("image_id").equals(rows)


def test_each_detection_is_a_row(
    table: LabelsTable, lake: str, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    add_labels(table, storage, make_rows(["a", "b"], A, failed={"b": "io"}, at_us=1))
    add_labels(table, storage, make_rows(["a"], A, at_us=2))
    connection = current_labels(lake, storage).connect()
    found = connection.sql("SELECT * EXCLUDE labeled_at FROM detections ORDER BY score")
    image = ("a", SOURCE, "shard-000.tar", 640, 480, A)
    box = (1.0, 2.0, 30.5, 40.25)
    assert found.fetchall() == [
        (*image, 1, 0.5, *box, 700, b"rle of a 1"),
        (*image, 3, 0.75, *box, 700, b"rle of a 3"),
    ]
    assert found.columns[6:] == ["category_id", "score", "x0", "y0", "x1", "y1", "area", "rle"]
    assert connection.sql("SELECT count(*) FROM all_labels").fetchall() == [(3,)]


def test_the_documented_example_runs(
    table: LabelsTable, lake: str, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    add_labels(table, storage, make_rows(["a", "b"], A, at_us=1), make_rows(["a"], A, at_us=2, removed=["a"]))
    section = (ROOT / "docs/relabel.md").read_text().partition("\n## Reading\n")[2].partition("\n## ")[0]
    lines = [line[4:] for line in section.splitlines() if line.startswith("    ")]
    names: dict[str, Any] = {}
    exec("\n".join(lines).replace("s3://bucket/lake", lake), names)
    assert names["images"]["image_id"].to_pylist() == []  # the score of all is 0.75
    assert sorted(names["counts"]) == [(1, 1), (3, 1)]
    assert names["batch"].num_rows == 1


def test_a_query_for_one_image_opens_no_other_file(
    table: LabelsTable, lake: str, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    ids = [[f"{i}{j}" for j in range(10)] for i in range(3)]
    fragments = add_labels(table, storage, *(make_rows(some, A, at_us=1) for some in ids))
    fragments += add_labels(table, storage, make_rows(["12", "14"], A, run_id="newer", at_us=2))
    for number in (0, 2):
        (Path(lake.removeprefix("file://")) / "labels" / fragments[number].path).unlink()
    found = current_labels(lake, storage).relation().filter("image_id = '14'").select("image_id, run_id")
    assert found.fetchall() == [("14", "newer")]


def test_a_time_names_the_version_that_was_the_newest_then(
    table: LabelsTable, lake: str, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    start = datetime(2026, 11, 1, tzinfo=UTC)
    add_labels(table, storage, make_rows(["a"], A))
    add_labels(table, storage, make_rows(["b"], A))
    log = Path(lake.removeprefix("file://")) / "labels" / "_delta_log"
    for version in range(3):
        moment = (start + timedelta(days=version)).timestamp()
        os.utime(log / f"{version:020}.json", (moment, moment))

    def count(at: datetime) -> int:
        return current_labels(lake, storage, at=at).reader().read_all().num_rows

    assert count(start + timedelta(days=1)) == 1
    assert count(start + timedelta(days=1, hours=23)) == 1
    assert count(start + timedelta(days=2)) == 2
    assert count(start + timedelta(days=999)) == 2
    with pytest.raises(UsageError, match=r"no version of 2020-01-01T00:00:00\+00:00; its first is of 20"):
        count(datetime(2020, 1, 1, tzinfo=UTC))
    with pytest.raises(UsageError, match="both asked for"):
        current_labels(lake, storage, version=1, at=start)


@pytest.mark.slow
def test_the_views_work_on_s3(
    s3_lake: tuple[str, Storage], make_rows: MakeRows, add_labels: AddLabels
) -> None:
    lake, storage = s3_lake
    table = LabelsTable.open_or_create(lake, storage)
    add_labels(table, storage, make_rows(["a", "b"], A, at_us=1), make_rows(["x"], A))
    add_labels(table, storage, make_rows(["a"], A, at_us=2, removed=["a"]))
    rows = current_labels(lake, storage).reader().read_all().sort_by("image_id")
    assert rows["image_id"].to_pylist() == ["b", "x"]
