"""Where a checkpoint's bytes come from: the bundled one, or a path or URI.

Enters: model.uri of a spec. Leaves: the file's bytes and what to call them in messages. What they mean is
maskrcnn_core.checkpoint's to say.
"""

from importlib import resources

from jobs.lake.storage import Storage
from jobs.lake.store import MissingObjectError
from schemas.errors import UsageError

DEMO_CHECKPOINT = "lite-scenes.safetensors"


def read_checkpoint_bytes(model_uri: str, storage: Storage) -> tuple[bytes, str]:
    """Read the whole file.

    Returns:
        its bytes, and its name for messages.

    Raises:
        UsageError: there is no such file, or the URI names an alias, which needs a model registry.
        StorageError: the store refused.
    """
    if model_uri == "demo":
        bundled = resources.files("jobs.demo").joinpath(DEMO_CHECKPOINT)
        return bundled.read_bytes(), "the bundled checkpoint"
    if model_uri.startswith("alias:"):
        raise UsageError(
            f"model.uri {model_uri}: this version has no model registry; give the checkpoint's path or URI."
        )
    uri = storage.normalize(model_uri)
    storage.check_reachable(uri, "model.uri")
    try:
        return storage.read_bytes(storage.stat(uri)), uri
    except MissingObjectError as error:
        raise UsageError(f"model.uri: there is no checkpoint at {uri}; check the path.") from error
