"""Counting what differs between the labels of two models, one range of images after another.

Enters: the rows of both models. Leaves: a Tally: counts by category, counts of images, the images that differ
most. Tallies add up, in any grouping.

An object is a detection with a score of min_score or more. Objects of one image are paired (matching.py):
a pair of one category is `kept`, one of two categories `relabelled`; what is in no pair is `lost` or `added`.

Letters: I images, N old and M new objects of all of them, P pairs, C categories.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from jobs.relabel.mask_overlap import mask_ious
from jobs.relabel.matching import Matches, Objects, match_objects
from jobs.relabel.paired_labels import RowsOfBoth
from schemas.labels import Status

pc: Any = pyarrow.compute  # whose stubs know no arrays of unknown type
IOU_BINS = 20  # of 0.05, from 0 to 1
SHIFT_BINS = 201  # of 0.01, about -1, -0.99, ... 1
SIZE_LIMITS_PX = (32**2, 96**2)  # COCO's: areas of small, medium and large objects
# By category. `relabelled` counts by the old category, `arrived` the same pairs by the new one.
COUNTS = np.dtype(
    [
        *((name, np.int64) for name in ("old", "new", "kept", "lost", "added", "relabelled", "arrived")),
        ("unreadable", np.int64),  # kept pairs whose masks could not be compared
        ("ious", np.int64, (IOU_BINS,)),
        ("iou_sum", np.float64),
        ("shifts", np.int64, (SHIFT_BINS,)),
        ("shift_sum", np.float64),
        ("old_sizes", np.int64, (3,)),
        ("new_sizes", np.int64, (3,)),
    ]
)
_CHANGE = np.dtype(
    [
        ("difference", np.float64),
        *((name, np.int64) for name in ("old", "new", "lost", "added", "relabelled")),
        ("mean_iou", np.float64),
    ]
)
_IMAGES_AT_ONCE = 8192


@dataclass(frozen=True)
class ImageChange:
    """How one image differs. mean_iou: of the kept pairs; None without one.

    difference: lost + added + relabelled objects, and of each kept pair what its IoU lacks to 1.
    """

    image_id: str
    difference: float
    old: int
    new: int
    lost: int
    added: int
    relabelled: int
    mean_iou: float | None


@dataclass
class Tally:
    """Sums over images.

    images: by what became of them: compared (of which `unchanged` lost, added and relabelled nothing),
        content_changed, only_old, only_new, failed_old, failed_new, failed_both.
    categories: (C,) ascending; counts: (C,) COUNTS.
    renamed: (old category, new category) -> pairs.
    worst: those with the largest difference first.
    """

    num_worst: int
    images: Counter[str] = field(default_factory=Counter)
    categories: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    counts: NDArray[np.void] = field(default_factory=lambda: np.zeros(0, COUNTS))
    renamed: Counter[tuple[int, int]] = field(default_factory=Counter)
    worst: list[ImageChange] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.images.update(other.images)
        self.renamed.update(other.renamed)
        self.worst = sorted([*self.worst, *other.worst], key=_by_difference)[: self.num_worst]
        categories = np.union1d(self.categories, other.categories)
        counts = np.zeros(len(categories), COUNTS)
        for part in (self, other):
            places = np.searchsorted(categories, part.categories)
            for name in COUNTS.names or ():
                counts[name][places] += part.counts[name]
        self.categories, self.counts = categories, counts


def tally_rows(rows: RowsOfBoth, min_score: float, min_iou: float, num_worst: int) -> Tally:
    """Compare the images that both models labelled `ok`, from the same bytes; count the others.

    Args:
        rows: with rle: pairs have the IoU of their masks; without: of their boxes.
    """
    total = Tally(num_worst)
    places = pc.index_in(rows.new["image_id"], value_set=rows.old["image_id"].combine_chunks())
    old_places = pc.fill_null(places, -1).to_numpy()
    new_places = np.flatnonzero(old_places >= 0)
    old_places = old_places[new_places]
    ok_old = _is_ok(rows.old)[old_places]
    ok_new = _is_ok(rows.new)[new_places]
    is_same = _have_same_content(rows, old_places, new_places)
    is_compared = ok_old & ok_new & is_same
    total.images = Counter(
        compared=int(is_compared.sum()),
        content_changed=int((ok_old & ok_new & ~is_same).sum()),
        only_old=len(rows.old) - len(old_places),
        only_new=len(rows.new) - len(new_places),
        failed_old=int((~ok_old & ok_new).sum()),
        failed_new=int((ok_old & ~ok_new).sum()),
        failed_both=int((~ok_old & ~ok_new).sum()),
    )
    old, new = _take(rows.old, old_places[is_compared]), _take(rows.new, new_places[is_compared])
    for start in range(0, len(old), _IMAGES_AT_ONCE):
        total.add(
            _tally_images(
                old[start : start + _IMAGES_AT_ONCE],
                new[start : start + _IMAGES_AT_ONCE],
                min_score,
                min_iou,
                num_worst,
            )
        )
    return total


def _by_difference(change: ImageChange) -> tuple[float, str]:
    return -change.difference, change.image_id


def _is_ok(rows: pa.Table) -> NDArray[np.bool_]:
    is_ok: NDArray[np.bool_] = pc.equal(rows["status"], pa.scalar(str(Status.OK))).to_numpy()
    return is_ok


def _have_same_content(
    rows: RowsOfBoth, old_places: NDArray[np.int64], new_places: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether both labelled the same bytes; where one does not say, it is believed."""
    ours = rows.old["content_hash"].take(old_places)
    theirs = rows.new["content_hash"].take(new_places)
    is_same: NDArray[np.bool_] = pc.fill_null(pc.equal(ours, theirs), True).to_numpy()
    return is_same


def _take(rows: pa.Table, places: NDArray[np.int64]) -> pa.Table:
    """Rows in ascending places; without a copy where those are all."""
    return rows if len(places) == len(rows) else rows.take(places)


@dataclass(frozen=True)
class _Found:
    """The objects of I images. rles: of all detections, of which the objects are at `places`; or None."""

    objects: Objects
    scores: NDArray[np.float32]
    areas: NDArray[np.int32]
    rles: pa.BinaryArray | None
    places: NDArray[np.int64]

    @classmethod
    def of(cls, rows: pa.Table, min_score: float) -> _Found:
        lists: Any = rows["detections"].combine_chunks()
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
        found = lists.flatten()
        scores = found.field("score").to_numpy()
        places = np.flatnonzero(scores >= np.float32(min_score))
        offsets = np.searchsorted(places, np.concatenate(([0], np.cumsum(lengths))))
        box = found.field("box")
        boxes = np.stack([box.field(side).to_numpy()[places] for side in ("x0", "y0", "x1", "y1")], axis=1)
        has_masks = found.type.get_field_index("rle") >= 0
        return cls(
            Objects(offsets, found.field("category_id").to_numpy()[places], boxes),
            scores[places],
            found.field("area").to_numpy()[places],
            found.field("rle") if has_masks else None,
            places,
        )


@dataclass(frozen=True)
class _Compared:
    """The objects of I images, paired. ious: (P,) NaN where masks do not read; lost, added: those left."""

    old: _Found
    new: _Found
    pairs: Matches
    ious: NDArray[np.float32]
    is_kept: NDArray[np.bool_]
    lost: NDArray[np.int64]
    added: NDArray[np.int64]

    @classmethod
    def of(cls, old: _Found, new: _Found, min_iou: float) -> _Compared:
        pairs = match_objects(old.objects, new.objects, min_iou)
        ious = pairs.ious
        if old.rles is not None and new.rles is not None:
            ious = mask_ious(old.rles, old.places[pairs.old], new.rles, new.places[pairs.new])
        is_kept = old.objects.categories[pairs.old] == new.objects.categories[pairs.new]
        is_lost, is_added = np.ones(len(old.scores), np.bool_), np.ones(len(new.scores), np.bool_)
        is_lost[pairs.old] = False
        is_added[pairs.new] = False
        return cls(old, new, pairs, ious, is_kept, np.flatnonzero(is_lost), np.flatnonzero(is_added))


def _tally_images(old: pa.Table, new: pa.Table, min_score: float, min_iou: float, num_worst: int) -> Tally:
    compared = _Compared.of(_Found.of(old, min_score), _Found.of(new, min_score), min_iou)
    changes = _changes(compared)
    is_unchanged = (changes["lost"] + changes["added"] + changes["relabelled"]) == 0
    worst = np.argsort(-changes["difference"], kind="stable")[:num_worst]
    worst = worst[changes["difference"][worst] > 0]
    return Tally(
        num_worst,
        Counter(unchanged=int(is_unchanged.sum())),
        *_count_by_category(compared),
        _count_renamed(compared),
        [_image_change(str(old["image_id"][place]), changes[place]) for place in worst.tolist()],
    )


def _count_by_category(compared: _Compared) -> tuple[NDArray[np.int32], NDArray[np.void]]:
    old, new, pairs, is_kept = compared.old, compared.new, compared.pairs, compared.is_kept
    categories = np.union1d(old.objects.categories, new.objects.categories)
    of_old = np.searchsorted(categories, old.objects.categories)
    of_new = np.searchsorted(categories, new.objects.categories)
    kept = of_old[pairs.old[is_kept]]
    shifts = (new.scores[pairs.new] - old.scores[pairs.old])[is_kept].astype(np.float64)
    ious = compared.ious[is_kept].astype(np.float64)
    is_readable = ~np.isnan(ious)
    readable, ious = kept[is_readable], ious[is_readable]
    counts = np.zeros(len(categories), COUNTS)
    for name, rows in (
        ("old", of_old),
        ("new", of_new),
        ("kept", kept),
        ("lost", of_old[compared.lost]),
        ("added", of_new[compared.added]),
        ("relabelled", of_old[pairs.old[~is_kept]]),
        ("arrived", of_new[pairs.new[~is_kept]]),
        ("unreadable", kept[~is_readable]),
    ):
        counts[name] = np.bincount(rows, minlength=len(categories))
    for name, rows, bins in (
        ("ious", readable, np.minimum((ious * IOU_BINS).astype(np.int64), IOU_BINS - 1)),
        ("shifts", kept, np.rint((shifts + 1) * 100).astype(np.int64)),
        ("old_sizes", of_old, np.digitize(old.areas, SIZE_LIMITS_PX)),
        ("new_sizes", of_new, np.digitize(new.areas, SIZE_LIMITS_PX)),
    ):
        num_bins = counts[name].shape[1]
        cells = np.bincount(rows * num_bins + bins, minlength=len(categories) * num_bins)
        counts[name] = cells.reshape(-1, num_bins)
    counts["iou_sum"] = np.bincount(readable, ious, len(categories))
    counts["shift_sum"] = np.bincount(kept, shifts, len(categories))
    return categories, counts


def _count_renamed(compared: _Compared) -> Counter[tuple[int, int]]:
    old = compared.old.objects.categories[compared.pairs.old[~compared.is_kept]]
    new = compared.new.objects.categories[compared.pairs.new[~compared.is_kept]]
    (names, numbers) = np.unique(np.stack([old, new], axis=1), axis=0, return_counts=True)
    return Counter({(a, b): number for (a, b), number in zip(names.tolist(), numbers.tolist(), strict=True)})


def _changes(compared: _Compared) -> NDArray[np.void]:
    """(I,) with the fields of ImageChange but image_id; mean_iou is NaN where it has none."""
    num_images = len(compared.old.objects.offsets) - 1
    of_old, of_new = compared.old.objects.images, compared.new.objects.images
    of_pair = of_old[compared.pairs.old]
    is_read = compared.is_kept & ~np.isnan(compared.ious)
    ious = compared.ious[is_read].astype(np.float64)
    num_read = np.bincount(of_pair[is_read], minlength=num_images)
    iou_sum = np.bincount(of_pair[is_read], ious, num_images)
    changes = np.zeros(num_images, _CHANGE)
    changes["old"] = np.diff(compared.old.objects.offsets)
    changes["new"] = np.diff(compared.new.objects.offsets)
    changes["lost"] = np.bincount(of_old[compared.lost], minlength=num_images)
    changes["added"] = np.bincount(of_new[compared.added], minlength=num_images)
    changes["relabelled"] = np.bincount(of_pair[~compared.is_kept], minlength=num_images)
    changes["difference"] = changes["lost"] + changes["added"] + changes["relabelled"] + num_read - iou_sum
    changes["mean_iou"] = np.divide(iou_sum, num_read, out=np.full(num_images, np.nan), where=num_read > 0)
    return changes


def _image_change(image_id: str, change: np.void) -> ImageChange:
    values = dict(zip(_CHANGE.names or (), change.item(), strict=True))
    if np.isnan(values["mean_iou"]):
        values["mean_iou"] = None
    return ImageChange(image_id, **values)
