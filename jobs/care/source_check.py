"""The label table against its source: which images have no row, which rows have no image.

Enters: a source, and the keys of all rows as the doctor collected them. Leaves: counts for each model.
"""

from __future__ import annotations

from dataclasses import dataclass

import duckdb
import numpy as np

from jobs.lake.done_images import Standing
from jobs.lake.labels_table import LabelsTable
from jobs.lake.plan import Done
from jobs.lake.shard_index import ShardIndex, load_shard_index
from jobs.lake.sources import Shard, list_shards
from jobs.lake.storage import Storage
from schemas.specs import SourceSpec


@dataclass(frozen=True)
class SourceCheck:
    """One model's rows beside what the source holds now.

    listed: images in shards whose number of images is known; missing: those of them without a row; extra:
        images with a row that are no more in the source.
    unknown_shards: never read to their end in this version, so how many images they hold nobody knows.
    """

    source: str
    model_id: str
    listed: int
    missing: int
    extra: int
    unknown_shards: int


def check_source(
    keys: duckdb.DuckDBPyConnection, table: LabelsTable, lake_uri: str, spec: SourceSpec, storage: Storage
) -> list[SourceCheck]:
    """Compare each model's rows with the source.

    Args:
        keys: a key_database() that audit_into() filled.

    Raises:
        UsageError: the source is not there or not one.
    """
    source = storage.normalize(spec.uri)
    shards = list(list_shards(spec, storage))
    return [
        _check_model(
            keys,
            shards,
            source,
            model_id,
            table.done_images(source, model_id),
            load_shard_index(storage, lake_uri, source, model_id),
        )
        for model_id in table.model_ids()
    ]


def _check_model(
    keys: duckdb.DuckDBPyConnection,
    shards: list[Shard],
    source: str,
    model_id: str,
    done: Done,
    index: ShardIndex,
) -> SourceCheck:
    rows = keys.execute(
        "SELECT shard, count(DISTINCT image_id) FROM keys WHERE model_id = $1 AND source = $2 GROUP BY shard",
        [model_id, source],
    ).fetchall()
    labelled = {str(shard): int(count) for shard, count in rows}
    listed = missing = found = unknown = 0
    for shard in shards:
        if shard.format == "files":
            num_found = int(np.count_nonzero(done.known(shard.objects).standing != Standing.NEW))
            listed += len(shard.objects)
            missing += len(shard.objects) - num_found
            found += num_found
            continue
        num_labelled = labelled.get(shard.name, 0)
        num_images = index.get((shard.name, shard.info.version)) if shard.info else None
        if num_images is None:
            unknown += 1
            found += num_labelled
        else:
            listed += num_images
            missing += max(0, num_images - num_labelled)
            found += min(num_images, num_labelled)
    return SourceCheck(source, model_id, listed, missing, sum(labelled.values()) - found, unknown)
