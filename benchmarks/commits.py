"""The label table's log: 100,000 fragments in it, its thousandth version, and many small files merged.

Run:  python benchmarks/commits.py [--out benchmarks/results]

The log is measured with fragments that are not there: a commit names files and never opens one. A commit is
what a run does once a minute: look at the newest version, send one Delta transaction, look for it. Every 25th
version is a checkpoint of the log too, and both tables come to one. S3 is moto's server on the
loopback, in a process of its own.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.common.report import arguments, seconds, write_report
from jobs.lake.commit import Committer, DeltaStore, app_id
from jobs.lake.compact import run_compaction
from jobs.lake.fragments import Fragment, delta_stats, write_fragment
from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from schemas.labels import LABEL_SCHEMA
from schemas.specs import StorageSpec

PACKAGES = ("deltalake", "pyarrow", "duckdb", "moto")
MODEL = "lite-0123456789ab"
SOURCE = "s3://photos/2026"
WINDOW = 26  # commits
LATE = 1000  # version
MASKS_PER_IMAGE = 13
IMAGES_PER_FRAGMENT = 128

Row = list[str]


@dataclass(frozen=True)
class Place:
    name: str
    lake: str
    storage: Storage


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--fragments", type=int, default=100_000, help="in the log")
    parser.add_argument("--files", type=int, default=2_000, help="small files to merge")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="masklake-") as folder, s3_place() as s3:
        disk = Storage(StorageSpec())
        results = [measure_log(Place("local folder", f"file://{folder}/many", disk), args.fragments)]
        old = LabelsTable.open_or_create(f"file://{folder}/old", disk)
        commit_times(old, LATE - WINDOW // 2)
        old_s3 = upload_log(old, Place(s3.name, f"{s3.lake}/old", s3.storage))
        new, new_s3 = (
            LabelsTable.open_or_create(f"{lake}/new", storage)
            for lake, storage in ((f"file://{folder}", disk), (s3.lake, s3.storage))
        )
        for table in (new, new_s3):
            commit([fake_fragment() for _ in range(LATE - WINDOW // 2)], table)
        results += [
            measure_versions(old, new, "local folder"),
            measure_versions(old_s3, new_s3, s3.name),
            measure_compaction(Place("local folder", f"file://{folder}/files", disk), args.files),
        ]
    failed = [row for rows, holds in results for row in rows if not holds]
    write_report(
        "commits",
        "Commits, checkpoints and compaction of the label table",
        PACKAGES,
        [
            f"commits: medians; of {WINDOW} commits to either table in turns, the slowest is in parentheses",
            f"both have {LATE - WINDOW // 2} files to begin with: each costs a commit some 8 µs, "
            "see the first rows",
            f"merged files: {IMAGES_PER_FRAGMENT} images of {MASKS_PER_IMAGE} masks in each small one",
        ],
        [
            ["what", "where", "measured", "beside", "ratio", "must reach"],
            *(row for rows, _ in results for row in rows),
        ],
        args.out,
    )
    if failed:
        sys.exit("a figure is not what it must be")


def measure_log(place: Place, num_fragments: int) -> tuple[list[Row], bool]:
    """Open a table with so many fragments in its log, and commit one more."""
    table = LabelsTable.open_or_create(place.lake, place.storage)
    for _ in range(10):
        commit([fake_fragment() for _ in range(num_fragments // 10)], table)

    def open_times() -> list[tuple[float, float]]:
        return [timed(lambda: LabelsTable.open(place.lake, place.storage)) for _ in range(5)]

    opened, committed = open_times(), commit_times(table, 9)
    table.delta.create_checkpoint()
    opened_later, committed_later = open_times(), commit_times(table, 9)
    rows = [
        [
            f"{what}, {num_fragments:,} fragments",
            place.name,
            _figure(late),
            f"{_figure(early)} before",
            "",
            "2 s",
        ]
        for what, early, late in (
            ("open, from a checkpoint", opened, opened_later),
            ("commit, after a checkpoint", committed, committed_later),
        )
    ]
    slowest_s = max(
        statistics.median(wall_s for wall_s, _ in times)
        for times in (opened, committed, opened_later, committed_later)
    )
    return rows, slowest_s <= 2


def _figure(times: list[tuple[float, float]]) -> str:
    wall_s, processor_s = (statistics.median(column) for column in zip(*times, strict=True))
    return f"{wall_s:.2f} s ({processor_s:.2f} of processor)"


def measure_versions(old: LabelsTable, new: LabelsTable, name: str) -> tuple[list[Row], bool]:
    """The seconds of a commit to a table with LATE versions and to a new one of as many files, in turns."""
    committers = [_committer(table) for table in (old, new)]
    taken: list[list[float]] = [[], []]
    for _ in range(WINDOW):
        for committer, times in zip(committers, taken, strict=True):
            committer.add(fake_fragment())
            times.append(seconds(committer.commit))
    late, early = taken
    ratio = statistics.median(late) / statistics.median(early)
    figures = [f"{1e3 * statistics.median(times):.1f} ms ({1e3 * max(times):.0f})" for times in taken]
    what = f"commits {LATE - WINDOW // 2} to {LATE + WINDOW // 2}, beside 2 to {WINDOW + 2}"
    return [[what, name, *figures, f"{ratio:.2f}×", "1.5×"]], ratio <= 1.5


def upload_log(table: LabelsTable, place: Place) -> LabelsTable:
    """The same table in another place: a log's paths are below the table."""
    for path in Path(table.uri.removeprefix("file://"), "_delta_log").iterdir():
        place.storage.write_bytes(f"{place.lake}/labels/_delta_log/{path.name}", path.read_bytes())
    return LabelsTable.open(place.lake, place.storage)


def measure_compaction(place: Place, num_files: int) -> tuple[list[Row], bool]:
    """Merge many small files, and plan a run over their images and scan a column before and after."""
    table = LabelsTable.open_or_create(place.lake, place.storage)
    fragments = [
        write_fragment(make_rows(number), [f"unit-{number}"], place.lake, MODEL, place.storage)
        for number in range(num_files)
    ]
    commit(fragments, table)
    num_bytes = sum(fragment.size_bytes for fragment in fragments)
    before_s = plan_seconds(place, num_files)
    scan_before_s = scan_seconds(place)
    result = run_compaction(table, place.lake, place.storage)
    after_s, scan_after_s = plan_seconds(place, num_files), scan_seconds(place)
    sizes = sorted(file.size_bytes for file in table.files())
    rows = [
        [
            f"compaction of {num_bytes / 1e6:.0f} MB",
            place.name,
            f"{result.seconds:.1f} s",
            f"{num_files:,} files to {len(sizes)} of {sizes[0] / 1e6:.0f} to {sizes[-1] / 1e6:.0f} MB",
            f"{num_bytes / 1e6 / result.seconds:.0f} MB/s",
            "",
        ],
        [
            f"plan with nothing to do, {num_files * IMAGES_PER_FRAGMENT:,} images, merged",
            place.name,
            f"{after_s:.2f} s",
            f"{before_s:.2f} s before",
            f"{after_s / before_s:.1f}×",
            "",
        ],
        [
            "best score of every image, merged",
            place.name,
            f"{scan_after_s:.2f} s",
            f"{scan_before_s:.2f} s before",
            f"{scan_after_s / scan_before_s:.2f}×",
            "",
        ],
    ]
    return rows, result.num_old_files == num_files


def commit(fragments: list[Fragment], table: LabelsTable) -> None:
    committer = _committer(table)
    for fragment in fragments:
        committer.add(fragment)
    committer.commit()


def commit_times(table: LabelsTable, num_commits: int) -> list[tuple[float, float]]:
    """(seconds, seconds of processor) of one Committer's commits of a fragment each, as a run has it."""
    committer = _committer(table)
    taken = []
    for _ in range(num_commits):
        committer.add(fake_fragment())
        taken.append(timed(committer.commit))
    return taken


def timed(work: Callable[[], object]) -> tuple[float, float]:
    start_s = time.process_time()
    return seconds(work), time.process_time() - start_s


def _committer(table: LabelsTable) -> Committer:
    return Committer(DeltaStore(table), app_id(SOURCE, MODEL), {"run_id": "r"}, 60, 1)


def fake_fragment() -> Fragment:
    """A fragment as a commit sees it, of a shard of its own; there is no file."""
    stem = uuid.uuid4().hex
    return Fragment(
        path=f"model_id={MODEL}/{stem[:16]}-{uuid.uuid4().hex}.parquet",
        model_id=MODEL,
        unit_ids=(stem,),
        size_bytes=1_000_000,
        num_rows=IMAGES_PER_FRAGMENT,
        num_ok=IMAGES_PER_FRAGMENT,
        num_failed=0,
        written_at_ms=time.time_ns() // 1_000_000,
        stats_json=_STATS_JSON.replace(shard_name(0), f"shard-{stem[:6]}.tar"),
    )


def shard_name(number: int) -> str:
    return f"shard-{number:06}.tar"


def make_rows(number: int) -> pa.Table:
    """The labels of one shard: its own image ids and masks, as long as those of photographs."""
    ids = pa.array([f"{shard_name(number)}/{image:09}" for image in range(IMAGES_PER_FRAGMENT)])
    shards = pa.array([shard_name(number)] * IMAGES_PER_FRAGMENT)
    rng = np.random.default_rng(number)
    num_masks = IMAGES_PER_FRAGMENT * MASKS_PER_IMAGE
    ends = np.cumsum(rng.integers(50, 250, num_masks), dtype=np.int32)
    offsets = pa.py_buffer(np.concatenate(([0], ends)).astype(np.int32).tobytes())
    codes = pa.py_buffer(rng.integers(48, 112, ends[-1], np.uint8).tobytes())
    lists = cast("pa.ListArray[Any]", _ROWS["detections"].combine_chunks())
    detection_type = lists.type.value_type
    leaves = cast("pa.StructArray", lists.flatten()).flatten()
    leaves[-1] = pa.Array.from_buffers(pa.binary(), num_masks, [None, offsets, codes])
    structs = pa.StructArray.from_arrays(leaves, fields=list(detection_type))
    columns = {
        "image_id": ids,
        "shard": shards,
        "detections": pa.ListArray.from_arrays(lists.offsets, structs, type=lists.type),
    }
    rows = _ROWS
    for name, column in columns.items():
        rows = rows.set_column(rows.column_names.index(name), LABEL_SCHEMA.field(name), column)
    return rows


def template_rows() -> pa.Table:
    rng = np.random.default_rng(0)

    def detection(score: float) -> dict[str, object]:
        x0, y0, x1, y1 = (float(side) for side in np.sort(rng.uniform(0, 480, 4)).astype(np.float32))
        box = {"x0": x0, "y0": y0, "x1": x1, "y1": y1}
        return {"category_id": 1, "score": score, "box": box, "area": 700, "rle": b""}

    rows = [
        {
            "image_id": str(image),
            "source": SOURCE,
            "shard": shard_name(0),
            "content_hash": rng.bytes(16),
            "width": 640,
            "height": 480,
            "status": "ok",
            "error_kind": None,
            "error": None,
            "model_id": MODEL,
            "run_id": "run-1",
            "labeled_at": datetime(2026, 11, 22, tzinfo=UTC),
            "num_detections": MASKS_PER_IMAGE,
            "max_score": 0.75,
            "detections": [detection(0.75 - rank / 32) for rank in range(MASKS_PER_IMAGE)],
        }
        for image in range(IMAGES_PER_FRAGMENT)
    ]
    return pa.Table.from_pylist(rows, schema=LABEL_SCHEMA)


def plan_seconds(place: Place, num_shards: int) -> float:
    """Open the table and ask of every shard how many images are done."""

    def ask() -> None:
        done = LabelsTable.open(place.lake, place.storage).done_images(SOURCE, MODEL)
        num_done = sum(done.state(shard_name(number)).num_done for number in range(num_shards))
        assert num_done == num_shards * IMAGES_PER_FRAGMENT, num_done

    return statistics.median(seconds(ask) for _ in range(3))


def scan_seconds(place: Place) -> float:
    """What an analysis does: one column of all rows."""
    table = LabelsTable.open(place.lake, place.storage)
    return seconds(lambda: table.dataset(MODEL).to_table(columns={"score": pc.field("max_score")}))


@contextmanager
def s3_place() -> Iterator[Place]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    os.environ.update(AWS_ACCESS_KEY_ID="benchmark", AWS_SECRET_ACCESS_KEY="not-a-secret")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        while True:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if server.poll() is not None:
                sys.exit("moto's server did not start")
            time.sleep(0.05)
        storage = Storage(StorageSpec(endpoint_url=f"http://127.0.0.1:{port}", region="us-east-1"))
        filesystem, _ = storage.filesystem("s3://benchmark")
        filesystem.call_s3("create_bucket", Bucket="benchmark")
        yield Place("moto's S3", "s3://benchmark/lake", storage)
        server.terminate()


_ROWS = template_rows()
_STATS_JSON = json.dumps(delta_stats(make_rows(0)))


if __name__ == "__main__":
    main()
