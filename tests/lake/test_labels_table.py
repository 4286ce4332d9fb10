"""The label table, jobs/lake/labels_table.py, and what is done in it, jobs/lake/done_images.py."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pytest
from deltalake import DeltaTable, QueryBuilder, write_deltalake

from jobs.lake.compact import commit_compaction, merge_group, plan_compaction
from jobs.lake.done_images import DoneImages, ShardState, Standing
from jobs.lake.fragments import Fragment
from jobs.lake.labels_table import LabelsTable
from jobs.lake.object_table import ObjectTable
from jobs.lake.storage import CorruptObjectError, ObjectInfo, Storage
from schemas.errors import SchemaMismatchError, UsageError
from schemas.labels import LABEL_SCHEMA, ErrorKind

MODEL = "lite-0123456789ab"
ODD_MODEL = "my mödel/v1=a%20b+#?:&'-0123456789ab"
SOURCE = "s3://photos/2026"
GOLDEN = Path(__file__).parents[1] / "golden"

MakeRows = Callable[..., pa.Table]
AddLabels = Callable[..., list[Fragment]]


@pytest.fixture
def table(lake: str, storage: Storage) -> LabelsTable:
    return LabelsTable.open_or_create(lake, storage)


def among(done: DoneImages, image_ids: list[str]) -> frozenset[str]:
    """Those of the ids that are done."""
    objects = ObjectTable.of((image_id, ObjectInfo(image_id, 1, None, "")) for image_id in image_ids)
    known = done.known(objects).standing
    return frozenset(
        i for i, s in zip(image_ids, known, strict=True) if s in (Standing.DONE, Standing.FAILED)
    )


def test_a_new_table_is_empty(table: LabelsTable) -> None:
    assert table.version == 0
    assert table.model_ids() == []
    assert table.file_uris() == []
    assert table.dataset().schema.equals(LABEL_SCHEMA)
    assert table.dataset().to_table().num_rows == 0
    assert table.to_current(MODEL).fetchall() == []
    done = table.done_images(SOURCE, MODEL)
    assert done.state("shard-000.tar") == ShardState(0, 0)
    assert done.ids("shard-000.tar") == among(done, ["a"]) == among(done, []) == frozenset()


def test_any_reader_may_read_the_table(table: LabelsTable) -> None:
    protocol = table.delta.protocol()
    assert (protocol.min_reader_version, protocol.min_writer_version) == (1, 2)
    assert protocol.reader_features is None
    assert table.delta.metadata().configuration == {
        "delta.appendOnly": "true",
        "delta.checkpointInterval": "25",
        "delta.enableExpiredLogCleanup": "false",
        "masklake.label_schema_version": "2",
    }
    units = {field.name: field.metadata.get("unit") for field in table.delta.schema().fields}
    assert units["width"] == "px"


def test_opening_what_is_not_there_creates_nothing(lake: str, storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no label table"):
        LabelsTable.open(lake, storage)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_version_is_a_mistake_of_the_users(
    table: LabelsTable, lake: str, storage: Storage
) -> None:
    with pytest.raises(UsageError, match="no version 7; its newest is 0"):
        LabelsTable.open(lake, storage, version=7)


def test_many_may_create_it_at_once(lake: str, storage: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        tables = list(pool.map(lambda _: LabelsTable.open_or_create(lake, storage), range(8)))
    assert {table.delta.metadata().id for table in tables} == {tables[0].delta.metadata().id}
    assert {table.version for table in tables} == {0}


def test_a_table_that_is_not_ours_is_refused(lake: str, storage: Storage) -> None:
    path = f"{lake.removeprefix('file://')}/labels"
    DeltaTable.create(path, pa.schema([("image_id", pa.string()), ("model_id", pa.string())]))
    with pytest.raises(SchemaMismatchError, match="is partitioned by"):
        LabelsTable.open(lake, storage)
    DeltaTable.create(
        path,
        pa.schema([("image_id", pa.string()), ("model_id", pa.string())]),
        mode="overwrite",
        partition_by="model_id",
    )
    with pytest.raises(SchemaMismatchError, match=r"image_id.*may be null.*detections.*missing"):
        LabelsTable.open_or_create(lake, storage)


def test_a_table_of_a_later_schema_is_refused(table: LabelsTable, lake: str, storage: Storage) -> None:
    properties = {"masklake.label_schema_version": "3"}
    table.delta.alter.set_table_properties(properties, raise_if_not_exists=False)
    with pytest.raises(SchemaMismatchError, match="version 3; this masklake reads 1 and 2"):
        LabelsTable.open(lake, storage)


def test_a_table_of_the_schema_before_is_read_as_it_is_and_brought_up_when_it_is_written_to(
    tmp_path: Path, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    shutil.copytree(GOLDEN / "label_schema_1", tmp_path / "lake")
    lake = storage.normalize(str(tmp_path / "lake"))
    old = LabelsTable.open(lake, storage)
    rows = old.dataset().to_table().sort_by("image_id")
    assert (old.version, rows["image_id"].to_pylist(), rows["object_version"].null_count) == (
        2,
        ["a.jpg", "b.jpg", "c.jpg"],
        3,
    )
    assert among(old.done_images(SOURCE, MODEL), ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]) == {
        "a.jpg",
        "b.jpg",
        "c.jpg",
    }

    table = LabelsTable.open_or_create(lake, storage)
    add_labels(table, storage, make_rows(["d.jpg"], MODEL, shard=".", object_version="v1"))
    again = LabelsTable.open_or_create(lake, storage)
    assert again.version == table.version == 5
    assert again.delta.metadata().configuration["masklake.label_schema_version"] == "2"
    versions = again.to_current(MODEL).order("image_id").select("object_version").fetchall()
    assert versions == [(None,), (None,), (None,), ("v1",)]
    names = [str(field.name) for field in again.delta.schema().fields]
    assert names == [*(name for name in LABEL_SCHEMA.names if name != "object_version"), "object_version"]
    assert LabelsTable.open(lake, storage, version=2).dataset().count_rows() == 3


def test_an_object_that_changed_since_it_was_labelled_is_told(
    table: LabelsTable, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    rows = make_rows(["a", "b", "c", "e"], MODEL, failed={"b": "io"}, object_version="v1")
    add_labels(
        table,
        storage,
        rows,
        make_rows(["d"], MODEL),
        make_rows(["e"], MODEL, at_us=2 * 10**15, removed=["e"]),
    )
    versions = {"a": "v1", "b": "v2", "c": "v2", "d": "v2", "e": "v2", "f": "v2"}
    objects = ObjectTable.of((i, ObjectInfo(i, 1, None, version)) for i, version in versions.items())
    known = table.done_images(SOURCE, MODEL).known(objects)
    assert [Standing(code).name for code in known.standing] == [
        "DONE",
        "CHANGED",
        "CHANGED",
        "DONE",  # its row does not say what it was made from
        "NEW",  # it was gone, and is back
        "NEW",
    ]
    assert known.content_hash.to_pylist()[2] == rows["content_hash"][2].as_py()
    assert known.content_hash.to_pylist()[5] is None


def test_the_images_of_a_shard_that_changed_are_told_with_what_was_in_them(
    table: LabelsTable, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    rows = make_rows(["a", "b"], MODEL, object_version="v1")
    add_labels(table, storage, rows, make_rows(["c"], MODEL, object_version="v2"), make_rows(["d"], MODEL))
    done = table.done_images(SOURCE, MODEL)
    assert done.ids("shard-000.tar") == {"a", "b", "c", "d"}
    assert done.ids("shard-000.tar", "v2") == {"c", "d"}
    hashes = rows["content_hash"].to_pylist()
    assert done.contents("shard-000.tar", "v2") == {"a": hashes[0], "b": hashes[1]}
    assert done.contents("shard-000.tar", "v1").keys() == {"c"}


@pytest.mark.parametrize("name", ["50%25", "a\\b", "a#b", "a?b"])
def test_a_lake_that_deltalake_would_look_for_elsewhere_is_refused(
    name: str, storage: Storage, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="choose a path without"):
        LabelsTable.open_or_create(f"file://{tmp_path}/{name}", storage)
    assert list(tmp_path.iterdir()) == []


def test_a_lake_in_memory_is_refused(storage: Storage) -> None:
    with pytest.raises(UsageError, match="memory"):
        LabelsTable.open_or_create("memory://lake", storage)


@pytest.mark.parametrize("name", ["my lake", "ä&=+:~", "50% of it"])
def test_a_lake_may_have_an_odd_name(
    name: str, storage: Storage, tmp_path: Path, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    table = LabelsTable.open_or_create(f"file://{tmp_path}/{name}", storage)
    add_labels(table, storage, make_rows(["a", "b"], ODD_MODEL))
    check_every_reader(table, ODD_MODEL, make_rows(["a", "b"], ODD_MODEL))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("model_id", [MODEL, ODD_MODEL])
def test_every_reader_reads_the_same_labels(
    model_id: str, table: LabelsTable, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    rows = make_rows(["a", "b", "c"], model_id, failed={"b": "corrupt"}, at_us=1_234_567_890_123_456)
    add_labels(table, storage, rows)
    add_labels(table, storage, make_rows(["a"], "other-0123456789ab"))
    assert table.model_ids() == sorted([model_id, "other-0123456789ab"])
    check_every_reader(table, model_id, rows)


def check_every_reader(table: LabelsTable, model_id: str, rows: pa.Table) -> None:
    """pyarrow over our dataset, pyarrow and DuckDB over plain files, DuckDB over the dataset, DataFusion."""
    wanted = rows.sort_by("image_id").to_pylist()
    assert table.dataset(model_id).to_table().sort_by("image_id").equals(rows.sort_by("image_id"))

    where = pads.partitioning(pa.schema([("model_id", pa.string())]), flavor="hive")
    root = table.uri.removeprefix("file://")
    files = pads.dataset(table.file_uris(), partitioning=where, partition_base_dir=root)
    mine = files.to_table(filter=pc.field("model_id") == model_id).select(LABEL_SCHEMA.names)
    assert mine.sort_by("image_id").to_pylist() == wanted

    relation = duckdb.sql(
        "SELECT * FROM read_parquet($1, hive_partitioning = true, hive_types_autocast = false) "
        "WHERE model_id = $2 ORDER BY image_id",
        params=[table.file_uris(), model_id],
    )
    assert relation is not None
    duck = relation.to_arrow_table()
    assert duck.select(LABEL_SCHEMA.names).cast(LABEL_SCHEMA).to_pylist() == wanted
    current = table.to_current(model_id).order("image_id").to_arrow_table()
    assert current.cast(LABEL_SCHEMA).to_pylist() == wanted

    quoted = model_id.replace("'", "''")
    sql = f"SELECT * FROM labels WHERE model_id = '{quoted}' ORDER BY image_id"
    fusion = pa.table(QueryBuilder().register("labels", table.delta).execute(sql).read_all())
    assert pa.types.is_binary_view(fusion.schema.field("content_hash").type)
    assert [_plain(row) for row in fusion.select(LABEL_SCHEMA.names).to_pylist()] == [
        _plain(r) for r in wanted
    ]


def _plain(row: dict[str, object]) -> dict[str, object]:
    at = row["labeled_at"]
    assert isinstance(at, datetime)
    return row | {"labeled_at": at.astimezone(UTC)}


def test_a_version_stays_readable(
    table: LabelsTable, lake: str, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    add_labels(table, storage, make_rows(["a"], MODEL))
    add_labels(table, storage, make_rows(["b"], MODEL))
    assert table.version == 2
    assert table.dataset(version=1).to_table()["image_id"].to_pylist() == ["a"]
    assert LabelsTable.open(lake, storage, version=0).dataset().count_rows() == 0


def test_every_25th_version_is_a_checkpoint_whoever_commits_it(
    table: LabelsTable, lake: str, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    for number in range(23):
        add_labels(table, storage, make_rows([f"{number:02}"], MODEL))
    merged = [merge_group(group, lake, storage) for group in plan_compaction(table)]
    assert commit_compaction(table, merged).version == 24
    log = Path(lake.removeprefix("file://")) / "labels" / "_delta_log"
    assert [path.name for path in log.glob("*.checkpoint.parquet")] == [f"{24:020}.checkpoint.parquet"]
    assert LabelsTable.open(lake, storage).dataset().count_rows() == 23


def test_another_runs_commit_shows_after_a_refresh(
    table: LabelsTable, lake: str, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    other = LabelsTable.open(lake, storage)
    add_labels(table, storage, make_rows(["a"], MODEL))
    assert other.version == 0
    other.refresh()
    assert other.version == 1
    assert other.dataset().count_rows() == 1


def test_the_current_view_has_the_newest_row_of_each_image_and_no_removed_ones(
    table: LabelsTable, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    add_labels(table, storage, make_rows(["b"], MODEL, run_id="newer", at_us=200))
    add_labels(table, storage, make_rows(["a", "b", "c"], MODEL, run_id="older", at_us=100))
    add_labels(table, storage, make_rows(["c"], MODEL, removed=["c"], at_us=300))
    add_labels(table, storage, make_rows(["b"], MODEL, source="s3://elsewhere", run_id="other", at_us=100))
    rows = table.to_current(MODEL).select("source, image_id, run_id").order("source, image_id").fetchall()
    assert rows == [("s3://elsewhere", "b", "other"), (SOURCE, "a", "older"), (SOURCE, "b", "newer")]


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_query_for_one_image_opens_one_file(
    checkpoint: bool,
    table: LabelsTable,
    lake: str,
    storage: Storage,
    make_rows: MakeRows,
    add_labels: AddLabels,
    tmp_path: Path,
) -> None:
    rows = [make_rows([f"image-{i}{j}" for j in range(10)], MODEL) for i in range(4)]
    fragments = add_labels(table, storage, *rows)
    if checkpoint:
        table.delta.create_checkpoint()
        table = LabelsTable.open(lake, storage)
    uris = table.delta.file_uris(file_pruning_predicate="image_id = 'image-25'")
    assert [uri.endswith(fragments[2].path) for uri in uris] == [True]

    # Who opens another file than the one that may have the image, fails.
    for fragment in (fragments[0], fragments[1], fragments[3]):
        (tmp_path / "lake" / "labels" / fragment.path).unlink()
    found = table.dataset().to_table(filter=pc.field("image_id") == "image-25")
    assert found["image_id"].to_pylist() == ["image-25"]
    sql = "SELECT image_id FROM labels WHERE image_id = 'image-25'"
    fusion = QueryBuilder().register("labels", table.delta).execute(sql).read_all()
    assert pa.table(fusion).to_pylist() == [{"image_id": "image-25"}]


def test_stats_of_nested_columns_do_not_hide_rows(
    table: LabelsTable, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    add_labels(table, storage, make_rows(["a", "b"], MODEL, failed={"b": "io"}))
    sql = "SELECT image_id FROM labels WHERE detections IS NOT NULL AND content_hash IS NOT NULL"
    fusion = QueryBuilder().register("labels", table.delta).execute(sql).read_all()
    assert pa.table(fusion).to_pylist() == [{"image_id": "a"}]
    actions = pa.table(table.delta.get_add_actions(flatten=True)).to_pylist()[0]
    assert actions["num_records"] == 2
    assert actions.get("null_count.detections") is None
    assert (
        actions["max.labeled_at"]
        >= actions["min.labeled_at"]
        == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    )


def test_the_table_works_on_s3(
    s3_lake: tuple[str, Storage], make_rows: MakeRows, add_labels: AddLabels
) -> None:
    lake, storage = s3_lake
    table = LabelsTable.open_or_create(lake, storage)
    rows = make_rows(["a", "b"], ODD_MODEL)
    (fragment,) = add_labels(table, storage, rows)
    add_labels(table, storage, make_rows(["c"], MODEL))
    assert table.file_uris(ODD_MODEL) == [f"{lake}/labels/{fragment.path}"]
    assert table.dataset(ODD_MODEL).to_table().equals(rows)
    assert table.to_current(MODEL).count("*").fetchall() == [(1,)]
    assert table.done_images(SOURCE, ODD_MODEL).ids("shard-000.tar") == {"a", "b"}
    sql = f"SELECT image_id FROM labels WHERE model_id <> '{MODEL}' ORDER BY 1"
    fusion = QueryBuilder().register("labels", table.delta).execute(sql).read_all()
    assert pa.table(fusion)["image_id"].to_pylist() == ["a", "b"]
    assert LabelsTable.open_or_create(lake, storage).version == 2


def test_a_table_that_is_not_there_on_s3_or_whose_bucket_is_not(s3_lake: tuple[str, Storage]) -> None:
    lake, storage = s3_lake
    with pytest.raises(UsageError, match="no label table"):
        LabelsTable.open(lake, storage)


# What is done


def test_done_images_are_counted_without_opening_a_file(
    table: LabelsTable, storage: Storage, make_rows: MakeRows, add_labels: AddLabels, tmp_path: Path
) -> None:
    for fragment in add_labels(
        table,
        storage,
        make_rows(["x/00", "x/01"], MODEL, shard="x", failed={"x/01": "corrupt"}),
        make_rows(["x/02"], MODEL, shard="x"),
        make_rows(["y/00"], MODEL, shard="y"),
        make_rows(["x/03"], "other-0123456789ab", shard="x"),
        make_rows(["x/04"], MODEL, shard="x", source="s3://elsewhere"),
    ):
        (tmp_path / "lake" / "labels" / fragment.path).unlink()
    done = table.done_images(SOURCE, MODEL)
    assert done.state("x") == ShardState(3, 0)
    assert done.state("y") == ShardState(1, 0)
    assert done.state("z") == ShardState(0, 0)
    assert table.done_images(SOURCE, MODEL, retry=[ErrorKind.IO]).state("y") == ShardState(1, 0)


def test_failed_images_are_done_unless_their_kind_is_to_be_retried(
    table: LabelsTable, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    failed = {"b": "io", "c": "corrupt", "d": "truncated"}
    add_labels(table, storage, make_rows(["a", "b", "c", "d"], MODEL, shard="x", failed=failed))
    assert table.done_images(SOURCE, MODEL).ids("x") == {"a", "b", "c", "d"}
    done = table.done_images(SOURCE, MODEL, retry=[ErrorKind.IO, ErrorKind.TRUNCATED])
    assert done.ids("x") == {"a", "c"}
    assert done.state("x") == ShardState(2, 2)
    assert among(done, ["d", "c", "b", "unheard-of"]) == {"c"}


def test_the_newest_row_decides_whichever_file_it_is_in(
    table: LabelsTable, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    add_labels(table, storage, make_rows(["b"], MODEL, shard="x", at_us=200))
    add_labels(table, storage, make_rows(["a", "b", "c"], MODEL, shard="x", failed={"b": "io"}, at_us=100))
    add_labels(table, storage, make_rows(["c"], MODEL, shard="x", removed=["c"], at_us=300))
    done = table.done_images(SOURCE, MODEL, retry=[ErrorKind.IO])
    assert done.ids("x") == among(done, ["a", "b", "c"]) == {"a", "b"}
    assert done.state("x") == ShardState(2, 1)


def test_an_image_in_two_files_counts_once(
    table: LabelsTable, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    add_labels(table, storage, make_rows(["a", "c"], MODEL, shard="x", at_us=100))
    add_labels(table, storage, make_rows(["b", "c"], MODEL, shard="x", at_us=200))
    assert table.done_images(SOURCE, MODEL).state("x") == ShardState(3, 0)


def test_a_file_with_several_shards_is_counted_for_each(
    table: LabelsTable, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    both = [make_rows(["x/0", "x/1"], MODEL, shard="x"), make_rows(["z/0"], MODEL, shard="z")]
    add_labels(table, storage, pa.concat_tables(both))
    done = table.done_images(SOURCE, MODEL)
    assert [done.state(shard).num_done for shard in "wxyz"] == [0, 2, 0, 1]
    assert done.ids("z") == {"z/0"}


@pytest.mark.parametrize("max_cached_rows", [1, 7, 1000])
def test_merging_files_changes_nothing_about_what_is_done(
    max_cached_rows: int,
    table: LabelsTable,
    lake: str,
    storage: Storage,
    make_rows: MakeRows,
    add_labels: AddLabels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jobs.lake.done_images._MAX_CACHED_ROWS", max_cached_rows)
    shards = {name: [f"{i:02}{name}" for i in range(4)] for name in "xyz"}  # the order of ids says no shard
    for name, ids in shards.items():
        add_labels(table, storage, make_rows(ids, MODEL, shard=name, failed={ids[1]: "io"}, at_us=1))
    add_labels(table, storage, make_rows(["00y", "01z"], MODEL, shard="z", removed=["00y"], at_us=2))
    add_labels(table, storage, make_rows(["00x"], MODEL, shard="x", source="s3://elsewhere", at_us=3))

    def answers() -> list[object]:
        found: list[object] = []
        for retry in ([], [ErrorKind.IO]):
            done = table.done_images(SOURCE, MODEL, retry=retry)
            found += [(done.state(name), done.ids(name)) for name in "wxyz"]
            found += [among(done, [*ids, "unheard-of"]) for ids in shards.values()]
        return found

    before = answers()
    merged = [merge_group(group, lake, storage) for group in plan_compaction(table)]
    assert len(commit_compaction(table, merged).done) == 1
    assert len(table.files()) == 2
    assert answers() == before
    assert before[1] == (ShardState(4, 0), frozenset(shards["x"]))


def test_an_image_twice_in_a_merged_file_counts_once(
    table: LabelsTable, lake: str, storage: Storage, make_rows: MakeRows, add_labels: AddLabels
) -> None:
    add_labels(table, storage, make_rows(["a", "b"], MODEL, shard="x", failed={"a": "io"}, at_us=1))
    add_labels(table, storage, make_rows(["a"], MODEL, shard="x", at_us=2))
    (group,) = plan_compaction(table)
    commit_compaction(table, [merge_group(group, lake, storage)])
    assert [file.num_rows for file in table.files()] == [3]
    assert table.done_images(SOURCE, MODEL).state("x") == ShardState(2, 0)


def test_files_of_another_writer_without_stats_are_read(
    table: LabelsTable, storage: Storage, make_rows: MakeRows, add_labels: AddLabels, lake: str
) -> None:
    add_labels(table, storage, make_rows(["b"], MODEL, shard="x"))
    rows = make_rows(["a", "c"], MODEL, shard="x", failed={"a": "io"})
    write_deltalake(f"{lake.removeprefix('file://')}/labels", rows, mode="append")
    table.refresh()
    done = table.done_images(SOURCE, MODEL)
    assert done.state("x") == ShardState(3, 0)
    assert among(done, ["a", "b", "c", "d"]) == {"a", "b", "c"}


@pytest.mark.parametrize("max_cached_files", [1, 4, 1000])
def test_among_finds_images_in_any_of_many_files(
    max_cached_files: int,
    table: LabelsTable,
    storage: Storage,
    make_rows: MakeRows,
    add_labels: AddLabels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jobs.lake.done_images._MAX_CACHED_FILES", max_cached_files)
    ids = [f"{i:03d}.jpg" for i in range(120)]
    files = [ids[start::2][:3] for start in range(0, 120, 4)]  # files of three whose ranges interlock
    add_labels(table, storage, *(make_rows(file_ids, MODEL, shard=file_ids[0]) for file_ids in files))
    labelled = {image_id for file_ids in files for image_id in file_ids}
    assert 0 < len(labelled) < 120
    done = table.done_images(SOURCE, MODEL)
    for size in (1, 7, 50, 120):
        found = {i for start in range(0, 120, size) for i in among(done, ids[start : start + size])}
        assert found == labelled
    assert among(done, list(reversed(ids))) == labelled


def test_a_damaged_label_file_makes_no_plan_wrong(
    lake: str, storage: Storage, make_rows: Callable[..., pa.Table], add_labels: Callable[..., object]
) -> None:
    table = LabelsTable.open_or_create(lake, storage)
    ids = [f"image-{number:03d}" for number in range(50)]
    add_labels(table, storage, make_rows(ids, MODEL, shard="."))
    (uri,) = table.file_uris()
    sound = Path(uri).read_bytes()
    (source,) = table.dataset().to_table(columns=["source"])["source"].unique().to_pylist()
    outcomes: set[bool | str] = set()
    for place in range(0, len(sound), len(sound) // 150):
        Path(uri).write_bytes(sound[:place] + bytes([sound[place] ^ 4]) + sound[place + 1 :])
        try:
            outcomes.add(among(table.done_images(str(source), MODEL), [*ids, "unheard-of"]) == set(ids))
        except CorruptObjectError:
            outcomes.add("refused")
    assert outcomes == {True, "refused"}
