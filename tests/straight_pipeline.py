"""A label job without Ray: its stages one after another in this process.

Enters: a Pipeline, and what labels a unit. Leaves: its finished units, in order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from typing import Any

import pyarrow as pa

from cluster.session import ClusterInfo
from jobs.infer.pipeline import FinishedUnit, Pipeline
from jobs.infer.units import UnitReport
from jobs.lake.compact import merge_on_threads
from jobs.lake.fragments import Fragment

# Names of jobs.infer.run beside run_pipeline, and what stands in for them.
WITHOUT_RAY: Mapping[str, Any] = {
    "connect": lambda: ClusterInfo(({"CPU": 2.0},), False),
    "shutdown": lambda: None,
    "merge_on_ray": merge_on_threads,
}


def run_straight(
    pipeline: Pipeline, label: Callable[[pa.Table], pa.Table], note: Callable[[pa.Table], None] | None = None
) -> Generator[FinishedUnit, None, None]:
    """Args: label: READ_SCHEMA -> LABELLED_SCHEMA, a row; note: told of a unit before it is labelled."""
    read, write = pipeline.reader(), pipeline.writer()
    for task in pipeline.tasks:
        for row in read.read_units(task):
            if note is not None:
                note(row)
            (written,) = write(label(row)).to_pylist()
            fragment = written["fragment"] and Fragment.from_row(json.loads(written["fragment"]))
            yield FinishedUnit(UnitReport.from_json(written["report"]), fragment)
