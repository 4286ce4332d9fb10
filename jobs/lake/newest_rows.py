"""Of rows that were only ever added, the newest of each image, `removed` left out.

Enters: files of the label table and their rows as datasets. Leaves: a DuckDB view. Rows of files in which no
image can have a second row are passed on as they come; only the others are compared by image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import duckdb
import pyarrow.dataset as pads

from jobs.lake.done_images import LabelFile
from jobs.lake.fragments import is_fragment
from schemas.labels import Status


def split_files(files: Sequence[LabelFile]) -> tuple[list[LabelFile], list[LabelFile]]:
    """Tell files in which each image of a source is only once, in this file and no other, from the rest.

    The log's bounds decide, so a file that could repeat an image is with the rest even if it does not.

    Args:
        files: in which an image of a source is to be counted once: of one model, or of a model for each
            source.

    Returns:
        (alone, others), each file in one of them.
    """
    if any(file.sources.only is None for file in files):  # it may repeat an image of any other
        return [], list(files)
    alone: list[LabelFile] = []
    others: list[LabelFile] = []
    by_source = sorted(files, key=lambda file: file.sources.only or "")
    for _, its_files in groupby(by_source, key=lambda file: file.sources.only):
        for together in _interlocked(list(its_files)):
            is_alone = len(together) == 1 and is_fragment(together[0].path)
            (alone if is_alone else others).extend(together)
    return alone, others


def create_newest_view(
    connection: duckdb.DuckDBPyConnection,
    name: str,
    alone: pads.Dataset,
    others: pads.Dataset,
    condition: str = "true",
) -> None:
    """Make a temporary view of the newest row of each (source, image_id), columns of LABEL_SCHEMA.

    An image's rows of different runs may be of one time, as with a clock that stands still: one of them
    counts. No run makes two rows of an image at one time; if there were such, both would count.

    Args:
        alone, others: rows of the files that split_files() tells from each other.
        condition: SQL; which rows of `others` are meant at all.
    """
    connection.register(f"{name}_alone", alone)
    connection.register(f"{name}_others", others)
    # Joined with their keys, rows stream; sorted by image (QUALIFY row_number() OVER ...) all are held at
    # once. 1,000,000 images with 10 objects: 3.5 s of CPU and 0.9 GB against 5.8 s and 1.4 GB.
    connection.execute(f"""
        CREATE TEMP VIEW {name} AS
        SELECT * FROM (
            SELECT * FROM {name}_alone
            UNION ALL
            SELECT {name}_others.* FROM {name}_others JOIN (
                SELECT source, image_id, max(labeled_at) AS labeled_at, arg_max(run_id, labeled_at) AS run_id
                FROM {name}_others WHERE {condition} GROUP BY source, image_id
            ) USING (source, image_id, labeled_at, run_id)
            WHERE {condition}
        ) WHERE status <> '{Status.REMOVED}'
    """)


def _interlocked(files: list[LabelFile]) -> Iterator[list[LabelFile]]:
    """Groups of files whose ranges of image ids hang together; no id is in two groups."""
    files.sort(key=lambda file: file.image_ids.low or "")
    group: list[LabelFile] = []
    high: str | None = ""
    for file in files:
        if group and high is not None and (file.image_ids.low or "") > high:
            yield group
            group, high = [], ""
        group.append(file)
        high = None if high is None or file.image_ids.high is None else max(high, file.image_ids.high)
    if group:
        yield group
