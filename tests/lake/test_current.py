"""Which model's labels are current, jobs/lake/current.py."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake

from jobs.lake.commit import Committer, DeltaStore, app_id
from jobs.lake.compact import commit_compaction, merge_group, plan_compaction
from jobs.lake.current import (
    CurrentModel,
    ModelName,
    current_of,
    history,
    labelled_sources,
    promote,
    read_current,
    rollback,
    rolled_back,
)
from jobs.lake.fragments import Fragment, write_fragment
from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from schemas.errors import CommitConflictError, CommitStateUnknownError, StorageError, UsageError

A, B, C = "lite-aaaaaaaaaaaa", "lite-bbbbbbbbbbbb", "lite-cccccccccccc"
SOURCE, OTHER = "s3://photos/2026", "s3://photos/2027"

MakeRows = Callable[..., pa.Table]
AddLabels = Callable[..., list[Fragment]]


def clock() -> datetime:
    return datetime(2026, 11, 23, 2, 10, tzinfo=UTC)


def no_sleep(seconds: float) -> None:
    pass


@pytest.fixture
def table(lake: str, storage: Storage, make_rows: MakeRows, add_labels: AddLabels) -> LabelsTable:
    """Version 1: SOURCE labelled by A, B and C, OTHER by A."""
    table = LabelsTable.open_or_create(lake, storage)
    others = make_rows(["b"], A, source=OTHER)
    add_labels(table, storage, *(make_rows(["a"], model_id) for model_id in (A, B, C)), others)
    return table


def test_an_empty_table_has_no_current_model(lake: str, storage: Storage) -> None:
    table = LabelsTable.open_or_create(lake, storage)
    assert read_current(table) == {}
    assert labelled_sources(table) == {}
    assert current_of(table, SOURCE) is None
    assert list(history(table)) == []


def test_without_a_promotion_the_only_model_of_a_source_is_current(table: LabelsTable) -> None:
    assert labelled_sources(table) == {SOURCE: {A, B, C}, OTHER: {A}}
    assert current_of(table, OTHER) == A
    assert current_of(table, SOURCE) is None
    assert current_of(table, "s3://nowhere") is None
    assert read_current(table) == {}


def test_sources_of_files_without_statistics_are_read(
    table: LabelsTable, lake: str, make_rows: MakeRows
) -> None:
    rows = pa.concat_tables([make_rows(["x"], A, source="s3://x"), make_rows(["y"], A, source="s3://y")])
    write_deltalake(f"{lake.removeprefix('file://')}/labels", rows, mode="append")
    table.refresh()
    assert labelled_sources(table) == {SOURCE: {A, B, C}, OTHER: {A}, "s3://x": {A}, "s3://y": {A}}


def test_a_promotion_is_one_commit_that_every_version_remembers(
    table: LabelsTable, lake: str, storage: Storage
) -> None:
    assert promote(table, [SOURCE, OTHER], A, "facades@1", "ana", "first", clock) == table.version == 2
    assert promote(table, [SOURCE], B, "facades@2", "ben", "it is better", clock) == 3
    at = "2026-11-23T02:10:00+00:00"
    first = (ModelName(A, "facades@1"),)
    assert read_current(table) == {
        SOURCE: CurrentModel(SOURCE, B, "facades@2", "ben", at, "it is better", first),
        OTHER: CurrentModel(OTHER, A, "facades@1", "ana", at, "first", ()),
    }
    assert read_current(table)[SOURCE].previous == ModelName(A, "facades@1")
    assert read_current(table)[OTHER].previous is None
    versions = [LabelsTable.open(lake, storage, version) for version in (1, 2, 3)]
    assert [current_of(version, SOURCE) for version in versions] == [None, A, B]
    assert table.dataset().count_rows() == 4
    protocol = table.delta.protocol()
    assert (protocol.min_reader_version, protocol.min_writer_version) == (1, 2)


def test_what_is_current_already_is_not_committed_again(table: LabelsTable) -> None:
    promote(table, [SOURCE], A, "facades@1", "ana", "")
    assert promote(table, [SOURCE], A, "facades@1", "ben", "again") == table.version == 2
    assert promote(table, [SOURCE], A, None, "ben", "by its model_id") == 2
    assert promote(table, [SOURCE, OTHER], A, "facades@1", "ben", "one is new") == 3
    assert promote(table, [SOURCE], A, "facades@7", "ben", "the same weights") == 4
    assert read_current(table)[SOURCE].before == ()


def test_a_model_without_labels_of_a_source_is_refused(table: LabelsTable) -> None:
    with pytest.raises(UsageError, match=f"{B}.* has no labels of {OTHER}"):
        promote(table, [SOURCE, OTHER], B, "facades@2", "ana", "")
    with pytest.raises(UsageError, match="for no source"):
        promote(table, [], B, None, "ana", "")
    with pytest.raises(UsageError, match=r"why .*one line"):
        promote(table, [SOURCE], B, None, "ana", "two\nlines")
    assert table.version == 1


def test_rollbacks_go_back_through_what_was_current_and_never_forward(table: LabelsTable) -> None:
    for model_id in (A, B, C):
        promote(table, [SOURCE], model_id, None, "ana", "")
    assert rollback(table, [SOURCE], "ben", "C is no good") == table.version == 5
    assert current_of(table, SOURCE) == B
    rollback(table, None, "ben", "nor is B")
    assert current_of(table, SOURCE) == A
    with pytest.raises(UsageError, match=f"no labels of {SOURCE} were current before"):
        rollback(table, [SOURCE], "ben", "and before that?")
    with pytest.raises(UsageError, match=f"no labels of {SOURCE}, {OTHER} were current"):
        rollback(table, [SOURCE, OTHER], "ben", "")
    assert table.version == 6


def test_a_rollback_of_a_table_without_promotions_is_refused(table: LabelsTable) -> None:
    with pytest.raises(UsageError, match="nothing to go back to"):
        rollback(table, None, "ana", "")
    assert table.version == 1


def test_the_history_says_who_switched_what_and_when_the_newest_first(
    table: LabelsTable, lake: str, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    promote(table, [SOURCE, OTHER], A, "facades@1", "ana", "first", clock)
    add_labels(table, storage, make_rows(["z"], A))
    promote(table, [SOURCE], B, None, "ben", "ü\"' \\", clock)
    rollback(table, [SOURCE], "eva", "", clock)
    old, new = ModelName(A, "facades@1"), ModelName(B, None)
    switches = list(history(table))
    assert [(s.version, s.event, s.by, s.why) for s in switches] == [
        (5, "rollback", "eva", ""),
        (4, "promotion", "ben", "ü\"' \\"),
        (2, "promotion", "ana", "first"),
    ]
    assert [s.sources for s in switches] == [
        {SOURCE: (old, new)},
        {SOURCE: (new, old)},
        {OTHER: (old, None), SOURCE: (old, None)},
    ]
    assert {s.at for s in switches} == {"2026-11-23T02:10:00+00:00"}
    assert list(history(LabelsTable.open(lake, storage, 3))) == switches[2:]


def test_a_compaction_and_a_checkpoint_leave_it_as_it_is(
    table: LabelsTable, lake: str, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    promote(table, [SOURCE], A, None, "ana", "")
    add_labels(table, storage, make_rows(["m"], A))
    commit_compaction(table, [merge_group(group, lake, storage) for group in plan_compaction(table)])
    table.delta.create_checkpoint()
    again = LabelsTable.open_or_create(lake, storage)
    assert (again.version, current_of(again, SOURCE)) == (4, A)
    assert [switch.version for switch in history(again)] == [2]


@pytest.mark.parametrize("value", ["", "[]", "{}", '{"version": 1, "sources": {"s3://x": {}}}'])
def test_a_property_that_is_not_ours_is_said_so(value: str, table: LabelsTable) -> None:
    table.delta.alter.set_table_properties({"masklake.current": value}, raise_if_not_exists=False)
    with pytest.raises(StorageError, match=r"masklake\.current .* is damaged"):
        read_current(table)


# Others who commit at the same time


def test_a_run_that_commits_before_and_after_a_promotion_goes_on(
    table: LabelsTable, lake: str, storage: Storage, make_rows: MakeRows
) -> None:
    run = LabelsTable.open(lake, storage)
    committer = Committer(DeltaStore(run), app_id(SOURCE, A), {}, every_s=60, every_images=1, sleep=no_sleep)
    for number, model_id in enumerate((A, B, C)):
        committer.add(write_fragment(make_rows([f"n{number}"], A), [f"unit {number}"], lake, A, storage))
        assert committer.commit() == 2 + 2 * number
        assert promote(table, [SOURCE], model_id, None, "ana", "", sleep=no_sleep) == 3 + 2 * number
    assert run.dataset().count_rows() == 4 + 3
    assert [s.version for s in history(table)] == [7, 5, 3]


def test_a_commit_in_the_very_moment_of_a_promotion_loses_neither(
    table: LabelsTable, lake: str, storage: Storage, make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is sent over a version that the other has just gone beyond."""
    run = LabelsTable.open(lake, storage)
    store = DeltaStore(run)
    committer = Committer(store, app_id(SOURCE, A), {}, every_s=60, every_images=1, sleep=no_sleep)
    committer.add(write_fragment(make_rows(["n"], A), ["unit"], lake, A, storage))

    def promote_then_append(*arguments: Any) -> None:
        monkeypatch.undo()
        promote(LabelsTable.open(lake, storage), [SOURCE], A, None, "ana", "")
        store.append(*arguments)

    monkeypatch.setattr(store, "append", promote_then_append)
    assert committer.commit() == 3

    def append_then_commit(what: str, call: Callable[..., Any]) -> Any:
        monkeypatch.undo()
        committer.add(write_fragment(make_rows(["o"], A), ["unit 2"], lake, A, storage))
        assert committer.commit() == 4
        return table.ask(what, call)

    monkeypatch.setattr(table, "ask", append_then_commit)
    table.refresh()
    monkeypatch.setattr(table, "refresh", lambda: None)
    assert promote(table, [SOURCE], B, None, "ben", "", sleep=no_sleep) == 5
    assert table.dataset().count_rows() == 4 + 2
    assert current_of(table, SOURCE) == B


def test_of_two_promotions_at_once_one_is_told_of_the_other(
    table: LabelsTable, lake: str, storage: Storage
) -> None:
    late = LabelsTable.open(lake, storage)
    promote(table, [SOURCE], A, None, "ana", "I was first")
    with pytest.raises(CommitConflictError, match=f"ana made {A} current for {SOURCE} .*I was first"):
        promote(late, [SOURCE], B, None, "ben", "")
    assert current_of(late, SOURCE) == A
    assert promote(late, [SOURCE], B, None, "ben", "on second thoughts") == 3


def test_two_rollbacks_at_once_go_back_once(table: LabelsTable, lake: str, storage: Storage) -> None:
    for model_id in (A, B, C):
        promote(table, [SOURCE], model_id, None, "ana", "")
    late = LabelsTable.open(lake, storage)
    rollback(table, [SOURCE], "ana", "")
    with pytest.raises(CommitConflictError, match=f"ana made {B} current"):
        rollback(late, [SOURCE], "ben", "")
    assert current_of(late, SOURCE) == B


def test_promotions_of_different_sources_do_not_disturb_each_other(
    table: LabelsTable, lake: str, storage: Storage
) -> None:
    late = LabelsTable.open(lake, storage)
    promote(table, [SOURCE], B, None, "ana", "")
    assert promote(late, [OTHER], A, None, "ben", "") == 3
    assert {source: one.model_id for source, one in read_current(late).items()} == {SOURCE: B, OTHER: A}


def test_of_many_promotions_at_once_each_that_returns_is_in_the_history(
    table: LabelsTable, lake: str, storage: Storage
) -> None:
    started = threading.Barrier(6)

    def try_one(number: int) -> int | None:
        mine = LabelsTable.open(lake, storage)
        started.wait()
        try:
            return promote(mine, [SOURCE], (A, B, C)[number % 3], f"m@{number + 1}", f"p{number}", "")
        except CommitConflictError:
            return None

    with ThreadPoolExecutor(6) as pool:
        versions = list(pool.map(try_one, range(6)))
    table.refresh()
    (only,) = history(table)
    assert {only.by: only.version} == {f"p{n}": v for n, v in enumerate(versions) if v is not None}


def test_a_promotion_whose_reply_is_lost_is_found(
    table: LabelsTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_ask = table.ask

    def lose_the_reply(what: str, call: Callable[..., Any]) -> Any:
        answer = real_ask(what, call)
        if what.startswith("a commit"):
            raise OSError("connection reset")
        return answer

    monkeypatch.setattr(table, "ask", lose_the_reply)
    assert promote(table, [SOURCE], A, None, "ana", "", sleep=no_sleep) == table.version == 2


def test_a_store_that_refuses_and_one_that_is_gone_are_told_apart(
    table: LabelsTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(what: str, call: Callable[..., Any]) -> Any:
        raise OSError("busy")

    monkeypatch.setattr(table, "ask", refuse)
    monkeypatch.setattr(table, "refresh", lambda: None)
    with pytest.raises(StorageError, match=r"not in the table .* after 20 attempts: busy\. The table is"):
        promote(table, [SOURCE], A, None, "ana", "", sleep=no_sleep)
    monkeypatch.setattr(table, "reopen", lambda: refuse("", list))
    with pytest.raises(CommitStateUnknownError, match="masklake history"):
        promote(table, [SOURCE], A, None, "ana", "", sleep=no_sleep)
    monkeypatch.undo()
    assert current_of(LabelsTable(table.uri, table._storage), SOURCE) is None


def test_a_change_of_the_property_by_hand_is_no_history(table: LabelsTable) -> None:
    promote(table, [SOURCE], A, None, "ana", "")
    value = json.loads(table.delta.metadata().configuration["masklake.current"]) | {"version": 1}
    table.delta.alter.set_table_properties({"masklake.current": json.dumps(value)}, False)
    with pytest.raises(StorageError, match=r"version 1 .* is not a promotion"):
        next(history(table))


def test_who_rolled_a_model_back_is_looked_for_only_as_far_as_it_takes(
    table: LabelsTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in (A, B):
        promote(table, [SOURCE], model, None, "ana", "")
    rollback(table, [SOURCE], "ben", "")
    read: list[int] = []
    commit_info = table.commit_info

    def count(version: int) -> dict[str, Any]:
        read.append(version)
        return commit_info(version)

    monkeypatch.setattr(table, "commit_info", count)
    assert rolled_back(table, SOURCE, A) is None  # it is current
    assert read == []
    switch = rolled_back(table, SOURCE, B)
    assert switch is not None
    assert switch.by == "ben"
    assert read == [table.version]
    assert rolled_back(table, "s3://another", B) is None


@pytest.mark.slow
def test_promotions_on_s3(s3_lake: tuple[str, Storage], make_rows: MakeRows, add_labels: AddLabels) -> None:
    lake, storage = s3_lake
    table = LabelsTable.open_or_create(lake, storage)
    add_labels(table, storage, make_rows(["a"], A), make_rows(["a"], B))
    late = LabelsTable.open(lake, storage)
    promote(table, [SOURCE], A, None, "ana", "")
    with pytest.raises(CommitConflictError):
        promote(late, [SOURCE], B, None, "ben", "")
    promote(table, [SOURCE], B, None, "ana", "")
    rollback(table, None, "ana", "")
    assert current_of(LabelsTable.open(lake, storage), SOURCE) == A
    assert [switch.event for switch in history(table)] == ["rollback", "promotion", "promotion"]
    assert not Path("s3:").exists()
