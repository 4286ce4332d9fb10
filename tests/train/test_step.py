"""One step, jobs/train/step.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from jobs.train.batches import TrainingBatch
from jobs.train.optimizer import make_optimizer
from jobs.train.readable_images import UnreadableImage
from jobs.train.recipe import Recipe
from jobs.train.step import StepFigures, Stepper
from jobs.train.workers import Workers
from maskrcnn_core.config import lite
from maskrcnn_core.instance_masks import MaskCrops
from maskrcnn_core.model import MaskRCNN, build_model
from maskrcnn_core.roi_heads import Instances

SIDE_PX = 64
RECIPE = Recipe(
    "one", steps=2, total_batch=2, base_batch=2, warmup_steps=0, schedule="cosine", precision="fp32"
)


def batch(*positions: int) -> TrainingBatch:
    """Images drawn by their positions, each with one square."""
    images = torch.stack(
        [torch.rand(3, SIDE_PX, SIDE_PX, generator=torch.Generator().manual_seed(p)) for p in positions]
    )
    squares = [
        Instances(
            torch.tensor([[8.0, 8.0, 40.0, 40.0]]),
            torch.tensor([1]),
            MaskCrops.from_crops([(8, 8, torch.ones(32, 32))]),
            torch.zeros((0, 4)),
        )
        for _ in positions
    ]
    return TrainingBatch(images, [(SIDE_PX, SIDE_PX)] * len(positions), squares, torch.tensor(positions))


def take(recipe: Recipe, *passes: TrainingBatch, waited_s: float = 0.0) -> tuple[MaskRCNN, StepFigures]:
    """A model of fresh weights after one step, and the step's figures."""
    torch.set_num_threads(1)
    model = build_model(lite(((1, "square"),)).replace(norm="frozen_bn"), seed=0).train()
    optimizer = make_optimizer(model, recipe)
    stepper = Stepper(model, None, optimizer, recipe, Workers(0, 1, torch.device("cpu")), seed=0)
    return model, stepper.step(passes, 0, waited_s)


def test_two_passes_are_a_step_of_twice_the_images() -> None:
    """Exactly so where both have as many samples: each pass's terms are divided by its own."""
    once, figures = take(dataclasses.replace(RECIPE, total_batch=4), batch(0, 1, 0, 1))
    twice, in_passes = take(
        dataclasses.replace(RECIPE, total_batch=4, accumulate=2), batch(0, 1), batch(0, 1)
    )
    for name, term in figures.terms.items():
        assert float(in_passes.terms[name]) == pytest.approx(float(term), rel=1e-5), name
    assert float(in_passes.norm) == pytest.approx(float(figures.norm), rel=1e-4)
    fresh = build_model(once.config, seed=0).state_dict()
    for name, value in once.state_dict().items():
        assert torch.allclose(twice.state_dict()[name], value, atol=1e-6), name
    assert any(not torch.equal(value, fresh[name]) for name, value in once.state_dict().items())


def test_gradients_are_clipped_all_together_and_told_as_they_were() -> None:
    plain, figures = take(RECIPE, batch(0, 1))
    clipped, of_clipped = take(dataclasses.replace(RECIPE, clip_norm=0.5), batch(0, 1))
    assert float(figures.norm) == float(of_clipped.norm) > 0.5

    def norm(model: MaskRCNN) -> float:
        return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())

    assert norm(plain) == pytest.approx(float(figures.norm), rel=1e-4)
    assert norm(clipped) == pytest.approx(0.5, rel=1e-4)


def test_the_time_that_images_were_waited_for_is_told() -> None:
    recipe = dataclasses.replace(RECIPE, accumulate=2)
    _, figures = take(recipe, batch(0), batch(1), waited_s=0.5)
    assert float(figures.waited_s) == pytest.approx(0.5)


def test_images_that_could_not_be_read_are_counted() -> None:
    recipe = dataclasses.replace(RECIPE, accumulate=2)
    gone = UnreadableImage("0.png", "missing", "it is gone")
    passes = (dataclasses.replace(batch(0, 1), unreadable=(gone, gone)), batch(0, 1))
    assert float(take(recipe, *passes)[1].num_unreadable) == 2
