"""Batches for one worker: images read, decoded, augmented and normalised on threads, ahead of their use.

Enters: training sets and an order of images. Leaves: TrainingBatches, from any step on.
Letters: B images of the global batch, W workers, H×W the padded size of a batch.

Batch s holds positions s·B … s·B + B - 1 of the order; worker r takes the r-th of them, the (r + W)-th, and
so on. What is random about an image is drawn from (seed, position), and the padded size is that of the global
batch, which takes the images' sizes alone: so the images of a step are the same bits for any W.

An image that cannot be read or decoded becomes a blank one on which nothing is learnt, and is named in its
batch; many of them with none between that can be read, or a store that cannot be reached, stop the run.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jobs.train.image_locations import ImageReader
from jobs.train.image_order import Draw, ImageOrder
from jobs.train.readable_images import UnreadableImage, UnreadableImageError, read_pixels
from jobs.train.training_set import TrainingSet
from maskrcnn_core.augment import PADDING, Augmentation, Placement, apply, copy_paste, place
from maskrcnn_core.config import MaskRCNNConfig
from maskrcnn_core.instance_masks import MaskCrops
from maskrcnn_core.roi_heads import Instances
from maskrcnn_core.shapes import Size, tight_shape
from schemas.errors import UsageError

DEFAULT_PREFETCH = 2
# Of a worker, one after another. A set with one good image in 20 is stopped by chance once in 30,000 times.
MOST_UNREADABLE = 200


@dataclass(frozen=True)
class TrainingBatch:
    """One worker's share of a batch: N of its B images.

    images: (N, 3, H, W) float32, normalised, zeros beside the image, in memory with channels last;
    image_sizes: N (height, width) without the padding; targets: N; positions: (N,) int64 in the order of
    images; names: N, as in the training set; unreadable: those that were tried in vain.
    """

    images: Tensor
    image_sizes: list[tuple[int, int]]
    targets: list[Instances]
    positions: Tensor
    names: tuple[str, ...] = ()
    unreadable: tuple[UnreadableImage, ...] = ()


class Batches:
    """An endless sequence of batches.

    Args:
        sets: in the order that `order` numbers them.
        config: for mean and std of the pixels.
        batch_size: B, of all workers together.
        copy_paste: probability that an image gets instances of another of its set; with scale_jitter only.
        num_threads: that read, decode and augment.
        prefetch: batches made ahead of the one in use.
        pin_memory: of the images, for copies to a GPU that nobody waits for.

    Raises:
        ValueError: fewer images than workers, or a number out of range.
    """

    def __init__(
        self,
        sets: Sequence[TrainingSet],
        order: ImageOrder,
        reader: ImageReader,
        augmentation: Augmentation,
        config: MaskRCNNConfig,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int,
        copy_paste: float = 0.0,
        num_threads: int = 1,
        prefetch: int = DEFAULT_PREFETCH,
        pin_memory: bool = False,
    ) -> None:
        if not 0 <= rank < world_size <= batch_size:
            raise ValueError(
                f"worker {rank} of {world_size} with {batch_size} images a batch; wanted an image for each"
            )
        if num_threads < 1 or prefetch < 1:
            raise ValueError(f"num_threads is {num_threads}, prefetch {prefetch}; wanted 1 or more")
        if not 0 <= copy_paste <= 1 or (copy_paste and augmentation.canvas_px is None):
            raise ValueError(f"copy_paste is {copy_paste}; wanted 0 to 1, and 0 without scale_jitter")
        self._sets, self._order, self._reader = sets, order, reader
        self._augmentation = augmentation
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._seed, self._copy_paste = seed, copy_paste
        self._num_threads, self._prefetch, self._pin_memory = num_threads, prefetch, pin_memory
        std = np.array(config.image_std, np.float32)
        self._scale = 1 / (255 * std)
        self._shift = -np.array(config.image_mean, np.float32) / std

    def starting_at(self, step: int, stride: int = 1) -> Iterator[TrainingBatch]:
        """Batches `step`, step + stride, … without end; closing the iterator stops its threads.

        Raises (while iterating):
            UsageError: of the last MOST_UNREADABLE images of this worker none could be read.
            StorageError: the store cannot be reached.
        """
        in_vain: deque[UnreadableImage] = deque()
        pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="training-images")
        ahead: deque[_Pending] = deque()
        try:
            for number in count(step, stride):
                ahead.append(self._submit(pool, number))
                if len(ahead) > self._prefetch:
                    batch = ahead.popleft().result()
                    _check_readable(batch, in_vain)
                    yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, number: int) -> _Pending:
        positions = range(number * self._batch_size, (number + 1) * self._batch_size)
        own = positions[self._rank :: self._world_size]
        height, width = self._padded_size(positions)
        images = torch.empty((len(own), height, width, 3), dtype=torch.float32, pin_memory=self._pin_memory)
        canvases = images.numpy()
        made = [pool.submit(self._make, position, canvases[k]) for k, position in enumerate(own)]
        return _Pending(images, list(own), made)

    def _padded_size(self, positions: range) -> Size:
        """Of the global batch, without looking at an image."""
        if self._augmentation.canvas_px is not None:
            return tight_shape((self._augmentation.canvas_px, self._augmentation.canvas_px))
        sizes = [self._placed(self._order.at(p), self._rng(p)).output for p in positions]
        return tight_shape((max(h for h, _ in sizes), max(w for _, w in sizes)))

    def _make(self, position: int, canvas: NDArray[np.float32]) -> _Made:
        """Write one image into its place of the batch."""
        draw, rng = self._order.at(position), self._rng(position)
        placement = self._placed(draw, rng)
        data = self._sets[draw.set_index]
        unreadable: list[UnreadableImage] = []
        try:
            pixels, instances = self._read(draw, placement)
            if rng.random() < self._copy_paste:
                other = Draw(draw.set_index, int(rng.integers(len(data))))
                pixels, instances = self._paste(pixels, instances, other, rng, unreadable)
        except UnreadableImageError as error:
            unreadable.append(error.image)
            pixels, instances = _blank(placement.output)
        height, width = placement.output
        window = canvas.reshape(len(canvas), -1)[:height, : width * 3]
        np.multiply(pixels.reshape(height, -1), np.tile(self._scale, width), out=window)
        window += np.tile(self._shift, width)
        canvas[height:] = 0
        canvas[:, width:] = 0
        return _Made(placement.output, instances, data.name(draw.index), tuple(unreadable))

    def _paste(
        self,
        pixels: NDArray[np.uint8],
        instances: Instances,
        other: Draw,
        rng: np.random.Generator,
        unreadable: list[UnreadableImage],
    ) -> tuple[NDArray[np.uint8], Instances]:
        placement = self._placed(other, rng)
        try:
            return copy_paste(pixels, instances, *self._read(other, placement), rng)
        except UnreadableImageError as error:
            unreadable.append(error.image)
            return pixels, instances

    def _read(self, draw: Draw, placement: Placement) -> tuple[NDArray[np.uint8], Instances]:
        """The image as it is placed. Raises UnreadableImageError."""
        data = self._sets[draw.set_index]
        pixels = read_pixels(data, draw.index, self._reader)
        return apply(placement, pixels, data.annotations(draw.index))

    def _placed(self, draw: Draw, rng: np.random.Generator) -> Placement:
        height, width = self._sets[draw.set_index].sizes[draw.index].tolist()
        return place(self._augmentation, height, width, rng)

    def _rng(self, position: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, position))


@dataclass(frozen=True)
class _Made:
    size: Size
    instances: Instances
    name: str
    unreadable: tuple[UnreadableImage, ...]


@dataclass(frozen=True)
class _Pending:
    """A batch in the making: images (N, H, W, 3), of which each future fills one."""

    images: Tensor
    positions: list[int]
    made: list[Future[_Made]]

    def result(self) -> TrainingBatch:
        made = [future.result() for future in self.made]
        return TrainingBatch(
            self.images.permute(0, 3, 1, 2),
            [one.size for one in made],
            [one.instances for one in made],
            torch.tensor(self.positions),
            tuple(one.name for one in made),
            tuple(image for one in made for image in one.unreadable),
        )


def _check_readable(batch: TrainingBatch, in_vain: deque[UnreadableImage]) -> None:
    """Keep account of the images since the last that could be read; raises UsageError: there are too many."""
    of_name = {image.name: image for image in batch.unreadable}
    for name in batch.names:
        if name in of_name:
            in_vain.append(of_name[name])
        else:
            in_vain.clear()
    if len(in_vain) >= MOST_UNREADABLE:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in Counter(i.kind for i in in_vain).items())
        raise UsageError(
            f"none of the last {len(in_vain)} images could be read ({kinds}), the last of them "
            f"{in_vain[-1].name}: {in_vain[-1].problem}; mend or bring back the images, and run the same "
            f"command again to go on from the newest checkpoint"
        )


def _blank(size: Size) -> tuple[NDArray[np.uint8], Instances]:
    """Grey, and ignored as a whole."""
    height, width = size
    instances = Instances(
        torch.zeros((0, 4)),
        torch.zeros(0, dtype=torch.int64),
        MaskCrops.from_crops([]),
        torch.tensor([[0.0, 0.0, width, height]]),
    )
    return np.full((height, width, 3), PADDING, np.uint8), instances
