import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from jobs.lake.registry import ModelRegistry, ModelVersion
from jobs.lake.storage import CorruptObjectError, MissingObjectError, Storage
from schemas.errors import StorageError, UsageError

FIRST, SECOND = "1a" * 32, "2b" * 32
NOW = datetime(2026, 11, 23, 12, 30, tzinfo=UTC)


@pytest.fixture(params=["file", "memory"])
def registry(request: pytest.FixtureRequest, tmp_path: Path, storage: Storage) -> ModelRegistry:
    uri = f"{tmp_path}/lake" if request.param == "file" else f"memory://bucket-{uuid.uuid4().hex}/lake"
    return ModelRegistry(uri, storage, clock=lambda: NOW)


@pytest.fixture
def on_disk(tmp_path: Path, storage: Storage) -> ModelRegistry:
    return ModelRegistry(str(tmp_path), storage)


def test_an_empty_lake_has_no_models(registry: ModelRegistry) -> None:
    assert registry.names() == []
    assert registry.versions("street") == []


def test_versions_count_up_and_each_stays_what_it_was(registry: ModelRegistry) -> None:
    one = registry.register("street", b"weights", FIRST, {"segm_AP": 0.25})
    two = registry.register("street", b"other weights", SECOND)
    other = registry.register("facade-v2.1", b"weights", FIRST)
    assert [str(v) for v in (one, two, other)] == ["street@1", "street@2", "facade-v2.1@1"]
    assert registry.versions("street") == [one, two]
    assert registry.names() == ["facade-v2.1", "street"]
    assert registry.open("street@1") == one
    assert (one.created_at, one.facts, one.num_bytes) == ("2026-11-23T12:30:00+00:00", {"segm_AP": 0.25}, 7)
    assert registry.read(one) == b"weights"
    assert registry.read(registry.open("street@2")) == b"other weights"


def test_ten_versions_are_in_order_of_their_numbers(registry: ModelRegistry) -> None:
    for _ in range(11):
        registry.register("street", b"weights", FIRST)
    assert [v.version for v in registry.versions("street")] == list(range(1, 12))


def test_equal_weights_are_stored_once_and_mean_what_was_there_first(registry: ModelRegistry) -> None:
    one = registry.register("street", b"weights, called street", FIRST)
    two = registry.register("square", b"weights, called square", FIRST)
    assert registry.weights_uri(one) == registry.weights_uri(two)
    assert registry.read(two) == registry.read(one) == b"weights, called street"


def test_two_writers_at_once_get_two_versions(on_disk: ModelRegistry) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: on_disk.register("street", b"weights", FIRST).version, range(16)))
    assert sorted(made) == list(range(1, 17))
    assert len(on_disk.versions("street")) == 16


def test_a_version_that_another_writer_makes_first_is_left_to_it(
    on_disk: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk.register("street", b"weights", FIRST)
    monkeypatch.setattr(on_disk, "_files", lambda name: [])  # as listed before the other came
    assert on_disk.register("street", b"other", SECOND).version == 2
    monkeypatch.undo()
    assert [v.fingerprint for v in on_disk.versions("street")] == [FIRST, SECOND]


@pytest.mark.parametrize(
    "name", ["", "blobs", "aliases", "ids", "a/b", "..", ".hidden", "_x", "näme", "a b", "a@1", "x" * 101]
)
def test_a_name_that_cannot_be_used_is_refused(name: str, on_disk: ModelRegistry) -> None:
    with pytest.raises(UsageError, match="model name"):
        on_disk.register(name, b"weights", FIRST)
    with pytest.raises(UsageError, match="model name"):
        on_disk.versions(name)


@pytest.mark.parametrize(
    "reference", ["street", "street@", "street@0", "street@01", "street@x", "street@1/2"]
)
def test_a_reference_without_a_version_says_which_there_are(reference: str, on_disk: ModelRegistry) -> None:
    on_disk.register("street", b"weights", FIRST)
    with pytest.raises(UsageError, match=r"wanted NAME@VERSION; street has version 1\."):
        on_disk.open(reference)


def test_a_version_that_is_not_there_says_what_is(on_disk: ModelRegistry) -> None:
    with pytest.raises(UsageError, match="street@1 is not registered: the lake's models are none so far"):
        on_disk.open("street@1")
    on_disk.register("street", b"weights", FIRST)
    with pytest.raises(UsageError, match="street@2 is not registered: street has version 1"):
        on_disk.open("street@2")
    with pytest.raises(UsageError, match="square@1 is not registered: the lake's models are street"):
        on_disk.open("square@1")


def test_weights_that_were_changed_or_deleted_are_not_given_out(
    on_disk: ModelRegistry, tmp_path: Path
) -> None:
    version = on_disk.register("street", b"weights", FIRST)
    path = tmp_path / "models" / "blobs" / f"{FIRST}.safetensors"
    path.write_bytes(b"WEIGHTS")
    with pytest.raises(CorruptObjectError, match="not what street@1 was registered with"):
        on_disk.read(version)
    path.unlink()
    with pytest.raises(MissingObjectError):
        on_disk.read(version)


@pytest.mark.parametrize(
    "damage",
    [
        {"format": "masklake-model-2"},
        {"name": "square"},
        {"version": 2},
        {"fingerprint": "../../secret"},
        {"surplus": 1},
    ],
)
def test_a_damaged_version_is_an_error(
    damage: dict[str, object], on_disk: ModelRegistry, tmp_path: Path
) -> None:
    on_disk.register("street", b"weights", FIRST)
    path = tmp_path / "models" / "street" / "1.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | damage))
    with pytest.raises(StorageError, match=r"1\.json is damaged"):
        on_disk.open("street@1")


def test_a_version_cut_short_is_an_error_and_another_file_is_left_alone(
    on_disk: ModelRegistry, tmp_path: Path
) -> None:
    version = on_disk.register("street", b"weights", FIRST)
    folder = tmp_path / "models" / "street"
    (folder / "notes.json").write_text("a user's own")
    (folder / "01.json").write_text("a user's own")
    assert on_disk.versions("street") == [version]
    (folder / "1.json").write_text("{")
    with pytest.raises(StorageError, match="damaged"):
        on_disk.versions("street")


def test_what_else_the_lake_keeps_beside_its_models_is_none(on_disk: ModelRegistry, tmp_path: Path) -> None:
    on_disk.register("street", b"weights", FIRST)
    for path in ("ids/street-0123456789ab.json", "aliases/champion/1.json"):
        (tmp_path / "models" / path).parent.mkdir(parents=True)
        (tmp_path / "models" / path).write_text("{}")
    assert on_disk.names() == ["street"]


def test_a_fingerprint_that_is_none_is_our_own_mistake(on_disk: ModelRegistry) -> None:
    with pytest.raises(ValueError, match="64 hex digits"):
        on_disk.register("street", b"weights", "../x")


def test_a_version_reads_back_from_its_file(on_disk: ModelRegistry, tmp_path: Path) -> None:
    version = on_disk.register("street", b"weights", FIRST, {"a": [1, {"b": None}]})
    values = json.loads((tmp_path / "models" / "street" / "1.json").read_bytes())
    assert values.pop("format") == "masklake-model-1"
    assert ModelVersion(**values) == version
