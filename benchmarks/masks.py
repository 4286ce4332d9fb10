"""Mask probabilities to COCO RLE strings: ours against paste, threshold and encode, one thread, side by side.

Run:  python benchmarks/masks.py [--out benchmarks/results]

Both sides get the same 100 detections and must give the same strings. Box sides follow the objects
of COCO (log-normal; median 8 % of the width and 12 % of the height, upper quartile 18 % and 27 %); masks are
smooth blobs with an outline or two, M = 28. Rounds alternate between the sides, so that whatever else the
machine does slows down both.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torchvision.models.detection.roi_heads import paste_masks_in_image

from benchmarks.common.report import arguments, seconds, write_report
from maskrcnn_core.masks import encode_mask_probs

SIZES = ((480, 640, 50), (1080, 1920, 400))  # height, width, the ratio that must be reached
NUM_DETECTIONS = 100
MASK_SIDE = 28
PACKAGES = ("torch", "torchvision", "pycocotools", "numba", "numpy")

Probs = NDArray[np.float32]
Boxes = NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    height: int
    width: int
    reference_ms: float
    ours_ms: float
    wanted: int

    @property
    def ratio(self) -> float:
        return self.reference_ms / self.ours_ms


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of each side; the median counts")
    args = parser.parse_args()

    torch.set_num_threads(1)
    first_call_s = seconds(lambda: encode_mask_probs(*make_detections(1, 10, 10), 10, 10))
    rows = [measure(height, width, wanted, args.rounds) for height, width, wanted in SIZES]
    write_report(
        "masks",
        f"{MASK_SIDE}×{MASK_SIDE} mask probabilities to COCO RLE: {NUM_DETECTIONS} detections, one thread",
        PACKAGES,
        [
            f"median of {args.rounds} rounds; strings identical",
            f"first call: {first_call_s:.1f} s (loads machine code; the very first compiles it)",
        ],
        [
            ["image", "paste + threshold + pycocotools", "ours", "ratio", "must reach"],
            *(
                [
                    f"{row.width}×{row.height}",
                    f"{row.reference_ms:.1f} ms",
                    f"{row.ours_ms:.2f} ms",
                    f"{row.ratio:.0f}×",
                    f"{row.wanted}×",
                ]
                for row in rows
            ),
        ],
        args.out,
    )
    if any(row.ratio < row.wanted for row in rows):
        sys.exit("a ratio is below what it must reach")


def measure(height: int, width: int, wanted: int, rounds: int) -> Row:
    probs, boxes = make_detections(NUM_DETECTIONS, height, width)
    if encode_mask_probs(probs, boxes, height, width)[0] != encode_by_pasting(probs, boxes, height, width):
        sys.exit(f"the strings differ at {width}×{height}: nothing to compare")
    reference_s, ours_s = [], []
    for _ in range(rounds):
        reference_s.append(seconds(lambda: encode_by_pasting(probs, boxes, height, width)))
        ours = [seconds(lambda: encode_mask_probs(probs, boxes, height, width)) for _ in range(9)]
        ours_s.append(statistics.median(ours))
    return Row(height, width, 1e3 * statistics.median(reference_s), 1e3 * statistics.median(ours_s), wanted)


def encode_by_pasting(probs: Probs, boxes: Boxes, height: int, width: int) -> list[str | bytes]:
    """The reference. pycocotools wants Fortran order; mask by mask is the fastest way to give it that."""
    pasted: torch.Tensor = paste_masks_in_image(
        torch.from_numpy(probs)[:, None], torch.from_numpy(boxes), (height, width)
    )
    masks = (pasted[:, 0] > 0.5).to(torch.uint8).numpy()
    return [coco_mask.encode(np.asfortranarray(mask))["counts"] for mask in masks]


def make_detections(num_detections: int, height: int, width: int) -> tuple[Probs, Boxes]:
    rng = np.random.default_rng(0)
    sides = np.exp(rng.normal([-2.5, -2.1], 1.15, (num_detections, 2))).clip(0.01, 1) * [width, height]
    corners = rng.uniform(0, [width, height] - sides)
    boxes = np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
    coarse = torch.from_numpy(rng.normal(size=(num_detections, 1, 6, 6)).astype(np.float32))
    size = (MASK_SIDE, MASK_SIDE)
    field = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")[:, 0].numpy()
    y, x = np.mgrid[:MASK_SIDE, :MASK_SIDE] / (MASK_SIDE - 1) * 2 - 1
    logits = 8 * (0.8 - np.hypot(x, y)) + 2.5 * field
    return (1 / (1 + np.exp(-logits))).astype(np.float32), boxes


if __name__ == "__main__":
    main()
