"""Planning at scale: a source against a label table of a million images and of ten million, by both commands.

Run:  python benchmarks/planning.py [--images 10000000] [--out benchmarks/results]

Each plan is made in a process of its own, which then says how long it took and how much memory it had. The
source is a listing in temporary files, as a job makes one; what it costs to list is another matter. The table
is on this machine's disk, in merged files of 100,000 rows.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import product
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute

from benchmarks.common.report import arguments, peak_memory_mb, write_report
from jobs.lake.commit import Committer, DeltaStore, app_id
from jobs.lake.fragments import write_fragment
from jobs.lake.labels_table import LabelsTable
from jobs.lake.listing import SLICE_OBJECTS, Listing
from jobs.lake.object_table import OBJECT_SCHEMA, ObjectTable
from jobs.lake.plan import plan_shards
from jobs.lake.shard_index import load_shard_index, save_shard_index
from jobs.lake.shards import Shard
from jobs.lake.storage import ObjectInfo, Storage
from jobs.relabel.worklist import open_worklist
from schemas.labels import LABEL_SCHEMA
from schemas.specs import StorageSpec

pc: Any = pyarrow.compute  # whose stubs know no arrays of unknown type
MODEL = "lite-0123456789ab"
SOURCE = "s3://photographs/2026"
FILE_ROWS = 100_000
NEW_IMAGES = 1000
TAR_IMAGES = {"tar": 1000, "small-tar": 100}  # a shard
FORMS = ("files", *TAR_IMAGES)
# What the table lacks: each hundredth image, nothing, or a thousand that were added to the source since.
LACKS = ("hundredth", "nothing", "added")
COMMANDS = ("infer", "relabel")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=10_000_000)
    parser.add_argument(
        "--plan", nargs=5, help="used by the script itself: command, lake, form, images, lack"
    )
    args = parser.parse_args()
    if args.plan:
        command, lake, form, images, lack = args.plan
        print(json.dumps(measure(command, lake, form, int(images), lack)))
        return
    table = [
        ["command", "source", "images labelled", "to do", "seconds", "peak memory", "tasks", "must reach"]
    ]
    with tempfile.TemporaryDirectory() as folder:
        for form, images, lack in product(FORMS, (args.images // 10, args.images), LACKS):
            lake = f"file://{folder}/{form}-{images}-{lack}"
            write_table(lake, form, images, lack)
            for command in COMMANDS:
                told = plan_apart(command, lake, form, images, lack)
                table.append(
                    [
                        command,
                        form,
                        f"{images:,}",
                        f"{told['to_do']:,}",
                        f"{told['seconds']:.1f}",
                        f"{told['peak_mb']:.0f} MB",
                        f"{told['tasks']:,}",
                        limit(command, images, lack),
                    ]
                )
                print(table[-1], flush=True)
            shutil.rmtree(lake.removeprefix("file://"))
    facts = [
        "image ids are compared as strings, never by hashes, so none can be skipped for another",
        f"{', '.join(f'{form}: {num:,} images a shard' for form, num in TAR_IMAGES.items())}; each hundredth "
        "is of all shards",
        "peak memory is the whole process's, 150 MB of it before it begins",
    ]
    write_report("planning", "Planning at scale", ["pyarrow", "deltalake"], facts, table, args.out)


def limit(command: str, images: int, lack: str) -> str:
    """What the project wants."""
    wanted = {
        ("infer", 10_000_000, "hundredth"): "60 s, 2 GB",
        ("infer", 1_000_000, "nothing"): "10 s",
        ("relabel", 1_000_000, "added"): "15 s",
    }
    return wanted.get((command, images, lack), "")


def plan_apart(command: str, lake: str, form: str, images: int, lack: str) -> dict[str, float]:
    script = [sys.executable, "-m", "benchmarks.planning"]
    output = subprocess.run(
        [*script, "--plan", command, lake, form, str(images), lack],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    told: dict[str, float] = json.loads(output.splitlines()[-1])
    return told


def measure(command: str, lake: str, form: str, images: int, lack: str) -> dict[str, float]:
    storage = Storage(StorageSpec())
    listed = images + (NEW_IMAGES if lack == "added" else 0)
    with Listing(slices(listed) if form == "files" else tars(form, listed), 0.0) as listing:
        started = time.perf_counter()
        table = LabelsTable.open(lake, storage)
        index = load_shard_index(storage, lake, SOURCE, MODEL)
        if command == "infer":
            tasks = list(plan_shards(listing, table.done_images(SOURCE, MODEL), index))
        else:
            with open_worklist(listing, table, SOURCE, MODEL, None, index=index) as work:
                tasks = list(work.tasks())
        seconds = time.perf_counter() - started
    to_do = sum(
        len(task.shard.objects)
        if form == "files"
        else TAR_IMAGES[form] - len(cast(frozenset[str], task.skip))
        for task in tasks
    )
    wanted = {"hundredth": -(-images // 100), "nothing": 0, "added": NEW_IMAGES}[lack]
    assert to_do == wanted, f"{to_do} of {wanted} planned"
    return {"seconds": seconds, "peak_mb": peak_memory_mb(), "tasks": len(tasks), "to_do": to_do}


def keys(start: int, end: int) -> Any:
    """0000000000000000.jpg and so on."""
    numbers = pc.cast(pa.array(range(start, end), pa.int64()), pa.string())
    return pc.binary_join_element_wise(pc.utf8_lpad(numbers, 16, "0"), ".jpg", "")


def slices(images: int) -> Iterator[Shard]:
    for start in range(0, images, SLICE_OBJECTS):
        ids = keys(start, min(start + SLICE_OBJECTS, images))
        uris = pc.binary_join_element_wise(SOURCE, ids, "/")
        etags = pc.utf8_lpad(pc.cast(pa.array(range(len(ids))), pa.string()), 32, "0")
        columns = [ids, uris.cast(pa.binary()), pa.array([150_000] * len(ids), pa.int64()), etags, etags]
        table = ObjectTable(pa.Table.from_arrays(columns, schema=OBJECT_SCHEMA))
        yield Shard(SOURCE, ".", "files", None, table)


def tar_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def tars(form: str, images: int) -> Iterator[Shard]:
    for number in range(images // TAR_IMAGES[form]):
        uri = f"{SOURCE}/{tar_name(number)}"
        size = 150_000 * TAR_IMAGES[form]
        yield Shard(uri, tar_name(number), "tar", ObjectInfo(uri, size, None, "1"))


def write_table(lake: str, form: str, images: int, lack: str) -> None:
    """Labels of all images, or of all but each hundredth, and the index of tar shards."""
    storage = Storage(StorageSpec())
    table = LabelsTable.open_or_create(lake, storage)
    committer = Committer(DeltaStore(table), app_id(SOURCE, MODEL), {"run_id": "r"}, 60, 10**9)
    for start in range(0, images, FILE_ROWS):
        end = min(start + FILE_ROWS, images)
        rows = label_rows(form, start, end)
        if lack == "hundredth":
            rows = rows.filter(pa.array([number % 100 != 0 for number in range(start, end)]))
        committer.add(write_fragment(rows, [f"unit {start}"], lake, MODEL, storage))
    committer.commit()
    if form != "files":
        num = TAR_IMAGES[form]
        counts = {(tar_name(number), "1"): num for number in range(images // num)}
        save_shard_index(storage, lake, SOURCE, MODEL, "r", counts)


def label_rows(form: str, start: int, end: int) -> pa.Table:
    num = end - start
    ids, shards = keys(start, end), pa.array(["."] * num)
    if form != "files":
        shards = pa.array([tar_name(number // TAR_IMAGES[form]) for number in range(start, end)])
        ids = pc.binary_join_element_wise(shards, ids, "/")
    values: dict[str, Any] = {
        "image_id": ids,
        "source": pa.array([SOURCE] * num),
        "shard": shards,
        "status": pa.array(["ok"] * num),
        "model_id": pa.array([MODEL] * num),
        "run_id": pa.array(["r"] * num),
        "labeled_at": pa.array([datetime(2026, 11, 1, tzinfo=UTC)] * num, pa.timestamp("us", "UTC")),
        "detections": pa.array([[]] * num, LABEL_SCHEMA.field("detections").type),
    }
    arrays = [values[f.name] if f.name in values else pa.nulls(num, f.type) for f in LABEL_SCHEMA]
    return pa.Table.from_arrays(arrays, schema=LABEL_SCHEMA)


if __name__ == "__main__":
    main()
