"""What differs between two models, jobs/relabel/diff.py, with tally.py and paired_labels.py below it."""

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from jobs.lake.compact import commit_compaction, merge_group, plan_compaction
from jobs.lake.labels_table import LabelsTable
from jobs.lake.model_ids import ModelIdRecord, record_model_id
from jobs.lake.storage import CorruptObjectError, Storage
from jobs.relabel import paired_labels
from jobs.relabel.diff import ImageCounts, LabelDiff, ScoreShift, diff_models
from tests.relabel.two_models import NEW, OLD, SOURCE, add_rows, found, label_rows

CAR, DOG, CAT = 1, 2, 3
LEFT, RIGHT, BELOW = (0, 0, 20, 20), (40, 0, 60, 20), (0, 30, 20, 50)


def diff(table: LabelsTable, storage: Storage, **settings: Any) -> LabelDiff:
    return diff_models(table, storage, SOURCE, OLD, NEW, **{"num_threads": 2, **settings})


def test_an_image_by_hand(table: LabelsTable, storage: Storage) -> None:
    old = [
        found(CAR, LEFT, 0.9),
        found(DOG, RIGHT, 0.8),
        found(DOG, BELOW, 0.7),
        found(CAT, (60, 40, 80, 60), 0.4),  # below min_score: no object
    ]
    new = [
        found(CAR, (0, 0, 20, 16), 0.7),  # 320 shared of 400
        found(CAT, RIGHT, 0.8),
        found(CAT, (40, 30, 70, 60), 0.6),
    ]
    add_rows(table, storage, label_rows({"a": old}, OLD), label_rows({"a": new}, NEW))
    result = diff(table, storage)
    assert result.images == ImageCounts(compared=1)
    total = result.total
    assert (total.old, total.new, total.kept, total.lost, total.added) == (3, 3, 1, 1, 1)
    assert (total.relabelled, total.arrived, total.moved, total.unreadable) == (1, 1, 0, 0)
    assert total.mean_iou == pytest.approx(0.8)
    assert total.score_shift is not None
    assert total.score_shift == ScoreShift(total.score_shift.mean, -0.2, -0.2, -0.2)
    assert total.score_shift.mean == pytest.approx(-0.2)
    assert (total.old_sizes, total.new_sizes) == ((3, 0, 0), (3, 0, 0))
    assert {key: (c.old, c.new, c.kept, c.lost, c.added) for key, c in result.categories.items()} == {
        CAR: (1, 1, 1, 0, 0),
        DOG: (2, 0, 0, 1, 0),
        CAT: (0, 2, 0, 0, 1),
    }
    assert result.categories[DOG].relabelled_to == {CAT: 1}
    assert result.categories[CAT].arrived == 1
    (change,) = result.worst
    assert (change.image_id, change.lost, change.added, change.relabelled) == ("a", 1, 1, 1)
    assert change.difference == pytest.approx(3.2)


def test_masks_may_differ_in_one_box(table: LabelsTable, storage: Storage) -> None:
    add_rows(
        table,
        storage,
        label_rows({"a": [found(CAR, LEFT)], "b": [found(CAR, LEFT)]}, OLD),
        label_rows({"a": [found(CAR, LEFT, mask=(0, 0, 20, 10))], "b": [found(CAR, LEFT)]}, NEW),
    )
    with_masks, boxes = diff(table, storage), diff(table, storage, masks=False)
    assert (with_masks.total.mean_iou, with_masks.total.moved) == (0.75, 1)
    assert with_masks.total.iou_histogram[10] == with_masks.total.iou_histogram[-1] == 1
    assert (boxes.total.mean_iou, boxes.total.moved) == (1.0, 0)
    assert [change.image_id for change in with_masks.worst] == ["a"]
    assert boxes.worst == ()


def test_masks_that_do_not_read_are_counted(table: LabelsTable, storage: Storage) -> None:
    damaged = found(CAR, LEFT) | {"rle": b"~"}
    add_rows(table, storage, label_rows({"a": [found(CAR, LEFT)]}, OLD), label_rows({"a": [damaged]}, NEW))
    total = diff(table, storage).total
    assert (total.kept, total.unreadable, total.mean_iou) == (1, 1, None)


def test_every_image_is_counted_once(table: LabelsTable, storage: Storage) -> None:
    objects = [found(CAR, LEFT)]
    old: dict[str, Any] = dict.fromkeys(["both", "other bytes", "only old", "fails now", "gone"], objects)
    new: dict[str, Any] = dict.fromkeys(["both", "other bytes", "only new", "failed before", "gone"], objects)
    add_rows(
        table,
        storage,
        label_rows(old | {"failed before": None, "fails": None}, OLD),
        label_rows(
            new | {"fails now": None, "fails": None}, NEW, content={"other bytes": b"x"}, removed=["gone"]
        ),
        label_rows({"elsewhere": objects}, OLD, source="s3://other"),
        label_rows({"elsewhere": objects}, NEW, source="s3://other"),
    )
    assert diff(table, storage).images == ImageCounts(
        compared=1,
        unchanged=1,
        content_changed=1,
        only_old=2,  # with the one that was removed
        only_new=1,
        failed_old=1,
        failed_new=1,
        failed_both=1,
    )


def test_the_newest_row_of_an_image_counts(table: LabelsTable, storage: Storage) -> None:
    add_rows(table, storage, label_rows({"a": [found(CAR, LEFT)], "b": []}, OLD))
    add_rows(table, storage, label_rows({"a": [], "b": []}, NEW, at_s=5))
    add_rows(table, storage, label_rows({"a": [found(CAR, LEFT)]}, NEW, at_s=9))
    add_rows(table, storage, label_rows({"b": [found(CAR, LEFT)]}, NEW, at_s=1))  # late, but older
    result = diff(table, storage)
    assert (result.total.kept, result.total.added) == (1, 0)


def test_nothing_to_compare(table: LabelsTable, storage: Storage) -> None:
    assert diff(table, storage).images == ImageCounts()
    add_rows(table, storage, label_rows({"a": []}, OLD), label_rows({"a": [], "b": []}, NEW))
    result = diff(table, storage)
    assert result.images == ImageCounts(compared=1, unchanged=1, only_new=1)
    assert result.categories == {}
    assert (result.total.old, result.total.mean_iou, result.total.score_shift) == (0, None, None)
    json.dumps(result.to_dict(), allow_nan=False)


def test_names_are_those_that_the_lake_knows(table: LabelsTable, storage: Storage) -> None:
    lake = table.uri.removesuffix("/labels")
    for model_id, categories in ((OLD, ((CAR, "car"), (DOG, "dog"))), (NEW, ((DOG, "dog"), (CAT, "cat")))):
        at = datetime(2026, 11, 22, tzinfo=UTC).isoformat()
        record_model_id(
            storage, lake, ModelIdRecord(model_id, "0" * 64, "lite", "fp32", {}, categories, "run-1", at)
        )
    result = diff(table, storage)
    assert [result.name(category_id) for category_id in (CAR, DOG, CAT, 9)] == ["car", "dog", "cat", "9"]


Images = dict[str, list[dict[str, Any]] | None]


def random_images(rng: random.Random, ids: Sequence[str]) -> Images:
    corners = [(x, y) for x in (0, 24, 48) for y in (0, 30)]
    images: Images = {}
    for image_id in ids:
        detections = []
        for x, y in rng.sample(corners, rng.randrange(7)):
            box = (x, y, x + rng.randrange(14, 24), y + rng.randrange(14, 24))
            detections.append(found(rng.choice([CAR, DOG]), box, rng.choice([0.3, 0.6, 0.9])))
        images[image_id] = None if rng.random() < 0.1 else detections
    return images


def test_files_in_any_order_give_what_one_file_gives(
    tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small ranges, files that interlock, merged files, repeated rows: the sums are the same."""
    rng = random.Random(6)
    ids = [f"{number:03d}" for number in range(54)]
    images = {OLD: random_images(rng, ids), NEW: random_images(rng, ids)}
    first: Mapping[str, Images] = {
        model: random_images(rng, ids) for model in images
    }  # older rows, ids of some
    plain = LabelsTable.open_or_create(f"file://{tmp_path}/plain", storage)
    add_rows(plain, storage, *(label_rows(images[model], model) for model in images))
    wanted = diff(plain, storage).to_dict()

    in_order = LabelsTable.open_or_create(f"file://{tmp_path}/order", storage)
    shuffled = LabelsTable.open_or_create(f"file://{tmp_path}/shuffled", storage)
    for table in (in_order, shuffled):
        for model, its_images in images.items():
            some = rng.sample(ids, 20)
            add_rows(table, storage, label_rows({i: first[model][i] for i in some}, model, at_s=-60))
            order = ids if table is in_order else rng.sample(ids, len(ids))
            step = 9 if model == OLD else 13
            parts = [order[start : start + step] for start in range(0, len(order), step)]
            add_rows(table, storage, *(label_rows({i: its_images[i] for i in part}, model) for part in parts))
    monkeypatch.setattr(paired_labels, "_RANGE_ROWS", 10)
    for table in (in_order, shuffled):
        for max_load in (100.0, 2.0):  # cuts at files, and at samples with files that are read again
            monkeypatch.setattr(paired_labels, "_MAX_LOAD", max_load)
            monkeypatch.setattr(paired_labels, "_SAMPLED_ROWS", 3)
            with paired_labels.PairedLabels(table, SOURCE, OLD, NEW, masks=True) as labels:
                assert labels.num_ranges > 5
            got = diff(table, storage, num_threads=3).to_dict()
            assert without_time(got) == without_time(wanted)
    groups = plan_compaction(in_order, target_bytes=50_000)
    lake = in_order.uri.removesuffix("/labels")
    commit_compaction(in_order, [merge_group(group, lake, storage) for group in groups])
    monkeypatch.setattr(paired_labels, "_RANGE_BYTES", 1000)  # merged files by their row groups
    assert len(in_order.files()) < 6
    assert without_time(diff(in_order, storage).to_dict()) == without_time(wanted)


def without_time(facts: dict[str, Any]) -> Any:
    """Floating-point sums are of another order."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items() if key not in ("seconds", "version")}
        if isinstance(value, list | tuple):
            return [rounded(item) for item in value]
        return round(value, 9) if isinstance(value, float) else value

    return rounded(facts)


def test_the_worst_come_first_and_are_few(table: LabelsTable, storage: Storage) -> None:
    boxes = [LEFT, RIGHT, BELOW]
    old = {f"image {n}": [found(CAR, box) for box in boxes[:n]] for n in range(4)}
    add_rows(table, storage, label_rows(old, OLD), label_rows({image_id: [] for image_id in old}, NEW))
    worst = diff(table, storage, num_worst=2).worst
    assert [(change.image_id, change.lost) for change in worst] == [("image 3", 3), ("image 2", 2)]


def test_a_damaged_file_is_named(table: LabelsTable, storage: Storage, tmp_path: Path) -> None:
    add_rows(table, storage, label_rows({"a": []}, OLD), label_rows({"a": []}, NEW))
    path = tmp_path / "lake" / "labels" / table.files(NEW)[0].path
    path.write_bytes(b"PAR1" + bytes(path.stat().st_size - 8) + b"PAR1")
    with pytest.raises(CorruptObjectError, match=f"label file .*{path.name} is damaged"):
        diff(table, storage)


def test_sums_hold_for_every_category(table: LabelsTable, storage: Storage) -> None:
    rng = random.Random(7)
    ids = [str(number) for number in range(60)]
    add_rows(table, storage, *(label_rows(random_images(rng, ids), model) for model in (OLD, NEW)))
    result = diff(table, storage)
    added = Counter({"old": 0, "new": 0, "kept": 0})
    for counts in (result.total, *result.categories.values()):
        assert counts.old == counts.kept + counts.lost + counts.relabelled
        assert counts.new == counts.kept + counts.added + counts.arrived
        assert sum(counts.iou_histogram) == counts.kept - counts.unreadable
        assert sum(counts.old_sizes) == counts.old
    for counts in result.categories.values():
        added.update(old=counts.old, new=counts.new, kept=counts.kept)
    assert dict(added) == {name: getattr(result.total, name) for name in added}
    assert result.total.relabelled == result.total.arrived > 0
