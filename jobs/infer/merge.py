"""Compaction at the end of a run: the cluster's nodes merge what they wrote."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from jobs.lake.compact import Group, merge_group
from jobs.lake.rewrite import MergedFile
from jobs.lake.storage import Storage


def merge_on_ray(groups: Sequence[Group], lake_uri: str, storage: Storage) -> list[MergedFile]:
    """merge_group for each, as tasks of a core, which hold about a gigabyte each (docs/table-care.md).

    Raises:
        RayError: a task failed for good.
    """
    merge = ray.remote(num_cpus=1)(merge_group)
    merged: list[MergedFile] = ray.get([merge.remote(group, lake_uri, storage) for group in groups])
    return merged
