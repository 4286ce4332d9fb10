"""Recipes: how long, with which optimiser, schedule and augmentation a model is trained.

Enters: a recipe's name and a spec's changes. Leaves: a frozen, validated Recipe.

Times and AP in the docstrings are their sources', on their hardware; docs/training.md has what was measured
here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from maskrcnn_core.augment import Augmentation
from schemas.errors import UsageError
from schemas.train_spec import RecipeSpec


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    Attributes:
        steps: of the whole run; the schedule ends with it.
        total_batch: images a step, over all workers and passes.
        accumulate: passes a step; each takes total_batch / accumulate images.
        learning_rate: at base_batch images a step; scaled by total_batch / base_batch (Goyal et al.,
            arXiv:1706.02677).
        milestones: of multi_step, as shares of `steps`: the rate falls to a tenth at each.
        warmup_steps: the rate rises linearly from warmup_factor of it.
        clip_norm: of all gradients together; 0: no clipping.
        ema_decay: of the averaged weights, which are what is evaluated and kept; 0: no average.
        calibration_batches: batch norm's statistics of the averaged weights are measured anew over so many
            batches; 0: averaged like the weights. Nothing is done for a model without live batch norm.
        copy_paste: probability that an image gets another's instances; with large-scale jitter only.
        compile: torch.compile of the backbone. Not on by itself: it is meant for long runs on a GPU, where it
            was never run.
    """

    name: str
    steps: int
    total_batch: int = 16
    accumulate: int = 1
    optimizer: str = "sgd"
    base_batch: int = 16
    learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "multi_step"
    milestones: tuple[float, ...] = ()
    warmup_steps: int = 1000
    warmup_factor: float = 0.001
    clip_norm: float = 0.0
    ema_decay: float = 0.0
    calibration_batches: int = 0
    precision: str = "bf16"
    shorter_sides: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    max_size_px: int = 1333
    scale_jitter: tuple[float, float] | None = None
    canvas_px: int | None = None
    flip: float = 0.5
    copy_paste: float = 0.0
    compile: bool = False

    def __post_init__(self) -> None:
        if self.warmup_steps >= self.steps:
            raise UsageError(
                f"recipe: warmup_steps {self.warmup_steps} is not less than steps {self.steps}; change one"
            )
        if self.total_batch % self.accumulate:
            raise UsageError(
                f"recipe: total_batch {self.total_batch} is not a multiple of accumulate {self.accumulate}"
            )
        if list(self.milestones) != sorted(self.milestones):
            raise UsageError(f"recipe: milestones {list(self.milestones)} do not rise")
        if (self.scale_jitter is None) != (self.canvas_px is None):
            raise UsageError("recipe: scale_jitter and canvas_px belong together; set both or neither")
        if self.copy_paste and self.canvas_px is None:
            raise UsageError("recipe: copy_paste needs large-scale jitter; set scale_jitter and canvas_px")
        if self.schedule == "cosine" and self.milestones:
            raise UsageError("recipe: milestones are for the schedule multi_step, and this is cosine")
        _ = self.augmentation  # its sizes fit each other

    @property
    def augmentation(self) -> Augmentation:
        """Large-scale jitter where there is a canvas, else multi-scale.

        Raises:
            UsageError: the sizes contradict each other.
        """
        try:
            if self.scale_jitter is not None and self.canvas_px is not None:
                return Augmentation(scale_jitter=self.scale_jitter, canvas_px=self.canvas_px, flip=self.flip)
            return Augmentation(
                shorter_sides=self.shorter_sides, max_size_px=self.max_size_px, flip=self.flip
            )
        except ValueError as error:
            raise UsageError(f"recipe: {error}") from error

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rate = self.learning_rate * self.total_batch / self.base_batch
        if step < self.warmup_steps:
            share = (step + 1) / self.warmup_steps
            return rate * (self.warmup_factor + (1 - self.warmup_factor) * share)
        if self.schedule == "cosine":
            progress = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
            return rate * 0.5 * (1 + math.cos(math.pi * progress))
        return rate * 0.1 ** sum(step >= share * self.steps for share in self.milestones)


def finetune() -> Recipe:
    """A checkpoint, or an ImageNet backbone, to a small data set; the default.

    Command: `masklake train --data coco:train.json --images train/ --model r50.safetensors --out run`
    Hardware, time, result: not measured with these settings. docs/training.md has a shorter run of `lite` on
    2 CPU cores with others (700 steps of 4 images, four times the rate at that batch, another average).
    AdamW, because fresh heads on a small set want no tuning of the rate with it; the average of the weights
    stands in for a longer schedule. Where batch norm is live (`lite`, r50_fpn_v2, random weights), the
    average's statistics are measured anew, else it is worth nothing (docs/demo-checkpoint.md).
    """
    return Recipe(
        "finetune",
        steps=2000,
        total_batch=8,
        optimizer="adamw",
        base_batch=8,
        learning_rate=5e-4,
        weight_decay=1e-2,
        schedule="cosine",
        warmup_steps=100,
        clip_norm=10.0,
        ema_decay=0.998,
        calibration_batches=50,
        shorter_sides=(480, 512, 544, 576, 608, 640),
        max_size_px=1024,
    )


def paper_1x() -> Recipe:
    """COCO train2017 for 90,000 steps of 16 images, 12 epochs, from an ImageNet backbone.

    Command: `masklake train --data coco:instances_train2017.json --images train2017/ --model r50_fpn
    --set model.backbone=resnet50.pth --set recipe.name=paper_1x --set scaling.num_workers=8 --out run`
    Hardware and time: 8 V100, 0.261 s a step, 6.5 hours. Box AP 38.6, mask AP 35.2 on val2017.
    Source: Detectron2, configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml and MODEL_ZOO.md; the
    schedule of He et al., "Mask R-CNN", section 3.1, but for the length. Not run here.
    """
    return Recipe("paper_1x", steps=90_000, milestones=(60_000 / 90_000, 80_000 / 90_000))


def lsj_100ep() -> Recipe:
    """COCO train2017 for 100 epochs of large-scale jitter, from fresh weights.

    Command: `masklake train --data coco:instances_train2017.json --images train2017/ --model r50_fpn_v2
    --set model.norm=sync_bn --set recipe.name=lsj_100ep --set scaling.num_workers=64 --out run`
    Hardware and time: 64 V100 at one image each, 0.376 s a step, 19 hours. Box AP 44.6, mask AP 40.3 on
    val2017. Source: Detectron2, configs/new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py and its MODEL_ZOO.md;
    jitter of Ghiasi et al., arXiv:2012.07177. Its heads' norms are synchronised, ours are not. Not run here.
    """
    return Recipe(
        "lsj_100ep",
        steps=184_375,
        total_batch=64,
        base_batch=64,
        learning_rate=0.1,
        weight_decay=4e-5,
        milestones=(163_889 / 184_375, 177_546 / 184_375),
        warmup_steps=500,
        warmup_factor=0.067,
        scale_jitter=(0.1, 2.0),
        canvas_px=1024,
    )


def scenes() -> Recipe:
    """`lite` from fresh weights on rendered scenes of 256 px: the bundled checkpoint.

    Command, hardware, time and result: docs/demo-checkpoint.md.
    """
    return Recipe(
        "scenes",
        steps=3200,
        total_batch=8,
        optimizer="adamw",
        base_batch=8,
        learning_rate=1e-3,
        weight_decay=1e-2,
        schedule="cosine",
        warmup_steps=200,
        clip_norm=10.0,
        ema_decay=0.998,
        calibration_batches=50,
        shorter_sides=(256,),
        max_size_px=448,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "finetune": finetune,
    "paper_1x": paper_1x,
    "lsj_100ep": lsj_100ep,
    "scenes": scenes,
}


def make_recipe(spec: RecipeSpec) -> Recipe:
    """The named recipe with the spec's changes.

    Raises:
        UsageError: they contradict each other.
    """
    changes = {
        name: value for name, value in spec.model_dump(exclude={"name", "seed"}).items() if value is not None
    }
    recipe = RECIPES[spec.name]()
    if changes.get("schedule") == "cosine":
        changes.setdefault("milestones", ())  # the named recipe's go with its schedule
    if changes.get("schedule") == "multi_step" and not changes.get("milestones", recipe.milestones):
        raise UsageError(
            f"recipe: schedule multi_step needs milestones, of which {spec.name} has none; set "
            "recipe.milestones, such as [0.67, 0.89]"
        )
    has_canvas = "canvas_px" in changes or recipe.canvas_px is not None
    if has_canvas and (unused := [name for name in ("shorter_sides", "max_size_px") if name in changes]):
        raise UsageError(
            f"recipe: {unused[0]} is for multi-scale, and this recipe has large-scale jitter; set "
            "scale_jitter and canvas_px instead, or take another recipe"
        )
    if "steps" in changes and "warmup_steps" not in changes:  # a short run is not all warm-up
        changes["warmup_steps"] = min(recipe.warmup_steps, changes["steps"] // 10)
    return dataclasses.replace(recipe, **changes)
