"""Compaction: the plan, merging one group, jobs/lake/compact.py."""

import json
import pickle
import random
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.lake import compact
from jobs.lake.commit import Committer, DeltaStore, app_id
from jobs.lake.compact import commit_compaction, group_files, merge_group, plan_compaction
from jobs.lake.done_images import LabelFile, Range
from jobs.lake.fragments import Fragment, write_fragment
from jobs.lake.labels_table import LabelsTable
from jobs.lake.rewrite import MergedFile
from jobs.lake.storage import CorruptObjectError, Storage

MODEL = "lite-0123456789ab"
ODD_MODEL = "my mödel/v1=a%20b+#?:&'-0123456789ab"
MakeRows = Callable[..., pa.Table]
AddLabels = Callable[..., list[Fragment]]


def file(low: str, size_bytes: int, source: str = "s3://photos", shard: str = "s") -> LabelFile:
    nothing = Range(None, None)
    only = (Range(source, source), Range(shard, shard))
    return LabelFile(f"{low}.parquet", MODEL, size_bytes, 1, 0, Range(low, low), *only, nothing, nothing)


def lows(groups: list[tuple[LabelFile, ...]]) -> list[str]:
    return ["".join(str(file.image_ids.low) for file in group) for group in groups]


def test_neighbours_are_packed_to_the_target_and_a_small_rest_joins_them() -> None:
    files = [file(low, 40) for low in "gfedcba"]
    assert lows(group_files(files, 100)) == ["abc", "defg"]
    assert lows(group_files(files[1:], 100)) == ["abc", "def"]


def test_large_files_stay_and_so_does_one_alone() -> None:
    assert group_files([file("a", 50), file("b", 90), file("c", 49)], 100) == []
    assert group_files([], 100) == []


def test_sources_are_not_mixed_and_shards_go_before_image_ids() -> None:
    files = [file("a", 30, "x"), file("b", 30, "y"), file("c", 30, "x"), file("d", 30, "y")]
    assert lows(group_files(files, 100)) == ["ac", "bd"]
    files = [file(low, 25, shard=shard) for low, shard in zip("abcdef", "ststst", strict=True)]
    assert lows(group_files(files, 60)) == ["ace", "bdf"]


def test_a_rest_is_not_written_anew_for_every_small_file_that_joins_it() -> None:
    assert group_files([file("a", 40), file("b", 1)], 100) == []
    assert group_files([file("a", 40), *(file(f"b{i:02}", 0) for i in range(30))], 100) == []
    assert len(group_files([file("a", 40), *(file(f"b{i:02}", 0) for i in range(31))], 100)) == 1
    assert len(group_files([file("a", 10), file("b", 10)], 100)) == 1


@given(st.lists(st.integers(0, 150), max_size=40))
def test_every_group_is_within_half_and_twice_the_target_or_the_only_rest(sizes: list[int]) -> None:
    files = [file(f"{place:02}", size) for place, size in enumerate(sizes)]
    groups = group_files(files, 100)
    chosen = [file.path for group in groups for file in group]
    assert chosen == sorted(set(chosen))
    assert all(file.size_bytes < 50 for group in groups for file in group)
    totals = [sum(file.size_bytes for file in group) for group in groups]
    assert all(50 <= total < 200 for total in totals) or len(totals) == 1
    left = [file for file in files if file.size_bytes < 50 and file.path not in chosen]
    assert not (totals and sum(file.size_bytes for file in left) >= 50)


@pytest.fixture
def table(lake: str, storage: Storage) -> LabelsTable:
    return LabelsTable.open_or_create(lake, storage)


def in_order(table: LabelsTable) -> pa.Table:
    return (
        table.dataset()
        .to_table()
        .sort_by([("model_id", "ascending"), ("image_id", "ascending"), ("labeled_at", "ascending")])
    )


@pytest.mark.parametrize("model_id", [MODEL, ODD_MODEL])
def test_compaction_keeps_every_row_and_older_versions(
    model_id: str, table: LabelsTable, lake: str, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    for number in range(4):
        ids = [f"{number + 4 * i:03}" for i in range(5)]  # ranges interlock
        add_labels(table, storage, make_rows(ids, model_id, failed={ids[0]: "io"}, at_us=number))
    add_labels(table, storage, make_rows(["000", "007"], model_id, at_us=9, run_id="retry"))
    add_labels(table, storage, make_rows(["000"], "other-0123456789ab"))
    before = in_order(table)

    (group,) = plan_compaction(table, model_id)
    assert plan_compaction(table) == [group]
    merged = pickle.loads(pickle.dumps(merge_group(pickle.loads(pickle.dumps(group)), lake, storage)))
    rewrite = commit_compaction(table, [merged], {"run_id": "run-7"})

    assert (rewrite.version, rewrite.done, rewrite.given_up) == (table.version, (merged,), ())
    assert len(table.files()) == 2
    assert in_order(table).equals(before)
    assert table.dataset(model_id).to_table()["image_id"].to_pylist() == sorted(
        row["image_id"] for row in before.to_pylist() if row["model_id"] == model_id
    )
    old = LabelsTable.open(lake, storage, table.version - 1)
    assert len(old.files()) == 6
    assert in_order(old).equals(before)
    assert table.delta.history(1)[0]["run_id"] == "run-7"
    assert plan_compaction(table, model_id) == []


def test_a_merged_file_is_written_as_a_fragment_is(
    table: LabelsTable,
    lake: str,
    storage: Storage,
    make_rows: MakeRows,
    add_labels: AddLabels,
    tmp_path: Path,
) -> None:
    first = add_labels(table, storage, make_rows(["a", "b"], MODEL), make_rows(["c"], MODEL))[0]
    (group,) = plan_compaction(table)
    merged = merge_group(group, lake, storage)
    path = tmp_path / "lake" / "labels" / merged.path
    assert path.stat().st_size == merged.size_bytes
    new, old = pq.ParquetFile(path), pq.ParquetFile(tmp_path / "lake" / "labels" / first.path)
    assert new.schema_arrow.equals(old.schema_arrow)
    for place in range(new.metadata.num_columns):
        column, old_column = (file.metadata.row_group(0).column(place) for file in (new, old))
        assert (column.encodings, column.compression) == (old_column.encodings, old_column.compression)
        assert column.has_column_index == old_column.has_column_index
    stats = json.loads(merged.stats_json)
    assert stats["numRecords"] == merged.num_rows == 3
    assert (stats["minValues"]["image_id"], stats["maxValues"]["image_id"]) == ("a", "c")


@pytest.mark.parametrize("row_group_bytes", [1, 3_000, 10_000_000])
def test_rows_come_in_order_however_few_fit_a_row_group(
    row_group_bytes: int,
    table: LabelsTable,
    lake: str,
    storage: Storage,
    make_rows: MakeRows,
    add_labels: AddLabels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compact, "_ROW_GROUP_BYTES", row_group_bytes)
    ids = [f"{i:03}" for i in range(60)]
    pieces = [ids[0:10], ids[10:20], ids[20:40:2], ids[21:40:2], ids[40:60:3], ids[41:60:3], ids[42:60:3]]
    add_labels(table, storage, *(make_rows(piece, MODEL) for piece in pieces))
    (group,) = plan_compaction(table)
    merged = merge_group(group, lake, storage)
    file = pq.ParquetFile(f"{lake.removeprefix('file://')}/labels/{merged.path}")
    assert file.read(["image_id"])["image_id"].to_pylist() == ids
    assert (file.num_row_groups == 1) == (row_group_bytes == 10_000_000)


def test_a_file_that_lost_rows_or_bytes_is_not_merged(
    table: LabelsTable,
    lake: str,
    storage: Storage,
    make_rows: MakeRows,
    add_labels: AddLabels,
    tmp_path: Path,
) -> None:
    fragment = add_labels(table, storage, make_rows(["a", "b"], MODEL), make_rows(["c"], MODEL))[0]
    (group,) = plan_compaction(table)
    path = tmp_path / "lake" / "labels" / fragment.path
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptObjectError, match="not merged"):
        merge_group(group, lake, storage)
    fewer = replace(group, files=tuple(replace(file, num_rows=7) for file in group.files[1:]))
    with pytest.raises(CorruptObjectError, match="has 1 rows, the table's log says 7"):
        merge_group(fewer, lake, storage)
    assert len(list(path.parent.iterdir())) == 2


def append(rows: pa.Table, table: LabelsTable, lake: str, storage: Storage, writer: str) -> None:
    """Commit rows as a run does, from whatever version the table shows."""
    committer = Committer(DeltaStore(table), app_id("tests", writer), {}, every_s=60, every_images=1)
    committer.add(write_fragment(rows, [uuid.uuid4().hex], lake, MODEL, storage))
    committer.commit()


def test_labels_that_arrive_while_files_are_merged_stay(
    table: LabelsTable, lake: str, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    """A writer appends while two compactions race for the same files: one of them wins each group."""
    add_labels(table, storage, make_rows(["a0"], MODEL), make_rows(["b0"], MODEL))
    writer = LabelsTable.open(lake, storage)

    def write() -> None:
        for number in range(1, 13):
            append(make_rows([f"{c}{number}" for c in "ab"], MODEL), writer, lake, storage, "writer")

    def compact_all(_: int) -> int:
        mine, num_done = LabelsTable.open(lake, storage), 0
        for _ in range(6):
            merged = [merge_group(group, lake, storage) for group in plan_compaction(mine)]
            num_done += len(commit_compaction(mine, merged).done)
        return num_done

    with ThreadPoolExecutor(3) as pool:
        appended = pool.submit(write)
        num_done = sum(pool.map(compact_all, range(2)))
        appended.result()
    table.refresh()
    assert num_done >= 1
    ids = [str(image_id) for image_id in table.dataset(MODEL).to_table()["image_id"]]
    assert sorted(ids) == sorted(f"{c}{number}" for c in "ab" for number in range(13))


@pytest.mark.parametrize(
    "seeds", [range(1), pytest.param(range(1, 13), marks=pytest.mark.slow)], ids=["quick", "slow"]
)
def test_whatever_the_order_of_appends_and_compactions_no_row_is_lost_or_doubled(
    seeds: range, lake: str, storage: Storage, make_rows: MakeRows
) -> None:
    """Two compactions look, merge and commit between the steps of each other and of two writers."""
    num_merged = num_given_up = 0
    for seed in seeds:
        rng = random.Random(seed)
        place = f"{lake}-{seed}"
        LabelsTable.open_or_create(place, storage)
        tables = [LabelsTable.open(place, storage) for _ in range(4)]
        merged: dict[int, list[MergedFile]] = {}
        written: list[str] = []
        for step in range(20):
            actor = rng.randrange(4)
            table = tables[actor]
            if actor < 2:
                rows = make_rows([f"{rng.randrange(1000):03}-{step}-{i}" for i in range(3)], MODEL)
                append(rows, table, place, storage, f"writer {actor}")
                written += (str(image_id) for image_id in rows["image_id"])
            elif actor in merged:
                result = commit_compaction(table, merged.pop(actor))
                num_merged += len(result.done)
                num_given_up += len(result.given_up)
            else:
                if rng.random() < 0.8:
                    table.refresh()
                merged[actor] = [merge_group(group, place, storage) for group in plan_compaction(table)]
        newest = LabelsTable.open(place, storage)
        ids = [str(image_id) for image_id in newest.dataset().to_table(columns=["image_id"])["image_id"]]
        assert sorted(ids) == sorted(written), f"seed {seed}"
        for version in range(1, newest.version, 5):
            num_rows = LabelsTable.open(place, storage, version).dataset().count_rows()
            assert num_rows % 3 == 0, f"seed {seed}, version {version}"
    assert num_merged > 0
    assert num_given_up > 0 or len(seeds) == 1
