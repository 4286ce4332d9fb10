"""The label stage: an actor that holds a Mask R-CNN replica and turns a unit's bytes into label rows.

Pixels live here and nowhere else: a window of images is decoded on threads while the network has the last.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.infer.rows import Failure, Lineage, label_rows
from jobs.infer.units import LABELLED_SCHEMA, UnitReport, images_of, table_to_bytes
from jobs.lake.sources import SourceImage
from maskrcnn_core.checkpoint import parse_checkpoint
from maskrcnn_core.images import DecodeError, decode_image
from maskrcnn_core.predictor import Detections, Precision, Predictor
from schemas.labels import ErrorKind

Pixels = NDArray[np.uint8]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Replica:
    """How an actor builds its model."""

    model_overrides: Mapping[str, Any]
    device: str
    precision: Precision
    batch_size: int  # images of a forward pass; see forward_images
    threads: int  # for the network on a CPU, and for decoding

    @property
    def forward_images(self) -> int:
        """One on a CPU, so that an image's labels are the same to the last bit whatever it is read with. A
        GPU wants batch_size; sums may then differ in their last bits. docs/decisions/0003 has the figures.
        """
        return 1 if self.device == "cpu" else self.batch_size

    @property
    def window(self) -> int:
        """Images decoded ahead: what a forward pass takes, and what keeps the decoding threads busy."""
        return max(self.forward_images, 2 * self.threads)


class Labeler:
    """bytes -> rows, for one unit at a time. Built once an actor; called once a unit."""

    def __init__(self, checkpoint: bytes, replica: Replica, lineage: Lineage, node: str = "") -> None:
        import torch

        if replica.device == "cpu":
            torch.set_num_threads(replica.threads)
        model = parse_checkpoint(checkpoint, "the checkpoint").build(**replica.model_overrides)
        self._predictor = Predictor(
            model,
            device=replica.device,
            precision=replica.precision,
            batch_size=replica.forward_images,
            padding="tight" if replica.device == "cpu" else "common",  # of few shapes, so batches fill up
        )
        self._lineage = lineage
        self._node = node
        self._window = replica.window
        self._decoders = ThreadPoolExecutor(replica.threads, thread_name_prefix="decode")

    def __call__(self, row: pa.Table) -> pa.Table:
        """Label a table of one row (READ_SCHEMA); returns one of LABELLED_SCHEMA."""
        report = UnitReport.from_json(row["report"][0].as_py())
        images = list(images_of(row))
        started = time.perf_counter()
        outcomes: list[Detections | Failure] = []
        for window in _prefetch(images, self._decode, self._decoders, self._window):
            report.decode_s += sum(seconds for _, seconds in window)
            outcomes += self._detect([decoded for decoded, _ in window])
        rows = label_rows(images, outcomes, self._lineage, datetime.now(UTC))
        report.node = self._node
        report.label_s = time.perf_counter() - started
        report.num_detections = sum(len(o.rles) for o in outcomes if isinstance(o, Detections))
        report.count_failures(rows["error_kind"].to_pylist())
        return pa.table(
            {
                "unit_id": row["unit_id"],
                "report": [report.to_json()],
                "rows": pa.array([table_to_bytes(rows)], pa.large_binary()),
            },
            schema=LABELLED_SCHEMA,
        )

    def _decode(self, image: SourceImage) -> tuple[Pixels | Failure, float]:
        """Pixels or why there are none, and the seconds it took."""
        started = time.perf_counter()
        if image.data is None:
            return Failure(image.error_kind or ErrorKind.INTERNAL, image.error or "not read"), 0.0
        try:
            decoded: Pixels | Failure = decode_image(image.data)
        except DecodeError as error:
            decoded = Failure(ErrorKind(error.kind), str(error))
        return decoded, time.perf_counter() - started

    def _detect(self, decoded: list[Pixels | Failure]) -> list[Detections | Failure]:
        """Run the network on what could be decoded; an image it cannot take fails alone."""
        good = [d for d in decoded if not isinstance(d, Failure)]
        try:
            found: list[Detections | Failure] = list(self._predictor.predict(good))
        except (RuntimeError, ArithmeticError, ValueError):  # out of memory, NaN: find the image it is
            found = [self._detect_alone(pixels) for pixels in good]
        results = iter(found)
        return [d if isinstance(d, Failure) else next(results) for d in decoded]

    def _detect_alone(self, pixels: Pixels) -> Detections | Failure:
        try:
            return self._predictor.predict([pixels])[0]
        except (RuntimeError, ArithmeticError, ValueError) as error:
            height, width = pixels.shape[:2]
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return Failure(ErrorKind.INTERNAL, f"the network failed on this {width}x{height} image: {reason}")


def _prefetch(
    items: Iterable[T], work: Callable[[T], R], pool: ThreadPoolExecutor, window: int
) -> Iterator[list[R]]:
    """Results in order, a window at a time, the next window already in work."""
    iterator = iter(items)
    ahead: deque[list[Future[R]]] = deque()

    def submit() -> None:
        if batch := [pool.submit(work, item) for item in islice(iterator, window)]:
            ahead.append(batch)

    submit()
    while ahead:
        submit()
        yield [future.result() for future in ahead.popleft()]
