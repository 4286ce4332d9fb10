"""What a run would leave if it ended now, jobs/train/calibration.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from jobs.train.batches import TrainingBatch
from jobs.train.calibration import recalibrate_batch_norm, stored_copy
from jobs.train.workers import Workers
from maskrcnn_core.config import lite
from maskrcnn_core.model import MaskRCNN, build_model

ALONE = Workers(0, 1, torch.device("cpu"))


@pytest.fixture
def model() -> MaskRCNN:
    torch.set_num_threads(1)
    return build_model(lite(((1, "disc"),)), seed=0)


@pytest.fixture
def batch() -> TrainingBatch:
    return batch_of(0)


def batch_of(seed: int) -> TrainingBatch:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    return TrainingBatch(images, [(64, 64)] * 2, [], torch.arange(2))


def statistics(model: MaskRCNN) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}


def test_recalibrated_batch_norm_has_the_statistics_of_the_batches(
    model: MaskRCNN, batch: TrainingBatch
) -> None:
    recalibrate_batch_norm(model, iter([batch]), 1, ALONE)
    first = next(m for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))
    convolution = next(m for m in model.backbone.modules() if isinstance(m, torch.nn.Conv2d))
    expected = convolution(batch.images).mean(dim=(0, 2, 3))
    assert first.running_mean is not None
    assert torch.allclose(first.running_mean, expected, atol=1e-4)
    assert not model.training


def test_frozen_stages_keep_their_statistics(batch: TrainingBatch) -> None:
    model = build_model(lite(((1, "disc"),)).replace(trainable_stages=1), seed=0)
    before = statistics(model)
    recalibrate_batch_norm(model, iter([batch]), 1, ALONE)
    moved = {name for name, value in statistics(model).items() if not torch.equal(value, before[name])}
    assert moved
    assert all(int(name.split(".")[2]) >= 14 for name in moved)  # the first block of the last stage


def test_synchronised_batch_norm_is_measured_as_any_other(batch: TrainingBatch, tmp_path: Path) -> None:
    """In a group of processes it would wait for the others; on a CPU it refuses at once."""
    plain, synchronised = (
        build_model(lite(((1, "disc"),)).replace(norm=norm), seed=0) for norm in ("bn", "sync_bn")
    )
    recalibrate_batch_norm(plain, iter([batch]), 1, ALONE)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/met", rank=0, world_size=1)
    try:
        recalibrate_batch_norm(synchronised, iter([batch]), 1, ALONE)
    finally:
        dist.destroy_process_group()
    for name, value in statistics(plain).items():
        assert torch.equal(value, statistics(synchronised)[name]), name


def test_a_stored_copy_has_the_values_of_its_file_and_leaves_the_model_alone(model: MaskRCNN) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    copied = dict(stored_copy(model, torch.float16).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert torch.equal(copied[name], parameter.half().float())


def _calibrate(rank: int, folder: str) -> None:
    """One process of two, over three batches."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
    model = build_model(lite(((1, "disc"),)), seed=0)
    workers = Workers.joined(torch.device("cpu"))
    recalibrate_batch_norm(model, map(batch_of, range(rank, 3, 2)), 3, workers)
    torch.save(statistics(model), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_measure_what_one_does(model: MaskRCNN, tmp_path: Path) -> None:
    start_processes(_calibrate, (str(tmp_path),), nprocs=2)
    recalibrate_batch_norm(model, map(batch_of, range(3)), 3, ALONE)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in statistics(model).items():
            assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-5), name
