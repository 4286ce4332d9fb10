"""Whole runs in memory by the thousand: plan, units, commits, kills, two drivers, a source that changes.

The plan, the books, the committer and what is done of a source are the real ones; the store, the shards and
the pipeline are sets. After each schedule the table is read back: every image once, none twice, none lost.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.infer.books import Books
from jobs.infer.units import UnitReport
from jobs.lake import done_images
from jobs.lake.commit import Committer
from jobs.lake.done_images import KEY_COLUMNS, DoneImages, Known, LabelFile, Range
from jobs.lake.fragments import Fragment
from jobs.lake.object_table import ObjectTable
from jobs.lake.plan import ShardTask, plan_shards
from jobs.lake.shard_index import ShardIndex
from jobs.lake.sources import Shard
from jobs.lake.storage import ObjectInfo
from schemas.errors import MasklakeError
from schemas.labels import LABEL_SCHEMA
from tests.lake.memory_log import MODEL, Log, MemoryStore, StoppedError

SOURCE = "s3://photos"
APP = "infer:schedules"


@dataclass
class World:
    """What outlives a process: the source, the log, the fragments' rows, the shard index."""

    shards: dict[str, tuple[str, list[str]]]  # name -> version, image ids: each read by one task
    objects: list[str]  # single images, listed in slices
    log: Log = field(default_factory=Log)
    rows: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # path -> (shard, image id)
    index: dict[tuple[str, str], int] = field(default_factory=dict)
    ever: set[str] = field(default_factory=set)  # images that the source ever had

    def images(self) -> set[str]:
        return {image for _, images in self.shards.values() for image in images} | set(self.objects)

    def listing(self) -> Iterator[Shard]:
        for name, (version, _) in self.shards.items():
            uri = f"{SOURCE}/{name}"
            yield Shard(uri, name, "tar", ObjectInfo(uri, 1, None, version))
        for start in range(0, len(self.objects), 3):
            part = self.objects[start : start + 3]
            objects = ObjectTable.of((key, ObjectInfo(f"{SOURCE}/{key}", 1, None, "1")) for key in part)
            yield Shard(f"{SOURCE}/{part[0]}", ".", "files", None, objects)

    def table(self) -> list[str]:
        """The image of every row of the table."""
        return [
            image
            for version in self.log.versions
            for fragment in version.fragments
            for _, image in self.rows[fragment.path]
        ]

    def done(self, num_versions: int) -> DoneImages:
        """What is done as of a version of the table."""
        files = [
            self._file(fragment.path)
            for version in self.log.versions[:num_versions]
            for fragment in version.fragments
        ]
        return DoneImages(files, SOURCE, (), self._keys)

    def _file(self, path: str) -> LabelFile:
        shards, images = zip(*self.rows[path], strict=True)
        return LabelFile(
            path,
            MODEL,
            1,
            len(images),
            0,
            Range(min(images), max(images)),
            Range(SOURCE, SOURCE),
            Range(min(shards), max(shards)),
            Range("ok", "ok"),
            Range(None, None),
        )

    def _keys(self, file: LabelFile) -> pa.Table:
        shared = {"source": SOURCE, "status": "ok", "labeled_at": 0}
        rows = [{**shared, "shard": shard, "image_id": image} for shard, image in self.rows[file.path]]
        return pa.Table.from_pylist(rows, pa.schema([LABEL_SCHEMA.field(name) for name in KEY_COLUMNS]))


class Run:
    """One process: planned once, then units come back in any order and are committed now and then."""

    def __init__(self, world: World, rng: random.Random, faults: float) -> None:
        self.others: list[Run] = []
        self.ended = False
        self.acknowledged: set[str] = set()
        self._world = world
        self._rng = rng
        self._busy = False
        self._taken: set[str] = set()
        seen = len(world.log.versions)  # the store's snapshot and the plan are of one version
        store = MemoryStore(world.log, rng, faults, self._let_others_act)
        self._committer = Committer(
            store, APP, {"run_id": "r"}, 60, 100, lambda: 0.0, sleep=lambda seconds: None
        )
        self._books = Books(self._committer, self._save_index)
        done = world.done(seen)
        self._work = list(self._units(plan_shards(world.listing(), done, dict(world.index))))
        self.num_planned = sum(len(images) for _, _, images in self._work)
        rng.shuffle(self._work)

    def _units(self, planned: Iterator[ShardTask]) -> Iterator[tuple[UnitReport, str | None, list[str]]]:
        """(report, unit id or None, images) as the read stage gives them for what the source holds now."""
        size = self._rng.randint(1, 4)  # of units, which may differ from run to run
        for task in planned:
            shard, skip = task.shard, task.skip
            version, held = self._world.shards.get(shard.name, (None, [key for key, _ in shard.objects]))
            closing = UnitReport(shard.name)
            if shard.info is not None and shard.info.version != version:
                closing.shard_error = "it was replaced since it was listed"
                yield closing, None, []
                continue
            wanted = [image for image in held if image not in skip]
            num_read = len(wanted) if self._rng.random() < 0.8 else self._rng.randint(0, len(wanted))
            units = [wanted[start : min(start + size, num_read)] for start in range(0, num_read, size)]
            for number, images in enumerate(units):
                yield UnitReport(shard.name, num_images=len(images)), f"{shard.uri}#{number}", images
            if num_read < len(wanted):
                closing.shard_error = "the store is away"
            else:
                closing.shard_num_units, closing.shard_num_images = len(units), len(held)
                closing.shard_version = version
            yield closing, None, []

    def _let_others_act(self) -> None:
        if self.others and self._rng.random() < 0.2:
            self._rng.choice(self.others).act()

    def _save_index(self, shards: ShardIndex) -> None:
        self._world.index.update(shards)

    def act(self) -> None:
        """Take a unit or commit; a kill ends the run wherever it is."""
        if self._busy or self.ended:
            return
        self._busy = True
        try:
            if self._work and self._rng.random() < 0.7:
                self._take()
            else:
                self._commit()
                self.ended = not self._work
        except (MasklakeError, StoppedError):
            self.ended = True
        finally:
            self._busy = False

    def _take(self) -> None:
        report, unit, images = self._work[-1]
        if self._rng.random() < 0.9:  # else it comes once more, made by a task that was run again
            self._work.pop()
        fragment = None
        if unit is not None:
            path = f"{unit}-{self._rng.random()}"
            self._world.rows[path] = [(report.shard, image) for image in images]
            fragment = Fragment(path, MODEL, (unit,), 1, len(images), len(images), 0, 0, "{}")
        self._books.take(report, fragment)
        self._taken.update(images)

    def _commit(self) -> None:
        self._books.commit()
        self.acknowledged |= self._taken


def make_world(rng: random.Random) -> World:
    shards = {
        f"{number}.tar": ("1", [f"{number}.tar/{i:02d}" for i in range(rng.randint(0, 8))])
        for number in range(rng.randint(0, 3))
    }
    world = World(shards, [f"single-{i:02d}.jpg" for i in range(rng.randint(0, 8))])
    world.ever = world.images()
    return world


def change(world: World, rng: random.Random) -> None:
    """Images are added, deleted, and shards packed anew."""
    for name, (version, images) in list(world.shards.items()):
        if rng.random() < 0.3:
            new = [f"{name}/new-{version}-{i}" for i in range(rng.randint(0, 2))]
            kept = [image for image in images if rng.random() < 0.9]
            world.shards[name] = (f"{version}'", sorted([*kept, *new]))
    world.objects = sorted(
        [key for key in world.objects if rng.random() < 0.9]
        + [f"single-{rng.random():.6f}.jpg" for _ in range(rng.randint(0, 2))]
    )
    world.ever |= world.images()


def run_schedules(seeds: range) -> None:
    for seed in seeds:
        run_schedule(seed)


def run_schedule(seed: int) -> None:
    rng = random.Random(seed)
    world = make_world(rng)
    runs: list[Run] = []
    for _ in range(80):
        alive = [run for run in runs if not run.ended]
        if not alive or (len(alive) < 3 and rng.random() < 0.05):
            try:
                runs.append(Run(world, rng, faults=0.1))
            except StoppedError:
                continue
            for run in runs:
                run.others = [other for other in runs if other is not run and not other.ended]
        elif rng.random() < 0.04:
            rng.choice(alive).ended = True  # killed between two steps; what it had sent may yet arrive
        elif rng.random() < 0.04:
            change(world, rng)
        else:
            rng.choice(alive).act()
        table = set(world.table())
        for run in runs:
            assert run.acknowledged <= table, f"seed {seed}: acknowledged, not in the table"
    finish(world, rng, seed)
    rows = Counter(world.table())
    twice = [image for image, count in rows.items() if count > 1]
    assert not twice, f"seed {seed}: in the table twice: {twice}"
    assert world.images() <= rows.keys() <= world.ever, f"seed {seed}: lost, or out of nowhere"


def finish(world: World, rng: random.Random, seed: int) -> None:
    """Nothing fails or changes any more: the same command again, until there is nothing to do."""
    for _ in range(100):
        committed = set(world.table())
        run = Run(world, rng, faults=0.0)
        while not run.ended:
            run.act()
        assert run.acknowledged.isdisjoint(committed), f"seed {seed}: labelled again"
        if run.num_planned == 0 and world.images() <= set(world.table()):
            return
    raise AssertionError(f"seed {seed}: it never ends")


class _OneThread:
    """In place of a pool: starting threads would be nine tenths of a schedule."""

    def __init__(self, num_threads: int) -> None:
        self.map = map

    def __enter__(self) -> _OneThread:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(done_images, "ThreadPoolExecutor", _OneThread)


def test_whatever_happens_every_image_ends_in_the_table_once() -> None:
    run_schedules(range(300))


@pytest.mark.chaos
@pytest.mark.parametrize("block", range(10))
def test_whatever_happens_every_image_ends_in_the_table_once_at_length(block: int) -> None:
    run_schedules(range(1000 * (block + 1), 1000 * (block + 2)))


class _RemembersEarly(Books):
    """Takes a shard for complete when its last unit came, not when that was committed."""

    def take(self, report: UnitReport, fragment: Fragment | None) -> bool:
        taken = super().take(report, fragment)
        complete = {(n, s.version or ""): s.num_images for n, s in self._open.items() if s.is_complete}
        self._save_index(complete)
        return taken


class _CountsTwice(Committer):
    """Commits a unit again that came again."""

    def add(self, fragment: Fragment) -> bool:
        self._seen_units.clear()
        return super().add(fragment)


class _PlansFromNothing(DoneImages):
    """Forgets single images that are done."""

    def known(self, objects: ObjectTable) -> Known:
        nothing: Any = pa.nulls(len(objects), pa.binary(16))
        return Known(np.zeros(len(objects), np.int8), nothing)


@pytest.mark.parametrize(
    ("part", "broken"),
    [("Books", _RemembersEarly), ("Committer", _CountsTwice), ("DoneImages", _PlansFromNothing)],
)
def test_the_schedules_catch_what_is_broken(part: str, broken: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], part, broken)
    with pytest.raises(AssertionError, match="seed"):
        run_schedules(range(1000))
