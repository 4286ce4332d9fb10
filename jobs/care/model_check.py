"""What the table and the registry say of models, against what there is.

Enters: a table and the keys of its rows, the registry of its lake. Leaves: faults, each with an example.
"""

from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import unquote

import duckdb

from jobs.lake.aliases import Aliases
from jobs.lake.current import read_current
from jobs.lake.labels_table import LabelsTable
from jobs.lake.model_ids import read_model_id
from jobs.lake.registry import ModelRegistry, ModelVersion
from jobs.lake.storage import MissingObjectError, Storage
from schemas.errors import StorageError, UsageError


def model_faults(
    keys: duckdb.DuckDBPyConnection, table: LabelsTable, lake_uri: str, storage: Storage, deep: bool
) -> Iterator[tuple[str, str]]:
    """Of the current models, the aliases and the records of model_ids.

    Args:
        keys: has the table `keys` of all rows.
        deep: read the weights that aliases lead to, else compare their sizes only.
    """
    yield from _current_faults(keys, table)
    yield from _alias_faults(lake_uri, storage, deep)
    yield from _record_faults(lake_uri, storage)


def _current_faults(keys: duckdb.DuckDBPyConnection, table: LabelsTable) -> Iterator[tuple[str, str]]:
    """What the table says is current, against the rows that there are."""
    try:
        said = read_current(table)
    except StorageError as error:
        yield "what is current cannot be read", str(error)
        return
    # Rows of files that do not read are no less labels; that is a problem of its own.
    labelled = {(file.sources.only, file.model_id) for file in table.files()}
    labelled.update(keys.execute("SELECT DISTINCT source, model_id FROM keys").fetchall())
    for source, current in said.items():
        if (source, current.model_id) not in labelled:
            yield "a current model without labels", f"{current.name} of {source}; promote another"
        previous = current.previous
        if previous is not None and (source, previous.model_id) not in labelled:
            yield "a rollback would go back to a model without labels", f"{previous} of {source}"


def _alias_faults(lake_uri: str, storage: Storage, deep: bool) -> Iterator[tuple[str, str]]:
    aliases, registry = Aliases(lake_uri, storage), ModelRegistry(lake_uri, storage)
    seen: set[tuple[str, str]] = set()
    for alias in aliases.names():
        try:
            version = registry.open(aliases.newest(alias).model)
        except (UsageError, StorageError) as error:
            yield "an alias that leads to no version", f"{alias}: {error}"
            continue
        weights = (version.fingerprint, version.sha256)  # versions may share them
        if weights not in seen:
            seen.add(weights)
            if problem := _weights_fault(registry, version, storage, deep):
                yield "an alias whose weights are not those of its version", f"{alias}: {problem}"


def _weights_fault(
    registry: ModelRegistry, version: ModelVersion, storage: Storage, deep: bool
) -> str | None:
    try:
        if deep:
            registry.read(version)
            return None
        info = storage.stat(registry.weights_uri(version))
    except StorageError as error:
        return f"{version}: {error}"
    if info.size == version.num_bytes:
        return None
    return f"{info.uri} has {info.size} bytes, {version} was registered with {version.num_bytes}"


def _record_faults(lake_uri: str, storage: Storage) -> Iterator[tuple[str, str]]:
    """Records of model_ids that do not read, or are of another model_id than their name says."""
    folder = f"{lake_uri}/models/ids"
    recorded: list[str] = []
    with suppress(MissingObjectError):  # on a disk there is no folder before the first record
        for info in storage.list(folder, "*.json"):
            recorded.append(unquote(info.uri[len(folder) + 1 :].removesuffix(".json")))
    for model_id in recorded:
        try:
            read_model_id(storage, lake_uri, model_id)
        except StorageError as error:
            yield "a model_id whose record cannot be read", str(error)
