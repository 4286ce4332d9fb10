"""What bfloat16 costs in accuracy: AP of one network on the same annotated photographs in both precisions.

Run:  python benchmarks/precision.py [--photos ../shared/data/facades] [--out benchmarks/results]

No trained r50_fpn can be shipped or downloaded, so one is trained here, from random weights, and measured on
the photographs that it was trained on and on some it never saw: for the difference between two precisions it
does not matter that it knows the first by heart. Many instances of few categories make the difference
readable: with 67 instances of 30 categories, AP moves by 0.0025 with any change of a rounding. Training takes
about an hour on two cores; --weights keeps the result for another run.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import torch
from pycocotools import mask as coco_mask

from benchmarks.common import photographs as photos
from benchmarks.common.network import same_weights
from benchmarks.common.report import arguments, write_report
from jobs.demo.lake import write_scene_lake
from jobs.demo.scenes import render_scene
from jobs.lake.models import read_checkpoint_bytes
from jobs.lake.storage import Storage
from jobs.train.loop import Recipe, TrainingBatch, fit
from maskrcnn_core.checkpoint import dump_checkpoint, parse_checkpoint
from maskrcnn_core.coco_eval import evaluate_coco
from maskrcnn_core.model import MaskRCNN
from maskrcnn_core.ops import resize_normalize
from maskrcnn_core.predictor import Precision, Predictor
from maskrcnn_core.roi_heads import Instances
from maskrcnn_core.shapes import input_size, tight_shape
from schemas.specs import StorageSpec

SIDE_PX = 256  # shorter side: small, so that training ends in minutes
ALLOWED = 0.001
KINDS: dict[Literal["bbox", "segm"], str] = {"bbox": "boxes", "segm": "masks"}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--photos",
        type=Path,
        default=Path("../shared/data/facades"),
        help="folder with train/*.jpg, val/*.jpg, annotations/instances_train.json and instances_val.json",
    )
    parser.add_argument("--images", type=int, default=100, help="photographs to train on")
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--weights", type=Path, help="checkpoint to use, or to write where there is none")
    args = parser.parse_args()

    images, truth = photos.load_annotated(args.photos, args.images, "train")
    if args.weights and args.weights.exists():
        model = parse_checkpoint(args.weights.read_bytes(), str(args.weights)).build()
    else:
        model = train(images, truth, args.steps)
        if args.weights:
            args.weights.write_bytes(dump_checkpoint(model, "precision"))
    table = [["network", "labels", "AP", "fp32", "bf16", "difference", "at most"]]
    unseen, unseen_truth = photos.load_annotated(args.photos, None, "val")
    for labels, photographs, answers in (
        (f"{len(images)} photographs of its training", images, truth),
        (f"{len(unseen)} photographs it never saw", unseen, unseen_truth),
    ):
        known = dict(enumerate(photographs, 1))
        table += compare("r50_fpn, trained here", model, labels, known, answers)
    scenes, scene_truth = demo_scenes(args.scenes)
    demo = parse_checkpoint(*read_checkpoint_bytes("demo", Storage(StorageSpec()))).build()
    table += compare("lite, bundled", demo, f"{len(scenes)} scenes it never saw", scenes, scene_truth)
    facts = [
        f"r50_fpn: {args.steps} steps on {len(images)} photographs, {len(truth['annotations'])} instances, "
        f"shorter side {SIDE_PX} px; {len(unseen_truth['annotations'])} instances on those it never saw",
    ]
    packages = ["torch", "torchvision", "pycocotools"]
    write_report(
        "precision", "bfloat16 against float32: AP on the same labels", packages, facts, table, args.out
    )


def compare(
    network: str,
    model: MaskRCNN,
    labels: str,
    images: dict[int, photos.Photograph],
    truth: dict[str, Any],
) -> list[list[str]]:
    """Two rows: AP of boxes and of masks, in both precisions."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    found = {}
    for precision in precisions:
        predictor = Predictor(model, precision=precision)
        found[precision] = {number: predictor.predict([image])[0] for number, image in images.items()}
    rows = []
    for kind, name in KINDS.items():
        exact, rough = (evaluate_coco(truth, found[precision], kind)["AP"] for precision in precisions)
        rows.append(
            [network, labels, name, f"{exact:.4f}", f"{rough:.4f}", f"{rough - exact:+.4f}", f"{ALLOWED}"]
        )
    return rows


def demo_scenes(num_scenes: int) -> tuple[dict[int, photos.Photograph], dict[str, Any]]:
    """Rendered scenes by image id, and their truth; the seeds are the demo's and more, none of training."""
    with tempfile.TemporaryDirectory() as folder:
        write_scene_lake(Path(folder), range(num_scenes), 1)
        truth = json.loads((Path(folder) / "annotations.json").read_text())
    return {seed: render_scene(seed).image for seed in range(num_scenes)}, truth


def train(images: list[photos.Photograph], truth: dict[str, Any], steps: int) -> MaskRCNN:
    first = torch.from_numpy(images[0].copy()).permute(2, 0, 1) / 255
    _, model = same_weights(
        "r50_fpn",
        first,
        min_size_px=SIDE_PX,
        max_size_px=int(SIDE_PX * 5 / 3),
        roi_samples=128,
        rpn_post_nms_train=500,
    )
    batches = [one_batch(model, image, truth, number) for number, image in enumerate(images, start=1)]
    recipe = Recipe(steps=steps, learning_rate=3e-4, weight_decay=0.0, warmup_steps=50, ema_decay=0.99)
    started = time.monotonic()

    def tell(step: int, terms: dict[str, float]) -> None:
        if step % 50 == 0:
            total = sum(terms.values())
            print(f"step {step} of {steps}, {time.monotonic() - started:.0f} s, loss {total:.3f}", flush=True)

    return fit(model, in_turn(batches), recipe, tell)


def in_turn(batches: list[TrainingBatch]) -> Iterator[TrainingBatch]:
    return cycle([batch for batch in batches if len(batch.targets[0].boxes)])


def one_batch(model: MaskRCNN, image: photos.Photograph, truth: dict[str, Any], number: int) -> TrainingBatch:
    config = model.config
    height, width = image.shape[:2]
    size = input_size(config, height, width)
    shape = tight_shape(size)
    pixels = resize_normalize(
        torch.from_numpy(image.copy()).flatten(),
        torch.tensor([[0, height, width, *size]]),
        *shape,
        list(config.image_mean),
        list(config.image_std),
        torch.float32,
    )
    own = [a for a in truth["annotations"] if a["image_id"] == number and not a["iscrowd"]]
    scale = torch.tensor([size[1] / width, size[0] / height] * 2)
    corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in own)]
    masks = torch.zeros(len(own), *shape, dtype=torch.uint8)
    for target, annotation in zip(masks, own, strict=True):
        whole = torch.from_numpy(decode(annotation["segmentation"], height, width))
        resized = torch.nn.functional.interpolate(whole[None, None].float(), size=size, mode="nearest")
        target[: size[0], : size[1]] = resized[0, 0].to(torch.uint8)
    instances = Instances(
        torch.tensor(corners, dtype=torch.float32).reshape(-1, 4) * scale,
        torch.tensor(
            [a["category_id"] for a in own], dtype=torch.int64
        ),  # of 90 categories: id = class_index
        masks,
    )
    return TrainingBatch(pixels, [size], [instances])


def decode(segmentation: Any, height: int, width: int) -> Any:
    """(H, W) uint8 of COCO's polygons."""
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))


if __name__ == "__main__":
    main()
