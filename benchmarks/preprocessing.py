"""One photograph to the network's input: ours against torchvision's GeneralizedRCNNTransform, on a CPU.

Run:  python benchmarks/preprocessing.py [--out benchmarks/results]

640×480 becomes 800×1066, padded to 800×1088. torchvision's transform takes float tensors, so turning the
photograph's bytes into one is counted on its side, and shown without it too.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from benchmarks.common.report import arguments, side_by_side, write_report
from maskrcnn_core.ops import resize_normalize

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
HEIGHT, WIDTH = 480, 640
WANTED = 5


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=51, help="timed rounds of each side; the median counts")
    args = parser.parse_args()

    photograph = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    )
    transform = GeneralizedRCNNTransform(800, 1333, MEAN, STD)
    geometry = torch.tensor([[0, HEIGHT, WIDTH, 800, 1066]])

    def ours(dtype: torch.dtype) -> torch.Tensor:
        result: torch.Tensor = resize_normalize(photograph.flatten(), geometry, 800, 1088, MEAN, STD, dtype)
        return result

    def as_float() -> torch.Tensor:
        return photograph.permute(2, 0, 1).contiguous() / 255

    floats = as_float()
    table = [
        [
            "threads",
            "torchvision",
            "its transform alone",
            "ours, float32",
            "ratio",
            "ours, bfloat16",
            "ratio",
            "must reach",
            "float32 off by",
            "bfloat16 off by",
        ]
    ]
    on_one_thread = 0.0
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with torch.inference_mode():
            theirs, alone, exact, rough = side_by_side(
                lambda: transform([as_float()]),
                lambda: transform([floats]),
                lambda: ours(torch.float32),
                lambda: ours(torch.bfloat16),
                rounds=args.rounds,
            )
            expected = transform([floats])[0].tensors
            differences = [
                ((ours(dtype) - expected).abs() * torch.tensor(STD).view(1, 3, 1, 1)).max().item()
                for dtype in (torch.float32, torch.bfloat16)
            ]
        if max(differences) > 1 / 255:
            sys.exit(f"the results differ by {differences}: nothing to compare")
        on_one_thread = on_one_thread or theirs / rough
        table.append(
            [
                str(threads),
                *(f"{1e3 * s:.2f} ms" for s in (theirs, alone, exact)),
                f"{theirs / exact:.1f}×",
                f"{1e3 * rough:.2f} ms",
                f"{theirs / rough:.1f}×",
                f"{WANTED}×" if threads == 1 else "–",
                *(f"{difference:.1e}" for difference in differences),
            ]
        )
    facts = [
        f"median of {args.rounds} rounds that go around the sides",
        "judged in bfloat16, the fast predictor's type, on one thread",
        "float32 takes torchvision's roundings one by one, which costs divisions",
        "off by: of a pixel's range, 0 to 1; 1/255 = 3.9e-3 is allowed",
    ]
    write_report(
        "preprocessing",
        "Resize, normalise and pad one photograph",
        ["torch", "torchvision", "numba", "numpy"],
        facts,
        table,
        args.out,
    )
    if on_one_thread < WANTED:
        sys.exit("the ratio on one thread is below what it must reach")


if __name__ == "__main__":
    main()
