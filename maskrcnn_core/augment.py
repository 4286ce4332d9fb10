"""Training augmentation: one image and its annotations -> the network's input before normalisation.

Enters: uint8 RGB pixels with boxes and run-length encoded masks. Leaves: pixels of the output's size, and
Instances with masks as crops.
Letters: N annotations of an image, H×W its size, h×w the output.

What is random is drawn first, from the image's size alone (place); then the pixels follow (apply). So every
worker knows the shape of a batch without reading its images. Only the part of an image that the output shows
is resized, and of a mask only that part is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from maskrcnn_core.instance_masks import MaskCrops
from maskrcnn_core.machine_code import compiled
from maskrcnn_core.masks import decode_rle_crop
from maskrcnn_core.roi_heads import Instances

PADDING = 128  # grey beside an image smaller than its canvas; Ghiasi et al., section 3
MIN_SIDE_PX = 1.0  # an instance with less of a box or mask is dropped
_EPSILON_PX = 1e-3  # a box that sticks out by no more was cut by rounding

Crop = tuple[int, int, NDArray[np.bool_]]  # y0, x0, mask: as MaskCrops.from_crops takes it


@dataclass(frozen=True)
class Annotations:
    """What is known of one image, in its own pixels. N may be 0.

    boxes: (N, 4) float32 x0 y0 x1 y1, inside the image; class_indices: (N,) int64 >= 1; ignored: (N,) bool,
    where nothing is to be learnt (crowds, uncertain labels); rles: N COCO compressed counts of (height,
    width).
    """

    height: int
    width: int
    boxes: NDArray[np.float32]
    class_indices: NDArray[np.int64]
    ignored: NDArray[np.bool_]
    rles: list[bytes]


@dataclass(frozen=True)
class Augmentation:
    """Which sizes, crops and flips are drawn: either `shorter_sides` with `max_size_px`, or `scale_jitter`.

    shorter_sides: the image is resized to one of them, unless its longer side would pass max_size_px (Faster
        R-CNN, section 3.3). One side and flip 0: what inference does.
    scale_jitter: large-scale jitter, the least and the greatest factor: the image is resized to fit the
        canvas times a factor, then cropped or padded to the canvas, canvas_px on each side.
    flip: probability of a mirror image.

    Raises:
        ValueError: neither of the two or both, or a value out of range.

    Source: Ghiasi et al., "Simple Copy-Paste", arXiv:2012.07177, section 3; factors there 0.1 and 2.
    """

    shorter_sides: tuple[int, ...] = ()
    max_size_px: int | None = None
    scale_jitter: tuple[float, float] | None = None
    canvas_px: int | None = None
    flip: float = 0.5

    def __post_init__(self) -> None:
        def want(holds: bool, field: str, wanted: str) -> None:
            if not holds:
                raise ValueError(f"Augmentation.{field} is {getattr(self, field)!r}; wanted {wanted}.")

        want(0.0 <= self.flip <= 1.0, "flip", "a probability from 0 to 1")
        if self.scale_jitter is None:
            want(bool(self.shorter_sides), "shorter_sides", "at least one, or scale_jitter")
            want(min(self.shorter_sides) >= 1, "shorter_sides", "pixels >= 1")
            fits = self.max_size_px is not None and self.max_size_px >= max(self.shorter_sides)
            want(fits, "max_size_px", f">= the greatest of shorter_sides ({max(self.shorter_sides)})")
            want(self.canvas_px is None, "canvas_px", "None without scale_jitter")
        else:
            low, high = self.scale_jitter
            want(0.0 < low <= high < np.inf, "scale_jitter", "0 < low <= high")
            want(self.canvas_px is not None and self.canvas_px >= 1, "canvas_px", ">= 1 with scale_jitter")
            want(not self.shorter_sides, "shorter_sides", "none with scale_jitter")
            want(self.max_size_px is None, "max_size_px", "None with scale_jitter")


@dataclass(frozen=True)
class Placement:
    """How an image comes to lie on the output; all are (height, width) or (y, x) in pixels.

    resized: its size after resizing; it is then mirrored if `flip`; `offset`: of the output's top left corner
    on it; `output`: size of the output. What the image does not cover is padding, on the right and below.
    """

    resized: tuple[int, int]
    flip: bool
    offset: tuple[int, int]
    output: tuple[int, int]

    @property
    def visible(self) -> tuple[int, int]:
        """Height and width of the part of the output that shows the image."""
        return (
            min(self.output[0], self.resized[0] - self.offset[0]),
            min(self.output[1], self.resized[1] - self.offset[1]),
        )


def place(augmentation: Augmentation, height: int, width: int, rng: np.random.Generator) -> Placement:
    """Draw where an image of this size comes to lie; four draws, whatever comes out."""
    flip, size, down, right = rng.random(4).tolist()
    is_flipped = flip < augmentation.flip
    if augmentation.scale_jitter is None:
        assert augmentation.max_size_px is not None  # validated
        sides = augmentation.shorter_sides
        side = sides[int(size * len(sides))]
        scale = min(side / min(height, width), augmentation.max_size_px / max(height, width))
        resized = max(1, int(height * scale)), max(1, int(width * scale))  # rounded as shapes.input_size does
        return Placement(resized, is_flipped, (0, 0), resized)
    assert augmentation.canvas_px is not None
    low, high = augmentation.scale_jitter
    canvas = augmentation.canvas_px
    scale = canvas * (low + (high - low) * size) / max(height, width)
    resized = max(1, round(height * scale)), max(1, round(width * scale))
    offset = (
        int(down * (max(resized[0] - canvas, 0) + 1)),
        int(right * (max(resized[1] - canvas, 0) + 1)),
    )
    return Placement(resized, is_flipped, offset, (canvas, canvas))


def apply(
    placement: Placement, image: NDArray[np.uint8], annotations: Annotations
) -> tuple[NDArray[np.uint8], Instances]:
    """Resize, mirror, crop and pad an image together with what is annotated on it.

    The image is resized bilinearly without antialiasing, as at inference, and masks to the nearest pixel;
    pixel centres lie at +0.5. Pixels of a mask outside its box are left out. A box that the crop cuts becomes
    the tight box of the mask that is left. Instances of which less than a pixel is left are dropped, and
    likewise ignored regions.

    Args:
        image: (H, W, 3), C-contiguous.

    Returns:
        (h, w, 3) uint8, and the instances on the CPU.

    Raises:
        ValueError: the image's size is not what the annotations are for, or a mask is malformed.
    """
    height, width = image.shape[:2]
    if (height, width) != (annotations.height, annotations.width):
        raise ValueError(
            f"the image has {height}×{width} px, its annotations are for "
            f"{annotations.height}×{annotations.width}"
        )
    rows = _Axis(height, placement.resized[0], placement.offset[0], placement.visible[0], False)
    columns = _Axis(width, placement.resized[1], placement.offset[1], placement.visible[1], placement.flip)
    pixels = np.empty((*placement.output, 3), np.uint8)
    pixels[len(rows) :] = PADDING
    pixels[:, len(columns) :] = PADDING
    _resize(np.ascontiguousarray(image), *rows.taps(), *columns.taps(), pixels)

    y0, y1 = rows.place(annotations.boxes[:, 1], annotations.boxes[:, 3])
    x0, x1 = columns.place(annotations.boxes[:, 0], annotations.boxes[:, 2])
    placed = np.stack((x0, y0, x1, y1), axis=1)
    limits = np.array([len(columns), len(rows)] * 2, np.float64)
    boxes = placed.clip(0, limits)
    is_cut = np.abs(boxes - placed).max(axis=1, initial=0.0) > _EPSILON_PX
    sides = boxes[:, 2:] - boxes[:, :2]
    is_left = (sides[:, 0] >= MIN_SIDE_PX) & (sides[:, 1] >= MIN_SIDE_PX)
    kept, crops = [], []
    for n in np.flatnonzero(is_left & ~annotations.ignored).tolist():
        crop = _mask_crop(annotations.rles[n], annotations.boxes[n], rows, columns)
        tight = _tight_box(crop)
        if tight is None:
            continue
        if is_cut[n]:
            boxes[n] = tight
        kept.append(n)
        crops.append(crop)
    return pixels, _instances(
        boxes[kept],
        annotations.class_indices[kept],
        crops,
        torch.from_numpy(boxes[is_left & annotations.ignored].astype(np.float32)),
    )


def copy_paste(
    image: NDArray[np.uint8],
    instances: Instances,
    other_image: NDArray[np.uint8],
    other: Instances,
    rng: np.random.Generator,
) -> tuple[NDArray[np.uint8], Instances]:
    """Paste a random half of another image's instances over an image.

    What they hide is cut from the masks below; boxes that hung on it become tight; hidden instances go.
    Ignored regions of the image stay, those of the other do not come along.

    Args:
        image, other_image: (h, w, 3) uint8 of one size; both stay as they are.

    Returns:
        the image, with its own instances before the pasted ones.

    Raises:
        ValueError: the images differ in size.

    Source: Ghiasi et al., arXiv:2012.07177, section 3, without blending, which made no difference there.
    """
    if image.shape != other_image.shape:
        raise ValueError(f"images of {image.shape} and {other_image.shape}; copy-paste wants one size")
    pasted = np.flatnonzero(rng.random(len(other.boxes)) < 0.5)
    if not len(pasted):
        return image, instances
    other_crops, own_crops = _crops_of(other.masks), _crops_of(instances.masks)
    hidden = np.zeros(image.shape[:2], np.bool_)
    for y0, x0, mask in (other_crops[n] for n in pasted):
        hidden[y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]] |= mask
    boxes = instances.boxes.numpy().copy()
    kept, crops = [], []
    for n, (y0, x0, mask) in enumerate(own_crops):
        over = hidden[y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]]
        if (over & mask).any():
            mask = mask & ~over
            tight = _tight_box((y0, x0, mask))
            if tight is None:
                continue
            boxes[n] = tight
        kept.append(n)
        crops.append((y0, x0, mask))
    both = _instances(
        np.concatenate((boxes[kept], other.boxes.numpy()[pasted])),
        np.concatenate((instances.class_indices.numpy()[kept], other.class_indices.numpy()[pasted])),
        [*crops, *(other_crops[n] for n in pasted)],
        instances.ignored_boxes,
    )
    return np.where(hidden[..., None], other_image, image), both


class _Axis:
    """One axis of a placement: from positions on the image to positions on the visible part of the output.

    `size` pixels are resized to `resized`, mirrored if `flip`; `visible` of these are shown, from `offset`.
    """

    def __init__(self, size: int, resized: int, offset: int, visible: int, flip: bool) -> None:
        self.size, self._resized, self._offset, self._flip = size, resized, offset, flip
        shown = np.arange(offset, offset + visible)
        self._centres = ((resized - 1 - shown if flip else shown) + 0.5) * (size / resized)
        self.nearest = np.minimum(self._centres.astype(np.int64), size - 1)  # (visible,) the pixel under each

    def __len__(self) -> int:
        return len(self._centres)

    def place(
        self, low: NDArray[np.float32], high: NDArray[np.float32]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Where intervals of the image lie on the output, beyond its borders too."""
        scale = self._resized / self.size
        first, second = low.astype(np.float64) * scale, high.astype(np.float64) * scale
        if self._flip:
            first, second = self._resized - second, self._resized - first
        return first - self._offset, second - self._offset

    def covered(self, low: float, high: float) -> slice:
        """The output's pixels whose nearest pixel of the image has some part in the interval low to high."""
        ascending = self.nearest[::-1] if self._flip else self.nearest
        start, stop = np.searchsorted(ascending, (int(np.floor(low)), int(np.ceil(high))))
        return slice(len(self) - stop, len(self) - start) if self._flip else slice(int(start), int(stop))

    def taps(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """For each of the output's pixels the first of two neighbours to blend, and the second's weight."""
        position = np.maximum(self._centres - 0.5, 0.0)
        first = np.minimum(position.astype(np.int64), self.size - 1)
        weight = np.where(first < self.size - 1, position - first, 0.0)
        return first, weight.astype(np.float32)


def _mask_crop(rle: bytes, box: NDArray[np.float32], rows: _Axis, columns: _Axis) -> Crop:
    """The part of a mask that lies in its box and is shown, resized to the nearest pixel."""
    x0, y0, x1, y1 = box.tolist()
    down, across = rows.covered(y0, y1), columns.covered(x0, x1)
    y, x = rows.nearest[down], columns.nearest[across]
    if not len(y) or not len(x):
        return down.start, across.start, np.zeros((len(y), len(x)), np.bool_)
    top, left = int(y.min()), int(x.min())
    mask = decode_rle_crop(rle, rows.size, top, left, int(y.max()) + 1, int(x.max()) + 1)
    return down.start, across.start, _pick(mask, y - top, x - left)


def _tight_box(crop: Crop) -> tuple[int, int, int, int] | None:
    """x0, y0, x1, y1 around the pixels of a mask; None where there are none."""
    y0, x0, mask = crop
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return (
        x0 + int(columns[0]),
        y0 + int(rows[0]),
        x0 + int(columns[-1]) + 1,
        y0 + int(rows[-1]) + 1,
    )


def _crops_of(masks: MaskCrops) -> list[Crop]:
    crops, start = [], 0
    pixels = masks.pixels.numpy().view(np.bool_)
    for (y0, x0), (height, width) in zip(masks.corners.tolist(), masks.sizes.tolist(), strict=True):
        crops.append((y0, x0, pixels[start : start + height * width].reshape(height, width)))
        start += height * width
    return crops


def _instances(
    boxes: NDArray[np.floating],
    class_indices: NDArray[np.int64],
    crops: Sequence[Crop],
    ignored: torch.Tensor,
) -> Instances:
    return Instances(
        torch.from_numpy(boxes.astype(np.float32).reshape(-1, 4)),
        torch.from_numpy(class_indices.astype(np.int64)),
        MaskCrops.from_crops(crops),
        ignored,
    )


@compiled
def _pick(mask: NDArray[np.bool_], rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.bool_]:
    """mask[np.ix_(rows, columns)], in a third of the time and without the GIL."""
    picked = np.empty((len(rows), len(columns)), np.bool_)
    for y in range(len(rows)):
        line = mask[rows[y]]
        for x in range(len(columns)):
            picked[y, x] = line[columns[x]]
    return picked


@compiled
def _resize(
    image: NDArray[np.uint8],
    row: NDArray[np.int64],
    row_weight: NDArray[np.float32],
    column: NDArray[np.int64],
    column_weight: NDArray[np.float32],
    out: NDArray[np.uint8],
) -> None:
    """Blend the four neighbours of each pixel of out[: len(row), : len(column)]; halves are rounded up."""
    height, width, _ = image.shape
    first = column.min() * 3
    last = min(column.max() + 2, width) * 3
    line = np.empty(width * 3 + 3, np.float32)
    line[last:] = np.float32(0)  # read with weight 0
    half = np.float32(0.5)
    for y in range(len(row)):
        upper = image[row[y]].reshape(width * 3)
        lower = image[min(row[y] + 1, height - 1)].reshape(width * 3)
        weight = row_weight[y]
        for i in range(first, last):
            above, below = np.float32(upper[i]), np.float32(lower[i])
            line[i] = above + (below - above) * weight
        for x in range(len(column)):
            at, weight = column[x] * 3, column_weight[x]
            for channel in range(3):
                left, right = line[at + channel], line[at + channel + 3]
                out[y, x, channel] = np.uint8(left + (right - left) * weight + half)
