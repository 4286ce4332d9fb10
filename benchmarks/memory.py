"""Memory: of the driver while it labels ten times as many images, and of a read task on a tar of 2 GB.

Run:  python benchmarks/memory.py [--images 8000] [--tar-mb 2000] [--out benchmarks/results]

Each figure is the peak (VmHWM) of a process that did nothing else. The driver labels small pictures on a
local Ray with the bundled checkpoint; the read task runs the read stage and drops what it gives.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common.report import arguments, write_report
from jobs.infer.progress import JsonWatcher
from jobs.infer.read import UnitReader
from jobs.infer.run import run_infer
from jobs.lake.plan import ShardTask
from jobs.lake.sources import list_shards
from jobs.lake.storage import Storage
from schemas.spec_loader import load_spec
from schemas.specs import InferSpec, SourceSpec, StorageSpec

DRIVER_AT_MOST = 1.2
READ_AT_MOST_MB = 256


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--tar-mb", type=int, default=2000)
    parser.add_argument("--measure", nargs=2, help="used by the script itself: what, folder")
    args = parser.parse_args()
    if args.measure:
        what, folder = args.measure
        (drive if what == "driver" else read)(Path(folder))
        print(json.dumps(peak_mb()))
        return
    table = [["process", "peak memory", "compared with", "peak memory", "result", "at most"]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few, many = (
            peak_of("driver", write_pictures(folder / str(n), n)) for n in (args.images // 10, args.images)
        )
        table.append(
            [
                f"driver, {args.images:,} images",
                f"{many:.0f} MB",
                f"{args.images // 10:,} images",
                f"{few:.0f} MB",
                f"{many / few:.2f}x",
                f"{DRIVER_AT_MOST}x",
            ]
        )
        empty = peak_of("read", write_tar(folder / "empty", 0))
        full = peak_of("read", write_tar(folder / "full", args.tar_mb))
        table.append(
            [
                f"read task, tar of {args.tar_mb} MB",
                f"{full:.0f} MB",
                "an empty tar",
                f"{empty:.0f} MB",
                f"{full - empty:.0f} MB more",
                f"{READ_AT_MOST_MB} MB more",
            ]
        )
    facts = ["read task: members of 100 kB and one of 60 MB, units of 64 MB and 512 images, from a disk"]
    write_report("memory", "Memory that does not grow", ["ray", "pyarrow"], facts, table, args.out)


def peak_of(what: str, folder: Path) -> float:
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", what, str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return float(json.loads(done.stdout.splitlines()[-1]))


def peak_mb() -> float:
    """Of this process alone; getrusage would add what its children had."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "Linux says so in every process's status"
    return int(found[1]) / 1024


def drive(folder: Path) -> None:
    spec = load_spec(
        InferSpec,
        None,
        ["unit.max_images=32", "commit.every_s=5", "model.min_size_px=64", "model.max_size_px=64"],
        **{"source.uri": str(folder), "model.uri": "demo", "lake.uri": f"{folder}-lake"},
    )
    summary = run_infer(spec, JsonWatcher())
    assert summary.status == "done", summary.status


def read(folder: Path) -> None:
    spec, storage = SourceSpec(uri=str(folder)), Storage(StorageSpec())
    (shard,) = list_shards(spec, storage)
    units = UnitReader(spec, storage, max_bytes=64_000_000, max_images=512)
    num_images = sum(len(unit["images"][0]) for unit in units.read_units(ShardTask(shard, frozenset())))
    assert num_images == json.loads((folder / "expected").read_text())


def write_pictures(folder: Path, num: int) -> Path:
    folder.mkdir()
    for number in range(num):
        blocks = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks.repeat(16, 0).repeat(16, 1)).save(folder / f"{number:06d}.jpg")
    return folder


def write_tar(folder: Path, size_mb: int) -> Path:
    """Members of random bytes: reading does not look into them."""
    folder.mkdir()
    sizes = [60_000_000, *[100_000] * (10 * (size_mb - 60))] if size_mb else []
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for number, size in enumerate(sizes):
            member = tarfile.TarInfo(f"{number:06d}.jpg")
            member.size = size
            tar.addfile(member, io.BytesIO(rng.bytes(size)))
    (folder / "expected").write_text(str(len(sizes)))
    return folder


if __name__ == "__main__":
    main()
