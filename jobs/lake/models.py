"""Where a checkpoint's bytes come from: the bundled one, a path or URI, or the lake's registry.

Enters: model.uri of a spec. Leaves: the file's bytes and what to call them in messages. What they mean is
maskrcnn_core.checkpoint's to say.
"""

from importlib import resources

from jobs.lake.aliases import PREFIX as ALIAS_PREFIX
from jobs.lake.aliases import open_version
from jobs.lake.registry import ModelRegistry, ModelVersion
from jobs.lake.storage import MissingObjectError, Storage
from schemas.errors import StorageError, UsageError

DEMO_CHECKPOINT = "lite-scenes.safetensors"
REGISTRY_PREFIX = "registry:"


def read_checkpoint_bytes(model_uri: str, storage: Storage, lake_uri: str | None = None) -> tuple[bytes, str]:
    """Read the whole file.

    Args:
        model_uri: `demo`, a path or URI; with a lake also `alias:NAME` and `registry:NAME@N`.
        lake_uri: whose registry.

    Returns:
        its bytes, and its name for messages.

    Raises:
        UsageError: there is no such file, alias or version, or a registry is meant and no lake given.
        StorageError: the store refused, or the registry is damaged.
    """
    if model_uri == "demo":
        bundled = resources.files("jobs.demo").joinpath(DEMO_CHECKPOINT)
        return bundled.read_bytes(), "the bundled checkpoint"
    version = resolve_uri(model_uri, storage, lake_uri)
    if version is not None:
        assert lake_uri is not None  # resolve_uri asks for it
        return _read_version(ModelRegistry(lake_uri, storage), version)
    uri = storage.normalize(model_uri)
    storage.check_reachable(uri, "model.uri")
    try:
        return storage.read_bytes(storage.stat(uri)), uri
    except MissingObjectError as error:
        raise UsageError(f"model.uri: there is no checkpoint at {uri}; check the path.") from error


def resolve_uri(model_uri: str, storage: Storage, lake_uri: str | None = None) -> ModelVersion | None:
    """The registered version that model.uri means now; None where it is no matter of the registry.

    An alias may move between two calls: whoever resolves one and reads it asks for the bytes of
    `registry:{version}`.

    Raises:
        UsageError, StorageError: as read_checkpoint_bytes.
    """
    if not is_of_registry(model_uri):
        return None
    if lake_uri is None:
        raise UsageError(
            f"model.uri {model_uri} is looked up in a lake's registry, and there is no lake here; give the "
            f"checkpoint's path or URI."
        )
    storage.check_reachable(lake_uri, "lake.uri")
    if model_uri.startswith(ALIAS_PREFIX):
        return open_version(model_uri, storage, lake_uri)
    return ModelRegistry(lake_uri, storage).open(model_uri.removeprefix(REGISTRY_PREFIX))


def is_of_registry(model_uri: str) -> bool:
    """Whether model.uri names an alias or a version, not a file."""
    return model_uri.startswith((ALIAS_PREFIX, REGISTRY_PREFIX))


def _read_version(registry: ModelRegistry, version: ModelVersion) -> tuple[bytes, str]:
    uri = registry.weights_uri(version)
    try:
        return registry.read(version), f"{version} ({uri})"
    except MissingObjectError as error:
        raise StorageError(f"the weights of {version} are gone: {uri} does not exist; restore it.") from error
