"""The diff of two models over a label table: a million images of ten objects each under both.

Run:  python benchmarks/diff.py [--images 1000000] [--objects 10] [--out benchmarks/results]

The table is on this machine's disk, in files of 25,000 rows, as compaction makes them of labels of this size.
The new model moves boxes and scores a little, renames a hundredth of the objects, and every second mask is
another. Each diff runs in a process of its own, which then says how long it took and how much memory it had.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from benchmarks.common.report import arguments, peak_memory_mb, write_report
from jobs.lake.commit import Committer, DeltaStore, app_id
from jobs.lake.fragments import write_fragment
from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from jobs.relabel.diff import diff_models
from maskrcnn_core.masks import encode_mask_probs
from schemas.labels import BOX_TYPE, DETECTION_TYPE, LABEL_SCHEMA
from schemas.specs import StorageSpec

pc: Any = pyarrow.compute  # whose stubs know no arrays of unknown type
SOURCE = "s3://photographs/2026"
MODELS = ("lite-000000000000", "lite-111111111111")
FILE_ROWS = 25_000
HEIGHT, WIDTH = 480, 640
NUM_CATEGORIES = 80
NUM_MASKS = 40_000  # different ones: more than a Parquet page holds, so that they compress as real ones do


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--objects", type=int, default=10)
    parser.add_argument("--diff", nargs=3, help="used by the script itself: lake, masks or boxes, images")
    args = parser.parse_args()
    if args.diff:
        lake, overlap, images = args.diff
        print(json.dumps(measure(lake, overlap == "masks", int(images))))
        return
    table = [["overlap of", "seconds", "peak memory", "images a second", "processor seconds", "must reach"]]
    with tempfile.TemporaryDirectory() as folder:
        lake = f"file://{folder}/lake"
        num_bytes = write_table(lake, args.images, args.objects)
        for overlap in ("masks", "boxes"):
            told = diff_apart(lake, overlap, args.images)
            rate = args.images / told["seconds"]
            goal = f"{args.images * 300 / 1e6:.0f} s" if overlap == "masks" else ""
            memory = f"{told['peak_mb']:.0f} MB"
            row = [f"{told['seconds']:.1f}", memory, f"{rate:,.0f}", f"{told['cpu_s']:.1f}", goal]
            table.append([overlap, *row])
            print(table[-1], flush=True)
    facts = [
        f"{args.images:,} images of {args.objects} objects under each model, {num_bytes / 1e9:.2f} GB",
        f"objects of {NUM_MASKS:,} masks of {WIDTH} x {HEIGHT} pixels",
        "peak memory is the whole process's, 200 MB of it before it begins",
    ]
    write_report("diff", "Diff of two models", ["pyarrow", "numpy", "numba"], facts, table, args.out)


def diff_apart(lake: str, overlap: str, images: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.diff", "--diff", lake, overlap, str(images)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    told: dict[str, float] = json.loads(output.splitlines()[-1])
    return told


def measure(lake: str, masks: bool, images: int) -> dict[str, float]:
    storage = Storage(StorageSpec())
    started, cpu_started = time.perf_counter(), time.process_time()
    diff = diff_models(LabelsTable.open(lake, storage), storage, SOURCE, *MODELS, masks=masks)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    assert diff.images.compared == images, f"{diff.images} compared"
    assert diff.total.moved
    assert diff.total.relabelled
    assert not diff.total.unreadable
    return {"seconds": seconds, "cpu_s": cpu_s, "peak_mb": peak_memory_mb()}


def write_table(lake: str, images: int, objects: int) -> int:
    """Labels of both models; how many bytes they are."""
    storage = Storage(StorageSpec())
    table = LabelsTable.open_or_create(lake, storage)
    committer = Committer(DeltaStore(table), app_id(SOURCE, ""), {"run_id": "r"}, 60, 10**9)
    rng = np.random.default_rng(6)
    boxes, strings = make_masks(rng)
    num_bytes = 0
    for start in range(0, images, FILE_ROWS):
        num = min(FILE_ROWS, images - start)
        chosen = rng.integers(0, NUM_MASKS, num * objects)
        categories = rng.integers(1, NUM_CATEGORIES + 1, num * objects).astype(np.int32)
        scores = rng.uniform(0.55, 1, num * objects).astype(np.float32)
        for model_id in MODELS:
            found = boxes[chosen]
            if model_id == MODELS[1]:
                found = found + rng.normal(0, 2, found.shape).astype(np.float32)
                categories = np.where(rng.random(len(categories)) < 0.01, 81, categories).astype(np.int32)
                scores = np.clip(scores + rng.normal(0, 0.05, len(scores)), 0, 1).astype(np.float32)
                # Every second mask is that of its neighbour, which is a little wider.
                chosen = np.where(rng.random(len(chosen)) < 0.5, chosen ^ 1, chosen)
            rows = label_rows(start, num, objects, model_id, categories, scores, found, strings.take(chosen))
            fragment = write_fragment(rows, [f"{model_id} {start}"], lake, model_id, storage)
            num_bytes += fragment.size_bytes
            committer.add(fragment)
    committer.commit()
    return num_bytes


def make_masks(rng: np.random.Generator) -> tuple[NDArray[np.float32], Any]:
    """Blobs in pairs, the second of each two pixels wider: their boxes and count strings."""
    num = NUM_MASKS // 2
    y, x = np.mgrid[-1:1:28j, -1:1:28j].astype(np.float32)
    inside = 1.3 - np.repeat(np.hypot(x, y)[None], num, axis=0)
    for number_of_waves in (2, 3, 5):
        depth, turn = rng.uniform(-0.15, 0.15, (num, 1, 1)), rng.uniform(0, 6, (num, 1, 1))
        inside += depth.astype(np.float32) * np.sin(
            number_of_waves * np.arctan2(y, x) + turn.astype(np.float32)
        )
    probs = np.repeat(np.clip(inside, 0, 1), 2, axis=0).astype(np.float32)
    sizes = rng.uniform(16, 160, (num, 2))
    corners = rng.uniform(0, 1, (num, 2)) * (np.array([WIDTH - 2, HEIGHT]) - sizes)
    boxes = np.repeat(np.concatenate([corners, corners + sizes], axis=1), 2, axis=0).astype(np.float32)
    boxes[1::2, 2] += 2
    strings, _ = encode_mask_probs(probs, boxes, HEIGHT, WIDTH)
    return boxes, pa.array(strings, pa.binary())


def label_rows(
    start: int,
    num: int,
    objects: int,
    model_id: str,
    categories: NDArray[np.int32],
    scores: NDArray[np.float32],
    boxes: NDArray[np.float32],
    rles: Any,
) -> pa.Table:
    """`num` images from number `start` on, each with `objects` detections."""
    numbers = pc.cast(pa.array(np.arange(start, start + num)), pa.string())
    box = pa.StructArray.from_arrays(
        [pa.array(np.ascontiguousarray(side)) for side in boxes.T], fields=list(BOX_TYPE)
    )
    areas = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) * np.pi / 4).astype(np.int32)
    columns = [pa.array(categories), pa.array(scores), box, pa.array(areas), rles]
    found = pa.StructArray.from_arrays(columns, fields=list(DETECTION_TYPE))
    offsets: Any = pa.array(np.arange(num + 1, dtype=np.int32) * objects)
    hashes = np.stack([np.arange(start, start + num), np.zeros(num, np.int64)], axis=1).tobytes()
    values: dict[str, Any] = {
        "image_id": pc.binary_join_element_wise(pc.utf8_lpad(numbers, 16, "0"), ".jpg", ""),
        "source": pa.array([SOURCE] * num),
        "shard": pa.array(["."] * num),
        "content_hash": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), num, [None, pa.py_buffer(hashes)]
        ),
        "status": pa.array(["ok"] * num),
        "model_id": pa.array([model_id] * num),
        "run_id": pa.array(["r"] * num),
        "labeled_at": pa.array([datetime(2026, 11, 1, tzinfo=UTC)] * num, pa.timestamp("us", "UTC")),
        "detections": pa.ListArray.from_arrays(offsets, found, type=LABEL_SCHEMA.field("detections").type),
    }
    arrays = [values[f.name] if f.name in values else pa.nulls(num, f.type) for f in LABEL_SCHEMA]
    return pa.Table.from_arrays(arrays, schema=LABEL_SCHEMA)


if __name__ == "__main__":
    main()
