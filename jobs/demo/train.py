"""Makes the bundled checkpoint from scratch: `python -m jobs.demo.train --out lite-scenes.safetensors`.

What it takes and what comes out is measured in docs/demo-checkpoint.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import masks_to_boxes

from jobs.demo.scenes import SCENE_CATEGORIES, Scene, render_scene
from jobs.train.loop import Recipe, TrainingBatch, fit, recalibrate_batch_norm
from maskrcnn_core.checkpoint import dump_checkpoint
from maskrcnn_core.config import MaskRCNNConfig, lite
from maskrcnn_core.model import build_model
from maskrcnn_core.roi_heads import Instances

CHECKPOINT_NAME = "lite-scenes"
TRAIN_SEED = 10_000_000  # training scenes count up from here; the demo's from 0, so none is in both
CALIBRATION_SEED, CALIBRATION_BATCHES = 50_000_000, 50
LOG_EVERY = 25


def training_batches(config: MaskRCNNConfig, batch_size: int, first_seed: int) -> Iterator[TrainingBatch]:
    """Endless batches; each scene is rendered once, from the next seed."""
    seed = first_seed
    while True:
        scenes = [render_scene(seed + i) for i in range(batch_size)]
        seed += batch_size
        yield to_batch(scenes, config)


def to_batch(scenes: list[Scene], config: MaskRCNNConfig) -> TrainingBatch:
    """Normalise the images and take boxes from the masks: x1, y1 lie one past the last pixel."""
    pixels = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2) / 255.0
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (config.image_mean, config.image_std))
    targets = []
    for scene in scenes:
        masks = torch.from_numpy(np.stack([i.mask for i in scene.instances]).astype(np.uint8))
        boxes = masks_to_boxes(masks)
        boxes[:, 2:] += 1
        targets.append(Instances(boxes, torch.tensor([i.category_id for i in scene.instances]), masks))
    sizes = [scene.image.shape[:2] for scene in scenes]
    return TrainingBatch((pixels - mean) / std, [(h, w) for h, w in sizes], targets)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train the demo's checkpoint from scratch on rendered scenes."
    )
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--steps", type=int, default=3200, help="length of the learning-rate schedule")
    parser.add_argument("--stop-after", type=int, help="keep the model of this step; default: the last")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and of the sampling")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    config = lite(SCENE_CATEGORIES)
    recipe = Recipe(steps=arguments.steps, warmup_steps=min(200, arguments.steps // 2))
    last_step = arguments.stop_after or arguments.steps
    started = time.monotonic()
    sums: dict[str, float] = {}

    def on_step(step: int, losses: dict[str, float]) -> None:
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value
        if step % LOG_EVERY == 0:
            terms = " ".join(
                f"{name.removeprefix('loss_')} {value / LOG_EVERY:.3f}" for name, value in sums.items()
            )
            rate = step * arguments.batch_size / (time.monotonic() - started)
            print(f"step {step}/{recipe.steps} {terms} {rate:.1f} images/s", flush=True)
            sums.clear()

    batches = training_batches(config, arguments.batch_size, TRAIN_SEED)
    model = fit(build_model(config, arguments.seed), batches, recipe, on_step, last_step)
    recalibrate_batch_norm(
        model, training_batches(config, arguments.batch_size, CALIBRATION_SEED), CALIBRATION_BATCHES
    )
    provenance = {
        "data": f"rendered scenes, seeds from {TRAIN_SEED}, batch norm from {CALIBRATION_SEED}",
        "steps": last_step,
        "schedule_steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "seed": arguments.seed,
        "torch": torch.__version__,
    }
    arguments.out.write_bytes(
        dump_checkpoint(model, CHECKPOINT_NAME, dtype=torch.float16, provenance=provenance)
    )
    print(f"wrote {arguments.out} after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
