"""What a night has to do, jobs/relabel/worklist.py."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

from jobs.lake.labels_table import LabelsTable
from jobs.lake.object_table import ObjectTable
from jobs.lake.plan import ShardTask, plan_shards
from jobs.lake.shards import Shard
from jobs.lake.storage import ObjectInfo, Storage
from jobs.relabel.worklist import Counts, Reason, RemovedImages, open_worklist
from schemas.labels import ErrorKind
from schemas.relabel_spec import OrderSpec
from tests.lake.conftest import make_label_rows

OLD, NEW = "lite-0123456789ab", "lite-ba9876543210"
SOURCE = "s3://photos/2026"
LATER_US = 1_800_000_000_000_000

AddLabels = Callable[..., object]


def files(**versions: str) -> list[Shard]:
    """A listing of objects, `a="v1"`: a.jpg in version v1."""
    objects = ObjectTable.of(
        (f"{key}.jpg", ObjectInfo(f"{SOURCE}/{key}.jpg", 10, None, version))
        for key, version in versions.items()
    )
    return [Shard(SOURCE, ".", "files", None, objects)]


def tar(name: str, version: str, num_bytes: int = 100) -> Shard:
    uri = f"{SOURCE}/{name}"
    return Shard(uri, name, "tar", ObjectInfo(uri, num_bytes, None, version))


def rows(
    model_id: str, *keys: str, version: str | None = "v1", shard: str = ".", **options: object
) -> pa.Table:
    ids = [f"{key}.jpg" if shard == "." else f"{shard}/{key}" for key in keys]
    return make_label_rows(ids, model_id, shard=shard, object_version=version, **options)  # type: ignore[arg-type]


def counted(counts: Counts) -> dict[str, int]:
    """Without the reasons that nothing has."""
    found = {str(reason): count for reason, count in counts.by_reason.items() if count}
    return found | ({"removed": counts.removed} if counts.removed else {})


def ids_of(tasks: list[ShardTask]) -> list[str]:
    return [image_id.removesuffix(".jpg") for task in tasks for image_id, _ in task.shard.objects]


def test_without_a_table_all_is_new() -> None:
    with open_worklist(files(a="v1", b="v1"), None, SOURCE, NEW, None) as work:
        assert counted(work.counts) == {"new": 2}
        assert ids_of(list(work.tasks())) == ["a", "b"]
        assert list(work.removed()) == []
    with open_worklist([tar("x.tar", "v1")], None, SOURCE, NEW, None) as work:
        assert (counted(work.counts), list(work.tasks())) == ({}, [ShardTask(tar("x.tar", "v1"))])


def test_every_image_has_one_reason(table: LabelsTable, storage: Storage, add_labels: AddLabels) -> None:
    add_labels(
        table,
        storage,
        rows(OLD, "stale", "stale-changed", "gone"),
        rows(NEW, "fresh", "changed", "touched", "gone", "back", "gone-before"),
        rows(NEW, "failed", failed={"failed.jpg": "io"}),
        rows(NEW, "given-up", failed={"given-up.jpg": "corrupt"}),
        rows(NEW, "unknown", version=None),
        rows(NEW, "back", "gone-before", removed=["back.jpg", "gone-before.jpg"], at_us=LATER_US),
        rows(NEW, "twice", version="v0"),
        rows(NEW, "twice", version="v1", at_us=LATER_US),
        make_label_rows(["new.jpg"], NEW, source="s3://other"),
    )
    listing = files(
        **dict.fromkeys(("fresh", "stale", "failed", "given-up", "unknown", "back", "twice", "new"), "v1"),
        **dict.fromkeys(("changed", "stale-changed", "touched"), "v2"),
    )
    with open_worklist(listing, table, SOURCE, NEW, OLD, retry=[ErrorKind.IO]) as work:
        assert counted(work.counts) == {
            "new": 2,  # new, back
            "changed": 3,
            "failed": 1,
            "stale": 1,
            "fresh": 3,  # fresh, unknown, twice
            "given_up": 1,
            "removed": 1,
        }
        assert work.counts.to_do == 7
        (task,) = work.tasks()
        assert ids_of([task]) == ["back", "new", "changed", "stale-changed", "touched", "failed", "stale"]
        assert task.contents.keys() == {"changed.jpg", "touched.jpg"}  # what the old model read is no matter
        assert list(work.removed()) == [RemovedImages(".", ["gone.jpg"])]
        assert work.versions_of(["touched.jpg", "fresh.jpg"]) == {"touched.jpg": "v2", "fresh.jpg": "v1"}
    with open_worklist(listing, table, SOURCE, OLD, None) as work:
        assert counted(work.counts)["removed"] == 1
        assert counted(work.counts)["new"] == 9


def test_it_agrees_with_the_plan_of_a_label_job(
    table: LabelsTable, storage: Storage, add_labels: AddLabels
) -> None:
    keys = [f"{number:03d}" for number in range(40)]
    add_labels(
        table,
        storage,
        rows(NEW, *keys[:20], failed={f"{key}.jpg": "io" for key in keys[:20:5]}),
        rows(
            NEW, *keys[3:20:4], version="v2", at_us=LATER_US, removed=[f"{key}.jpg" for key in keys[3:20:8]]
        ),
    )
    listing = files(**{key: "v2" if number % 3 else "v1" for number, key in enumerate(keys)})
    done = table.done_images(SOURCE, NEW, [ErrorKind.IO])
    planned = list(plan_shards(listing, done, {}))
    with open_worklist(listing, table, SOURCE, NEW, None, retry=[ErrorKind.IO]) as work:
        tasks = list(work.tasks())
        assert sorted(ids_of(planned)) == sorted(ids_of(tasks))
        contents = {i: h for task in planned for i, h in task.contents.items()}
        assert {i: h for task in tasks for i, h in task.contents.items()} == contents != {}


def test_what_is_wanted_most_comes_first_and_a_budget_cuts_the_rest(
    table: LabelsTable, storage: Storage, add_labels: AddLabels
) -> None:
    doubtful, sure = rows(OLD, "doubtful", "z-important"), rows(OLD, "sure")
    scores = pa.array([0.99], pa.float32())
    place = sure.schema.get_field_index("max_score")
    add_labels(table, storage, doubtful, sure.set_column(place, sure.schema.field(place), scores))
    listing = files(**dict.fromkeys(["doubtful", "new", "sure", "z-important"], "v1"))
    order = OrderSpec(first=("z-*", "y'*"), uncertain_first=True)
    with open_worklist(listing, table, SOURCE, NEW, OLD, order=order) as work:
        assert ids_of(list(work.tasks())) == ["z-important", "new", "doubtful", "sure"]
        assert ids_of(list(work.tasks(max_images=2))) == ["z-important", "new"]
        assert work.counts.by_reason[Reason.STALE] == 3


def test_stale_images_come_newest_first_and_uncertainty_goes_before_that(
    table: LabelsTable, storage: Storage, add_labels: AddLabels
) -> None:
    sure = rows(OLD, "a", at_us=3)
    place = sure.schema.get_field_index("max_score")
    sure = sure.set_column(place, sure.schema.field(place), pa.array([0.99], pa.float32()))
    add_labels(table, storage, rows(OLD, "b", "c", at_us=1), rows(OLD, "d", at_us=2), sure)
    add_labels(table, storage, rows(OLD, "c", at_us=4))  # as one whose object was touched
    listing = files(**dict.fromkeys("abcde", "v1"))
    with open_worklist(listing, table, SOURCE, NEW, OLD) as work:
        assert ids_of(list(work.tasks())) == ["e", "c", "a", "d", "b"]
    with open_worklist(listing, table, SOURCE, NEW, OLD, order=OrderSpec(uncertain_first=True)) as work:
        assert ids_of(list(work.tasks())) == ["e", "c", "d", "b", "a"]


def test_stale_shards_come_newest_first_each_with_what_it_has(
    table: LabelsTable, storage: Storage, add_labels: AddLabels
) -> None:
    names = ("x.tar", "y.tar", "z.tar")
    for at_us, name in enumerate(names):
        add_labels(table, storage, rows(OLD, "1", "2", shard=name, at_us=at_us))
    add_labels(table, storage, rows(NEW, "2", shard="y.tar"))
    shards = [tar(name, "v1") for name in (*names, "new.tar")]
    known = {(name, "v1"): 2 for name in names}
    with open_worklist(shards, table, SOURCE, NEW, OLD, current_index=known) as work:
        tasks = [(task.shard.name, task.skip) for task in work.tasks()]
    nothing: frozenset[str] = frozenset()
    assert tasks == [
        ("new.tar", nothing),
        ("z.tar", nothing),
        ("y.tar", frozenset({"y.tar/2"})),
        ("x.tar", nothing),
    ]


def test_a_shard_that_was_read_whole_is_fresh_until_it_changes(
    table: LabelsTable, storage: Storage, add_labels: AddLabels
) -> None:
    add_labels(
        table,
        storage,
        rows(NEW, "1", "2", shard="x.tar"),
        rows(NEW, "1", "2", "3", shard="y.tar"),
        rows(NEW, "1", shard="gone.tar"),
        rows(OLD, "1", "2", "3", shard="z.tar"),
    )
    index = {("x.tar", "v1"): 2, ("y.tar", "v1"): 3, ("gone.tar", "v1"): 1}
    shards = [tar("x.tar", "v1"), tar("y.tar", "v2", 300), tar("z.tar", "v1"), tar("new.tar", "v1", 1000)]
    with open_worklist(
        shards, table, SOURCE, NEW, OLD, index=index, current_index={("z.tar", "v1"): 3}
    ) as work:
        # 5 images in 200 bytes of known shards: new.tar may hold 25; y.tar, which had 3 and is larger now, 8.
        assert counted(work.counts) == {"new": 25, "changed": 8, "stale": 3, "fresh": 2, "removed": 1}
        assert work.counts.estimated == 36
        first, second, third = work.tasks()
        assert (first.shard.name, first.skip, dict(first.contents)) == ("new.tar", frozenset(), {})
        assert (second.shard.name, second.skip) == ("y.tar", frozenset())
        assert second.contents.keys() == {"y.tar/1", "y.tar/2", "y.tar/3"}
        assert third.shard.name == "z.tar"
        assert list(work.removed()) == [RemovedImages("gone.tar", ["gone.tar/1"])]


def test_a_shard_with_a_row_too_many_is_read_again_to_find_out_which(
    table: LabelsTable, storage: Storage, add_labels: AddLabels
) -> None:
    add_labels(table, storage, rows(NEW, "1", "2", "3", shard="x.tar"))
    with open_worklist([tar("x.tar", "v2")], table, SOURCE, NEW, None, index={("x.tar", "v2"): 2}) as work:
        (task,) = work.tasks()
        assert task.contents.keys() == {"x.tar/1", "x.tar/2", "x.tar/3"}
        assert work.counts.to_do == 0


def test_a_shard_that_was_left_half_read_is_gone_on_with(
    table: LabelsTable, storage: Storage, add_labels: AddLabels
) -> None:
    failed = rows(NEW, "1", "2", shard="x.tar", failed={"x.tar/2": "io"})
    add_labels(table, storage, failed)
    with open_worklist([tar("x.tar", "v1")], table, SOURCE, NEW, None, retry=[ErrorKind.IO]) as work:
        (task,) = work.tasks()
        assert (task.skip, dict(task.contents)) == (frozenset({"x.tar/1"}), {"x.tar/2": b""})
    index = {("x.tar", "v1"): 2}
    with open_worklist([tar("x.tar", "v1")], table, SOURCE, NEW, None, index=index) as work:
        assert (counted(work.counts), list(work.tasks())) == ({"fresh": 1, "given_up": 1}, [])
    with open_worklist(
        [tar("x.tar", "v1")], table, SOURCE, NEW, None, index=index, retry=[ErrorKind.IO]
    ) as work:
        assert counted(work.counts) == {"fresh": 1, "failed": 1}
        assert [task.skip for task in work.tasks()] == [frozenset({"x.tar/1"})]
