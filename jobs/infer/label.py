"""The label stage: an actor that holds a Mask R-CNN replica and turns a unit's bytes into label rows.

Pixels live here and nowhere else: a window of images is decoded by child processes while the network has the
last. An image that ends a decoder costs that decoder; one that ends this very process is found with the help
of attempts.py.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from jobs.infer.attempts import DEATHS_TO_BLAME, AttemptLog, Attempts
from jobs.infer.decoders import DECODE_TIMEOUT_S, Decoded, DecoderPool, Limits, Pixels
from jobs.infer.metrics import ActorMetrics
from jobs.infer.rows import Failure, Lineage, label_rows
from jobs.infer.units import LABELLED_SCHEMA, UnitReport, images_of, table_to_bytes
from jobs.lake import failpoints
from jobs.lake.sources import SourceImage
from maskrcnn_core.checkpoint import parse_checkpoint
from maskrcnn_core.host_memory import keep_freed_memory
from maskrcnn_core.predictor import Detections, Precision, Predictor
from schemas.labels import ErrorKind

# Seen in Ray's account of a worker that ended, beside the line on stderr.
DEAD_DEVICE_EXIT_STATUS = 86


@dataclass(frozen=True)
class Replica:
    """How an actor builds its model."""

    model_overrides: Mapping[str, Any]
    device: str
    precision: Precision
    batch_size: int  # images of a forward pass; see forward_images
    threads: int  # for the network on a CPU; and as many decoder processes
    decode_timeout_s: float = DECODE_TIMEOUT_S

    @property
    def forward_images(self) -> int:
        """One on a CPU, so that an image's labels are the same to the last bit whatever it is read with. A
        GPU wants batch_size; sums may then differ in their last bits. docs/decisions/0003 has the figures.
        """
        return 1 if self.device == "cpu" else self.batch_size

    @property
    def window(self) -> int:
        """Images decoded ahead: what a forward pass takes, and what keeps the decoders busy."""
        return max(self.forward_images, 2 * self.threads)


class Labeler:
    """bytes -> rows, for one unit at a time. Built once an actor; called once a unit.

    Its decoder processes end with close(), with the Labeler, or with this process.
    """

    def __init__(
        self,
        checkpoint: bytes,
        replica: Replica,
        lineage: Lineage,
        node: str = "",
        attempts: Attempts | None = None,
    ) -> None:
        import torch

        if replica.device == "cpu":
            torch.set_num_threads(replica.threads)
            keep_freed_memory()
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
        self._attempts = attempts or AttemptLog()
        self._metrics = ActorMetrics()
        self._window = replica.window
        self._decoders = DecoderPool(replica.threads, Limits(timeout_s=replica.decode_timeout_s))

    def close(self) -> None:
        """End the decoder processes; the Labeler is of no more use."""
        self._decoders.close()

    def __call__(self, row: pa.Table) -> pa.Table:
        """Label a table of one row (READ_SCHEMA); returns one of LABELLED_SCHEMA."""
        report = UnitReport.from_json(row["report"][0].as_py())
        images = list(images_of(row))
        started = time.perf_counter()
        outcomes = self._label(row["unit_id"][0].as_py(), images, report) if images else []
        rows = label_rows(images, outcomes, self._lineage, max(datetime.now(UTC), self._lineage.since))
        report.node = self._node
        report.label_s = time.perf_counter() - started
        self._metrics.labelled(report.label_s)
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

    def _label(
        self, unit_id: str, images: list[SourceImage], report: UnitReport
    ) -> list[Detections | Failure]:
        """One outcome an image, in order."""
        deaths = self._attempts.begin(unit_id).deaths
        blamed = {image_id for image_id, count in deaths.items() if count >= DEATHS_TO_BLAME}
        outcomes: list[Detections | Failure] = []
        for window in self._decode_ahead(images, blamed):
            decoded = [future.result() for _, future in window]
            report.decode_s += sum(seconds for _, seconds in decoded)
            image_ids = [image.image_id for image, _ in window]
            outcomes += self._detect(unit_id, image_ids, [pixels for pixels, _ in decoded], deaths)
        self._attempts.finish(unit_id)
        return outcomes

    def _decode_ahead(
        self, images: Sequence[SourceImage], blamed: set[str]
    ) -> Iterator[list[tuple[SourceImage, Future[Decoded]]]]:
        """The images a window at a time, the next window already in work."""
        ahead: deque[list[tuple[SourceImage, Future[Decoded]]]] = deque()
        for start in range(0, len(images), self._window):
            window = images[start : start + self._window]
            ahead.append([(image, self._decode(image, blamed)) for image in window])
            if len(ahead) == 2:
                yield ahead.popleft()
        yield from ahead

    def _decode(self, image: SourceImage, blamed: set[str]) -> Future[Decoded]:
        if image.data is not None and image.image_id not in blamed:
            return self._decoders.submit(image.image_id, image.data)
        failure = (
            Failure(image.error_kind or ErrorKind.INTERNAL, image.error or "not read")
            if image.data is None
            else Failure(
                ErrorKind.CRASHED,
                f"{DEATHS_TO_BLAME} processes died with this image in the network, the last one with nothing "
                "else in it; their logs may say of what",
            )
        )
        known: Future[Decoded] = Future()
        known.set_result((failure, 0.0))
        return known

    def _detect(
        self,
        unit_id: str,
        image_ids: Sequence[str],
        decoded: Sequence[Pixels | Failure],
        deaths: Mapping[str, int],
    ) -> list[Detections | Failure]:
        """Run the network on what could be decoded: together, but each image alone that a process died on."""
        outcomes: list[Detections | Failure | None] = [d if isinstance(d, Failure) else None for d in decoded]
        pixels = {index: d for index, d in enumerate(decoded) if not isinstance(d, Failure)}
        suspects = [[index] for index in pixels if image_ids[index] in deaths]
        others = [index for index in pixels if image_ids[index] not in deaths]
        for group in [others, *suspects]:
            if not group:
                continue
            self._attempts.note(unit_id, [image_ids[index] for index in group])
            for index in group:
                failpoints.reach("label_image", image_ids[index])
            with self._metrics.in_network():
                found = self._predict([pixels[index] for index in group])
            for index, outcome in zip(group, found, strict=True):
                outcomes[index] = outcome
        return [outcome for outcome in outcomes if outcome is not None]

    def _predict(self, images: list[Pixels]) -> list[Detections | Failure]:
        """An image that the network cannot take fails alone."""
        try:
            return list(self._predictor.predict(images))
        except (RuntimeError, ArithmeticError, ValueError) as error:  # out of memory, NaN: find the image
            _end_if_device_is_dead(error)
            if len(images) > 1:
                return [outcome for pixels in images for outcome in self._predict([pixels])]
            height, width = images[0].shape[:2]
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return [
                Failure(ErrorKind.INTERNAL, f"the network failed on this {width}x{height} image: {reason}")
            ]


def _end_if_device_is_dead(error: Exception) -> None:
    """End this process where a CUDA error left its context unusable: every image after it would fail too.

    Ray starts the actor anew, and the next attempt at the unit finds the image.
    """
    import torch

    is_of_cuda = isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
    if not is_of_cuda or isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        return
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    print(
        f"masklake: the GPU is of no more use to this process ({reason}); it ends, and a new one tries the "
        "unit again.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(DEAD_DEVICE_EXIT_STATUS)
