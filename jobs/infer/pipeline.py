"""The label job as a Ray Data pipeline: tasks -> read -> label -> write, one row a work unit.

Read from top to bottom; each number is a PoolPlan's, and cluster/profiles.py gives its reason.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.util.annotations import RayDeprecationWarning

from cluster.profiles import PoolPlan
from jobs.infer.attempts import SharedAttempts
from jobs.infer.label import Labeler, Replica
from jobs.infer.read import Tasks, UnitReader
from jobs.infer.rows import Lineage
from jobs.infer.units import UnitReport
from jobs.infer.write import FragmentWriter
from jobs.lake.fragments import Fragment
from jobs.lake.storage import Storage
from schemas.specs import InferSpec

# Ray cuts blocks at this size. One byte: each unit becomes a block of its own, so that an actor call takes
# one unit and its result moves on at once instead of waiting for the block to fill.
BLOCK_BYTES = 1

# Ray Data takes its read tasks one by one, 1 ms each, before the first of them starts.
_MOST_READ_TASKS = 2000

# How often a unit may lose its actor; Ray's default is for ever. An image that kills the actor takes two (see
# attempts.py), so a unit may hold a dozen of them and still meet ten lost nodes or killed workers, its own or
# those of the unit that waits behind it. More is not the images' fault, and the run ends with an error.
MAX_LOST_ACTORS = 32


@dataclass(frozen=True)
class FinishedUnit:
    """A unit after all stages; fragment is None for the row that closes a shard."""

    report: UnitReport
    fragment: Fragment | None


class UnitSource(Datasource):
    """The read stage: a shard a read task, or some, one after another, where there are many.

    Not from_arrow and repartition: that task of Ray's wants a whole CPU, which after a lost node nobody may
    have free.
    """

    def __init__(self, tasks: Tasks, reader: UnitReader) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tasks = tasks
        self._reader = reader
        self.num_read_tasks = min(len(tasks), _MOST_READ_TASKS)

    def get_name(self) -> str:
        """As Ray's logs and metrics have it, with "Read" before."""
        return "Units"

    def estimate_inmemory_data_size(self) -> int | None:
        """Not known: blocks are cut as they come."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """In the order of the tasks."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        parts = self._tasks.parts(self.num_read_tasks)
        return [ReadTask(partial(self._reader, part), unknown) for part in parts]


class _LabelActor:
    """Ray's handle on a Labeler: fetches the checkpoint's bytes from the object store once."""

    def __init__(
        self,
        checkpoint: ray.ObjectRef[bytes],
        replica: Replica,
        lineage: Lineage,
        attempts: SharedAttempts,
    ) -> None:
        node = ray.get_runtime_context().get_node_id()
        self._labeler = Labeler(ray.get(checkpoint), replica, lineage, node, attempts)

    def __call__(self, row: pa.Table) -> pa.Table:
        return self._labeler(row)


@dataclass(frozen=True)
class Pipeline:
    """All that the stages need to know."""

    tasks: Tasks
    spec: InferSpec
    storage: Storage
    lineage: Lineage
    checkpoint: bytes
    replica: Replica
    pool: PoolPlan

    def reader(self) -> UnitReader:
        return UnitReader(self.spec.source, self.storage, self.spec.unit.max_bytes, self.pool.max_images)

    def writer(self) -> FragmentWriter:
        return FragmentWriter(self.storage.normalize(self.spec.lake.uri), self.lineage.model_id, self.storage)


def run_pipeline(pipeline: Pipeline) -> Generator[FinishedUnit, None, None]:
    """Finished units as they come, in no order. Closing the iterator stops the pipeline."""
    with _quiet_ray_data():
        attempts = SharedAttempts()  # ends with this function
        yield from _finished(_build(pipeline, attempts))


def _build(pipeline: Pipeline, attempts: SharedAttempts) -> ray.data.Dataset:
    pool = pipeline.pool
    units = pipeline.tasks.likely_units(pipeline.spec.unit.max_bytes, pool.max_images)
    source = UnitSource(pipeline.tasks, pipeline.reader())
    read: ray.data.Dataset = ray.data.read_datasource(
        source, override_num_blocks=source.num_read_tasks, num_cpus=pool.read_cpus
    )
    return read.map_batches(
        _LabelActor,
        fn_constructor_args=(
            ray.put(pipeline.checkpoint),
            pipeline.replica,
            pipeline.lineage,
            attempts,
        ),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=pool.num_actors(units), max_tasks_in_flight_per_actor=pool.tasks_in_flight
        ),
        num_cpus=pool.cpus_per_actor,
        num_gpus=pool.gpus_per_actor or None,
        resources=dict(pool.resources),
        max_restarts=-1,
        max_task_retries=MAX_LOST_ACTORS,
    ).map_batches(
        pipeline.writer().__call__,
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=pool.write_cpus,
    )


def _finished(dataset: ray.data.Dataset) -> Iterator[FinishedUnit]:
    batches = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    # Closed here, while Ray is up: left to the garbage collector, it would ask a Ray that is gone.
    with closing(cast(Generator[pa.Table, None, None], iter(batches))) as tables:
        for table in tables:
            for row in table.to_pylist():
                fragment = row["fragment"]
                yield FinishedUnit(
                    UnitReport.from_json(row["report"]),
                    None if fragment is None else Fragment.from_row(json.loads(fragment)),
                )


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Our progress speaks, not Ray's."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    # It warns that the bars are off, and of every stage that is slow.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # max_task_retries has no named parameter in Ray 2.60, and a deprecated one is all there is.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        yield
