"""The shard index: how many images a shard turned out to have, once a run had committed all of them.

A tar does not say how many images it holds. Without this a finished job would read every tar again to find
nothing to do. It is a cache: the label table stays the truth, and losing a file costs one reading of its
shards. Entries are made per model, so an entry says "all of this version of the shard was in the table".

On storage: <lake>/shard_index/<hash of source and model>/<run_id>.parquet, one object for each run.
"""

import hashlib
import logging
from collections.abc import Mapping
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.lake.storage import MissingObjectError, ObjectInfo, Storage

# (shard name, version of its object) -> number of images, failed ones included.
ShardIndex = Mapping[tuple[str, str], int]

_COLUMNS: dict[str, pa.DataType] = {"shard": pa.string(), "version": pa.string(), "num_images": pa.int64()}
_SCHEMA: pa.Schema = pa.schema(_COLUMNS)
_logger = logging.getLogger(__name__)


def load_shard_index(storage: Storage, lake_uri: str, source_uri: str, model_id: str) -> ShardIndex:
    """What all earlier runs learnt, empty where there was none; damaged files are left out with a warning."""
    index: dict[tuple[str, str], int] = {}
    objects: list[ObjectInfo] = []
    with suppress(MissingObjectError):  # on a disk there is no folder before the first run
        objects.extend(storage.list(_folder(lake_uri, source_uri, model_id), "*.parquet"))
    for info in objects:
        try:
            table = pq.read_table(pa.BufferReader(storage.read_bytes(info)), schema=_SCHEMA)
        except pa.ArrowException as error:
            _logger.warning("shard index %s is damaged, its shards are read again: %s", info.uri, error)
            continue
        for row in table.to_pylist():
            index[row["shard"], row["version"]] = row["num_images"]
    return index


def save_shard_index(
    storage: Storage, lake_uri: str, source_uri: str, model_id: str, run_id: str, shards: ShardIndex
) -> None:
    """Write, or write anew, what one run learnt.

    Args:
        shards: every shard of this run, so far, whose images are all committed: never one of which only
            some are, for then the rest would be forgotten.
    """
    rows = [
        {"shard": shard, "version": version, "num_images": count}
        for (shard, version), count in shards.items()
    ]
    table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    uri = f"{_folder(lake_uri, source_uri, model_id)}/{run_id}.parquet"
    storage.write_bytes(uri, buffer.getvalue().to_pybytes())


def _folder(lake_uri: str, source_uri: str, model_id: str) -> str:
    key = hashlib.blake2b(f"{source_uri}\0{model_id}".encode(), digest_size=16).hexdigest()
    return f"{lake_uri}/shard_index/{key}"
