"""Model files by path or URI: read whole, written at most once.

Enters: what the user typed. Leaves: bytes and the URI they have in messages, or a UsageError.
"""

from __future__ import annotations

from jobs.lake.models import is_of_registry, read_checkpoint_bytes
from jobs.lake.storage import AccessDeniedError, MissingObjectError, Storage
from maskrcnn_core.foreign_weights import MAX_FILE_BYTES
from schemas.errors import UsageError

SIDECAR_SUFFIX = ".json"


def check_lake(source: str, lake_uri: str | None) -> None:
    """Refuse a model of a registry where it is not said whose."""
    if is_of_registry(source) and lake_uri is None:
        raise UsageError(f"{source} is a model of a lake's registry: say which lake with --lake.")


def read_model_file(source: str, storage: Storage, lake_uri: str | None = None) -> tuple[bytes, str]:
    """The bytes of any model file, ours or not, and its name for messages.

    Args:
        source: path, URI or demo; with a lake also alias:NAME and registry:NAME@N.

    Raises:
        UsageError: there is no such file, alias or version, or it is too large to be one.
        StorageError: the store refused.
    """
    if source == "demo" or is_of_registry(source):
        return read_checkpoint_bytes(source, storage, lake_uri)
    uri = storage.normalize(source)
    storage.check_reachable(uri, "model")
    try:
        info = storage.stat(uri)
    except MissingObjectError as error:
        raise UsageError(f"there is no file {uri}; check the path.") from error
    if info.size > MAX_FILE_BYTES:
        raise UsageError(f"{uri} has {info.size:,} bytes; a model has at most {MAX_FILE_BYTES:,}.")
    return storage.read_bytes(info), uri


def is_checkpoint(data: bytes) -> bool:
    """Whether a file says that it is ours; it may still be damaged."""
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    return data[8:9] == b"{" and b'"masklake.format"' in header


def read_sidecar_bytes(uri: str, storage: Storage) -> bytes | None:
    """The file beside a .pth that says what it is; None where there is none, or we may not know."""
    try:
        return storage.read_bytes(storage.stat(uri + SIDECAR_SUFFIX))
    except (MissingObjectError, AccessDeniedError):
        return None


def refuse_existing(uris: list[str], storage: Storage, force: bool) -> None:
    """Before any work: nothing is overwritten unless the user said so."""
    for uri in uris:
        storage.check_reachable(uri, "OUT")
        if not force and storage.exists(uri):
            raise UsageError(
                f"{uri} exists; give another name, or --force to overwrite it. Nothing was written."
            )


def write_model_file(uri: str, data: bytes, storage: Storage, force: bool) -> None:
    """Write a whole file; without force, it must not have appeared since `refuse_existing` looked."""
    if force:
        storage.write_bytes(uri, data)
    elif not storage.create_exclusive(uri, data):
        raise UsageError(f"{uri} was made by somebody else meanwhile; it was left as it is.")
