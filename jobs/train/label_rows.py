"""The label table at one version -> records of a training set, as if people had drawn its labels.

Enters: a lake, a version, two scores. Leaves: images and annotations in the spool. A detection with a score
of at least `ignore_below` is an instance; one from `min_score` up to that marks a region where nothing is
learnt; what is below is background.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import MissingObjectError, Storage
from jobs.train.records import ANNOTATIONS, IMAGES, Problems, Spool
from schemas.errors import UsageError
from schemas.spec_loader import parse_spec
from schemas.specs import SourceSpec

_COLUMNS = ["image_id", "source", "shard", "status", "width", "height", "run_id", "labeled_at", "detections"]
_BATCH_ROWS = 512  # with a hundred masks each, some ten megabytes


class LabelRows:
    """The newest labels of each image by one model, as Records.

    version: of the table, also where none was asked for: then the newest when this was made.

    Args:
        model_id: whose labels; None: of the only model there is.
        images: settings of sources, where other than what the run's record in the lake says.

    Raises:
        UsageError: no such table, version or model, or min_score is above ignore_below.
    """

    def __init__(
        self,
        lake_uri: str,
        storage: Storage,
        *,
        version: int | None = None,
        model_id: str | None = None,
        min_score: float,
        ignore_below: float,
        images: Sequence[SourceSpec] = (),
    ) -> None:
        if not 0 <= min_score <= ignore_below <= 1:
            raise UsageError(
                f"min_score is {min_score} and ignore_below {ignore_below}; wanted 0 <= min_score <= "
                f"ignore_below <= 1"
            )
        self._lake_uri = storage.normalize(lake_uri)
        self._storage = storage
        self._table = LabelsTable.open(lake_uri, storage, version)
        self.version = self._table.version
        self.model_id = self._table.choose_model(model_id)
        self._min_score, self._ignore_below = min_score, ignore_below
        self._images = {storage.normalize(spec.uri): spec for spec in images}

    def describe(self) -> dict[str, Any]:
        return {
            "lake": self._lake_uri,
            "version": self.version,
            "model_id": self.model_id,
            "min_score": self._min_score,
            "ignore_below": self._ignore_below,
        }

    def read(self, spool: Spool, problems: Problems) -> Sequence[SourceSpec]:
        """Read every row of the model, older ones too: which is the newest, the training set finds out."""
        newest_runs: dict[str, tuple[int, str]] = {}
        first_row = 0
        for rows in self._batches():
            images = _images(rows, first_row)
            spool.add_images(images)
            spool.add_annotations(self._annotations(rows, first_row))
            first_row += len(rows)
            columns: list[list[Any]] = [
                column.to_pylist() for column in (rows["source"], images["newness"], rows["run_id"])
            ]
            for source, *run in zip(*columns, strict=True):
                newest_runs[source] = max(newest_runs.get(source, (0, "")), (run[0], run[1]))
        return [self._source_spec(source, run_id) for source, (_, run_id) in sorted(newest_runs.items())]

    def _batches(self) -> Iterator[pa.RecordBatch]:
        scanner = self._table.dataset(self.model_id).scanner(
            columns=_COLUMNS, batch_size=_BATCH_ROWS, batch_readahead=1, fragment_readahead=1
        )
        for batch in scanner.to_batches():
            if batch.num_rows:
                yield batch

    def _annotations(self, rows: pa.RecordBatch, first_row: int) -> pa.RecordBatch:
        lists = rows["detections"]
        image = pc.list_parent_indices(lists)
        found = pc.list_flatten(lists)
        columns = dict(zip([field.name for field in found.type], found.flatten(), strict=True))
        box = dict(zip([field.name for field in columns["box"].type], columns["box"].flatten(), strict=True))
        scores = columns["score"].to_numpy(zero_copy_only=False)
        table = pa.RecordBatch.from_arrays(
            [
                pc.add(image.cast(pa.int64()), first_row),
                pa.array(np.arange(len(found), dtype=np.int64)),
                columns["category_id"].cast(pa.int64()),
                box["x0"],
                box["y0"],
                box["x1"],
                box["y1"],
                pa.array(scores < np.float32(self._ignore_below)),
                columns["rle"],
                rows["height"].take(image),
                rows["width"].take(image),
            ],
            schema=ANNOTATIONS,
        )
        return table.filter(pa.array(scores >= np.float32(self._min_score)))

    def _source_spec(self, source: str, run_id: str) -> SourceSpec:
        """How the newest run over a source read it; in the plainest way where its record is gone."""
        if source in self._images:
            return self._images[source]
        settings: dict[str, Any] = {}
        uri = f"{self._lake_uri}/runs/{run_id}/spec.yaml"
        with suppress(MissingObjectError):
            settings = yaml.safe_load(self._storage.read_bytes(self._storage.stat(uri)))["source"]
        return parse_spec(SourceSpec, {**settings, "uri": source}, uri)


def _images(rows: pa.RecordBatch, first_row: int) -> pa.RecordBatch:
    num_rows = rows.num_rows
    return pa.RecordBatch.from_arrays(
        [
            pa.array(np.arange(first_row, first_row + num_rows, dtype=np.int64)),
            rows["source"],
            rows["shard"],
            rows["image_id"],
            pa.nulls(num_rows, pa.string()),
            rows["height"],
            rows["width"],
            rows["labeled_at"].cast(pa.int64()),
            rows["status"],
        ],
        schema=IMAGES,
    )
