"""Retiring models, jobs/care/retire.py: which may go, what is left of them, and who comes in between."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.care import retire as retire_module
from jobs.care.doctor import audit
from jobs.care.retire import Retirement, retire
from jobs.care.vacuum import vacuum
from jobs.lake.aliases import Aliases
from jobs.lake.commit import Committer, DeltaStore, app_id
from jobs.lake.compact import run_compaction
from jobs.lake.current import current_of, promote, rollback
from jobs.lake.fragments import Fragment, write_fragment
from jobs.lake.labels_table import LabelsTable
from jobs.lake.lease import Lease
from jobs.lake.model_ids import ModelIdRecord, record_model_id
from jobs.lake.plan import plan_shards
from jobs.lake.registry import ModelRegistry
from jobs.lake.shard_index import load_shard_index, save_shard_index
from jobs.lake.shards import Shard
from jobs.lake.storage import ObjectInfo, Storage
from schemas.errors import CommitStateUnknownError, StorageError, UsageError
from schemas.specs import StorageSpec
from tests.care.conftest import make_sound_rows

MakeRows = Callable[..., pa.Table]
AddRows = Callable[..., list[Fragment]]
SOURCE = "s3://photos/2026"
OLD, MIDDLE, NEW = "a-000000000000", "b-111111111111", "c-222222222222"
ODD_MODEL = "my mödel/v1=a%20b+#?:&'-0123456789ab"
LABELLED_AT = datetime(2026, 11, 22, tzinfo=UTC)
DAY_S = 86400.0

Retire = Callable[..., Retirement]


def half_a_year_later() -> datetime:
    return datetime(2027, 5, 22, tzinfo=UTC)


def no_sleep(seconds: float) -> None:
    pass


@pytest.fixture
def retire_now(lake: str, storage: Storage) -> Retire:
    def call(*model_ids: str, **options: Any) -> Retirement:
        options = {"clock": half_a_year_later, "sleep": no_sleep, **options}
        return retire(lake, storage, model_ids, **options)

    return call


@pytest.fixture(scope="module")
def labelled_lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OLD, MIDDLE and NEW labelled a and b of one source and were promoted in turn: version 4."""
    path = tmp_path_factory.mktemp("labelled") / "lake"
    lake, storage = f"file://{path}", Storage(StorageSpec())
    table = LabelsTable.open_or_create(lake, storage)
    append(
        lake, storage, *(make_sound_rows(["a", "b"], model_id=model_id) for model_id in (OLD, MIDDLE, NEW))
    )
    for model_id in (OLD, MIDDLE, NEW):
        promote(table, [SOURCE], model_id, None, "ana", "")
    return path


@pytest.fixture
def three_models(labelled_lake: Path, lake: str, storage: Storage) -> LabelsTable:
    """A copy of labelled_lake at `lake`."""
    shutil.copytree(labelled_lake, lake.removeprefix("file://"))
    return LabelsTable.open(lake, storage)


def names(result: Retirement) -> list[str]:
    return [model.model_id for model in result.retired]


def rows_by_model(lake: str, storage: Storage, version: int | None = None) -> dict[str, int]:
    rows = LabelsTable.open(lake, storage, version).dataset().to_table(columns=["model_id"])
    return dict(sorted(Counter(map(str, rows["model_id"].to_pylist())).items()))


def test_current_and_previous_stay_and_what_was_before_goes_in_one_version(
    three_models: LabelsTable, lake: str, storage: Storage, retire_now: Retire
) -> None:
    planned = retire_now(dry_run=True)
    assert (names(planned), planned.version) == ([OLD], 4)
    assert rows_by_model(lake, storage) == {OLD: 2, MIDDLE: 2, NEW: 2}

    done = retire_now()
    (model,) = done.retired
    assert (model.model_id, model.num_files, model.num_rows) == (OLD, 1, 2)
    assert model.newest_row_at == LABELLED_AT.isoformat()
    assert done.version == 5
    assert done.kept == {
        MIDDLE: f"`masklake rollback` of {SOURCE} goes back to it",
        NEW: f"its labels of {SOURCE} are current",
    }
    assert rows_by_model(lake, storage) == {MIDDLE: 2, NEW: 2}
    three_models.refresh()
    info = three_models.commit_info(5)
    assert (info["purpose"], info["models"]) == ("retire", [OLD])
    again = retire_now()
    assert (again.retired, again.version) == ([], 5)


def test_a_rollback_works_after_it(
    three_models: LabelsTable, lake: str, storage: Storage, retire_now: Retire
) -> None:
    retire_now()
    assert audit(lake, storage).problems == []
    rollback(three_models, [SOURCE], "ana", "")
    assert current_of(three_models, SOURCE) == MIDDLE
    assert three_models.to_current(MIDDLE).select("image_id").fetchall() == [("a",), ("b",)]
    with pytest.raises(UsageError, match=rf"{OLD}.* has no labels of {SOURCE} any more.*it was retired"):
        rollback(three_models, [SOURCE], "ana", "")
    assert current_of(three_models, SOURCE) == MIDDLE


def test_older_versions_read_until_vacuum_deletes_the_files(
    three_models: LabelsTable, lake: str, storage: Storage, retire_now: Retire
) -> None:
    """Time travel: version 4 has all three models, as long as the grace period lasts."""
    path = three_models.files(OLD)[0].path
    retire_now()
    young = vacuum(lake, storage)
    assert (young.deleted, [file.path for file in young.kept]) == ([], [path])
    assert rows_by_model(lake, storage, 4) == {OLD: 2, MIDDLE: 2, NEW: 2}
    found = audit(lake, storage)
    assert (found.orphans, [file.path for file in found.replaced]) == ([], [path])

    gone = vacuum(lake, storage, clock=lambda: time.time() + 8 * DAY_S)
    assert ([file.path for file in gone.deleted], gone.kept, gone.oldest_whole_version) == ([path], [], 5)
    assert rows_by_model(lake, storage) == {MIDDLE: 2, NEW: 2}
    with pytest.raises(FileNotFoundError):
        rows_by_model(lake, storage, 4)


def test_a_model_that_is_named_goes_alone_or_the_reason_is_an_error(
    three_models: LabelsTable, lake: str, storage: Storage, retire_now: Retire
) -> None:
    with pytest.raises(UsageError, match=rf"{NEW} stays: its labels of {SOURCE} are current .* Nothing was"):
        retire_now(OLD, NEW)
    with pytest.raises(UsageError, match="nobody is not one of them"):
        retire_now("nobody")
    assert rows_by_model(lake, storage) == {OLD: 2, MIDDLE: 2, NEW: 2}
    assert names(retire_now(OLD)) == [OLD]


def test_all_of_several_go_in_one_version_and_others_are_left_alone(
    lake: str,
    storage: Storage,
    table: LabelsTable,
    make_rows: MakeRows,
    add_rows: AddRows,
    retire_now: Retire,
) -> None:
    add_rows(*(make_rows(["a"], model_id=model_id) for model_id in (OLD, MIDDLE, ODD_MODEL, NEW)))
    add_rows(make_rows(["b"], model_id=ODD_MODEL))
    promote(table, [SOURCE], NEW, None, "ana", "")
    done = retire_now(OLD, ODD_MODEL)
    assert (names(done), done.version) == ([OLD, ODD_MODEL], 4)
    assert rows_by_model(lake, storage) == {MIDDLE: 1, NEW: 1}


def test_without_a_promotion_no_label_of_a_source_goes(
    make_rows: MakeRows, add_rows: AddRows, table: LabelsTable, retire_now: Retire
) -> None:
    """Of two models nobody said which counts. Alone, either would be current."""
    add_rows(make_rows(["a"], model_id=OLD), make_rows(["a"], model_id=MIDDLE))
    add_rows(make_rows(["a"], model_id=NEW, source="s3://other"))
    kept = retire_now().kept
    assert kept[NEW] == "it is the only model that labelled s3://other"
    assert (
        kept[OLD]
        == kept[MIDDLE]
        == f"of those that labelled {SOURCE} none was promoted: `masklake promote` one"
    )
    promote(table, [SOURCE], MIDDLE, None, "ana", "")
    assert names(retire_now()) == [OLD]


@pytest.mark.usefixtures("table")
def test_a_table_without_labels_has_nothing_to_retire(retire_now: Retire) -> None:
    result = retire_now()
    assert (result.retired, result.kept, result.version) == ([], {}, 0)


def test_young_labels_stay_to_the_second(
    three_models: LabelsTable, make_rows: MakeRows, add_rows: AddRows, retire_now: Retire
) -> None:
    add_rows(make_rows(["c"], model_id=OLD, at_s=10))
    now = half_a_year_later()
    age_s = (now - LABELLED_AT).total_seconds() - 10
    assert (
        retire_now(older_than_s=age_s + 1)
        .kept[OLD]
        .startswith("its newest row is of 2026-11-22 00:00 UTC, younger than 181")
    )
    assert names(retire_now(older_than_s=age_s)) == [OLD]


def test_what_an_alias_leads_to_stays_until_the_alias_moves(
    three_models: LabelsTable, lake: str, storage: Storage, retire_now: Retire
) -> None:
    registry = ModelRegistry(lake, storage)
    fingerprints = {OLD: "1a" * 32, MIDDLE: "2b" * 32}
    for model_id, fingerprint in fingerprints.items():
        version = registry.register("facades", model_id.encode(), fingerprint)
        record = ModelIdRecord(model_id, fingerprint, "facades", "fp32", {}, (), "infer-1", "")
        record_model_id(storage, lake, record)
    aliases = Aliases(lake, storage)
    aliases.move("champion", registry.open("facades@1"), "ana", "")
    result = retire_now()
    assert (result.retired, result.kept[OLD]) == ([], "alias champion leads to it (facades@1)")
    aliases.move("champion", version, "ana", "")
    assert names(retire_now()) == [OLD]


def test_a_model_that_a_run_labels_with_stays(
    three_models: LabelsTable, lake: str, storage: Storage, retire_now: Retire
) -> None:
    with Lease.acquire(storage, lake, app_id(SOURCE, OLD), "infer-7 on host"):
        assert retire_now().kept[OLD] == "run infer-7 on host labels with it"
    assert names(retire_now()) == [OLD]


def test_a_run_of_an_unknown_model_keeps_those_with_young_rows(
    three_models: LabelsTable, lake: str, storage: Storage, retire_now: Retire
) -> None:
    """A lease of another source, or of a re-labelling, does not say which model it is."""
    with Lease.acquire(storage, lake, "relabel:0123", "relabel-7 on host"):
        kept = retire_now(older_than_s=0, clock=lambda: datetime(2026, 11, 28, tzinfo=UTC)).kept
        assert kept[OLD] == "run relabel-7 on host is at work, perhaps with it: it has rows younger than 7 d"
        assert names(retire_now(older_than_s=0, clock=lambda: datetime(2026, 11, 30, tzinfo=UTC))) == [OLD]


def commit_first(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> list[int]:
    """Let somebody commit between retire's look and its first commit. Gives the tries that were made."""
    commit, tries = retire_module._commit, []

    def too_late(*args: Any) -> None:
        tries.append(1)
        if len(tries) == 1:
            act()
        commit(*args)

    monkeypatch.setattr(retire_module, "_commit", too_late)
    return tries


def append(lake: str, storage: Storage, *tables: pa.Table) -> None:
    """Commit tables of rows, together, as a run of the first one's model does."""
    key = app_id(SOURCE, tables[0]["model_id"][0].as_py())
    table = LabelsTable.open(lake, storage)
    committer = Committer(DeltaStore(table), key, {}, every_s=60, every_images=1)
    for number, rows in enumerate(tables):
        model_id = rows["model_id"][0].as_py()
        committer.add(write_fragment(rows, [f"unit-{number}"], lake, model_id, storage))
    committer.commit()


def test_rows_of_the_same_model_that_come_first_keep_it(
    three_models: LabelsTable,
    lake: str,
    storage: Storage,
    make_rows: MakeRows,
    retire_now: Retire,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The row is not younger than the others, and no lease is held: that it came is what counts."""
    tries = commit_first(monkeypatch, lambda: append(lake, storage, make_rows(["c"], model_id=OLD)))
    result = retire_now()
    assert (result.retired, result.version, len(tries)) == ([], 5, 1)
    assert result.kept[OLD] == "rows of it were committed while this looked; run again"
    assert rows_by_model(lake, storage) == {OLD: 3, MIDDLE: 2, NEW: 2}


def test_rows_of_the_same_model_that_come_afterwards_are_there(
    three_models: LabelsTable, lake: str, storage: Storage, make_rows: MakeRows, retire_now: Retire
) -> None:
    """A run that looked before and commits after: its rows stand, those before them are gone."""
    run = Committer(DeltaStore(three_models), app_id(SOURCE, OLD), {}, every_s=60, every_images=1)
    run.add(write_fragment(make_rows(["c"], model_id=OLD), ["unit"], lake, OLD, storage))
    assert names(retire_now()) == [OLD]
    assert run.commit() == 6
    assert rows_by_model(lake, storage) == {OLD: 1, MIDDLE: 2, NEW: 2}


def test_a_named_model_that_got_rows_meanwhile_is_an_error(
    three_models: LabelsTable,
    lake: str,
    storage: Storage,
    make_rows: MakeRows,
    retire_now: Retire,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commit_first(monkeypatch, lambda: append(lake, storage, make_rows(["c"], model_id=OLD)))
    with pytest.raises(UsageError, match="committed while this looked"):
        retire_now(OLD)
    assert rows_by_model(lake, storage)[OLD] == 3


def test_rows_of_another_model_and_compactions_come_in_between(
    three_models: LabelsTable,
    lake: str,
    storage: Storage,
    make_rows: MakeRows,
    add_rows: AddRows,
    retire_now: Retire,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add_rows(make_rows(["c"], model_id=OLD))

    def act() -> None:
        append(lake, storage, make_rows(["c"], model_id=NEW))
        run_compaction(LabelsTable.open(lake, storage), lake, storage, OLD)

    tries = commit_first(monkeypatch, act)
    result = retire_now()
    (model,) = result.retired
    assert (model.model_id, model.num_files, model.num_rows, result.version) == (OLD, 1, 3, 8)
    assert len(tries) == 2
    assert rows_by_model(lake, storage) == {MIDDLE: 2, NEW: 3}


def test_a_model_that_is_promoted_meanwhile_stays(
    three_models: LabelsTable,
    lake: str,
    storage: Storage,
    retire_now: Retire,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = LabelsTable.open(lake, storage)
    commit_first(monkeypatch, lambda: promote(other, [SOURCE], OLD, None, "ana", ""))
    assert names(retire_now()) == [MIDDLE]
    assert rows_by_model(lake, storage) == {OLD: 2, NEW: 2}


def test_a_commit_whose_reply_was_lost_is_found(
    three_models: LabelsTable, retire_now: Retire, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = retire_module._commit

    def lose_reply(*args: Any) -> None:
        commit(*args)
        raise OSError("connection reset")

    monkeypatch.setattr(retire_module, "_commit", lose_reply)
    result = retire_now()
    assert (names(result), result.version) == ([OLD], 5)


def test_a_store_that_refuses_leaves_the_table_as_it_was(
    three_models: LabelsTable, retire_now: Retire, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError("503 SlowDown")

    monkeypatch.setattr(retire_module, "_commit", refuse)
    monkeypatch.setattr("jobs.lake.commit_on_top._MAX_ATTEMPTS", 2)
    with pytest.raises(StorageError, match=r"SlowDown\. The table is as it was"):
        retire_now()
    three_models.refresh()
    assert three_models.version == 4
    monkeypatch.setattr(LabelsTable, "reopen", refuse)
    with pytest.raises(CommitStateUnknownError, match="takes out what is left"):
        retire_now()


@pytest.mark.slow
@pytest.mark.parametrize(("failpoint", "is_there"), [("retire_send", True), ("retire_put", False)])
def test_killed_before_its_commit_it_changed_nothing_and_after_it_all_is_done(
    failpoint: str, is_there: bool, three_models: LabelsTable, lake: str, storage: Storage
) -> None:
    command = [sys.executable, "-m", "jobs.cli", "lake", "retire", "--lake", lake, "--older-than", "0s"]
    killed = subprocess.run(command, env={**os.environ, "MASKLAKE_FAILPOINTS": failpoint}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert rows_by_model(lake, storage) == ({OLD: 2} if is_there else {}) | {MIDDLE: 2, NEW: 2}
    assert audit(lake, storage).problems == []


def test_a_later_run_with_the_model_finds_every_image_to_do(
    lake: str,
    storage: Storage,
    make_rows: MakeRows,
    add_rows: AddRows,
    table: LabelsTable,
    retire_now: Retire,
) -> None:
    """The shard index says that x.tar has two images, and the table has neither of them any more."""
    tar = ObjectInfo(f"{SOURCE}/x.tar", 1024, None, "etag-1")
    shard = Shard(tar.uri, "x.tar", "tar", tar)

    def to_do() -> list[tuple[str, Any]]:
        now = LabelsTable.open(lake, storage)
        index = load_shard_index(storage, lake, SOURCE, OLD)
        return [
            (task.shard.name, task.skip) for task in plan_shards([shard], now.done_images(SOURCE, OLD), index)
        ]

    add_rows(make_rows(["x.tar/a", "x.tar/b"], model_id=OLD, shard="x.tar"))
    add_rows(make_rows(["x.tar/a"], model_id=NEW, shard="x.tar"))
    save_shard_index(storage, lake, SOURCE, OLD, "run-1", {("x.tar", tar.version): 2})
    promote(table, [SOURCE], NEW, None, "ana", "")
    assert to_do() == []
    assert names(retire_now()) == [OLD]
    assert to_do() == [("x.tar", frozenset())]

    append(lake, storage, make_rows(["x.tar/a", "x.tar/b"], model_id=OLD, shard="x.tar", run_id="run-2"))
    assert to_do() == []
    assert audit(lake, storage).problems == []
