"""JPEG bytes to pixels: decoder processes, which may crash alone, against threads of the same process.

Run:  python benchmarks/decoders.py [--out benchmarks/results]

The same 640×480 JPEGs go through both, in batches as the label stage sends them; rounds alternate between the
sides, so that whatever else the machine does slows both alike. Starting the processes is not counted but
shown. The overhead of an image is what one process takes longer than the bare decoder, one image after
another.
"""

from __future__ import annotations

import io
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from PIL import Image

from benchmarks.common.report import arguments, seconds, side_by_side, write_report
from jobs.infer.decoders import DecoderPool
from maskrcnn_core.images import decode_image

WIDTH, HEIGHT = 640, 480
NUM_IMAGES = 64
WORKERS = (1, 2)
WANTED = 0.9  # of the threads' images a second


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=21, help="timed rounds of each side; the median counts")
    args = parser.parse_args()

    files = [make_jpeg(seed) for seed in range(NUM_IMAGES)]
    table = [["workers", "threads", "processes", "ratio", "must reach"]]
    ratios = []
    facts = [
        f"{NUM_IMAGES} JPEGs of {WIDTH}×{HEIGHT}, {sum(map(len, files)) / NUM_IMAGES / 1e3:.0f} kB each",
        f"median of {args.rounds} rounds that go around the sides",
    ]
    for workers in WORKERS:
        pool = DecoderPool(workers)
        if workers == 1:
            start_s = seconds(partial(decode_on_processes, pool, files[:1]))
            facts += [f"first image of a new process: {start_s:.2f} s", overhead(pool, files, args.rounds)]
        with ThreadPoolExecutor(workers) as threads:
            threads_s, processes_s = side_by_side(
                partial(decode_on_threads, threads, files),
                partial(decode_on_processes, pool, files),
                rounds=args.rounds,
            )
        pool.close()
        ratios.append(threads_s / processes_s)
        table.append(
            [
                str(workers),
                f"{NUM_IMAGES / threads_s:.0f} images/s",
                f"{NUM_IMAGES / processes_s:.0f} images/s",
                f"{ratios[-1]:.2f}×",
                f"{WANTED}×",
            ]
        )
    write_report(
        "decoders", "JPEGs decoded on processes and on threads", ["pillow", "numpy"], facts, table, args.out
    )
    if min(ratios) < WANTED:
        sys.exit("a ratio is below what it must reach")


def overhead(pool: DecoderPool, files: list[bytes], rounds: int) -> str:
    """What a process adds to one image that nobody has anything else to do meanwhile."""
    bare, away = [], []
    for _ in range(rounds):
        for data in files[:8]:
            bare.append(seconds(partial(decode_image, data)))
            away.append(seconds(partial(decode_on_processes, pool, [data])))
    bare_s, away_s = statistics.median(bare), statistics.median(away)
    return (
        f"one image at a time: {1e3 * bare_s:.2f} ms bare, {1e3 * away_s:.2f} ms on a process "
        f"({1e3 * (away_s - bare_s):+.2f} ms)"
    )


def decode_on_threads(threads: ThreadPoolExecutor, files: list[bytes]) -> None:
    for future in [threads.submit(decode_image, data) for data in files]:
        future.result()


def decode_on_processes(pool: DecoderPool, files: list[bytes]) -> None:
    for future in [pool.submit("", data) for data in files]:
        if not isinstance(future.result()[0], np.ndarray):
            sys.exit("a picture did not decode: nothing to compare")


def make_jpeg(seed: int) -> bytes:
    """Soft blobs of colour with grain: about the bytes of a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (HEIGHT // 32, WIDTH // 32, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.int16)
    pixels = (smooth + rng.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return file.getvalue()


if __name__ == "__main__":
    main()
