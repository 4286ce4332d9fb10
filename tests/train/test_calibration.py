"""Batch norm of averaged weights, jobs/train/calibration.py."""

import pytest
import torch

from jobs.train.batches import TrainingBatch
from jobs.train.calibration import recalibrate_batch_norm
from jobs.train.workers import Workers
from maskrcnn_core.config import lite
from maskrcnn_core.model import MaskRCNN, build_model

ALONE = Workers(0, 1, torch.device("cpu"))


@pytest.fixture
def model() -> MaskRCNN:
    return build_model(lite(((1, "disc"),)), seed=0)


@pytest.fixture
def batch() -> TrainingBatch:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return TrainingBatch(images, [(64, 64)] * 2, [], torch.arange(2))


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
