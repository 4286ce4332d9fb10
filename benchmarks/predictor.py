"""Photograph to RLE on a CPU, r50_fpn: our predictor against torchvision's with its own transform and paste.

Run:  python benchmarks/predictor.py [--photos ../shared/data/coco_photos] [--out benchmarks/results]

Both have the same weights (benchmarks/common/network.py: untrained, but with activations, candidates and
scores as a trained network has) and the same photographs at full size, one at a time. torchvision runs
eagerly in float32, pastes its masks, thresholds them at 0.5, and pycocotools encodes them.
"""

from __future__ import annotations

import statistics
import sys

import numpy as np
import torch
from pycocotools import mask as coco_mask

from benchmarks.common import photographs as photos
from benchmarks.common.network import PRESETS, same_weights
from benchmarks.common.report import arguments, seconds, write_report
from maskrcnn_core.predictor import Predictor

WANTED = 3


def main() -> None:
    parser = arguments(__doc__)
    photos.add_options(parser)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--preset", choices=PRESETS, default="r50_fpn")
    args = parser.parse_args()

    images = photos.load(args.photos, args.images)
    as_tensors = [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in images]
    reference, model = same_weights(args.preset, as_tensors[0])
    exact, fast = Predictor(model), Predictor(model, precision="bf16")

    def theirs(tensor: torch.Tensor) -> int:
        with torch.inference_mode():
            found = reference([tensor])[0]
        masks = (found["masks"][:, 0] > 0.5).to(torch.uint8).numpy()
        return len([coco_mask.encode(np.asfortranarray(mask)) for mask in masks])

    num_detections = 0
    times: list[list[float]] = [[], [], []]
    for work in (
        lambda: theirs(as_tensors[0]),
        lambda: exact.predict([images[0]]),
        lambda: fast.predict([images[0]]),
    ):
        work()  # not timed: loads and compiles
    for image, tensor in zip(images, as_tensors, strict=True):
        times[0].append(seconds(lambda tensor=tensor: theirs(tensor)))  # type: ignore[misc]
        times[1].append(seconds(lambda image=image: exact.predict([image])))  # type: ignore[misc]
        times[2].append(seconds(lambda image=image: fast.predict([image])))  # type: ignore[misc]
        num_detections += len(fast.predict([image])[0].rles)
    medians = [statistics.median(side) for side in times]
    table = [
        ["", "median of the photographs", "ratio", "must reach"],
        ["torchvision, float32", f"{medians[0]:.2f} s", "1", ""],
        ["ours, float32", f"{medians[1]:.2f} s", f"{medians[0] / medians[1]:.2f}×", "–"],
        ["ours, bfloat16", f"{medians[2]:.2f} s", f"{medians[0] / medians[2]:.2f}×", f"{WANTED}×"],
    ]
    native = "has" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "lacks"
    facts = [
        f"{args.preset}, {len(images)} photographs, {num_detections / len(images):.0f} detections each, "
        f"{torch.get_num_threads()} threads; the processor {native} bfloat16 instructions",
    ]
    write_report(
        "predictor",
        "Photograph to RLE on a CPU",
        ["torch", "torchvision", "pycocotools", "numba"],
        facts,
        table,
        args.out,
    )
    if medians[0] / medians[2] < WANTED:
        sys.exit("the ratio is below what it must reach")


if __name__ == "__main__":
    main()
