from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest

from jobs.lake.aliases import Aliases
from jobs.lake.models import is_of_registry, read_checkpoint_bytes, resolve_uri
from jobs.lake.registry import ModelRegistry
from jobs.lake.storage import CorruptObjectError, Storage
from schemas.errors import StorageError, UsageError

FIRST, SECOND = "1a" * 32, "2b" * 32


@pytest.fixture
def registry(lake: str, storage: Storage) -> ModelRegistry:
    """facades@1 and facades@2; champion is the first."""
    registry = ModelRegistry(lake, storage)
    one = registry.register("facades", b"first", FIRST)
    registry.register("facades", b"second", SECOND)
    Aliases(lake, storage).move("champion", one, "ada", "")
    return registry


def test_a_path_or_uri_is_read_as_it_is_with_and_without_a_lake(
    storage: Storage, tmp_path: Path, lake: str
) -> None:
    path = tmp_path / "alias.safetensors"
    path.write_bytes(b"weights")
    for uri in (str(path), f"file://{path}"):
        for its_lake in (None, lake):
            assert read_checkpoint_bytes(uri, storage, its_lake) == (b"weights", f"file://{path}")
            assert resolve_uri(uri, storage, its_lake) is None
    with pytest.raises(UsageError, match=r"there is no checkpoint at file://.*/no\.safetensors"):
        read_checkpoint_bytes(str(tmp_path / "no.safetensors"), storage)


def test_the_bundled_checkpoint_needs_no_lake(storage: Storage) -> None:
    bundled = resources.files("jobs.demo").joinpath("lite-scenes.safetensors").read_bytes()
    assert read_checkpoint_bytes("demo", storage) == (bundled, "the bundled checkpoint")
    assert resolve_uri("demo", storage) is None


def test_a_version_is_read_from_the_lakes_registry(
    registry: ModelRegistry, storage: Storage, lake: str
) -> None:
    content, where = read_checkpoint_bytes("registry:facades@2", storage, lake)
    assert content == b"second"
    assert where == f"facades@2 ({lake}/models/blobs/{SECOND}.safetensors)"
    assert resolve_uri("registry:facades@2", storage, lake) == registry.open("facades@2")


def test_an_alias_is_read_as_what_it_means_now(registry: ModelRegistry, storage: Storage, lake: str) -> None:
    assert read_checkpoint_bytes("alias:champion", storage, lake)[0] == b"first"
    assert resolve_uri("alias:champion", storage, lake) == registry.open("facades@1")
    Aliases(lake, storage).move("champion", registry.open("facades@2"), "ada", "")
    assert read_checkpoint_bytes("alias:champion", storage, lake)[0] == b"second"
    assert str(resolve_uri("alias:champion", storage, lake)) == "facades@2"


@pytest.mark.parametrize("read", [read_checkpoint_bytes, resolve_uri])
def test_what_the_registry_does_not_have_is_refused_with_what_it_has(
    read: Callable[..., object], registry: ModelRegistry, storage: Storage, lake: str
) -> None:
    for uri, words in (
        ("alias:challenger", r"no alias 'challenger' in the lake file://.*: its aliases are champion;"),
        ("alias:", "alias ''"),
        ("registry:facades@3", "facades@3 is not registered: facades has version 1, 2"),
        ("registry:facades", "wanted NAME@VERSION; facades has version 1, 2"),
        ("registry:alias:champion", "model name 'alias:champion'"),
    ):
        with pytest.raises(UsageError, match=words):
            read(uri, storage, lake)


@pytest.mark.parametrize("uri", ["alias:champion", "registry:facades@1"])
def test_without_a_lake_there_is_no_registry_to_look_into(uri: str, storage: Storage) -> None:
    assert is_of_registry(uri)
    with pytest.raises(UsageError, match=f"{uri} is looked up in a lake's registry, and there is no lake"):
        read_checkpoint_bytes(uri, storage)


def test_weights_that_are_gone_or_others_now_are_not_given_out(
    registry: ModelRegistry, storage: Storage, lake: str, tmp_path: Path
) -> None:
    weights = tmp_path / "lake" / "models" / "blobs" / f"{FIRST}.safetensors"
    weights.write_bytes(b"other")
    with pytest.raises(CorruptObjectError, match="not what facades@1 was registered with"):
        read_checkpoint_bytes("alias:champion", storage, lake)
    weights.unlink()
    with pytest.raises(StorageError, match=r"the weights of facades@1 are gone: .* does not exist; restore"):
        read_checkpoint_bytes("alias:champion", storage, lake)
