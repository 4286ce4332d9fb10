"""A training step on a CPU: ours against torchvision's; the same weights, batch, precision and optimiser.

Run:  python benchmarks/training_step.py [--photos ../shared/data/facades] [--out benchmarks/results]

Both sides start from the same weights (benchmarks/common/network.py) and see the same annotated photographs,
resized and normalised beforehand by torchvision's transform, so that the step is the network alone: forward
and loss, backward, SGD with momentum, in bfloat16 autocast. torchvision has dense masks and its references'
optimiser and memory order; ours has masks as crops, channels last and the fused optimiser. `lite` is
compared with torchvision's MaskRCNN on the same backbone, heads and numbers of proposals and samples.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.models.detection import MaskRCNN as ReferenceMaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from benchmarks.common import photographs as photos
from benchmarks.common.network import NINETY, same_weights, settle
from benchmarks.common.report import arguments, seconds, write_report
from maskrcnn_core.backbone import build_backbone
from maskrcnn_core.config import lite
from maskrcnn_core.instance_masks import MaskCrops
from maskrcnn_core.model import MaskRCNN, build_model
from maskrcnn_core.roi_heads import Instances

WANTED = {"r50_fpn": 1.5, "lite": None}
PARTS = ("forward", "backward", "optimizer")
RATE, MOMENTUM, DECAY = 1e-5, 0.9, 1e-4  # so low a rate that the boxes stay what they are

Step = Callable[[], list[float]]  # takes one and gives the seconds of PARTS


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--photos",
        default=Path("../shared/data/facades"),
        type=Path,
        help="folder with train/*.jpg and annotations/instances_train.json",
    )
    parser.add_argument("--split", default="train")
    parser.add_argument("--presets", nargs="+", choices=WANTED, default=list(WANTED))
    parser.add_argument("--images", type=int, default=2, help="in a batch")
    parser.add_argument("--side", type=int, default=512, help="of the photographs, in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    images, truth = photos.load_annotated(args.photos, args.images, args.split)
    tensors = [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in images]
    targets = [dense_target(image, truth, number) for number, image in enumerate(images, start=1)]
    table = [["network", "side", *PARTS, "step", "ratio", "must reach"]]
    too_slow = []
    for preset in args.presets:
        reference, model = make_pair(preset, tensors[0], args.side)
        batch, resized = reference.transform(tensors, targets)
        sides = [their_step(reference, batch, resized), our_step(model, batch, resized)]
        for step in sides:
            step()  # not timed: loads and compiles
        rounds: list[list[list[float]]] = [[], []]
        for _ in range(args.rounds):
            for step, taken in zip(sides, rounds, strict=True):
                taken.append(step())
        ratio = statistics.median(sum(theirs) / sum(ours) for theirs, ours in zip(*rounds, strict=True))
        wanted = WANTED[preset]
        for name, taken in zip(("torchvision", "ours"), rounds, strict=True):
            parts = [statistics.median(part) for part in zip(*taken, strict=True)]
            total = statistics.median(map(sum, taken))
            is_ours = name == "ours"
            table.append(
                [preset, name]
                + [f"{part:.3f} s" for part in (*parts, total)]
                + [f"{ratio:.2f}×" if is_ours else "1", f"{wanted}×" if is_ours and wanted else ""]
            )
        if wanted and ratio < wanted:
            too_slow.append(preset)
    facts = [
        f"{args.images} photographs of {args.side} px a batch, {len(truth['annotations'])} instances; "
        f"{args.rounds} rounds, the sides in turn; medians, the ratio that of the rounds' ratios; "
        f"{torch.get_num_threads()} threads",
    ]
    write_report(
        "training_step", "A training step on a CPU", ["torch", "torchvision"], facts, table, args.out
    )
    if too_slow:
        sys.exit(f"the ratio is below what it must reach: {', '.join(too_slow)}")


def dense_target(image: photos.Photograph, truth: dict[str, Any], number: int) -> dict[str, Tensor]:
    """Ground truth of a photograph as torchvision wants it: boxes, labels and (G, H, W) masks."""
    height, width = image.shape[:2]
    own = [a for a in truth["annotations"] if a["image_id"] == number and not a.get("iscrowd")]
    boxes = torch.tensor([a["bbox"] for a in own], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = torch.zeros(len(own), height, width, dtype=torch.uint8)
    for mask, annotation in zip(masks, own, strict=True):
        rle = coco_mask.merge(coco_mask.frPyObjects(annotation["segmentation"], height, width))
        mask.copy_(torch.from_numpy(coco_mask.decode(rle)))
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    labels = torch.tensor([a["category_id"] for a in own], dtype=torch.int64).clamp(1, len(NINETY))
    return {"boxes": boxes[kept], "labels": labels[kept], "masks": masks[kept]}


def make_pair(preset: str, photograph: Tensor, side: int) -> tuple[Any, MaskRCNN]:
    """torchvision's network and ours in training mode, with the same weights and the same frozen ones."""
    if preset == "lite":
        reference, ours = lite_pair(photograph, side)
    else:
        reference, ours = same_weights(preset, photograph, min_size_px=side, max_size_px=side)
    for name, parameter in ours.named_parameters():
        reference.get_parameter(name).requires_grad_(parameter.requires_grad)
    return reference.train(), ours.train()


def lite_pair(photograph: Tensor, side: int) -> tuple[Any, MaskRCNN]:
    """`lite` built of torchvision's parts, and ours."""
    config = lite(NINETY).replace(min_size_px=side, max_size_px=side)
    torch.manual_seed(0)
    channels, hidden = config.fpn_channels, config.box_head_channels
    reference: Any = ReferenceMaskRCNN(
        build_backbone(config),
        min_size=side,
        max_size=side,
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in config.anchor_sizes), (config.anchor_ratios,) * 5
        ),
        rpn_pre_nms_top_n_train=config.rpn_pre_nms_train,
        rpn_post_nms_top_n_train=config.rpn_post_nms_train,
        box_head=TwoMLPHead(channels * config.box_roi_size**2, hidden),
        box_predictor=FastRCNNPredictor(hidden, config.num_classes),
        box_batch_size_per_image=config.roi_samples,
        mask_head=MaskRCNNHeads(channels, [config.mask_head_channels] * 4, 1),
        mask_predictor=MaskRCNNPredictor(
            config.mask_head_channels, config.mask_head_channels, config.num_classes
        ),
    ).eval()
    settle(reference, photograph)
    ours = build_model(config)
    ours.load_state_dict(reference.state_dict())
    return reference, ours


def their_step(reference: Any, batch: Any, targets: list[dict[str, Tensor]]) -> Step:
    """As references/detection/engine.py does it, after the transform."""
    trained = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, RATE, MOMENTUM, weight_decay=DECAY)

    def losses() -> dict[str, Tensor]:
        features = reference.backbone(batch.tensors)
        proposals, of_rpn = reference.rpn(batch, features, targets)
        of_heads = reference.roi_heads(features, proposals, batch.image_sizes, targets)[1]
        return {**of_rpn, **of_heads}

    return step_of(losses, optimizer)


def our_step(model: MaskRCNN, batch: Any, targets: list[dict[str, Tensor]]) -> Step:
    model.to(memory_format=torch.channels_last)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, RATE, MOMENTUM, weight_decay=DECAY, fused=True)
    images = batch.tensors.contiguous(memory_format=torch.channels_last)
    instances = [
        Instances(t["boxes"], t["labels"], MaskCrops.from_dense(t["masks"]), torch.zeros(0, 4))
        for t in targets
    ]
    return step_of(lambda: model.losses(images, batch.image_sizes, instances), optimizer)


def step_of(losses: Callable[[], dict[str, Tensor]], optimizer: torch.optim.Optimizer) -> Step:
    totals: list[Tensor] = []

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            totals[:] = [torch.stack(list(losses().values())).sum()]

    def step() -> list[float]:
        torch.manual_seed(0)
        optimizer.zero_grad()
        return [seconds(forward), seconds(lambda: totals[0].backward()), seconds(optimizer.step)]

    return step


if __name__ == "__main__":
    main()
