"""Batches: the same bits for any number of workers and from any step, whatever happens to single images."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.lake.storage import MissingObjectError, TransientStorageError
from jobs.train.batches import Batches, TrainingBatch
from jobs.train.image_locations import ImageLocation, ImageReader
from jobs.train.image_order import ImageOrder
from jobs.train.training_set import TrainingSet
from maskrcnn_core.augment import Augmentation
from maskrcnn_core.config import lite
from maskrcnn_core.images import decode_image
from maskrcnn_core.roi_heads import Instances
from schemas.errors import UsageError
from tests.train.coco_files import annotation, image, make_set, picture, storage, write_files

CONFIG = lite(((3, "window"), (7, "door")))
SIZES = {n: (20 + n % 3 * 7, 30 + n % 4 * 5) for n in range(9)}
MULTI_SCALE = Augmentation(shorter_sides=(24, 40), max_size_px=60)
JITTER = Augmentation(scale_jitter=(0.3, 2.0), canvas_px=48)
AS_IS = Augmentation(shorter_sides=(20,), max_size_px=40, flip=0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    """Nine images of several sizes, each with two annotations."""
    folder = tmp_path_factory.mktemp("data")
    images = [image(n, height=h, width=w) for n, (h, w) in SIZES.items()]
    write_files(folder / "images", {f"{n}.png": picture(n, *size) for n, size in SIZES.items()})
    second = [[14.0, 5.0, 27.0, 5.0, 20.0, 18.0]]
    annotations = [annotation(n) for n in SIZES]
    annotations += [annotation(n, category_id=7, bbox=[14, 5, 13, 13], segmentation=second) for n in SIZES]
    return make_set(folder, images, annotations)


def batches(
    sets: list[TrainingSet],
    augmentation: Augmentation = AS_IS,
    *,
    batch_size: int = 4,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 11,
    copy_paste: float = 0.0,
    num_threads: int = 2,
    reader: ImageReader | None = None,
) -> Batches:
    order = ImageOrder([len(one) for one in sets], [1.0] * len(sets), seed)
    return Batches(
        sets,
        order,
        reader or ImageReader(storage()),
        augmentation,
        CONFIG,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        copy_paste=copy_paste,
        num_threads=num_threads,
    )


def first(number: int, source: Iterator[TrainingBatch]) -> list[TrainingBatch]:
    return list(islice(source, number))


def parts(target: Instances) -> list[torch.Tensor]:
    masks = target.masks
    return [
        target.boxes,
        target.class_indices,
        target.ignored_boxes,
        masks.pixels,
        masks.corners,
        masks.sizes,
    ]


def by_position(shards: list[TrainingBatch]) -> dict[int, tuple[object, ...]]:
    """Everything about each image of a global batch, tensors as bytes."""
    return {
        position: (
            shard.images[k].numpy().tobytes(),
            shard.images.shape[1:],
            shard.image_sizes[k],
            shard.names[k],
            *(part.numpy().tobytes() for part in parts(shard.targets[k])),
        )
        for shard in shards
        for k, position in enumerate(shard.positions.tolist())
    }


@pytest.mark.parametrize(
    ("augmentation", "copy_paste"), [(MULTI_SCALE, 0.0), (JITTER, 0.7)], ids=["multi-scale", "jitter"]
)
def test_one_two_and_four_workers_get_the_same_global_batches_bit_by_bit(
    data: TrainingSet, augmentation: Augmentation, copy_paste: float
) -> None:
    def global_batches(world_size: int, num_threads: int) -> list[dict[int, tuple[object, ...]]]:
        workers = [
            first(
                3,
                batches(
                    [data],
                    augmentation,
                    batch_size=6,
                    rank=rank,
                    world_size=world_size,
                    copy_paste=copy_paste,
                    num_threads=num_threads,
                ).starting_at(0),
            )
            for rank in range(world_size)
        ]
        return [by_position([worker[step] for worker in workers]) for step in range(3)]

    alone = global_batches(1, 1)
    assert [sorted(batch) for batch in alone] == [list(range(6 * s, 6 * s + 6)) for s in range(3)]
    assert global_batches(2, 3) == alone
    assert global_batches(4, 1) == alone  # six images: two workers have two of them


def test_a_run_goes_on_from_any_step_as_if_it_had_not_stopped(data: TrainingSet) -> None:
    whole = first(5, batches([data], JITTER, copy_paste=0.5).starting_at(0))
    resumed = first(2, batches([data], JITTER, copy_paste=0.5).starting_at(3))
    assert [by_position([batch]) for batch in resumed] == [by_position([batch]) for batch in whole[3:]]


def test_another_seed_gives_other_batches(data: TrainingSet) -> None:
    (one,) = first(1, batches([data], JITTER).starting_at(0))
    (other,) = first(1, batches([data], JITTER, seed=12).starting_at(0))
    assert by_position([one]) != by_position([other])


def test_images_are_normalised_with_zeros_beside_them_and_channels_last(data: TrainingSet) -> None:
    (batch,) = first(
        1, batches([data], Augmentation((20, 26, 34), 200, flip=0.0), batch_size=9).starting_at(0)
    )
    heights, widths = zip(*batch.image_sizes, strict=True)
    assert batch.images.shape == (9, 3, -(-max(heights) // 32) * 32, -(-max(widths) // 32) * 32)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (CONFIG.image_mean, CONFIG.image_std))
    num_compared = 0
    for k, (height, width) in enumerate(batch.image_sizes):
        assert not batch.images[k, :, height:].any()
        assert not batch.images[k, :, :, width:].any()
        pixels = decode_image(
            picture(int(batch.names[k].removesuffix(".png")), *SIZES[int(batch.names[k][0])])
        )
        if pixels.shape[:2] == (height, width):  # drawn in its own size
            wanted = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
            torch.testing.assert_close(batch.images[k, :, :height, :width], wanted, atol=1e-5, rtol=1e-5)
            num_compared += 1
    assert num_compared


def test_an_epoch_shows_each_image_once_and_sets_are_mixed(data: TrainingSet) -> None:
    names = [name for batch in first(3, batches([data], batch_size=3).starting_at(0)) for name in batch.names]
    assert sorted(names) == [f"{n}.png" for n in range(9)]
    mixed = batches([data, data], batch_size=8)
    draws = [mixed._order.at(p).set_index for p in range(8 * 4)]
    assert set(draws) == {0, 1}
    assert len(first(1, mixed.starting_at(0))[0].names) == 8


def test_an_image_that_cannot_be_used_becomes_blank_ignored_and_named(tmp_path: Path) -> None:
    bad = {"0": b"no picture", "1": picture(1)[:90], "2": picture(2, 9, 9), "3": picture(3), "4": picture(4)}
    write_files(
        tmp_path / "images", {f"{n}.png": content for n, content in bad.items()} | {"5.png": picture(5)}
    )
    made = make_set(tmp_path, [image(n) for n in range(6)], [annotation(n) for n in range(6)])
    os.utime(tmp_path / "images" / "3.png", ns=(1, 1))
    (tmp_path / "images" / "4.png").unlink()
    (batch,) = first(1, batches([made], batch_size=6).starting_at(0))
    assert {problem.name: problem.kind for problem in batch.unreadable} == {
        "0.png": "unsupported",
        "1.png": "truncated",
        "2.png": "another_size",
        "3.png": "changed",
        "4.png": "missing",
    }
    for k, target in enumerate(batch.targets):
        height, width = batch.image_sizes[k]
        is_blank = batch.names[k] != "5.png"
        assert target.ignored_boxes.tolist() == ([[0, 0, width, height]] if is_blank else [])
        assert len(target.boxes) == len(target.masks) == (0 if is_blank else 1)
        assert (batch.images[k, 0, :height, :width].unique().numel() == 1) == is_blank


class FailingReader(ImageReader):
    def read(self, location: ImageLocation) -> bytes:
        raise TransientStorageError("the store is away")


@pytest.mark.parametrize("num_lost", [9, 8])
def test_a_run_ends_where_image_after_image_cannot_be_read(
    data: TrainingSet, num_lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All nine lost, or all but one."""
    monkeypatch.setattr("jobs.train.batches.MOST_UNREADABLE", 20)
    lost = {f"{n}.png" for n in range(num_lost)}

    class Reader(ImageReader):
        def read(self, location: ImageLocation) -> bytes:
            if location.info.uri.rpartition("/")[2] in lost:
                raise MissingObjectError(f"{location.info.uri} does not exist")
            return super().read(location)

    source = batches([data], reader=Reader(storage())).starting_at(0)
    if num_lost == 8:
        assert len(first(9, source)) == 9
        return
    with pytest.raises(UsageError, match=r"none of the last 20 images could be read \(20 missing\)"):
        first(9, source)


def test_a_store_that_cannot_be_reached_stops_the_run(data: TrainingSet) -> None:
    with pytest.raises(TransientStorageError, match="the store is away"):
        next(batches([data], reader=FailingReader(storage())).starting_at(0))


class SlowReader(ImageReader):
    """Counts what it read; waits a little, as storage does."""

    num_reads = 0

    def read(self, location: ImageLocation) -> bytes:
        time.sleep(0.01)
        self.num_reads += 1
        return super().read(location)


def test_images_are_made_ahead_of_their_use_but_not_without_end(data: TrainingSet) -> None:
    reader = SlowReader(storage())
    iterator = batches([data], reader=reader).starting_at(0)
    next(iterator)
    deadline = time.monotonic() + 10
    while reader.num_reads < 12 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reader.num_reads == 12  # the one in hand and two ahead, of four images each
    time.sleep(0.1)
    assert reader.num_reads == 12
    iterator.close()  # type: ignore[attr-defined]  # a generator
    deadline = time.monotonic() + 10
    while any(t.name.startswith("training-images") for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_copy_paste_adds_instances_of_other_images(data: TrainingSet) -> None:
    augmentation = Augmentation(scale_jitter=(1.0, 1.0), canvas_px=48, flip=0.0)
    (plain,) = first(1, batches([data], augmentation, batch_size=9).starting_at(0))
    (pasted,) = first(1, batches([data], augmentation, batch_size=9, copy_paste=1.0).starting_at(0))
    assert {len(target.boxes) for target in plain.targets} == {2}
    changed = [
        k for k in range(9) if not torch.equal(pasted.targets[k].masks.pixels, plain.targets[k].masks.pixels)
    ]
    assert len(changed) >= 4  # at a half each, none of two is taken in a quarter of the images
    assert all(not torch.equal(pasted.images[k], plain.images[k]) for k in changed)


@pytest.mark.parametrize(
    "wrong", [{"rank": 1}, {"world_size": 5}, {"num_threads": 0}, {"copy_paste": 0.5}, {"rank": -1}]
)
def test_settings_that_cannot_be_are_refused(data: TrainingSet, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        batches([data], **wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_time_spent_waiting_is_little_where_a_step_takes_longer_than_its_images(data: TrainingSet) -> None:
    """Four images of 10 ms each on two threads take 20 ms and more; a step takes 60."""
    iterator = batches([data], reader=SlowReader(storage())).starting_at(0)
    next(iterator)
    waited, started = 0.0, time.monotonic()
    for _ in range(20):
        time.sleep(0.06)
        before = time.monotonic()
        next(iterator)
        waited += time.monotonic() - before
    assert waited / (time.monotonic() - started) < 0.05


def test_masks_of_a_batch_lie_where_their_boxes_do(data: TrainingSet) -> None:
    for batch in first(3, batches([data], JITTER, batch_size=9, copy_paste=0.5).starting_at(0)):
        for target in batch.targets:
            corners, sizes = target.masks.corners.numpy(), target.masks.sizes.numpy()
            boxes = target.boxes.numpy()
            assert (corners[:, ::-1] <= np.ceil(boxes[:, 2:])).all()
            assert ((corners + sizes)[:, ::-1] >= np.floor(boxes[:, :2])).all()
