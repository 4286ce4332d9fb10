"""What differs between the labels of two models on the same images.

Enters: a version of the label table, a source, two model_ids. Leaves: a LabelDiff: images and objects
compared, lost, added, relabelled, moved; scores and sizes; the images that differ most. Only images that both
models labelled `ok` from the same bytes are compared; the others are counted.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.lake.labels_table import LabelsTable
from jobs.lake.model_ids import read_model_id
from jobs.lake.storage import Storage
from jobs.relabel.paired_labels import PairedLabels
from jobs.relabel.tally import COUNTS, IOU_BINS, ImageChange, Tally, tally_rows

MOVED_BELOW = 0.75  # the IoU under which a kept object counts as moved; where a bin of the histogram begins
_QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class ImageCounts:
    """Images of the source, each in one of these, but for `unchanged`, which is a part of `compared`.

    compared: both models labelled the same bytes; unchanged: nothing was lost, added or relabelled;
    content_changed: each model labelled other bytes; only_old, only_new: the other model has no row.
    """

    compared: int = 0
    unchanged: int = 0
    content_changed: int = 0
    only_old: int = 0
    only_new: int = 0
    failed_old: int = 0
    failed_new: int = 0
    failed_both: int = 0


@dataclass(frozen=True)
class ScoreShift:
    """New score less old one, over kept objects. Quantiles are exact to 0.01."""

    mean: float
    p05: float
    p50: float
    p95: float


@dataclass(frozen=True)
class CategoryDiff:
    """Objects of one category, or of all.

    old = kept + lost + relabelled; new = kept + added + arrived.

    relabelled_to: category_id -> how many of `relabelled`; {} for all categories together.
    moved: kept, with an IoU below MOVED_BELOW; unreadable: kept, but their masks could not be compared.
    mean_iou, score_shift: over kept objects; None where there is none.
    iou_histogram: kept objects by IoU, in bins of 0.05 from 0 to 1.
    old_sizes, new_sizes: small, medium and large objects, as COCO has them.
    """

    old: int
    new: int
    kept: int
    lost: int
    added: int
    relabelled: int
    arrived: int
    relabelled_to: Mapping[int, int]
    moved: int
    unreadable: int
    mean_iou: float | None
    iou_histogram: tuple[int, ...]
    score_shift: ScoreShift | None
    old_sizes: tuple[int, ...]
    new_sizes: tuple[int, ...]


@dataclass(frozen=True)
class LabelDiff:
    """Two models on one source, at one version of the label table.

    min_score: detections below it are no objects, under either model; match_iou: of the boxes of a pair.
    masks: whether the IoUs are those of the masks, and not of the boxes.
    names: category_id -> name, as far as the lake knows them. worst: those that differ most, first.
    """

    source: str
    old_model_id: str
    new_model_id: str
    version: int
    min_score: float
    match_iou: float
    masks: bool
    images: ImageCounts
    total: CategoryDiff
    categories: Mapping[int, CategoryDiff]
    names: Mapping[int, str]
    worst: tuple[ImageChange, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For json.dumps."""
        return asdict(self)

    def name(self, category_id: int) -> str:
        return self.names.get(category_id, str(category_id))


def diff_models(
    table: LabelsTable,
    storage: Storage,
    source: str,
    old_model_id: str,
    new_model_id: str,
    *,
    min_score: float = 0.5,
    match_iou: float = 0.5,
    masks: bool = True,
    num_worst: int = 20,
    num_threads: int | None = None,
) -> LabelDiff:
    """Compare the labels of two models, range by range of image_ids on threads.

    Args:
        table: at the version to read; files of other models and sources are not opened.
        source: as the rows have it.
        masks: False reads no masks, which are most of the bytes; IoUs are then those of boxes.
        num_threads: None: the machine's cores.

    Raises:
        CorruptObjectError: a label file is damaged. StorageError: the store refused.
    """
    started = time.monotonic()
    total = Tally(num_worst)
    with PairedLabels(table, source, old_model_id, new_model_id, masks=masks) as labels:

        def tally(number: int) -> Tally:
            return tally_rows(labels.read(number), min_score, match_iou, num_worst)

        for part in _in_order(tally, labels.num_ranges, num_threads or os.cpu_count() or 1):
            total.add(part)
    all_counts = np.zeros((), COUNTS)
    for name in COUNTS.names or ():
        all_counts[name] = total.counts[name].sum(axis=0)
    categories = {}
    for category_id, counts in zip(total.categories.tolist(), total.counts, strict=True):
        renamed = {new: number for (old, new), number in sorted(total.renamed.items()) if old == category_id}
        categories[category_id] = _category_diff(counts, renamed)
    return LabelDiff(
        source=source,
        old_model_id=old_model_id,
        new_model_id=new_model_id,
        version=table.version,
        min_score=min_score,
        match_iou=match_iou,
        masks=masks,
        images=ImageCounts(**{field.name: total.images[field.name] for field in fields(ImageCounts)}),
        total=_category_diff(all_counts, {}),
        categories=categories,
        names=_names(table, storage, old_model_id, new_model_id),
        worst=tuple(total.worst),
        seconds=time.monotonic() - started,
    )


def _in_order(tally: Callable[[int], Tally], num_ranges: int, num_threads: int) -> Iterator[Tally]:
    """The tally of each range in turn, some made ahead."""
    with ThreadPoolExecutor(num_threads, thread_name_prefix="diff-labels") as pool:
        running: deque[Future[Tally]] = deque()
        try:
            for number in range(num_ranges):
                running.append(pool.submit(tally, number))
                if len(running) > num_threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def _category_diff(counts: Any, relabelled_to: Mapping[int, int]) -> CategoryDiff:
    """From one record of COUNTS."""
    kept, readable = int(counts["kept"]), int(counts["ious"].sum())
    first_bin = round(MOVED_BELOW * IOU_BINS)
    numbers = {
        name: int(counts[name])
        for name in ("old", "new", "lost", "added", "relabelled", "arrived", "unreadable")
    }
    return CategoryDiff(
        **numbers,
        kept=kept,
        relabelled_to=dict(relabelled_to),
        moved=int(counts["ious"][:first_bin].sum()),
        mean_iou=float(counts["iou_sum"]) / readable if readable else None,
        iou_histogram=tuple(counts["ious"].tolist()),
        score_shift=_score_shift(counts["shifts"], float(counts["shift_sum"]) / kept) if kept else None,
        old_sizes=tuple(counts["old_sizes"].tolist()),
        new_sizes=tuple(counts["new_sizes"].tolist()),
    )


def _score_shift(histogram: NDArray[np.int64], mean: float) -> ScoreShift:
    ends = np.cumsum(histogram)
    bins = np.searchsorted(ends, [quantile * ends[-1] for quantile in _QUANTILES])
    return ScoreShift(mean, *((bins - 100) / 100).tolist())


def _names(table: LabelsTable, storage: Storage, *model_ids: str) -> dict[int, str]:
    """Of both models; where they contradict each other, the last one's."""
    lake_uri = table.uri.removesuffix("/labels")
    records = [read_model_id(storage, lake_uri, model_id) for model_id in model_ids]
    return {category_id: name for record in records if record for category_id, name in record.categories}
