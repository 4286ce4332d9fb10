"""Replacing files in one version, jobs/lake/rewrite.py."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pytest
from deltalake import QueryBuilder

from jobs.lake import rewrite
from jobs.lake.commit import Committer, DeltaStore, app_id
from jobs.lake.compact import merge_group, plan_compaction
from jobs.lake.fragments import Fragment, write_fragment
from jobs.lake.labels_table import LabelsTable
from jobs.lake.rewrite import MergedFile, replace_files
from jobs.lake.storage import Storage
from schemas.errors import CommitStateUnknownError, StorageError

MODEL = "lite-0123456789ab"
ODD_MODEL = "my mödel/v1=a%20b+#?:&'-0123456789ab"
MakeRows = Callable[..., pa.Table]
AddLabels = Callable[..., list[Fragment]]


@pytest.fixture
def table(lake: str, storage: Storage, make_rows: MakeRows, add_labels: AddLabels) -> LabelsTable:
    """Two files of two images each."""
    table = LabelsTable.open_or_create(lake, storage)
    add_labels(table, storage, make_rows(["a", "b"], MODEL))
    add_labels(table, storage, make_rows(["c", "d"], MODEL))
    return table


def merge(table: LabelsTable, lake: str, storage: Storage) -> MergedFile:
    (group,) = plan_compaction(table)
    return merge_group(group, lake, storage)


def image_ids(table: LabelsTable) -> list[str]:
    return sorted(str(image_id) for image_id in table.dataset().to_table()["image_id"])


def no_sleep(seconds: float) -> None:
    pass


def test_files_are_replaced_once_whoever_tries_again(table: LabelsTable, lake: str, storage: Storage) -> None:
    """deltalake alone takes the second: its check of conflicts passes over what was removed meanwhile."""
    stale = LabelsTable.open(lake, storage)
    first, second = merge(table, lake, storage), merge(stale, lake, storage)
    assert replace_files(table, [first], {}).version == 3
    result = replace_files(stale, [second], {}, no_sleep)
    assert (result.version, result.done, result.given_up) == (None, (), (second,))
    assert image_ids(stale) == ["a", "b", "c", "d"]


def test_a_commit_that_comes_first_does_not_stop_it(
    table: LabelsTable,
    lake: str,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
    make_rows: MakeRows,
    add_labels: AddLabels,
) -> None:
    merged, commit, calls = merge(table, lake, storage), rewrite._commit, 0

    def too_late(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls < 3:
            add_labels(LabelsTable.open(lake, storage), storage, make_rows([f"e{calls}"], MODEL))
        commit(*args)

    monkeypatch.setattr(rewrite, "_commit", too_late)
    assert replace_files(table, [merged], {}, no_sleep).version == 5
    assert calls == 3
    assert image_ids(table) == ["a", "b", "c", "d", "e1", "e2"]


def test_a_commit_whose_reply_was_lost_is_found(
    table: LabelsTable, lake: str, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged, commit = merge(table, lake, storage), rewrite._commit

    def lose_reply(*args: Any) -> None:
        commit(*args)
        raise OSError("connection reset")

    monkeypatch.setattr(rewrite, "_commit", lose_reply)
    result = replace_files(table, [merged], {}, no_sleep)
    assert (result.version, result.done) == (3, (merged,))
    assert table.version == 3
    assert image_ids(table) == ["a", "b", "c", "d"]


def test_a_store_that_refuses_leaves_the_table_as_it_was(
    table: LabelsTable, lake: str, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = merge(table, lake, storage)

    def refuse(*args: Any) -> None:
        raise OSError("503 SlowDown")

    monkeypatch.setattr(rewrite, "_commit", refuse)
    with pytest.raises(StorageError, match="SlowDown"):
        replace_files(table, [merged], {}, no_sleep)
    assert table.version == 2
    monkeypatch.setattr(table, "reopen", refuse)
    with pytest.raises(CommitStateUnknownError, match="same either way"):
        replace_files(table, [merged], {}, no_sleep)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_other_readers_read_the_replaced_table(
    checkpoint: bool, lake: str, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    table = LabelsTable.open_or_create(lake, storage)
    add_labels(table, storage, make_rows(["b", "c"], ODD_MODEL), make_rows(["a"], ODD_MODEL))
    replace_files(table, [merge(table, lake, storage)], {})
    add_labels(table, storage, make_rows(["d"], ODD_MODEL))
    if checkpoint:
        table.delta.create_checkpoint()
        table = LabelsTable.open(lake, storage)
    sql = "SELECT image_id, model_id, detections FROM labels ORDER BY image_id"
    fusion = pa.table(QueryBuilder().register("labels", table.delta).execute(sql).read_all())
    mine = table.dataset().to_table(columns=fusion.column_names).sort_by("image_id")
    assert fusion.to_pylist() == mine.to_pylist()
    assert mine["image_id"].to_pylist() == ["a", "b", "c", "d"]
    assert len(table.file_uris()) == 2
    assert LabelsTable.open(lake, storage, 1).dataset().count_rows() == 3


def test_rewrites_and_appends_race_on_s3(
    s3_lake: tuple[str, Storage], make_rows: MakeRows, add_labels: AddLabels
) -> None:
    lake, storage = s3_lake
    table = LabelsTable.open_or_create(lake, storage)
    add_labels(table, storage, make_rows(["a", "b"], ODD_MODEL), make_rows(["c"], ODD_MODEL))
    rivals = [LabelsTable.open(lake, storage) for _ in range(3)]
    merged = [merge(rival, lake, storage) for rival in rivals]
    writer = Committer(DeltaStore(LabelsTable.open(lake, storage)), app_id("tests", "other"), {}, 60, 1)
    writer.add(write_fragment(make_rows(["d"], ODD_MODEL), ["unit-d"], lake, ODD_MODEL, storage))
    with ThreadPoolExecutor(4) as pool:
        rewrites = [
            pool.submit(replace_files, rival, [file], {}) for rival, file in zip(rivals, merged, strict=True)
        ]
        pool.submit(writer.commit).result()
        versions = [rewrite.result().version for rewrite in rewrites]
    assert len([version for version in versions if version is not None]) == 1
    table.refresh()
    assert image_ids(table) == ["a", "b", "c", "d"]
    assert len(table.files()) == 2
