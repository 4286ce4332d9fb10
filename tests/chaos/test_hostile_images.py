"""Thousands of damaged and hostile files through one job and through a decoder's memory."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.infer.decoders import DECODE_TIMEOUT_S, DecoderPool, Pixels
from jobs.infer.rows import Failure
from jobs.lake.storage import Storage
from maskrcnn_core.images import MAX_DECODE_BYTES
from tests.chaos.harness import Drivers, Job
from tests.chaos.judge import read_table
from tests.chaos.mutations import bombs, corpus, encode, strangers
from tests.infer.test_decoders import children

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

NUM_MUTANTS = 3300
# What decoding one file may take beside an idle decoder; the bound.
PEAK_BYTES = 256 << 20

DECODE_KINDS = {"empty", "truncated", "corrupt", "unsupported", "too_large"}


def whole_corpus() -> Iterator[tuple[str, bytes]]:
    yield from corpus(NUM_MUTANTS)
    for name, data in strangers().items():
        yield f"stranger-{name}", data


def test_every_file_of_the_corpus_is_one_row(drivers: Drivers, disk: Storage, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    names = []
    with tarfile.open(tmp_path / "images" / "hostile.tar", "w") as tar:
        for name, data in [*whole_corpus(), *((f"bomb-{name}", data) for name, data in bombs())]:
            member = tarfile.TarInfo(f"{name}.jpg")  # whatever it is
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            names.append(f"hostile.tar/{name}")
    job = Job(
        str(tmp_path / "images"),
        str(tmp_path / "lake"),
        max_images=100,
        every_images=1000,
        settings=("failures.budget=100%", "model.score_threshold=0.5"),
    )

    ended = drivers.start(job).wait(timeout_s=1500)

    assert ended.status == 0, ended.stderr
    rows = read_table(job.lake, disk).rows
    assert sorted(row["image_id"] for row in rows) == sorted(names)
    summary = ended.summary
    assert summary["ok"] + summary["failed"] == summary["images"] == len(names)
    assert summary["ok"] > len(names) / 5
    assert set(summary["failed_by_kind"]) == DECODE_KINDS
    assert all(row["error"] and row["error"].isprintable() for row in rows if row["status"] == "failed")
    print(
        f"{len(names)} files in {summary['seconds']:.0f} s: {summary['ok']} ok, {summary['failed_by_kind']}"
    )


class Meter:
    """Memory of the one decoder of a pool, as the kernel counts it."""

    def __init__(self, pool: DecoderPool, others: set[int]) -> None:
        self._pool = pool
        self._decode(encode(Image.new("RGB", (8, 8)), "PNG"))
        (self._pid,) = children() - others
        self.idle_bytes = self._status("VmRSS")

    def peak_bytes(self, data: bytes) -> int:
        """The most that the decoder held at a time for one file, beside what an idle one holds."""
        Path(f"/proc/{self._pid}/clear_refs").write_text("5")  # sets the high-water mark back
        self.outcome = self._decode(data)
        return self._status("VmHWM") - self.idle_bytes

    def _decode(self, data: bytes) -> Pixels | Failure:
        return self._pool.submit("", data).result(timeout=2 * DECODE_TIMEOUT_S)[0]

    def _status(self, name: str) -> int:
        for line in Path(f"/proc/{self._pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
        raise AssertionError(f"no {name} in the status of process {self._pid}")


@contextmanager
def fresh_meter() -> Iterator[Meter]:
    others = children()
    pool = DecoderPool(1)
    yield Meter(pool, others)
    pool.close()


def peaks(files: Iterable[tuple[str, bytes]]) -> list[tuple[int, str]]:
    """Most first. One decoder for all; a file that is near the bound is measured again in one of its own, for
    what a decoder keeps of the files before.
    """
    found = []
    with fresh_meter() as meter:
        for name, data in files:
            peak = meter.peak_bytes(data)
            if peak > PEAK_BYTES / 2:
                with fresh_meter() as own:
                    peak = own.peak_bytes(data)
            found.append((peak, name))
    return sorted(found, reverse=True)


def test_no_file_of_the_corpus_takes_more_than_256_mb_to_decode() -> None:
    found = peaks(whole_corpus())
    print(f"{len(found)} files, the most: {found[0][0] / 2**20:.0f} MiB for {found[0][1]}")
    assert [(peak >> 20, name) for peak, name in found if peak > PEAK_BYTES] == []


def test_no_bomb_takes_more_than_256_mb_to_decode() -> None:
    found = peaks(bombs())
    for peak, name in found:
        print(f"{peak / 2**20:.0f} MiB for {name}")
    assert [(peak >> 20, name) for peak, name in found if peak > PEAK_BYTES] == []
    assert found[0][0] > PEAK_BYTES / 2, "nothing was measured"


def test_the_greediest_formats_stay_below_the_limit_of_a_decoder() -> None:
    side = 8000
    flat = Image.new("RGB", (side, side), (90, 120, 150))
    files = {
        "webp": encode(flat, "WEBP", method=0),
        "webp-lossless": encode(flat, "WEBP", lossless=True, method=0),
        "jpeg-progressive-444": encode(flat, "JPEG", progressive=True, subsampling=0),
        "jpeg-progressive-cmyk": encode(flat.convert("CMYK"), "JPEG", progressive=True),
        "tiff-one-strip": encode(flat, "TIFF", compression="tiff_lzw", tiffinfo={278: side}),
    }
    for name, data in files.items():
        with fresh_meter() as meter:
            peak = meter.peak_bytes(data)
            print(f"{peak / 2**20:.0f} MiB, {peak / side**2:.1f} bytes a pixel, for {name} of 64 megapixels")
            assert PEAK_BYTES < peak < MAX_DECODE_BYTES
            assert isinstance(meter.outcome, np.ndarray), meter.outcome
