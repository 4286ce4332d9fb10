"""The doctor, jobs/care/doctor.py: a sound table is sound, and each fault is named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.care.doctor import audit
from jobs.lake.aliases import Aliases
from jobs.lake.commit import Committer, DeltaStore, app_id
from jobs.lake.compact import run_compaction
from jobs.lake.current import promote
from jobs.lake.fragments import Fragment, write_fragment
from jobs.lake.labels_table import LabelsTable
from jobs.lake.lease import Lease
from jobs.lake.model_ids import ModelIdRecord, record_model_id
from jobs.lake.registry import ModelRegistry
from jobs.lake.storage import Storage
from schemas.errors import UsageError

MakeRows = Callable[..., pa.Table]
AddRows = Callable[..., list[Fragment]]
SOURCE = "s3://photos/2026"
MODEL = "lite-0123456789ab"
OTHER = "other-0123456789ab"


def test_a_sound_table_is_counted_and_nothing_found(
    lake: str, storage: Storage, make_rows: MakeRows, add_rows: AddRows
) -> None:
    add_rows(make_rows(["a", "b", "c"], failed={"b": "corrupt"}), make_rows(["d"], removed=["d"]))
    add_rows(make_rows(["a"], model_id="other-0123456789ab"))
    found = audit(lake, storage)
    assert found.problems == []
    assert found.is_sound
    assert (found.version, found.num_files, found.num_rows, found.num_images) == (2, 3, 5, 5)
    assert found.rows_by_status == {"failed": 1, "ok": 3, "removed": 1}
    assert found.rows_by_model == {MODEL: 4, "other-0123456789ab": 1}
    assert (found.num_masks, found.num_masks_checked, found.num_files_whole) == (6, 6, 3)
    assert [*found.orphans, *found.replaced, *found.leases, *found.unfinished_runs] == []
    json.dumps(found.to_dict())


def test_a_table_without_a_row_is_sound_and_none_is_a_mistake(
    table: LabelsTable, lake: str, storage: Storage, tmp_path: Path
) -> None:
    assert audit(lake, storage).is_sound
    with pytest.raises(UsageError, match="no label table"):
        audit(str(tmp_path / "elsewhere"), storage)


def test_a_bad_row_is_named_by_its_image_and_file(
    lake: str, storage: Storage, make_rows: MakeRows, add_rows: AddRows
) -> None:
    bad = make_rows(["b", "a"], changes={"area": 5})
    fragments = add_rows(make_rows(["c"]), bad, make_rows(["d"], changes={"area": 6}))
    (problem,) = audit(lake, storage).problems
    assert problem.startswith("an area that is not its mask's: 2, first image ")
    assert f"'b' in {fragments[1].path}" in problem or f"'d' in {fragments[2].path}" in problem


def test_rows_have_a_reason_or_are_duplicates(
    lake: str, storage: Storage, make_rows: MakeRows, add_rows: AddRows
) -> None:
    """a was retried, b came back after it was removed, c has other bytes now; d to f are labelled again."""
    first = make_rows(list("abcdef"), failed={"a": "io"}, run_id="r1", at_s=1)
    add_rows(first, make_rows(["b"], removed=["b"], run_id="r2", at_s=2))
    add_rows(make_rows(["a", "b"], run_id="r3", at_s=3), make_rows(["c"], content="new", run_id="r3", at_s=3))
    found = audit(lake, storage)
    assert found.problems == []
    assert (found.num_rows, found.num_images) == (10, 6)

    add_rows(make_rows(["d"], run_id="r4", at_s=4), make_rows(["e"], failed={"e": "io"}, run_id="r4", at_s=4))
    add_rows(make_rows(["f"], content="new", run_id="r1", at_s=5))
    (problem,) = audit(lake, storage).problems
    assert problem.startswith("rows that label an image a second time for no reason: 3,")


def test_files_are_compared_with_the_log(
    lake: str, storage: Storage, make_rows: MakeRows, add_rows: AddRows, tmp_path: Path
) -> None:
    gone, cut, flipped = (
        tmp_path / "lake" / "labels" / fragment.path
        for fragment in add_rows(*(make_rows([image_id]) for image_id in "abc"), make_rows(["d"]))[:3]
    )
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-9])
    column = pq.ParquetFile(flipped).metadata.row_group(0).column(0)
    data = bytearray(flipped.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    flipped.write_bytes(data)
    found = audit(lake, storage)
    kinds = {line.partition(":")[0]: line for line in found.problems}
    assert gone.name in kinds["a file that the table names does not exist"]
    assert cut.name in kinds["a file of another size than the log says"]
    assert "2, first" in kinds["a file that does not read"]
    assert (len(kinds), found.num_files, found.num_rows) == (3, 4, 1)


def test_statistics_in_the_log_must_hold(
    table: LabelsTable, lake: str, storage: Storage, make_rows: MakeRows
) -> None:
    """Two files whose Add actions were mixed up: a reader that trusts them would not open the right one."""
    first, second = (write_fragment(make_rows([i]), [i], lake, MODEL, storage) for i in "ab")
    more = write_fragment(make_rows(["c", "d"]), ["cd"], lake, MODEL, storage)
    committer = Committer(DeltaStore(table), app_id("tests", ""), {}, every_s=60, every_images=1)
    committer.add(replace(first, stats_json=second.stats_json))
    committer.add(replace(more, stats_json=first.stats_json))
    committer.commit()
    bounds, rows = sorted(audit(lake, storage).problems, reverse=True)
    assert f"{more.path} has 2 rows, the log says 1" in rows
    # image_id of both, and the number of nulls in error_kind of one
    assert bounds.startswith("statistics in the log that do not hold: 3, first ")


def test_orphans_and_replaced_files_are_told_apart_and_are_no_problem(
    table: LabelsTable, lake: str, storage: Storage, make_rows: MakeRows, add_rows: AddRows
) -> None:
    fragments = add_rows(make_rows(["a"]), make_rows(["b"]))
    orphan = write_fragment(make_rows(["c"]), ["unit"], lake, MODEL, storage)
    run_compaction(table, lake, storage)
    found = audit(lake, storage)
    assert found.problems == []
    assert [(file.path, file.size_bytes) for file in found.orphans] == [(orphan.path, orphan.size_bytes)]
    assert [file.path for file in found.replaced] == sorted(fragment.path for fragment in fragments)
    assert all(0 <= file.age_s < 60 for file in [*found.orphans, *found.replaced])


def test_who_is_at_work_and_which_runs_did_not_end(table: LabelsTable, lake: str, storage: Storage) -> None:
    with Lease.acquire(storage, lake, "key-1", "run-1 on host"):
        storage.write_bytes(f"{lake}/runs/run-1/spec.yaml", b"")
        storage.write_bytes(f"{lake}/runs/run-0/spec.yaml", b"")
        storage.write_bytes(f"{lake}/runs/run-0/summary.json", b"{}")
        found = audit(lake, storage)
        assert [(lease.key, lease.holder) for lease in found.leases] == [("key-1", "run-1 on host")]
        assert 0 < found.leases[0].expires_in_s <= 120
        assert found.unfinished_runs == ["run-1"]
    assert audit(lake, storage).leases == []


def test_a_look_that_is_not_deep_reads_a_sample_whole(
    lake: str, storage: Storage, make_rows: MakeRows, add_rows: AddRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.care.doctor._SAMPLE_FILES", 2)
    add_rows(*(make_rows([f"{number}"]) for number in range(4)), make_rows(["x"], changes={"width": None}))
    found = audit(lake, storage, deep=False)
    assert (found.num_files_whole, found.num_masks, found.num_masks_checked) == (3, 10, 6)
    assert any(line.startswith("ok without width: image 'x'") for line in found.problems)


def test_current_and_previous_models_must_have_labels_of_their_source(
    table: LabelsTable, lake: str, storage: Storage, make_rows: MakeRows, add_rows: AddRows
) -> None:
    """OTHER has labels, but of another source; the property is as a promotion writes it."""
    add_rows(make_rows(["a"]), make_rows(["a"], model_id=OTHER, source="s3://elsewhere"))
    promote(table, [SOURCE], MODEL, None, "ana", "")
    said = json.loads(table.delta.metadata().configuration["masklake.current"])
    set_current(table, said, model_id=OTHER, before=[[MODEL, None]])
    assert audit(lake, storage).problems == [
        f"a current model without labels: {OTHER} of {SOURCE}; promote another"
    ]
    set_current(table, said, model_id=MODEL, before=[[OTHER, "other@1"]])
    assert audit(lake, storage).problems == [
        f"a rollback would go back to a model without labels: other@1 ({OTHER}) of {SOURCE}"
    ]
    set_current(table, said, model_id=MODEL, before="?")
    (problem,) = audit(lake, storage).problems
    assert problem.startswith("what is current cannot be read: property masklake.current of the table")


def set_current(table: LabelsTable, said: dict[str, Any], **changes: Any) -> None:
    value = said | {"sources": {SOURCE: said["sources"][SOURCE] | changes}}
    table.delta.alter.set_table_properties({"masklake.current": json.dumps(value)}, False)


@pytest.mark.usefixtures("table")
def test_aliases_must_lead_to_weights_that_are_those_of_their_version(
    lake: str, storage: Storage, tmp_path: Path
) -> None:
    registry, aliases = ModelRegistry(lake, storage), Aliases(lake, storage)
    for number, alias in enumerate(("cut", "flipped", "gone", "lost", "sound")):
        fingerprint = f"{number}a" * 32
        aliases.move(alias, registry.register(f"{alias}-model", b"weights", fingerprint), "ana", "")
    models = tmp_path / "lake" / "models"
    (models / "blobs" / f"{'0a' * 32}.safetensors").write_bytes(b"weigh")
    (models / "blobs" / f"{'1a' * 32}.safetensors").write_bytes(b"WEIGHTS")
    (models / "blobs" / f"{'2a' * 32}.safetensors").unlink()
    (models / "lost-model" / "1.json").unlink()

    version, weights = sorted(audit(lake, storage, deep=False).problems)
    assert version.startswith("an alias that leads to no version: lost: model lost-model@1 is not registered")
    assert weights.startswith("an alias whose weights are not those of its version: 2, first cut: ")
    assert weights.endswith("has 5 bytes, cut-model@1 was registered with 7")
    _, weights = sorted(audit(lake, storage, deep=True).problems)
    assert weights.startswith("an alias whose weights are not those of its version: 3, first cut: ")


@pytest.mark.usefixtures("table")
def test_records_of_model_ids_must_read_and_be_of_their_model(
    lake: str, storage: Storage, tmp_path: Path
) -> None:
    for model_id in (MODEL, OTHER, "odd=/%-0123456789ab"):
        record_model_id(
            storage, lake, ModelIdRecord(model_id, "1a" * 32, "lite", "fp32", {}, (), "run-1", "")
        )
    assert audit(lake, storage).problems == []
    ids = tmp_path / "lake" / "models" / "ids"
    (ids / f"{OTHER}.json").write_bytes((ids / f"{MODEL}.json").read_bytes())
    (problem,) = audit(lake, storage).problems
    assert problem.startswith("a model_id whose record cannot be read: ")
    assert problem.endswith(f"it says '{MODEL}' of '{'1a' * 32}'")
