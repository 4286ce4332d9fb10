"""TrainingSet: images and annotations in one file, sorted by image, read by random access.

Enters: Records (an instances JSON, a label table) and where their images are. Leaves: an Arrow IPC file that
each worker maps into memory, so that workers of one machine share it and none holds it.

The way of a build: records -> spool -> newest row of each image -> its place in the source -> sorted by image
-> checked, masks run-length encoded -> file. DuckDB joins and sorts, on disk where memory is short.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from jobs.lake.storage import Storage
from jobs.train.image_locations import LOCATION_COLUMNS, LOCATIONS, ImageLocation, locate_images
from jobs.train.records import Problem, Problems, Records, Spool
from jobs.train.set_file import BATCH_IMAGES, FACTS_KEY, FACTS_VERSION, SET_SCHEMA, SetWriter
from maskrcnn_core.augment import Annotations
from schemas.errors import UsageError

DEFAULT_MEMORY_BYTES = 1 << 30

_CHOOSE_SQL = """
CREATE TABLE ranked AS
SELECT *,
    row_number() OVER (PARTITION BY source, key ORDER BY newness DESC, id_rank, file_row_number) AS key_rank,
    max(newness) OVER (PARTITION BY source, key) AS newest
FROM (
    SELECT *, row_number() OVER (PARTITION BY image ORDER BY file_row_number) AS id_rank
    FROM images
);
CREATE TABLE chosen AS SELECT * FROM ranked WHERE key_rank = 1 AND id_rank = 1 AND status = 'ok';
CREATE TABLE located AS SELECT *, file_row_number AS place FROM locations;
CREATE TABLE by_key AS
SELECT image, count(*) AS num_found, min(place) AS place
FROM chosen JOIN located USING (source, key)
WHERE chosen.shard IS NULL OR chosen.shard = located.shard
GROUP BY image;
CREATE TABLE by_name AS
SELECT image, count(*) * any_value(num_called_so) AS num_found, min(place) AS place
FROM (
    SELECT *, count(*) OVER (PARTITION BY source, name) AS num_called_so
    FROM chosen ANTI JOIN by_key USING (image)
) JOIN located USING (source, name)
GROUP BY image;
CREATE TABLE found AS
SELECT *, row_number() OVER (PARTITION BY place ORDER BY num_found, image) AS place_rank
FROM (FROM by_key UNION ALL FROM by_name);
CREATE TABLE sorted AS
SELECT row_number() OVER (ORDER BY chosen.source, chosen.key, image) - 1 AS position, image,
    chosen.key AS image_name, height, width, located.* EXCLUDE (source, shard, key, name, file_row_number)
FROM found JOIN chosen USING (image) JOIN located USING (place)
WHERE num_found = 1 AND place_rank = 1;
"""

# Each gives one image of the kind in words, and how many there are.
_PROBLEM_SQL = {
    Problem.DUPLICATE_IMAGE: """
        SELECT min(key), count(*) FROM (
            SELECT key FROM ranked WHERE id_rank > 1 OR (key_rank > 1 AND newness = newest)
            UNION ALL
            SELECT key FROM found JOIN chosen USING (image) WHERE num_found = 1 AND place_rank > 1
        )""",
    Problem.FAILED_IMAGE: "SELECT min(key), count(*) FROM ranked WHERE key_rank = 1 AND status = 'failed'",
    Problem.MISSING_IMAGE: "SELECT min(key), count(*) FROM chosen ANTI JOIN found USING (image)",
    Problem.AMBIGUOUS_IMAGE: """
        SELECT min(key), count(*) FROM chosen JOIN found USING (image) WHERE num_found > 1""",
    Problem.UNKNOWN_IMAGE: """
        SELECT 'image_id ' || min(image), count(*)
        FROM annotations ANTI JOIN ranked USING (image)""",
}
_SORTED_SQL = """
SELECT position, annotations.* EXCLUDE (number, image, file_row_number)
FROM annotations JOIN sorted USING (image)
ORDER BY position, number
"""


class TrainingSet:
    """A training set on a local disk, opened for reading. Thread-safe.

    sizes: (N, 2) int32, height and width of each image. fingerprint: BLAKE2b of names, sizes and annotations,
    wherever the images are. problems: what was left out of it, counted by kind. description: what it was made
    of.
    """

    def __init__(self, path: Path) -> None:
        """Map the file into memory.

        Raises:
            UsageError: there is no such file, or it is none of ours.
        """
        self.path = path
        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
            if not self._reader.schema.equals(SET_SCHEMA):  # also a type whose values would be run
                raise ValueError("it has other columns")
            last = self._reader.get_batch_with_custom_metadata(self._reader.num_record_batches - 1)
            metadata: Mapping[bytes, bytes] = last.custom_metadata or {}
            facts = json.loads(metadata[FACTS_KEY])
        except (OSError, pa.ArrowInvalid, KeyError, ValueError) as error:
            raise UsageError(f"{path} is not a training set ({error}); build it anew") from error
        if facts["version"] != FACTS_VERSION:
            raise UsageError(f"{path} is a training set of version {facts['version']}; build it anew")
        self.fingerprint: str = facts["fingerprint"]
        self.problems: dict[str, int] = facts["problems"]
        self.description: dict[str, Any] = facts["description"]
        self._lock = threading.Lock()
        batches = [self._reader.get_batch(k) for k in range(self._reader.num_record_batches)]
        self.sizes: NDArray[np.int32] = np.concatenate(
            [np.stack((batch["height"], batch["width"]), axis=1) for batch in batches]
        )

    def __len__(self) -> int:
        """N."""
        return len(self.sizes)

    def name(self, index: int) -> str:
        """The image's file_name in an instances JSON, its image_id in a label table."""
        batch, row = self._row(index)
        name: str = batch["name"][row].as_py()
        return name

    def location(self, index: int) -> ImageLocation:
        batch, row = self._row(index)
        return ImageLocation.from_row({name: batch[name][row].as_py() for name in LOCATION_COLUMNS})

    def row_groups(self) -> tuple[int, int, int]:
        """Of its images in Parquet files: how many, in how many row groups, of files of how many bytes."""
        keys = ["uri", "object_bytes", "row_group"]
        batches = (self._reader.get_batch(k).select(keys) for k in range(self._reader.num_record_batches))
        found = pa.Table.from_batches(batches).filter(pc.field("row_group") >= 0)
        groups = found.group_by(keys).aggregate([])
        files = groups.group_by(keys[:2]).aggregate([])
        return found.num_rows, groups.num_rows, pc.sum(files["object_bytes"]).as_py() or 0

    def annotations(self, index: int) -> Annotations:
        batch, row = self._row(index)
        height, width = self.sizes[index].tolist()
        return Annotations(
            height,
            width,
            batch["boxes"][row].values.to_numpy().reshape(-1, 4),
            batch["class_indices"][row].values.to_numpy().astype(np.int64),
            batch["ignored"][row].values.to_numpy().astype(np.bool_),
            batch["rles"][row].values.to_pylist(),
        )

    def _row(self, index: int) -> tuple[pa.RecordBatch, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a training set of {len(self)}")
        with self._lock:
            return self._reader.get_batch(index // BATCH_IMAGES), index % BATCH_IMAGES


def build(
    path: Path,
    records: Records,
    categories: Sequence[tuple[int, str]],
    storage: Storage,
    *,
    strict: bool = False,
    drop_empty: bool = False,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> TrainingSet:
    """Write a training set, whole or not at all; what stood at the path is replaced.

    Args:
        categories: (category_id, name) of the model: class_index = position + 1.
        strict: stop where anything has to be left out.
        drop_empty: leave out images without annotations, which otherwise are background from edge to edge.
        memory_bytes: for joining and sorting; what needs more goes through files beside `path`.

    Raises:
        UsageError: nothing is left to learn from; categories bear other names than the model's; or, if
            strict, something is wrong with the data, the first of each kind named.
        StorageError: images or annotations cannot be reached.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    problems = Problems()
    with tempfile.TemporaryDirectory(prefix=".building-", dir=path.parent) as scratch:
        folder = Path(scratch)
        with Spool(folder) as spool:
            sources = records.read(spool, problems)
        _check_names(spool.category_names, dict(categories))
        located = folder / "located.parquet"
        with pq.ParquetWriter(located, LOCATIONS, compression="zstd") as writer:
            for source in sources:
                for batch in locate_images(source, storage, problems):
                    writer.write_batch(batch)
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": f"{memory_bytes}B",
            "threads": 2,
            "temp_directory": str(folder),
        }
        with duckdb.connect(str(folder / "join.duckdb"), config=settings) as connection:
            for name, file in (
                ("images", spool.images_path),
                ("annotations", spool.annotations_path),
                ("locations", located),
            ):
                connection.read_parquet(str(file), file_row_number=True).create_view(name)
            connection.execute(_CHOOSE_SQL)
            for kind, sql in _PROBLEM_SQL.items():
                row = connection.execute(sql).fetchone()
                assert row is not None  # an aggregate
                problems.add(kind, str(row[0]), row[1])
            made = SetWriter(categories, problems)
            images = connection.cursor().sql("FROM sorted ORDER BY position")
            rows = connection.cursor().sql(_SORTED_SQL)
            made.write(folder / "set.arrow", images, rows, drop_empty, records.describe())
        where = json.dumps(records.describe())
        if strict:
            problems.refuse(where)
        if not made.num_instances:
            raise UsageError(
                f"nothing to learn from in {where}: {made.num_images} images with no instance; left out: "
                f"{'; '.join(f'{kind} ({n}): {problems.first[kind]}' for kind, n in problems.counts.items())}"
            )
        os.replace(folder / "set.arrow", path)
    return TrainingSet(path)


def _check_names(data: dict[int, str], model: dict[int, str]) -> None:
    """Raises UsageError where a category_id means one thing to the data and another to the model."""
    for category_id in sorted(data.keys() & model.keys()):
        if data[category_id].strip().lower() != model[category_id].strip().lower():
            raise UsageError(
                f"category_id {category_id} is {data[category_id]!r} in the data and "
                f"{model[category_id]!r} in the model; take the model's categories from the data, or "
                f"renumber the data"
            )
