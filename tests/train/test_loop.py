from collections.abc import Iterator

import pytest
import torch

from jobs.demo.scenes import SCENE_CATEGORIES
from jobs.demo.train import training_batches
from jobs.train.loop import Recipe, TrainingBatch, fit, recalibrate_batch_norm
from maskrcnn_core.config import lite
from maskrcnn_core.model import MaskRCNN, build_model
from maskrcnn_core.roi_heads import Instances


def small_batches(seed: int = 0) -> Iterator[TrainingBatch]:
    """The demo's scenes, cut to their upper left quarter for speed."""
    for batch in training_batches(lite(SCENE_CATEGORIES), 2, seed):
        whole = torch.tensor([[0.0, 0.0, 128.0, 128.0]])
        target = Instances(whole, torch.tensor([1]), torch.ones(1, 128, 128, dtype=torch.uint8))
        yield TrainingBatch(batch.images[:, :, :128, :128], [(128, 128)] * 2, [target] * 2)


@pytest.fixture
def model() -> MaskRCNN:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return build_model(lite(SCENE_CATEGORIES), seed=0)


def test_the_rate_warms_up_linearly_and_falls_to_zero() -> None:
    recipe = Recipe(steps=110, warmup_steps=10, learning_rate=1.0)
    assert recipe.rate_at(0) == pytest.approx(0.1)
    assert recipe.rate_at(9) == pytest.approx(1.0)
    assert recipe.rate_at(60) == pytest.approx(0.5)
    assert recipe.rate_at(110) == pytest.approx(0.0)


@pytest.mark.parametrize(("steps", "warmup_steps"), [(0, 0), (10, 10), (10, -1)])
def test_a_schedule_that_cannot_be_is_refused(steps: int, warmup_steps: int) -> None:
    with pytest.raises(ValueError, match="warmup"):
        Recipe(steps=steps, warmup_steps=warmup_steps)


def test_training_lowers_the_loss_and_the_same_seed_gives_the_same_curve(model: MaskRCNN) -> None:
    def curve() -> list[float]:
        torch.manual_seed(0)
        totals: list[float] = []
        fresh = build_model(lite(SCENE_CATEGORIES), seed=0)
        recipe = Recipe(steps=8, warmup_steps=1, bf16=False)
        fit(fresh, small_batches(), recipe, lambda _, losses: totals.append(sum(losses.values())))
        return totals

    first = curve()
    assert first[-1] < 0.7 * first[0]
    assert curve() == pytest.approx(first, rel=1e-4)


def test_training_stops_after_the_step_it_is_told(model: MaskRCNN) -> None:
    steps: list[int] = []
    fit(
        model,
        small_batches(),
        Recipe(steps=50, warmup_steps=1),
        lambda step, _: steps.append(step),
        last_step=2,
    )
    assert steps == [1, 2]


def test_a_loss_that_is_not_finite_stops_training(model: MaskRCNN) -> None:
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 1"):
        fit(model, small_batches(), Recipe(steps=2, warmup_steps=1), lambda *_: None)


def test_recalibrated_batch_norm_has_the_statistics_of_the_batches(model: MaskRCNN) -> None:
    (batch,) = [next(small_batches())]
    recalibrate_batch_norm(model, iter([batch]), 1)
    first = next(m for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))
    convolution = next(m for m in model.backbone.modules() if isinstance(m, torch.nn.Conv2d))
    expected = convolution(batch.images).mean(dim=(0, 2, 3))
    assert first.running_mean is not None
    assert torch.allclose(first.running_mean, expected, atol=1e-4)
    assert not model.training
