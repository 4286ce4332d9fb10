"""How much of a core the read and write stages take: what cluster/profiles.py books for them.

Run:  python benchmarks/stage_cpus.py [--units 8] [--out benchmarks/results]

CPU seconds of the process against wall seconds, for units as large as a unit gets: 64 MB of encoded images,
512 of them, read from tars and from files, and the rows of 512 images with masks as long as those of
photographs. A disk that has the pages in memory never lets a stage wait. Over HTTP, to a server in a process
of its own, it waits, if not for as long as for S3. CPU a unit is what counts: an actor has one meanwhile.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import pyarrow as pa

from benchmarks.commits import IMAGES_PER_FRAGMENT, MODEL, Place, make_rows, s3_place
from benchmarks.common.report import arguments, write_report
from cluster.profiles import READ_CPUS, WRITE_CPUS
from jobs.infer.read import UnitReader
from jobs.lake.fragments import write_fragment
from jobs.lake.plan import ShardTask
from jobs.lake.sources import list_shards
from jobs.lake.storage import Storage
from schemas.specs import SourceSpec, StorageSpec

IMAGES = 512
IMAGE_BYTES = 64_000_000 // IMAGES
# What an actor is to take for a unit; its unit has to be read and written meanwhile.
UNIT_S = 10.0


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--units", type=int, default=8)
    args = parser.parse_args()
    table = [["stage", "where", "CPU a unit", "wall a unit", "CPU / wall", f"CPU / {UNIT_S:g} s", "booked"]]
    with tempfile.TemporaryDirectory() as folder, s3_place() as s3:
        for place in (Place("disk", f"file://{folder}/lake", Storage(StorageSpec())), s3):
            for form in ("tar", "files"):
                source = write_source(place, form, args.units)
                cpu, wall = measure(partial(read, place, source), args.units)
                table.append(row(f"read, {form}", place, cpu, wall, READ_CPUS))
            cpu, wall = measure(partial(write, place, args.units), args.units)
            table.append(row("write", place, cpu, wall, WRITE_CPUS))
    facts = [
        f"a unit: {IMAGES} images of {IMAGE_BYTES:,} bytes, or the rows of so many",
        f"an actor is to have a unit for {UNIT_S:g} s: CPU / {UNIT_S:g} s is what feeds one",
        "other work on the machine lengthens the wall seconds",
    ]
    write_report(
        "stage_cpus", "CPUs of the read and write stages", ["pyarrow", "s3fs"], facts, table, args.out
    )


def row(stage: str, place: Place, cpu: float, wall: float, booked: float) -> list[str]:
    shares = [f"{cpu / wall:.2f}", f"{cpu / UNIT_S:.3f}", f"{booked:g}"]
    return [stage, place.name, f"{cpu:.2f} s", f"{wall:.2f} s", *shares]


def measure(work: Callable[[], object], units: int) -> tuple[float, float]:
    """CPU and wall seconds a unit, all threads of this process together."""
    work()
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return (time.process_time() - cpu) / units, (time.perf_counter() - wall) / units


def write_source(place: Place, form: str, units: int) -> str:
    """As many images as fill the units; gives the source's URI."""
    random = np.random.default_rng(0)
    uri = f"{place.lake}-{form}"
    for unit in range(units):
        images = {f"{unit:03d}-{number:04d}.jpg": random.bytes(IMAGE_BYTES) for number in range(IMAGES)}
        for name, data in (images if form == "files" else {f"{unit:03d}.tar": tar(images.items())}).items():
            place.storage.write_bytes(f"{uri}/{name}", data)
    return uri


def tar(images: Iterable[tuple[str, bytes]]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, data in images:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def read(place: Place, source: str) -> None:
    spec = SourceSpec(uri=source)
    reader = UnitReader(spec, place.storage, IMAGES * IMAGE_BYTES, IMAGES)
    for shard in list_shards(spec, place.storage):
        for _ in reader.read_units(ShardTask(shard)):
            pass


def write(place: Place, units: int) -> None:
    for unit in range(units):
        write_fragment(_ROWS, [f"unit {unit} {time.time()}"], place.lake, MODEL, place.storage)


_ROWS = pa.concat_tables([make_rows(number) for number in range(IMAGES // IMAGES_PER_FRAGMENT)])


if __name__ == "__main__":
    main()
