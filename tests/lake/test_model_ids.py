import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.lake.aliases import Aliases
from jobs.lake.labels_table import LabelsTable
from jobs.lake.model_ids import ModelIdRecord, check_categories, read_model_id, record_model_id, resolve
from jobs.lake.registry import ModelRegistry
from jobs.lake.storage import Storage
from schemas.errors import StorageError, UsageError

FIRST, SECOND = "1a" * 32, "2b" * 32
OLD = ModelIdRecord(
    "facades-0123456789ab",
    FIRST,
    "facades",
    "fp32",
    {"score_threshold": 0.05, "max_detections": 100},
    ((1, "window"), (3, "door")),
    "infer-1",
    "2026-11-23T12:00:00+00:00",
)

Label = Callable[..., LabelsTable]


@pytest.fixture
def label(
    lake: str, storage: Storage, make_rows: Callable[..., Any], add_labels: Callable[..., Any]
) -> Label:
    """A table with labels of these models, whose records are written down."""

    def make(*records: ModelIdRecord) -> LabelsTable:
        table = LabelsTable.open_or_create(lake, storage)
        if records:
            add_labels(table, storage, *(make_rows(["a.jpg"], record.model_id) for record in records))
        for record in records:
            record_model_id(storage, lake, record)
        return table

    return make


@pytest.fixture
def registry(lake: str, storage: Storage) -> ModelRegistry:
    registry = ModelRegistry(lake, storage)
    registry.register("facades", b"1", FIRST)
    registry.register("facades", b"2", SECOND)
    return registry


def test_what_a_model_id_stands_for_reads_back(storage: Storage, lake: str) -> None:
    assert read_model_id(storage, lake, OLD.model_id) is None
    assert record_model_id(storage, lake, OLD) == OLD
    assert read_model_id(storage, lake, OLD.model_id) == OLD
    assert read_model_id(storage, lake, "another-0123456789ab") is None


def test_a_later_run_finds_the_record_of_the_first(storage: Storage, lake: str) -> None:
    record_model_id(storage, lake, OLD)
    later = replace(OLD, first_run_id="infer-2", at="2026-11-24T12:00:00+00:00")
    assert record_model_id(storage, lake, later) == OLD
    assert read_model_id(storage, lake, OLD.model_id) == OLD


def test_of_many_runs_at_once_one_makes_the_record(storage: Storage, lake: str) -> None:
    ours = [replace(OLD, first_run_id=f"infer-{n}") for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda record: record_model_id(storage, lake, record), ours))
    assert {record.first_run_id for record in found} == {found[0].first_run_id}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fingerprint": SECOND}, "another fingerprint"),
        ({"precision": "bf16"}, "another precision .*'fp32', got 'bf16'"),
        ({"settings": {"score_threshold": 0.5, "max_detections": 100}}, "another settings"),
        ({"categories": ((1, "window"),)}, "another categories"),
    ],
)
def test_one_model_id_cannot_stand_for_two_models(
    change: dict[str, Any], words: str, storage: Storage, lake: str
) -> None:
    record_model_id(storage, lake, OLD)
    with pytest.raises(UsageError, match=words):
        record_model_id(storage, lake, replace(OLD, **change))
    assert read_model_id(storage, lake, OLD.model_id) == OLD


def test_a_model_id_that_is_no_file_name_has_a_record_too(storage: Storage, lake: str) -> None:
    odd = replace(OLD, model_id="../ä b/c%2F")
    record_model_id(storage, lake, odd)
    assert read_model_id(storage, lake, odd.model_id) == odd
    assert {path.name for path in (Path(lake.removeprefix("file://")) / "models").iterdir()} == {"ids"}
    with pytest.raises(UsageError, match="cannot name a partition"):
        record_model_id(storage, lake, replace(OLD, model_id=""))


@pytest.mark.parametrize(
    "damage",
    [
        {"format": "masklake-model-id-2"},
        {"model_id": "another"},
        {"fingerprint": "12"},
        {"categories": [[1]]},
        {"settings": None},
        {"surplus": 1},
    ],
)
def test_a_damaged_record_is_an_error(
    damage: dict[str, object], storage: Storage, lake: str, tmp_path: Path
) -> None:
    record_model_id(storage, lake, OLD)
    path = tmp_path / "lake" / "models" / "ids" / f"{OLD.model_id}.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | damage))
    with pytest.raises(StorageError, match=r"\.json is damaged"):
        read_model_id(storage, lake, OLD.model_id)


def test_a_model_is_named_by_its_model_id_version_or_alias(
    label: Label, registry: ModelRegistry, storage: Storage, lake: str
) -> None:
    new = replace(OLD, model_id="facades-ba9876543210", fingerprint=SECOND)
    table = label(OLD, new)
    Aliases(lake, storage).move("champion", registry.open("facades@2"), "ada", "")
    for reference, model_id in (
        (OLD.model_id, OLD.model_id),
        ("facades@1", OLD.model_id),
        ("facades@2", new.model_id),
        ("alias:champion", new.model_id),
    ):
        assert resolve(reference, table, storage, lake) == model_id


def test_a_model_without_labels_is_refused_and_the_labelled_ones_are_named(
    label: Label, registry: ModelRegistry, storage: Storage, lake: str
) -> None:
    table = label()
    with pytest.raises(UsageError, match=r"facades@1 has no labels .*labelled so far: nothing\)\."):
        resolve("facades@1", table, storage, lake)
    table = label(OLD)
    record_model_id(storage, lake, replace(OLD, model_id="facades-ba9876543210", fingerprint=SECOND))
    Aliases(lake, storage).move("champion", registry.open("facades@2"), "ada", "")
    with pytest.raises(
        UsageError, match=rf"alias:champion \(facades@2\) has no labels .*so far: {OLD.model_id}\)\."
    ):
        resolve("alias:champion", table, storage, lake)
    with pytest.raises(UsageError, match=rf"no model 'facades' .*so far: {OLD.model_id}\): give one"):
        resolve("facades", table, storage, lake)
    with pytest.raises(UsageError, match="no alias 'challenger'"):
        resolve("alias:challenger", table, storage, lake)
    with pytest.raises(UsageError, match="facades@3 is not registered"):
        resolve("facades@3", table, storage, lake)


def test_labels_of_one_version_by_several_settings_need_a_model_id(
    label: Label, registry: ModelRegistry, storage: Storage, lake: str
) -> None:
    half = replace(OLD, model_id="facades-b", precision="bf16")
    strict = replace(OLD, model_id="facades-c", settings={**OLD.settings, "score_threshold": 0.5})
    table = label(OLD, half, strict)
    with pytest.raises(UsageError) as refused:
        resolve("facades@1", table, storage, lake)
    assert (
        f"{OLD.model_id} (precision fp32, score_threshold 0.05), facades-b (precision bf16, score_threshold "
        f"0.05), facades-c (precision fp32, score_threshold 0.5); name one" in str(refused.value)
    )
    assert resolve("facades-b", table, storage, lake) == "facades-b"


def test_labels_from_before_there_were_records_are_found_by_model_id_only(
    label: Label,
    registry: ModelRegistry,
    storage: Storage,
    lake: str,
    make_rows: Callable[..., Any],
    add_labels: Callable[..., Any],
) -> None:
    table = label()
    add_labels(table, storage, make_rows(["a.jpg"], "facades-old"))
    assert resolve("facades-old", table, storage, lake) == "facades-old"
    with pytest.raises(UsageError, match="weights of facades-old were not written down: give the model_id"):
        resolve("facades@1", table, storage, lake)


@pytest.mark.parametrize(
    "categories",
    [
        ((1, "window"), (3, "door")),
        ((3, "door"), (1, "window"), (4, "balcony")),
        ((1, "window"),),
        ((5, "roof"),),
        ((1, "window"), (3, "door"), (8, "door")),
    ],
)
def test_more_or_fewer_categories_are_no_contradiction(categories: tuple[tuple[int, str], ...]) -> None:
    check_categories(OLD, replace(OLD, categories=categories))


@pytest.mark.parametrize(
    ("categories", "problems"),
    [
        (((1, "window"), (3, "gate")), ["category 3 was 'door' and is 'gate'"]),
        (((1, "window"), (4, "door")), ["'door' was category 3 and is 4"]),
        (
            ((1, "door"), (3, "window")),
            [
                "category 1 was 'window' and is 'door'",
                "category 3 was 'door' and is 'window'",
                "'door' was category 3 and is 1",
                "'window' was category 1 and is 3",
            ],
        ),
        (((1, "window"), (4, "door"), (8, "door")), ["'door' was category 3 and is 4, 8"]),
    ],
)
def test_every_contradiction_of_categories_is_named(
    categories: tuple[tuple[int, str], ...], problems: list[str]
) -> None:
    new = replace(OLD, model_id="facades-new", categories=categories)
    with pytest.raises(UsageError) as refused:
        check_categories(OLD, new)
    assert (
        f"of facades-new contradict those of {OLD.model_id}, which this lake has: {'; '.join(problems)}. "
        in (str(refused.value))
    )
