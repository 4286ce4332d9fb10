"""How far our detections are from torchvision's, and what batches, padding and bfloat16 change, at full size.

Run:  python benchmarks/exactness.py [--photos ../shared/data/coco_photos] [--out benchmarks/results]

Same weights (benchmarks/common/network.py), same photographs. Against torchvision, detections are compared
one by one in their order. The other rows compare with our own float32 result of one tightly padded image:
there a few detections near a threshold come and go, so pairs are made by class and overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torchvision.ops import box_iou

from benchmarks.common import photographs as photos
from benchmarks.common.network import PRESETS, same_weights
from benchmarks.common.report import arguments, write_report
from maskrcnn_core.predictor import Detections, Predictor

SAME_BOX_IOU = 0.9


@dataclass
class Agreement:
    """Over all photographs: pairs of detections, and the largest differences among them."""

    wanted: int = 0
    paired: int = 0
    box_px: float = 0.0
    score: float = 0.0

    def add(self, expected: Detections, found: Detections) -> None:
        iou = box_iou(torch.from_numpy(expected.boxes), torch.from_numpy(found.boxes)).numpy()
        iou[expected.category_ids[:, None] != found.category_ids[None]] = 0
        self.wanted += len(expected.scores)
        for row in range(len(iou)):
            column = int(iou[row].argmax())
            if iou[row, column] >= SAME_BOX_IOU:
                self.paired += 1
                self.compare(expected.boxes[row], found.boxes[column])
                self.score = max(self.score, abs(float(expected.scores[row] - found.scores[column])))

    def compare(self, expected: NDArray[np.float32], found: NDArray[np.float32]) -> None:
        self.box_px = max(self.box_px, float(np.abs(expected - found).max()))

    def row(self, name: str, masks: str = "") -> list[str]:
        share = f"{self.paired} of {self.wanted}"
        return [name, share, f"{self.box_px:.1e} px", f"{self.score:.1e}", masks]


def main() -> None:
    parser = arguments(__doc__)
    photos.add_options(parser)
    parser.add_argument("--images", type=int, default=8)
    args = parser.parse_args()

    torch.set_num_threads(max(2, torch.get_num_threads()))  # see tests/maskrcnn_core/test_exactness.py
    images = photos.load(args.photos, args.images)
    tensors = [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in images]
    table = [["", "same detections", "boxes differ by at most", "scores", "mask pixels that differ"]]
    for preset in PRESETS:
        reference, model = same_weights(preset, tensors[0])
        alone = [Predictor(model).predict([image])[0] for image in images]
        table.append(against_torchvision(preset, reference, tensors, alone))
        for name, predictor in (
            ("batch of 8, common padding", Predictor(model, batch_size=8, padding="common")),
            ("batch of 8, tight padding", Predictor(model, batch_size=8)),
            ("bfloat16", Predictor(model, precision="bf16")),
        ):
            agreement = Agreement()
            for expected, found in zip(alone, predictor.predict(images), strict=True):
                agreement.add(expected, found)
            table.append(agreement.row(f"{preset}, {name}, to ours alone"))
    facts = [
        f"{len(images)} photographs, shorter side 800 px, {torch.get_num_threads()} threads",
        f"same detections: in order for torchvision; else same class and IoU of at least {SAME_BOX_IOU}",
    ]
    write_report(
        "exactness",
        "Agreement with torchvision and with itself",
        ["torch", "torchvision"],
        facts,
        table,
        args.out,
    )


def against_torchvision(
    preset: str, reference: torch.nn.Module, tensors: list[torch.Tensor], ours: list[Detections]
) -> list[str]:
    """Detection by detection, in order; masks pixel by pixel."""
    agreement, differing, worst, pixels = Agreement(), 0, 0.0, 0
    for tensor, found in zip(tensors, ours, strict=True):
        with torch.inference_mode():
            expected = reference([tensor])[0]
        agreement.wanted += len(expected["scores"])
        if expected["labels"].tolist() != found.category_ids.tolist():
            continue
        agreement.paired += len(found.scores)
        agreement.compare(expected["boxes"].numpy(), found.boxes)
        scores = np.abs(expected["scores"].numpy() - found.scores)
        agreement.score = max(agreement.score, float(scores.max(initial=0)))
        size = [found.height, found.width]
        for probs, rle in zip(expected["masks"][:, 0].numpy(), found.rles, strict=True):
            wrong = (probs > 0.5) != coco_mask.decode({"size": size, "counts": rle}).astype(bool)
            differing += int(wrong.sum())
            pixels += wrong.size
            worst = max(worst, float(np.abs(probs[wrong] - 0.5).max(initial=0)))
    masks = f"{differing} of {pixels:.1e}, none further than {worst:.0e} from the threshold"
    return agreement.row(f"{preset}, ours to torchvision", masks)


if __name__ == "__main__":
    main()
